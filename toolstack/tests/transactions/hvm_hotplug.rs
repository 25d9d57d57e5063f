//! Functions that a running HVM guest gets and loses, over the ACPI hotplug controller of its device model.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use pciback::platform::StoreOps;
use pciback::platform::sim::SimHotplug;
use pciback::{DomId, FunctionState, Sbdf};
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Request, Scope, Success};

use crate::crashes::{at_each_change, settled};
use crate::hvm::{Guest, SLOT, VENDOR, WIN, assert_nothing_remains, attach_at, served};
use crate::world::{Service, World, bdf, name, wait_until, warnings};

const NUMBER: u16 = 0x3c;

fn first() -> Sbdf {
    bdf("01:10.0")
}

/// A guest that runs, without functions.
fn running(world: &World) -> (Guest, SimHotplug) {
    let guest = Guest::new(world);
    world.simulation.unpause(WIN).unwrap();
    (guest, world.simulation.hotplug(WIN))
}

/// A running guest that has a function.
fn attached() -> (World, Guest, SimHotplug, Service) {
    let world = World::new();
    let (guest, hotplug) = running(&world);
    let service = world.start();
    service.hold(first()).unwrap();
    service.attach(WIN, first()).unwrap();
    (world, guest, hotplug, service)
}

/// The guest's operating system ejects the function when it is asked to, while something is done.
fn answering<T>(hotplug: &SimHotplug, what: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                if hotplug.eject_when_asked(SLOT, Duration::from_millis(1)) {
                    break;
                }
            }
        });
        let answer = what();
        done.store(true, Ordering::SeqCst);
        answer
    })
}

fn force(service: &Service) -> Result<Success, Failure> {
    service.call(Request::PciDetach { domain: name(WIN), address: first(), force: true, scope: Scope::All })
}

fn assert_gone(world: &World, guest: &Guest, hotplug: &SimHotplug, service: &Service, why: &str) {
    world.assert_held(service, first(), why);
    assert_nothing_remains(world, guest, why);
    assert_eq!(hotplug.placeholders(), [0u8; 0], "{why}");
}

fn without_acpi(world: &World) {
    let store = world.simulation.store(DomId::DOM0).unwrap();
    store.write(&format!("/local/domain/{WIN}/platform/acpi"), b"0").unwrap();
}

#[test]
fn a_running_guest_is_notified_of_a_function_that_answers_already() {
    let (_world, guest, hotplug, _service) = attached();
    assert_eq!((hotplug.notified(), hotplug.placeholders()), (1, vec![SLOT]));
    assert_eq!(guest.read(SLOT, VENDOR, 4), 0x10ca_8086);
}

#[test]
fn a_function_is_withdrawn_when_the_guest_has_ejected_it_and_not_before() {
    let (world, guest, hotplug, service) = attached();
    let operator = service.operator();
    let detach = Request::PciDetach { domain: name(WIN), address: first(), force: false, scope: Scope::All };
    let detached = thread::spawn(move || operator.call(detach));
    wait_until("the guest is asked", || hotplug.is_asked(SLOT));
    assert_eq!(guest.read(SLOT, VENDOR, 4), 0x10ca_8086, "it is gone before the guest has let it go");
    hotplug.eject(SLOT);
    assert_eq!(warnings(detached.join().unwrap()), "");
    assert_gone(&world, &guest, &hotplug, &service, "ejected");
    service.attach(WIN, first()).unwrap();
    assert_eq!((guest.read(SLOT, VENDOR, 4), hotplug.notified()), (0x10ca_8086, 2));
}

#[test]
fn a_guest_keeps_its_other_function_when_it_ejects_one() {
    let (_world, guest, hotplug, service) = attached();
    service.hold(bdf("01:10.2")).unwrap();
    attach_at(&service, bdf("01:10.2"), 9).unwrap();
    answering(&hotplug, || service.detach(WIN, first())).unwrap();
    assert_eq!(hotplug.placeholders(), [9]);
    assert_eq!((guest.read(9, VENDOR, 2), guest.is_served(SLOT)), (0x8086, false));
}

#[test]
fn a_guest_that_does_not_eject_loses_the_function_after_the_limit() {
    let world = World::new();
    let (guest, hotplug) = running(&world);
    let service = world.start_impatient();
    service.hold(first()).unwrap();
    service.attach(WIN, first()).unwrap();
    let said = warnings(service.detach(WIN, first()));
    assert!(said.contains("did not release it in time; it was withdrawn without it"), "{said}");
    assert_gone(&world, &guest, &hotplug, &service, "not ejected");
}

#[test]
fn a_guest_is_not_asked_when_it_is_paused_or_the_function_is_taken_by_force() {
    for paused in [false, true] {
        let (world, guest, hotplug, service) = attached();
        let before = std::time::Instant::now();
        match paused {
            true => {
                world.simulation.platform("xl").unwrap().hypervisor.pause(WIN).unwrap();
                service.detach(WIN, first()).unwrap();
            }
            false => drop(force(&service).unwrap()),
        }
        assert!(
            before.elapsed() < Duration::from_secs(world.settings().guest_limit_seconds),
            "it was awaited"
        );
        assert_gone(&world, &guest, &hotplug, &service, "by force");
    }
}

#[test]
fn a_function_that_the_guest_ejected_by_itself_is_detached_at_once() {
    let (world, guest, hotplug, service) = attached();
    hotplug.eject(SLOT);
    assert_eq!(warnings(service.detach(WIN, first())), "");
    assert_gone(&world, &guest, &hotplug, &service, "ejected before");
}

#[test]
fn a_function_from_before_the_guest_ran_is_ejected_too() {
    let world = World::new();
    let (guest, hotplug) = (Guest::new(&world), world.simulation.hotplug(WIN));
    let service = world.start();
    service.hold(first()).unwrap();
    service.attach(WIN, first()).unwrap();
    served(&guest, SLOT);
    world.simulation.unpause(WIN).unwrap();
    answering(&hotplug, || assert_eq!(warnings(service.detach(WIN, first())), ""));
    assert_gone(&world, &guest, &hotplug, &service, "ejected");
}

#[test]
fn a_running_guest_without_acpi_is_refused_and_a_paused_one_loses_its_function_by_force_alone() {
    let world = World::new();
    let (guest, hotplug) = (Guest::new(&world), world.simulation.hotplug(WIN));
    without_acpi(&world);
    let service = world.start();
    service.hold(first()).unwrap();
    service.attach(WIN, first()).unwrap();
    served(&guest, SLOT);
    assert_eq!(hotplug.placeholders(), [0u8; 0]);
    world.simulation.unpause(WIN).unwrap();
    service.hold(bdf("01:10.2")).unwrap();
    let refusals =
        [(service.attach(WIN, bdf("01:10.2")), "xl create -p"), (service.detach(WIN, first()), "--force")];
    for (refused, hint) in refusals {
        let failure = refused.unwrap_err();
        assert!(failure.code == ErrorCode::Refused && failure.message.contains("acpi=0"), "{failure:?}");
        assert!(failure.hint.as_deref().is_some_and(|said| said.contains(hint)), "{failure:?}");
    }
    force(&service).unwrap();
    assert_gone(&world, &guest, &hotplug, &service, "by force");
}

#[test]
fn a_device_number_that_another_toolstack_takes_meanwhile_is_refused_and_nothing_remains() {
    for paused in [false, true] {
        let world = World::new();
        let (guest, hotplug) = (Guest::new(&world), world.simulation.hotplug(WIN));
        if !paused {
            world.simulation.unpause(WIN).unwrap();
        }
        let service = world.start();
        service.hold(first()).unwrap();
        world.fail("announce", None, Errno::EBUSY, 0);
        let failure = service.attach(WIN, first()).unwrap_err();
        assert!(format!("{failure:?}").contains("another number"), "{failure:?}");
        assert_gone(&world, &guest, &hotplug, &service, "refused");
        hotplug.plug_other(9);
        let failure = attach_at(&service, first(), 9).unwrap_err();
        assert!(failure.message.contains("emulated"), "{failure:?}");
    }
}

/// QEMU may be of a kind that knows no hotplug, or have ended.
#[test]
fn a_device_model_that_refuses_costs_a_running_guest_the_function_and_a_paused_one_the_hotplug() {
    let (world, guest, hotplug, service) = attached();
    force(&service).unwrap();
    world.fail("announce", None, Errno::EPIPE, 0);
    let failure = service.attach(WIN, first()).unwrap_err();
    assert!(failure.message.contains("placeholder"), "{failure:?}");
    assert_gone(&world, &guest, &hotplug, &service, "refused by its device model");

    let world = World::new();
    let (guest, hotplug) = (Guest::new(&world), world.simulation.hotplug(WIN));
    let service = world.start();
    service.hold(first()).unwrap();
    world.fail("announce", None, Errno::EPIPE, 0);
    let said = warnings(service.attach(WIN, first()));
    assert!(said.contains("cannot be asked to release"), "{said}");
    served(&guest, SLOT);
    world.simulation.unpause(WIN).unwrap();
    let failure = service.detach(WIN, first()).unwrap_err();
    assert!(failure.code == ErrorCode::Refused && failure.message.contains("cannot be asked"), "{failure:?}");
    force(&service).unwrap();
    assert_gone(&world, &guest, &hotplug, &service, "by force");
}

#[test]
fn a_device_model_that_is_gone_does_not_keep_the_function() {
    let (world, _guest, _hotplug, service) = attached();
    world.fail("request_eject", None, Errno::EPIPE, 0);
    world.fail("eject", None, Errno::EPIPE, 0);
    let said = warnings(service.detach(WIN, first()));
    assert!(said.contains("withdrawn without the guest") && said.contains("does nothing"), "{said}");
    world.assert_held(&service, first(), "withdrawn");
    // The placeholder that was left is replaced.
    service.attach(WIN, first()).unwrap();
    assert_eq!(world.simulation.hotplug(WIN).notified(), 2);
}

#[test]
fn a_guest_that_ends_while_it_is_asked_is_not_awaited() {
    let (world, guest, hotplug, service) = attached();
    let operator = service.operator();
    let detach = Request::PciDetach { domain: name(WIN), address: first(), force: false, scope: Scope::All };
    let detached = thread::spawn(move || operator.call(detach));
    wait_until("the guest is asked", || hotplug.is_asked(SLOT));
    world.simulation.destroy(WIN);
    assert_eq!(warnings(detached.join().unwrap()), "");
    assert_gone(&world, &guest, &hotplug, &service, "its guest has ended");
}

#[test]
fn an_attach_to_a_running_guest_that_is_killed_anywhere_leaves_nothing_or_is_whole() {
    at_each_change(5..100, |change, moment, why| {
        let world = World::new();
        let (guest, hotplug) = running(&world);
        let service = world.start();
        service.hold(first()).unwrap();
        service.fuse.arm(change, moment);
        if service.attach(WIN, first()).is_ok() && !service.fuse.is_blown() {
            return false;
        }
        service.kill();
        let service = world.start();
        settled(&service, why);
        if service.state(first()) == FunctionState::Held {
            assert_gone(&world, &guest, &hotplug, &service, why);
            service.attach(WIN, first()).unwrap();
        }
        assert_eq!((hotplug.placeholders(), guest.read(SLOT, VENDOR, 2)), (vec![SLOT], 0x8086), "{why}");
        answering(&hotplug, || assert_eq!(warnings(service.detach(WIN, first())), "", "{why}"));
        assert_gone(&world, &guest, &hotplug, &service, why);
        true
    });
}

#[test]
fn a_detach_that_is_killed_anywhere_is_completed_by_the_next_run() {
    at_each_change(5..100, |change, moment, why| {
        let (world, guest, hotplug, service) = attached();
        guest.write(NUMBER, 1, 9);
        service.fuse.arm(change, moment);
        let detached = answering(&hotplug, || service.detach(WIN, first()));
        if detached.is_ok() && !service.fuse.is_blown() {
            return false;
        }
        service.kill();
        let service = world.start();
        settled(&service, why);
        if service.state(first()) == FunctionState::Attached {
            assert_eq!(guest.read(SLOT, NUMBER, 1), 9, "{why}: it is another one");
            answering(&hotplug, || service.detach(WIN, first())).unwrap();
        }
        assert_gone(&world, &guest, &hotplug, &service, why);
        true
    });
}

#[test]
fn a_guest_that_did_not_answer_a_killed_service_loses_the_function() {
    let (world, guest, hotplug, service) = attached();
    let operator = service.operator();
    let detach = Request::PciDetach { domain: name(WIN), address: first(), force: false, scope: Scope::All };
    let detached = thread::spawn(move || operator.call(detach));
    wait_until("the guest is asked", || hotplug.is_asked(SLOT));
    service.kill();
    detached.join().unwrap().unwrap_err();
    let service = world.start();
    settled(&service, "after the kill");
    assert_gone(&world, &guest, &hotplug, &service, "by the next run");
}
