//! Containing a function: whatever fails, and whenever the service dies, it is harmless and no guest gets it before it is cleared.

use std::time::Duration;

use nix::errno::Errno;
use pciback::platform::sim::{self, Owner};
use pciback::{FunctionState, Sbdf};
use toolstack::engine::Containment;
use toolstack::outcome::ErrorCode;

use crate::crashes::killed_anywhere;
use crate::frontend::{Frontend, msix_op, write_op};
use crate::world::{Service, WEB, World, bdf, wait_until};

const COMMAND: u32 = 4;
/// Message Control of the PF's MSI-X, its high byte with MSI-X Enable.
const MSIX_CONTROL: u16 = 0x73;
const INTERRUPT_DISABLE: u8 = 1 << 2;

/// A PF with all its kinds of interrupts, at work for a guest.
fn at_work(world: &World) -> (Frontend, Service, Sbdf) {
    let address = bdf("01:00.0");
    let frontend = Frontend::load(world, WEB);
    let service = world.start();
    service.hold(address).unwrap();
    service.attach(WEB, address).unwrap();
    assert_eq!(frontend.ask(&msix_op(0, 3)).0, 0);
    frontend.ask(&write_op(0, COMMAND, 2, 0x0006));
    (frontend, service, address)
}

/// It can do nothing, and is and stays attached to no guest.
fn assert_contained(world: &World, service: &Service, address: Sbdf, why: &str) {
    service.wait_for_state(address, FunctionState::Quarantined);
    world.assert_nothing_granted(service, address, why);
    assert_eq!(world.simulation.owner(address), Some(Owner::Quarantine), "{why}");
    assert_off(world, address, why);
    for refused in [service.attach(WEB, address), service.hold(address), service.release(address)] {
        assert_eq!(refused.unwrap_err().code, ErrorCode::Refused, "{why}");
    }
    let problems = service.problems();
    assert!(problems.iter().any(|problem| problem.contains("the test distrusts it")), "{why}: {problems:?}");
}

/// Bus mastering and all interrupts are off in hardware.
fn assert_off(world: &World, address: Sbdf, why: &str) {
    assert_eq!(world.simulation.peek(address, 4, 1)[0] & 1 << 2, 0, "{why}: bus mastering is on");
    assert_ne!(world.simulation.peek(address, 5, 1)[0] & INTERRUPT_DISABLE, 0, "{why}: INTx is on");
    assert_eq!(world.simulation.peek(address, MSIX_CONTROL, 1)[0] & 0x80, 0, "{why}: MSI-X is on");
}

fn clear_and_attach(world: &World, service: &Service, address: Sbdf, why: &str) {
    service.clear(address).unwrap();
    world.assert_held(service, address, why);
    // The guest that gets it clears the bit when its driver has started.
    assert_ne!(
        world.simulation.peek(address, 5, 1)[0] & INTERRUPT_DISABLE,
        0,
        "{why}: INTx reaches the host"
    );
    service.attach(WEB, address).unwrap();
}

#[test]
fn a_quarantined_function_is_switched_off_and_not_attached_before_a_verified_reset() {
    let world = World::without_vfs();
    let (_frontend, service, address) = at_work(&world);
    service.contain(address, Containment::Quarantine);
    assert_contained(&world, &service, address, "contained");
    service.stop();
    let service = world.start();
    assert_contained(&world, &service, address, "after a restart");
    world.fail("reset", Some(address), Errno::ETIMEDOUT, 0);
    let failure = service.clear(address).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Quarantined, "{failure}");
    assert_contained(&world, &service, address, "its reset failed when it was to be cleared");
    clear_and_attach(&world, &service, address, "cleared");
}

#[test]
fn hardware_is_switched_off_before_the_guest_is_asked() {
    let world = World::without_vfs();
    let (frontend, service, address) = at_work(&world);
    frontend.freeze();
    service.contain(address, Containment::Quarantine);
    wait_until("bus mastering is off", || world.simulation.peek(address, 4, 1)[0] & 1 << 2 == 0);
    assert_eq!(service.state(address), FunctionState::Detaching, "the guest has not let go");
    assert_off(&world, address, "the guest still has its ring");
    assert_contained(&world, &service, address, "the guest lost it");
}

#[test]
fn an_unplugged_function_is_held_again_and_a_held_one_can_be_quarantined() {
    let world = World::without_vfs();
    let (_frontend, service, address) = at_work(&world);
    service.contain(address, Containment::Unplug);
    service.wait_for_state(address, FunctionState::Held);
    world.assert_held(&service, address, "unplugged");
    service.contain(address, Containment::Quarantine);
    assert_contained(&world, &service, address, "held, then quarantined");
    clear_and_attach(&world, &service, address, "cleared");
}

#[test]
fn a_function_in_a_transaction_is_contained_when_that_ends() {
    for operation in ["assign", "deassign"] {
        let world = World::without_vfs();
        let (_frontend, service, address) = at_work(&world);
        if operation == "assign" {
            service.detach(WEB, address).unwrap();
        }
        world.simulation.fail(sim::Failure {
            operation: operation.to_owned(),
            delay: Duration::from_millis(300),
            times: 1,
            ..sim::Failure::default()
        });
        std::thread::scope(|scope| {
            scope.spawn(|| match operation {
                "assign" => service.attach(WEB, address),
                _ => service.detach(WEB, address),
            });
            service.wait_for_state(
                address,
                match operation {
                    "assign" => FunctionState::Attaching,
                    _ => FunctionState::Detaching,
                },
            );
            service.contain(address, Containment::Quarantine);
        });
        assert_contained(&world, &service, address, operation);
        clear_and_attach(&world, &service, address, operation);
    }
}

#[test]
fn a_failure_of_any_call_ends_quarantined_and_can_be_cleared() {
    let operations = [
        "config",
        "config_read",
        "config_write",
        "unmap_pirq",
        "iomem_permission",
        "ioport_permission",
        "unmap_gsi",
        "deassign",
        "release_msix",
        "reset",
    ];
    for operation in operations {
        let mut failed = 0;
        for after in 0..4 {
            let world = World::without_vfs();
            let (_frontend, service, address) = at_work(&world);
            world.fail(operation, None, Errno::EIO, after);
            service.contain(address, Containment::Quarantine);
            let why = format!("{operation} failed after {after} calls");
            service.wait_for_state(address, FunctionState::Quarantined);
            failed += usize::from(world.simulation.pending_failures() == 0);
            world.simulation.forget_failures();
            assert_eq!(service.attach(WEB, address).unwrap_err().code, ErrorCode::Refused, "{why}");
            assert_off(&world, address, &why);
            let command = world.simulation.peek(address, 4, 1)[0];
            assert_eq!(command & 1 << 2, 0, "{why}: bus mastering is on");
            clear_and_attach(&world, &service, address, &why);
        }
        assert!(failed > 0, "{operation} is never called: nothing is tested");
    }
}

#[test]
fn a_containment_that_is_killed_anywhere_ends_quarantined() {
    let address = bdf("01:00.0");
    let attach = |_: &World, service: &Service| {
        service.hold(address).unwrap();
        service.attach(WEB, address).unwrap();
    };
    let contain = |service: &Service| {
        service.contain(address, Containment::Quarantine);
        wait_until("it is contained or the service was killed", || {
            service.fuse.is_blown() || service.is_in_state(address, FunctionState::Quarantined)
        });
        !service.fuse.is_blown()
    };
    killed_anywhere(attach, contain, |world, service, _, why| {
        assert_contained(world, service, address, why);
        clear_and_attach(world, service, address, why);
    });
}

#[test]
fn a_clearing_that_is_killed_anywhere_leaves_it_held_or_quarantined() {
    let address = bdf("01:00.0");
    let contain = |_: &World, service: &Service| {
        service.hold(address).unwrap();
        service.contain(address, Containment::Quarantine);
        service.wait_for_state(address, FunctionState::Quarantined);
    };
    killed_anywhere(
        contain,
        |service| service.clear(address).is_ok(),
        |world, service, _, why| {
            if service.state(address) == FunctionState::Quarantined {
                clear_and_attach(world, service, address, why);
            } else {
                world.assert_held(service, address, why);
            }
        },
    );
}
