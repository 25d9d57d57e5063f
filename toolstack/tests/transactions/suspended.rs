//! Guests that another program than `xpci save` suspends while they have functions, and what then becomes of them.

use std::fs;

use pciback::serve::hvm::wire::xen::config;
use pciback::{DomId, FunctionState, Sbdf, Uuid};
use toolstack::protocol::{Happening, Request, Success};

use crate::frontend::Frontend;
use crate::hvm::{SLOT, WIN};
use crate::world::{DB, LIMIT, Service, WEB, World, bdf, name, wait_until};

/// The domain that the guest is afterwards.
const AGAIN: DomId = DomId(11);

fn uuid() -> Uuid {
    "00000000-0000-0000-0000-000000000001".parse().unwrap()
}

fn vf() -> Sbdf {
    bdf("01:10.0")
}

/// The guest uses a VF, which it does not have persistently.
fn with_a_vf(world: &World) -> (Service, Frontend) {
    let service = world.start();
    let frontend = Frontend::load(world, WEB);
    service.hold(vf()).unwrap();
    service.attach(WEB, vf()).unwrap();
    (service, frontend)
}

/// The only problem there is then.
fn problem(service: &Service) -> String {
    let problems = service.problems();
    let [problem] = problems.as_slice() else { panic!("{problems:?}") };
    problem.clone()
}

fn wait_for_problem(service: &Service, with: &str) {
    wait_until(&format!("the status says '{with}'"), || {
        service.problems().iter().any(|problem| problem.contains(with))
    });
}

fn wait_for_no_problem(service: &Service) {
    wait_until("the status has no problem", || service.problems().is_empty());
}

/// How often the function's log has that its guest was suspended with it.
fn reports(service: &Service) -> usize {
    let is_one = |what: &Happening| matches!(what, Happening::Outcome { ok: false, text } if text.contains("its guest was suspended with it"));
    service.error_history(vf()).iter().filter(|event| is_one(&event.what)).count()
}

/// What `xl save` does with a guest that has functions; the service has noticed.
fn saved_by_xl(world: &World, service: &Service) {
    world.simulation.suspend_domain(WEB).unwrap();
    wait_for_problem(service, "'web' (domain 1) was suspended with 0000:01:10.0");
    world.simulation.destroy(WEB);
    service.wait_for_state(vf(), FunctionState::Held);
}

fn save(service: &Service) {
    let answer = service.call(Request::Save { domain: name(WEB) });
    assert!(matches!(answer, Ok(Success::Saved { .. })), "{answer:?}");
}

#[test]
fn a_guest_that_is_suspended_with_its_functions_is_reported_with_what_to_do() {
    let world = World::new();
    let (service, _frontend) = with_a_vf(&world);
    world.simulation.suspend_domain(WEB).unwrap();
    wait_for_problem(&service, "'web' (domain 1) was suspended with 0000:01:10.0, not by 'xpci save'");
    let said = problem(&service);
    assert!(said.contains("hangs; start the guest anew instead, by 'xl create'"), "{said}");
    assert_eq!(reports(&service), 1, "{:?}", service.error_history(vf()));
}

#[test]
fn a_suspended_guest_is_reported_once_whatever_other_domains_do_and_over_a_restart() {
    let world = World::new();
    let (service, _frontend) = with_a_vf(&world);
    world.simulation.suspend_domain(WEB).unwrap();
    wait_for_problem(&service, "was suspended");
    world.simulation.destroy(DB);
    service.kill();
    let service = world.start();
    wait_for_problem(&service, "'web' (domain 1) was suspended");
    assert_eq!((reports(&service), service.problems().len()), (1, 1), "{:?}", service.error_history(vf()));
}

#[test]
fn a_guest_that_is_suspended_while_no_service_runs_is_found_by_the_next() {
    let world = World::new();
    let (service, _frontend) = with_a_vf(&world);
    service.stop();
    world.simulation.suspend_domain(WEB).unwrap();
    wait_for_problem(&world.start(), "'web' (domain 1) was suspended with 0000:01:10.0");
}

#[test]
fn the_problem_outlives_the_domain_and_the_service() {
    let world = World::new();
    let (service, _frontend) = with_a_vf(&world);
    saved_by_xl(&world, &service);
    service.stop();
    let service = world.start();
    let said = problem(&service);
    let guest = format!("guest 'web' ({}) was suspended with 0000:01:10.0", uuid());
    assert!(said.starts_with(&guest) && said.contains("start it anew by 'xl create'"), "{said}");
}

#[test]
fn the_file_that_the_message_names_ends_it() {
    let world = World::new();
    let (service, _frontend) = with_a_vf(&world);
    saved_by_xl(&world, &service);
    let said = problem(&service);
    let path = said.split_once("'rm ").and_then(|(_, rest)| rest.split_once("' ends this message"));
    let path = path.map(|(path, _)| path.to_owned()).unwrap_or_else(|| panic!("{said}"));
    wait_until("the file is written", || fs::exists(&path).unwrap());
    // Only a note that is known to be written ends with its file.
    wait_until("the message ends", || {
        let _ = fs::remove_file(&path);
        service.problems().is_empty()
    });
    service.stop();
    assert_eq!(world.start().problems(), [""; 0]);
}

#[test]
fn a_guest_that_xl_restored_is_named_although_it_has_its_persistent_function_again() {
    let world = World::new();
    let (service, _frontend) = with_a_vf(&world);
    service.persist(WEB, vf()).unwrap();
    saved_by_xl(&world, &service);
    // The restored kernel knows nothing of the nodes that it is offered, and connects to nothing.
    world.simulation.create_guest(AGAIN, "web", "pv", uuid()).unwrap();
    service.wait_for_state(vf(), FunctionState::Attached);
    assert_eq!(service.view(vf()).unwrap().domain, Some(AGAIN));
    let said = problem(&service);
    assert!(said.starts_with("'web' (domain 11) was suspended with 0000:01:10.0"), "{said}");
    assert!(said.contains("if it was restored from that checkpoint, it hangs: 'xl destroy web'"), "{said}");
}

#[test]
fn a_guest_that_starts_anew_and_uses_its_function_is_no_problem_any_more() {
    let world = World::new();
    let (service, _frontend) = with_a_vf(&world);
    service.persist(WEB, vf()).unwrap();
    saved_by_xl(&world, &service);
    world.simulation.create_guest(AGAIN, "web", "pv", uuid()).unwrap();
    let frontend = Frontend::load(&world, AGAIN);
    wait_until("the guest has it", || frontend.is_connected());
    wait_for_no_problem(&service);
    service.stop();
    assert_eq!(world.start().problems(), [""; 0]);
}

#[test]
fn a_guest_of_its_name_with_another_uuid_was_started_anew() {
    let world = World::new();
    let (service, _frontend) = with_a_vf(&world);
    saved_by_xl(&world, &service);
    // xl makes up a UUID where the guest's xl.cfg has none.
    world.simulation.create_guest(AGAIN, "web", "pv", Uuid([7; 16])).unwrap();
    wait_for_no_problem(&service);
}

#[test]
fn a_guest_that_runs_on_after_a_checkpoint_keeps_its_function_and_the_status_says_what_to_save() {
    let world = World::new();
    let (service, frontend) = with_a_vf(&world);
    world.simulation.suspend_domain(WEB).unwrap();
    wait_for_problem(&service, "was suspended");
    world.simulation.resume_domain(WEB).unwrap();
    assert_eq!(frontend.read(0, 0, 4), 0x10ca_8086, "it is served as before");
    let said = problem(&service);
    assert!(
        said.contains("runs on with its functions") && said.contains("'xpci save -c web FILE'"),
        "{said}"
    );
    // It does so: xl suspends the guest, which has no functions then.
    save(&service);
    world.simulation.suspend_domain(WEB).unwrap();
    wait_until("the earlier checkpoint is no problem", || {
        service.problems().iter().all(|problem| !problem.contains("was suspended"))
    });
    world.simulation.resume_domain(WEB).unwrap();
    service.attach(WEB, vf()).unwrap();
    wait_for_no_problem(&service);
}

#[test]
fn an_hvm_guest_has_lost_its_function_until_a_driver_starts_with_it() {
    let world = World::new();
    let guest = Uuid([5; 16]);
    world.simulation.create_guest(WIN, "win", "hvm", guest).unwrap();
    world.simulation.start_device_model(WIN);
    let service = world.start();
    service.hold(vf()).unwrap();
    service.persist(WIN, vf()).unwrap();
    world.simulation.suspend_domain(WIN).unwrap();
    wait_for_problem(&service, "'win' (domain 7) was suspended with 0000:01:10.0");
    assert!(problem(&service).contains("has lost them"), "{}", problem(&service));
    world.simulation.destroy(WIN);
    world.simulation.create_guest(AGAIN, "win", "hvm", guest).unwrap();
    world.simulation.start_device_model(AGAIN);
    wait_until("the guest has it again", || {
        service.view(vf()).is_some_and(|view| view.domain == Some(AGAIN))
    });
    service.wait_for_state(vf(), FunctionState::Attached);
    assert!(problem(&service).starts_with("'win' (domain 11) was suspended"), "{}", problem(&service));
    let bus_master = config(SLOT, 4, 2, Some(0x6));
    world.simulation.hvm_guest(AGAIN).begin(&bus_master).unwrap().answer(LIMIT).unwrap();
    wait_for_no_problem(&service);
}

#[test]
fn what_xpci_saves_is_suspended_without_functions_and_no_problem() {
    let world = World::new();
    let (service, _frontend) = with_a_vf(&world);
    save(&service);
    world.simulation.suspend_domain(WEB).unwrap();
    world.simulation.destroy(WEB);
    // The engine has handled the events before it when it shows that this one has ended.
    service.hold(bdf("01:10.2")).unwrap();
    service.attach(DB, bdf("01:10.2")).unwrap();
    world.simulation.destroy(DB);
    service.wait_for_state(bdf("01:10.2"), FunctionState::Held);
    assert_eq!((service.problems(), reports(&service)), (Vec::new(), 0));
}
