//! Functions that guests have persistently: they get them again when they start as other domains, and no other guest does.

mod devices;

use nix::errno::Errno;
use pciback::serve::hvm::wire::xen::config;
use pciback::{DeviceNumber, DomId, FunctionState, Sbdf, Uuid};
use toolstack::outcome::ErrorCode;
use toolstack::protocol::{DomainName, FunctionView, Request, Scope, Success};

use crate::crashes::{at_each_change, killed_anywhere, settled};
use crate::frontend::Frontend;
use crate::world::{DB, LIMIT, Service, WEB, World, bdf, name, wait_until};

/// The domain that the guest is after its reboot.
const AGAIN: DomId = DomId(11);
const WIN: DomId = DomId(7);
const WIN_UUID: Uuid = Uuid([0x77; 16]);
const VENDOR: u32 = 0;

fn vf() -> Sbdf {
    bdf("01:10.0")
}

/// That of the simulated guest.
fn web_uuid() -> Uuid {
    "00000000-0000-0000-0000-000000000001".parse().unwrap()
}

/// The guest ends and starts again.
fn reboot(world: &World) -> Frontend {
    world.simulation.destroy(WEB);
    world.simulation.create_guest(AGAIN, "web", "pv", web_uuid()).unwrap();
    Frontend::load(world, AGAIN)
}

fn persistent(address: Sbdf) -> (World, Service) {
    let world = World::new();
    let service = world.start();
    service.hold(address).unwrap();
    service.persist(WEB, address).unwrap();
    (world, service)
}

fn is_attached(service: &Service, address: Sbdf, domain: DomId) -> bool {
    let view = service.view(address);
    view.is_some_and(|view| view.state == FunctionState::Attached && view.domain == Some(domain))
}

fn listed(service: &Service, guest: Option<&str>) -> Vec<FunctionView> {
    let guest = guest.map(|guest| DomainName(guest.into()));
    match service.call(Request::PciListPersistent { guest }) {
        Ok(Success::Functions { functions }) => functions,
        other => panic!("persistent list: {other:?}"),
    }
}

fn problem(service: &Service) -> String {
    service.problems().join("\n")
}

#[test]
fn a_guest_that_does_not_run_gets_its_reserved_functions_when_it_starts() {
    let world = World::new();
    let service = world.start();
    service.hold(vf()).unwrap();
    let kept = |guest: &str, slot: Option<u8>, dry_run| {
        service.call(Request::PciAttach {
            domain: DomainName(guest.into()),
            address: vf(),
            slot: slot.and_then(DeviceNumber::new),
            persist: true,
            managed: false,
            trust_former_owner: false,
            dry_run,
        })
    };
    let later = "00000000-0000-0000-0000-0000000000aa";
    assert!(matches!(kept(later, Some(9), true), Ok(Success::Possible { .. })));
    assert!(listed(&service, None).is_empty(), "a dry run changes nothing");
    assert!(matches!(kept(later, Some(9), false), Ok(Success::Changed { .. })));
    assert!(matches!(kept(later, Some(9), false), Ok(Success::Already { .. })));
    assert_eq!(service.attach(WEB, vf()).unwrap_err().code, ErrorCode::Refused, "it is kept");
    assert_eq!(kept("nobody", None, false).unwrap_err().code, ErrorCode::NotFound, "no name is no UUID");
    let other = "00000000-0000-0000-0000-0000000000bb";
    assert_eq!(kept(other, None, false).unwrap_err().code, ErrorCode::Refused, "it is another guest's");
    world.simulation.create_guest(AGAIN, "later", "pv", later.parse().unwrap()).unwrap();
    let frontend = Frontend::load(&world, AGAIN);
    wait_until("it is attached", || is_attached(&service, vf(), AGAIN));
    assert_eq!(frontend.read(9 << 3, VENDOR, 2), 0x8086);
}

#[test]
fn a_guest_that_runs_is_not_named_by_its_uuid() {
    let world = World::new();
    let service = world.start();
    service.hold(vf()).unwrap();
    let request = Request::PciAttach {
        domain: DomainName(web_uuid().to_string()),
        address: vf(),
        slot: None,
        persist: true,
        managed: false,
        trust_former_owner: false,
        dry_run: false,
    };
    let failure = service.call(request).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Refused);
    assert!(failure.message.contains("'web' (domain 1)"), "{failure}");
}

#[test]
fn a_rebooted_guest_gets_its_function_again_at_the_same_place_also_after_a_restart() {
    let world = World::new();
    let service = world.start();
    service.hold(vf()).unwrap();
    let at = Request::PciAttach {
        domain: name(WEB),
        address: vf(),
        slot: DeviceNumber::new(9),
        persist: true,
        managed: false,
        trust_former_owner: false,
        dry_run: false,
    };
    service.call(at).unwrap();
    let frontend = reboot(&world);
    wait_until("it is attached again", || is_attached(&service, vf(), AGAIN));
    wait_until("the guest has it", || frontend.is_connected());
    assert_eq!(frontend.read(9 << 3, VENDOR, 4), 0x10ca_8086);
    assert_eq!(service.view(vf()).unwrap().persistent.unwrap().guest, web_uuid());
    service.stop();
    // The next reboot comes while no service runs.
    world.simulation.destroy(AGAIN);
    world.simulation.create_guest(DomId(12), "web", "pv", web_uuid()).unwrap();
    let service = world.start();
    wait_until("it is attached once more", || is_attached(&service, vf(), DomId(12)));
    assert_eq!(problem(&service), "");
}

#[test]
fn a_persistent_function_goes_to_no_other_guest_until_a_command_ends_that() {
    let (world, service) = persistent(vf());
    world.simulation.destroy(WEB);
    service.wait_for_state(vf(), FunctionState::Held);
    for refused in [service.attach(DB, vf()), service.persist(DB, vf()), service.release(vf())] {
        let failure = refused.unwrap_err();
        assert_eq!(failure.code, ErrorCode::Refused);
        assert!(failure.message.contains("reserved for guest 'web'"), "{failure}");
        let hint = failure.hint.unwrap();
        assert!(hint.contains("xpci pci-detach --persistent web 0000:01:10.0"), "{hint}");
    }
    // Another guest of that name is not the guest.
    world.simulation.create_guest(AGAIN, "web", "pv", Uuid([5; 16])).unwrap();
    service.wait_for_state(vf(), FunctionState::Held);
    assert!(service.attach(AGAIN, vf()).is_err());
    world.simulation.destroy(AGAIN);
    assert_eq!((listed(&service, Some("web")).len(), listed(&service, Some("db")).len()), (1, 0));
    assert_eq!(listed(&service, Some(&web_uuid().to_string())), listed(&service, None));
    let release = Request::PciAssignableRemove { address: vf(), force: true, trust_former_owner: false };
    let Ok(Success::Changed { message, .. }) = service.call(release) else { panic!("not released") };
    assert!(message.contains("no longer persistent for guest 'web'"), "{message}");
    assert_eq!((service.state(vf()), listed(&service, None).len()), (FunctionState::Host, 0));
}

#[test]
fn a_guest_that_does_not_run_is_forgotten_by_name_or_uuid_and_others_are_not_found() {
    for called in ["web", "00000000-0000-0000-0000-000000000001"] {
        let (world, service) = persistent(vf());
        world.simulation.destroy(WEB);
        service.wait_for_state(vf(), FunctionState::Held);
        let forget = |guest: &str, scope| {
            let domain = DomainName(guest.into());
            service.call(Request::PciDetach { domain, address: vf(), force: false, scope })
        };
        assert_eq!(forget("db", Scope::Persistent).unwrap_err().code, ErrorCode::NotFound);
        assert_eq!(forget("web", Scope::Live).unwrap_err().code, ErrorCode::NotFound);
        forget(called, if called == "web" { Scope::Persistent } else { Scope::All }).unwrap();
        service.attach(DB, vf()).unwrap();
        world.simulation.create_guest(AGAIN, "web", "pv", web_uuid()).unwrap();
        assert!(is_attached(&service, vf(), DB) && problem(&service).is_empty());
    }
}

#[test]
fn a_detach_is_persistent_or_until_the_guest_starts_again() {
    let (world, service) = persistent(vf());
    service.detach_only(WEB, vf(), Scope::Live).unwrap();
    world.assert_held(&service, vf(), "detached for now");
    // Not even another run gives it back to the domain that lost it.
    service.stop();
    let service = world.start();
    assert_eq!((service.state(vf()), problem(&service)), (FunctionState::Held, String::new()));
    let _frontend = reboot(&world);
    wait_until("it is attached again", || is_attached(&service, vf(), AGAIN));
    service.detach(AGAIN, vf()).unwrap();
    assert_eq!(listed(&service, None), []);
    world.simulation.destroy(AGAIN);
    world.simulation.create_guest(DomId(12), "web", "pv", web_uuid()).unwrap();
    service.attach(DB, vf()).unwrap();
}

#[test]
fn persistence_of_an_attached_function_begins_and_ends_without_a_detach() {
    let (world, service) = persistent(vf());
    let Ok(Success::Already { .. }) = service.persist(WEB, vf()) else { panic!("it is persistent") };
    service.detach_only(WEB, vf(), Scope::Persistent).unwrap();
    assert!(is_attached(&service, vf(), WEB) && listed(&service, None).is_empty());
    let Ok(Success::Changed { .. }) = service.persist(WEB, vf()) else { panic!("it becomes persistent") };
    let _frontend = reboot(&world);
    wait_until("it is attached again", || is_attached(&service, vf(), AGAIN));
}

#[test]
fn the_device_number_of_a_persistent_function_is_reserved() {
    let (_world, service) = persistent(vf());
    service.detach_only(WEB, vf(), Scope::Live).unwrap();
    service.hold(bdf("01:10.2")).unwrap();
    service.attach(WEB, bdf("01:10.2")).unwrap();
    let seen = |address| service.view(bdf(address)).unwrap().guest_address.unwrap();
    assert_eq!(seen("01:10.2"), Sbdf::from_devfn(0, 0, 8));
    service.attach(WEB, vf()).unwrap();
    assert_eq!(seen("01:10.0"), Sbdf::from_devfn(0, 0, 0));
}

#[test]
fn an_attach_that_fails_leaves_no_reservation() {
    let world = World::new();
    let service = world.start();
    service.hold(vf()).unwrap();
    world.fail("assign", Some(vf()), Errno::EINVAL, 0);
    service.persist(WEB, vf()).unwrap_err();
    assert_eq!(listed(&service, None), []);
    world.assert_held(&service, vf(), "the attach failed");
}

#[test]
fn a_missing_function_is_shown_with_the_reason_and_retried_after_a_change() {
    let nic = bdf("02:00.0");
    let (world, service) = persistent(nic);
    world.simulation.destroy(WEB);
    service.wait_for_state(nic, FunctionState::Held);
    world.simulation.unplug(nic);
    wait_until("it is forgotten", || service.view(nic).is_none());
    world.simulation.plug(r#"{address: "02:00.0", model: virtio-net, irq: 11}"#).unwrap();
    world.simulation.create_guest(AGAIN, "web", "pv", web_uuid()).unwrap();
    wait_until("it is reported", || problem(&service).contains("02:00.0 is missing in 'web' (domain 11)"));
    assert!(problem(&service).contains("not assignable"), "{}", problem(&service));
    // The first one is to the quarantine domain.
    world.fail("assign", Some(nic), Errno::ENOMEM, 1);
    service.hold(nic).unwrap();
    wait_until("the new failure is reported", || problem(&service).contains("ENOMEM"));
    world.assert_held(&service, nic, "the attach failed");
    // Nothing happens: it is not tried in a loop.
    assert_eq!(service.state(nic), FunctionState::Held);
    service.release(nic).unwrap_err();
    service.call(Request::PolicyReload).unwrap();
    wait_until("it is attached again", || is_attached(&service, nic, AGAIN));
    assert_eq!(problem(&service), "");
}

fn addresses(functions: Vec<FunctionView>) -> Vec<Sbdf> {
    functions.into_iter().map(|function| function.address).collect()
}

#[test]
fn functions_in_the_settings_stay_assigned_across_restarts_of_guest_and_service() {
    let world = World::new();
    let _frontend = Frontend::load(&world, WEB);
    let start = || world.start_with_guest("web", &["01:10.0@9", "any:01:00.0"]);
    let service = start();
    let others = bdf("01:10.2");
    for address in [vf(), others] {
        service.hold(address).unwrap();
        wait_until("it is attached", || is_attached(&service, address, WEB));
    }
    service.stop();
    let service = start();
    assert!(is_attached(&service, vf(), WEB) && is_attached(&service, others, WEB));
    assert_eq!(addresses(listed(&service, None)), [vf(), others], "nothing is given twice");
    service.stop();
    // The guest starts again while no service runs.
    let frontend = reboot(&world);
    let service = start();
    for address in [vf(), others] {
        wait_until("it is attached again", || is_attached(&service, address, AGAIN));
    }
    wait_until("the guest has it", || frontend.is_connected());
    assert_eq!(frontend.read(9 << 3, VENDOR, 4), 0x10ca_8086);
    assert_eq!((addresses(listed(&service, None)), problem(&service)), (vec![vf(), others], String::new()));
}

#[test]
fn a_persistent_attach_that_is_killed_anywhere_ends_with_both_or_neither() {
    let address = bdf("01:00.0");
    let hold = |_: &World, service: &Service| drop(service.hold(address).unwrap());
    killed_anywhere(
        hold,
        |service| service.persist(WEB, address).is_ok(),
        |world, service, frontend, why| {
            settled(service, why);
            wait_until(&format!("{why}: it is whole"), || {
                let attached = is_attached(service, address, WEB);
                attached != listed(service, None).is_empty()
            });
            if service.state(address) == FunctionState::Held {
                service.persist(WEB, address).unwrap();
            }
            wait_until(&format!("{why}: the guest has it"), || frontend.is_connected());
            service.detach(WEB, address).unwrap();
            world.assert_held(service, address, why);
            assert_eq!(listed(service, None), [], "{why}");
        },
    );
}

/// Kills the service at each change that it makes from the end of a guest on, and lets `check` examine the next process.
fn rebooted_and_killed<Guest>(
    prepare: impl Fn(&World) -> Service,
    reboot: impl Fn(&World) -> Guest,
    done: impl Fn(&World, &Service) -> bool,
    check: impl Fn(&World, &Service, &str),
) {
    at_each_change(10..200, |change, moment, why| {
        let world = World::new();
        let service = prepare(&world);
        service.fuse.arm(change, moment);
        let _guest = reboot(&world);
        wait_until(why, || service.fuse.is_blown() || done(&world, &service));
        if !service.fuse.is_blown() {
            return false;
        }
        service.kill();
        let service = world.start();
        wait_until(&format!("{why}: it is attached again"), || done(&world, &service));
        check(&world, &service, why);
        true
    });
}

#[test]
fn a_service_killed_anywhere_in_a_reboot_gives_the_function_to_the_new_domain() {
    let prepare = |world: &World| {
        let _frontend = Frontend::load(world, WEB);
        let service = world.start();
        service.hold(vf()).unwrap();
        service.persist(WEB, vf()).unwrap();
        service
    };
    let attached = |_: &World, service: &Service| service.is_in_state(vf(), FunctionState::Attached);
    let done =
        |world: &World, service: &Service| attached(world, service) && is_domains(service, vf(), AGAIN);
    rebooted_and_killed(prepare, reboot, done, |_, service, why| {
        settled(service, why);
        assert!(is_attached(service, vf(), AGAIN), "{why}");
    });
}

/// Asks a service that may have been killed.
fn is_domains(service: &Service, address: Sbdf, domain: DomId) -> bool {
    let Ok(Success::Status(status)) = service.call(Request::Status) else { return false };
    status.functions.iter().any(|view| view.address == address && view.domain == Some(domain))
}

/// An HVM guest with a function persistently, which ran and ended.
fn win(world: &World) -> Service {
    world.simulation.create_guest(WIN, "win", "hvm", WIN_UUID).unwrap();
    world.simulation.start_device_model(WIN);
    let service = world.start();
    service.hold(vf()).unwrap();
    service.persist(WIN, vf()).unwrap();
    world.simulation.unpause(WIN).unwrap();
    service
}

fn win_again(world: &World) {
    world.simulation.destroy(WIN);
    world.simulation.create_guest(AGAIN, "win", "hvm", WIN_UUID).unwrap();
}

#[test]
fn an_hvm_guest_does_not_run_before_it_has_its_function_again() {
    let world = World::new();
    let service = win(&world);
    win_again(&world);
    let pauses = |count: u32| world.simulation.pauses(AGAIN) == Some(count);
    wait_until("it is kept paused", || pauses(2));
    // xl is ready before the device model, which is never so on a real host, and lets it run.
    world.simulation.unpause(AGAIN).unwrap();
    assert!(pauses(1) && !is_attached(&service, vf(), AGAIN));
    world.simulation.start_device_model(AGAIN);
    wait_until("it runs", || pauses(0));
    assert!(is_attached(&service, vf(), AGAIN));
    let guest = world.simulation.hvm_guest(AGAIN);
    let read = guest.begin(&config(0x1f, 0, 4, None)).unwrap();
    assert_eq!(read.answer(LIMIT).unwrap(), 0x10ca_8086);
    assert_eq!(problem(&service), "");
}

#[test]
fn an_hvm_guest_runs_without_its_function_when_it_cannot_have_it() {
    for (operation, told) in [("device_model_slots", "EPIPE"), ("assign", "EPIPE")] {
        let world = World::new();
        let service = win(&world);
        // What comes later would be a reason to try again.
        world.simulation.destroy(WIN);
        service.wait_for_state(vf(), FunctionState::Held);
        world.fail(operation, None, Errno::EPIPE, 0);
        world.simulation.create_guest(AGAIN, "win", "hvm", WIN_UUID).unwrap();
        world.simulation.start_device_model(AGAIN);
        wait_until(operation, || problem(&service).contains(told));
        assert_eq!(world.simulation.pauses(AGAIN), Some(1), "{operation}: xl's pause");
        service.wait_for_state(vf(), FunctionState::Held);
    }
}

#[test]
fn a_missing_device_model_does_not_keep_its_guest_paused() {
    let world = World::new();
    win(&world).stop();
    let service = world.start_impatient();
    win_again(&world);
    wait_until("it is reported", || problem(&service).contains("device model did not run for 1 s"));
    assert_eq!(world.simulation.pauses(AGAIN), Some(1), "xl's pause");
}

#[test]
fn an_hvm_guest_that_ran_already_is_left_alone() {
    let world = World::new();
    win(&world).stop();
    win_again(&world);
    world.simulation.start_device_model(AGAIN);
    world.simulation.unpause(AGAIN).unwrap();
    let service = world.start();
    wait_until("it is reported", || problem(&service).contains("runs already"));
    assert_eq!(world.simulation.pauses(AGAIN), Some(0));
    service.wait_for_state(vf(), FunctionState::Held);
}

#[test]
fn an_hvm_guest_whose_service_is_killed_anywhere_gets_its_function_and_runs() {
    let reboot = |world: &World| {
        win_again(world);
        world.simulation.start_device_model(AGAIN);
    };
    let done = |world: &World, service: &Service| {
        let told = || {
            let Ok(Success::Status(status)) = service.call(Request::Status) else { return false };
            status.problems.iter().any(|problem| problem.message.contains("killed while it paused"))
        };
        service.is_in_state(vf(), FunctionState::Attached)
            && is_domains(service, vf(), AGAIN)
            && (world.simulation.pauses(AGAIN) == Some(1) || told())
    };
    rebooted_and_killed(win, reboot, done, |world, service, why| {
        let pauses = world.simulation.pauses(AGAIN).unwrap();
        let told = problem(service).contains("killed while it paused 'win' (domain 11) or let it run");
        assert!(pauses == 1 || (told && pauses == 2), "{why}: {pauses} pauses");
    });
}
