//! Guests that are saved and restored: they get the same functions or equal ones, and a killed process leaves a visible state.

use pciback::platform::VfSettings;
use pciback::{DeviceNumber, DomId, FunctionState, Sbdf, Uuid};
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Request, ReservedFunction, Success};
use toolstack::saved::SavedGuest;

use crate::crashes::at_each_change;
use crate::frontend::Frontend;
use crate::world::{DB, Service, WEB, World, bdf, name, wait_until};

/// The domain that the guest is after it was restored.
const AGAIN: DomId = DomId(11);
const VENDOR: u32 = 0;

fn web_uuid() -> Uuid {
    "00000000-0000-0000-0000-000000000001".parse().unwrap()
}

fn vfs() -> [Sbdf; 2] {
    [bdf("01:10.0"), bdf("01:10.2")]
}

fn attach_at(service: &Service, domain: DomId, address: Sbdf, slot: u8) -> Result<Success, Failure> {
    let (domain, slot) = (name(domain), DeviceNumber::new(slot));
    service.call(Request::PciAttach {
        domain,
        address,
        slot,
        persist: false,
        managed: false,
        trust_former_owner: false,
        dry_run: false,
    })
}

/// The guest has two VFs, the first one persistently.
fn with_two(world: &World) -> (Service, Frontend) {
    let service = world.start();
    let frontend = Frontend::load(world, WEB);
    for (vf, slot) in vfs().into_iter().zip([9, 3]) {
        service.hold(vf).unwrap();
        attach_at(&service, WEB, vf, slot).unwrap();
    }
    service.persist(WEB, vfs()[0]).unwrap();
    (service, frontend)
}

fn save(service: &Service) -> Result<SavedGuest, Failure> {
    match service.call(Request::Save { domain: name(WEB) })? {
        Success::Saved { domain, guest } => {
            assert_eq!(domain, WEB);
            Ok(guest)
        }
        other => panic!("{other:?}"),
    }
}

fn restore(service: &Service, guest: &SavedGuest) -> Result<Vec<ReservedFunction>, Failure> {
    match service.call(Request::Restore { guest: guest.clone() })? {
        Success::Reserved { functions, .. } => Ok(functions),
        other => panic!("{other:?}"),
    }
}

/// What xl does: the domain leaves, and comes again as another one.
fn moved_by_xl(world: &World) -> Frontend {
    world.simulation.destroy(WEB);
    world.simulation.create_guest(AGAIN, "web", "pv", web_uuid()).unwrap();
    Frontend::load(world, AGAIN)
}

fn restored(service: &Service, functions: Vec<ReservedFunction>) {
    let answer = service.call(Request::Restored { guest: web_uuid(), functions });
    assert!(matches!(answer, Ok(Success::Restored { domain: AGAIN, .. })), "{answer:?}");
}

#[test]
fn a_restored_guest_has_its_functions_at_the_same_device_numbers() {
    let world = World::new();
    let (service, _frontend) = with_two(&world);
    let guest = save(&service).unwrap();
    for vf in vfs() {
        world.assert_held(&service, vf, "it was taken before the guest is saved");
    }
    let had: Vec<_> =
        guest.functions.iter().map(|one| (one.device.address, one.slot.get(), one.persistent)).collect();
    assert_eq!(had, [(vfs()[0], 9, true), (vfs()[1], 3, false)]);
    world.simulation.destroy(WEB);
    let failure = service.attach(DB, vfs()[1]).unwrap_err();
    assert!(
        failure.message.contains("reserved for guest 'web'") && failure.message.contains("saved"),
        "{failure}"
    );
    let functions = restore(&service, &guest).unwrap();
    assert!(functions.iter().all(|one| !one.is_new && !one.newly_held), "{functions:?}");
    world.simulation.create_guest(AGAIN, "web", "pv", web_uuid()).unwrap();
    let frontend = Frontend::load(&world, AGAIN);
    restored(&service, functions);
    wait_until("the guest has them", || frontend.is_connected());
    for slot in [9, 3] {
        assert_eq!(frontend.read(slot << 3, VENDOR, 4), 0x10ca_8086, "device {slot:x}");
    }
    let persistent = vfs().map(|vf| service.view(vf).unwrap().persistent.is_some());
    assert_eq!(persistent, [true, false], "what was reserved because it was saved is not persistent");
    assert_eq!(service.problems(), [""; 0]);
}

#[test]
fn a_guest_that_runs_on_without_its_functions_is_shown_until_it_has_them() {
    let world = World::new();
    let (service, frontend) = with_two(&world);
    service
        .call(Request::PciDetach {
            domain: name(WEB),
            address: vfs()[0],
            force: false,
            scope: toolstack::protocol::Scope::All,
        })
        .unwrap();
    save(&service).unwrap();
    // The process that was to run xl was killed, and so is the service.
    service.kill();
    let service = world.start();
    let problems = service.problems();
    let [problem] = problems.as_slice() else { panic!("{problems:?}") };
    assert!(problem.contains("'xpci pci-attach web 0000:01:10.2@3' gives it back"), "{problem}");
    attach_at(&service, WEB, vfs()[1], 3).unwrap();
    assert_eq!(service.problems(), [""; 0]);
    wait_until("the guest has it", || frontend.is_connected());
    assert_eq!(service.view(vfs()[1]).unwrap().persistent, None);
}

#[test]
fn a_save_that_is_killed_anywhere_leaves_each_function_with_the_guest_or_shown() {
    let vf = bdf("01:00.0");
    at_each_change(2..100, |change, moment, why| {
        let world = World::without_vfs();
        let _frontend = Frontend::load(&world, WEB);
        let service = world.start();
        service.hold(vf).unwrap();
        service.attach(WEB, vf).unwrap();
        service.call(Request::Sync { dry_run: true }).unwrap();
        service.fuse.arm(change, moment);
        let done = save(&service).is_ok();
        if done && !service.fuse.is_blown() {
            return false;
        }
        service.kill();
        let service = world.start();
        wait_until(&format!("{why}: it settles"), || {
            matches!(service.state(vf), FunctionState::Held | FunctionState::Attached)
        });
        let shown = service.problems().iter().any(|text| text.contains("was taken from"));
        assert_eq!(shown, service.state(vf) == FunctionState::Held, "{why}: {:?}", service.problems());
        attach_at(&service, WEB, vf, 0).unwrap();
        assert_eq!(service.state(vf), FunctionState::Attached, "{why}");
        assert_eq!(service.problems(), [""; 0], "{why}");
        true
    });
}

#[test]
fn a_guest_that_does_not_release_its_functions_is_not_saved_and_gets_them_back() {
    let world = World::new();
    let service = world.start_impatient();
    let frontend = Frontend::load(&world, WEB);
    service.hold(vfs()[0]).unwrap();
    attach_at(&service, WEB, vfs()[0], 9).unwrap();
    frontend.freeze();
    let failure = save(&service).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Failed);
    assert!(failure.message.contains("did not release 0000:01:10.0 in time"), "{failure}");
    assert!(failure.message.contains("has its functions again"), "{failure}");
    let view = service.view(vfs()[0]).unwrap();
    assert_eq!((view.state, view.domain), (FunctionState::Attached, Some(WEB)));
    assert_eq!(view.guest_address, Some(Sbdf::from_devfn(0, 0, 9 << 3)));
}

#[test]
fn guests_that_cannot_release_functions_are_refused_before_anything_is_changed() {
    let world = World::new();
    let (service, _frontend) = with_two(&world);
    world.simulation.platform("test").unwrap().hypervisor.pause(WEB).unwrap();
    let failure = save(&service).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Refused);
    assert!(failure.message.contains("is paused"), "{failure}");
    assert_eq!(vfs().map(|vf| service.state(vf)), [FunctionState::Attached; 2]);
}

#[test]
fn on_another_host_an_equivalent_function_gets_the_guests_settings() {
    let here = World::new();
    let (service, _frontend) = with_two(&here);
    let mac = "52:54:00:aa:bb:07".parse().unwrap();
    let settings = VfSettings { mac: Some(mac), ..VfSettings::default() };
    service.call(Request::VfSet { address: vfs()[1], settings, persist: false }).unwrap();
    let guest = save(&service).unwrap();
    drop(service);
    let there = World::new();
    there.simulation.destroy(WEB);
    let service = there.start();
    // The first one is another guest's there.
    service.hold(vfs()[0]).unwrap();
    service.attach(DB, vfs()[0]).unwrap();
    let functions = restore(&service, &guest).unwrap();
    assert!(functions.iter().all(|one| one.is_new && one.newly_held), "{functions:?}");
    assert!(functions.iter().all(|one| one.address != vfs()[0]), "{functions:?}");
    let at_3 = functions.iter().find(|one| one.slot.get() == 3).unwrap().address;
    assert_eq!(there.simulation.vf_network(at_3).unwrap().mac, Some(mac));
    there.simulation.create_guest(AGAIN, "web", "pv", web_uuid()).unwrap();
    restored(&service, functions);
    assert_eq!(service.view(at_3).unwrap().domain, Some(AGAIN));
    assert_eq!(service.view(at_3).unwrap().persistent, None);
}

#[test]
fn a_restore_without_equivalent_functions_is_refused_with_the_differences() {
    let here = World::new();
    let (service, _frontend) = with_two(&here);
    let guest = save(&service).unwrap();
    let runs = restore(&service, &guest).unwrap_err();
    assert!(runs.message.contains("runs, as 'web' (domain 1)"), "{runs}");
    drop(service);
    let there = World::without_vfs();
    there.simulation.destroy(WEB);
    let service = there.start();
    let none = restore(&service, &guest).unwrap_err();
    assert_eq!(none.code, ErrorCode::Refused);
    let all = none.to_string();
    assert!(all.contains("had 0000:01:10.2 as device 3: this host has none of its kind"), "{all}");
    // The second one has another VF for the first function, and none for the other.
    there.host().set_vf_autoprobe(bdf("01:00.0"), false).unwrap();
    service.call(Request::VfCreate { address: bdf("01:00.0"), count: 1, unmanaged: false }).unwrap();
    assert_eq!(restore(&service, &guest).unwrap_err().code, ErrorCode::Refused);
    assert_eq!(service.state(vfs()[0]), FunctionState::Host, "nothing is held, nothing is reserved");
}

#[test]
fn a_reservation_that_fails_halfway_is_undone() {
    let here = World::new();
    let (service, _frontend) = with_two(&here);
    let guest = save(&service).unwrap();
    drop(service);
    let there = World::new();
    there.simulation.destroy(WEB);
    let service = there.start();
    there.fail("assign", Some(vfs()[1]), nix::errno::Errno::EIO, 0);
    restore(&service, &guest).unwrap_err();
    for vf in vfs() {
        wait_until("it is dom0's again", || service.state(vf) == FunctionState::Host);
    }
    let listed = service.call(Request::PciListPersistent { guest: None }).unwrap();
    assert!(matches!(&listed, Success::Functions { functions } if functions.is_empty()), "{listed:?}");
}

#[test]
fn xl_restore_alone_also_returns_the_functions_of_a_saved_guest() {
    let world = World::new();
    let (service, _frontend) = with_two(&world);
    save(&service).unwrap();
    let frontend = moved_by_xl(&world);
    for vf in vfs() {
        wait_until("it is attached", || {
            service
                .view(vf)
                .is_some_and(|view| view.state == FunctionState::Attached && view.domain == Some(AGAIN))
        });
    }
    wait_until("the guest has them", || frontend.is_connected());
}
