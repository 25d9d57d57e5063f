//! The service is killed at each change it makes outside: the next process completes or undoes what it began.

use std::ops::Range;

use pciback::FunctionState;
use pciback::platform::sim::Moment;
use toolstack::protocol::{FunctionView, Request};

use crate::frontend::{Frontend, msix_op};
use crate::world::{Service, WEB, World, bdf, wait_until};

/// No transaction makes more changes than this.
const CHANGES: u32 = 100;
const VENDOR: u32 = 0;

/// Lets `work` meet each change that a service makes outside, before and after it. It arms the service's fuse with them and checks what the next
/// process makes of it, or answers `false` when the service was done before. `changes`: how many there are at least and at most.
pub fn at_each_change(changes: Range<u32>, work: impl Fn(u32, Moment, &str) -> bool) {
    for change in 0..changes.end {
        for moment in [Moment::Before, Moment::After] {
            if !work(change, moment, &format!("killed at change {change}, {moment:?}")) {
                assert!(change > changes.start, "hardly anything was done");
                return;
            }
        }
    }
    panic!("it makes more changes than are tested");
}

/// Kills the service at each of the changes that `work` makes, before and after it, and lets `check` examine the next process.
pub fn killed_anywhere(
    prepare: impl Fn(&World, &Service),
    work: impl Fn(&Service) -> bool,
    check: impl Fn(&World, &Service, &Frontend, &str),
) {
    at_each_change(2..CHANGES, |change, moment, why| {
        let world = World::without_vfs();
        let frontend = Frontend::load(&world, WEB);
        let service = world.start();
        prepare(&world, &service);
        // What preparing has stirred up is looked at before: the kill must hit the work.
        service.call(Request::Sync { dry_run: true }).unwrap();
        service.fuse.arm(change, moment);
        let done = work(&service);
        if done && !service.fuse.is_blown() {
            return false;
        }
        service.kill();
        let service = world.start();
        check(&world, &service, &frontend, why);
        true
    });
}

/// Nothing is under way any more, and nothing is wrong.
pub fn settled(service: &Service, why: &str) {
    let under_way = [FunctionState::Attaching, FunctionState::Detaching, FunctionState::Resetting];
    wait_until(&format!("{why}: it settles"), || {
        let status = service.status();
        assert!(status.problems.is_empty(), "{why}: {:?}", status.problems);
        // What an attached managed function has as a note is what will become of it later.
        let is_settled = |view: &FunctionView| match view.state {
            FunctionState::Attached => true,
            state => !under_way.contains(&state) && view.note.is_none(),
        };
        status.functions.iter().all(is_settled)
    });
}

/// It is held, or attached and served; then it can be attached or detached.
fn whole(world: &World, service: &Service, frontend: &Frontend, why: &str) {
    let address = bdf("01:00.0");
    settled(service, why);
    match service.state(address) {
        FunctionState::Held => {
            world.assert_held(service, address, why);
            let again = service.attach(WEB, address);
            assert!(again.is_ok(), "{why}, then: {again:?}");
        }
        FunctionState::Attached => {}
        other => panic!("{why}: {other}"),
    }
    wait_until(&format!("{why}: the guest has it"), || frontend.is_connected());
    assert_eq!(frontend.read(0, VENDOR, 2), 0x8086, "{why}");
    let detached = service.detach(WEB, address);
    assert!(detached.is_ok(), "{why}: {detached:?}");
    world.assert_held(service, address, why);
}

#[test]
fn an_attach_that_is_killed_anywhere_ends_held_or_attached_and_served() {
    let address = bdf("01:00.0");
    let hold = |_: &World, service: &Service| drop(service.hold(address).unwrap());
    killed_anywhere(hold, |service| service.attach(WEB, address).is_ok(), whole);
}

#[test]
fn a_detach_that_is_killed_anywhere_ends_held_or_attached_and_served() {
    let address = bdf("01:00.0");
    let attach = |_: &World, service: &Service| {
        service.hold(address).unwrap();
        service.attach(WEB, address).unwrap();
    };
    killed_anywhere(attach, |service| service.detach(WEB, address).is_ok(), whole);
}

#[test]
fn a_hold_that_is_killed_anywhere_ends_held_or_with_its_driver() {
    let address = bdf("02:00.0");
    killed_anywhere(
        |_, _| (),
        |service| service.hold(address).is_ok(),
        |world, service, _, why| {
            settled(service, why);
            wait_until(&format!("{why}: it is nobody's business"), || {
                service.view(address).is_none_or(|view| view.state == FunctionState::Held)
            });
            if service.state(address) == FunctionState::Host {
                world.assert_host(service, address, Some("virtio-pci"), why);
                service.hold(address).unwrap();
            }
            world.assert_held(service, address, why);
        },
    );
}

#[test]
fn a_release_that_is_killed_anywhere_ends_held_or_with_its_driver() {
    let address = bdf("02:00.0");
    killed_anywhere(
        |_, service| drop(service.hold(address).unwrap()),
        |service| service.release(address).is_ok(),
        |world, service, _, why| {
            settled(service, why);
            wait_until(&format!("{why}: it has ended"), || {
                world.record(address).is_none_or(|record| record.transaction.is_none())
            });
            if service.state(address) == FunctionState::Held {
                world.assert_held(service, address, why);
                service.release(address).unwrap();
            }
            world.assert_host(service, address, Some("virtio-pci"), why);
        },
    );
}

#[test]
fn a_service_killed_while_it_maps_vectors_leaves_no_unknown_ones() {
    let address = bdf("01:00.0");
    at_each_change(2..CHANGES, |change, moment, why| {
        let world = World::without_vfs();
        let frontend = Frontend::load(&world, WEB);
        let service = world.start();
        service.hold(address).unwrap();
        service.attach(WEB, address).unwrap();
        service.fuse.arm(change, moment);
        frontend.put(&msix_op(0, 3));
        let answered = || frontend.has_answer();
        wait_until(&format!("{why}: it is killed or answers"), || answered() || service.fuse.is_blown());
        let done = !service.fuse.is_blown();
        service.kill();
        let service = world.start();
        // The request still waits on the page: the next process answers it.
        let (error, _, entries) = frontend.take(3);
        assert_eq!(error, 0, "{why}");
        let mapped = world.simulation.grants(WEB).vectors;
        assert_eq!(mapped.len(), 3, "{why}: {mapped:?}");
        assert!(
            entries.iter().all(|entry| mapped.contains_key(&u32::from(entry.vector))),
            "{why}: {entries:?}"
        );
        service.detach(WEB, address).unwrap();
        world.assert_held(&service, address, why);
        !done
    });
}
