//! Functions that leave, come back, are replaced or taken, and events that get lost.

use std::time::Duration;

use nix::errno::Errno;
use pciback::platform::sim::Owner;
use pciback::{FunctionState, Sbdf};

use toolstack::protocol::{Request, Success};

use crate::frontend::{Frontend, read_op};
use crate::world::{Service, WEB, World, bdf, wait_until};

/// A function in a slot of its own, and another device that fits there.
const SLOT: &str = "02:00.0";
const OTHER: &str = r#"{address: "02:00.0", model: nvme, irq: 17}"#;
const LIMIT: Duration = Duration::from_secs(5);

fn attached(world: &World, address: Sbdf) -> (Frontend, Service) {
    let frontend = Frontend::load(world, WEB);
    let service = world.start();
    service.hold(address).unwrap();
    service.attach(WEB, address).unwrap();
    (frontend, service)
}

/// What `xpci sync` says it did, or would do.
fn synced(service: &Service, dry_run: bool) -> Vec<String> {
    match service.call(Request::Sync { dry_run }) {
        Ok(Success::Synced(view)) if view.plan.is_empty() => Vec::new(),
        Ok(Success::Synced(view)) => view.text,
        other => panic!("{other:?}"),
    }
}

/// Gone, and no guest has anything of it any more.
fn withdrawn(service: &Service, address: Sbdf) -> bool {
    service.view(address).is_some_and(|view| view.state == FunctionState::Gone && view.domain.is_none())
}

#[test]
fn a_function_that_is_replaced_under_its_guest_is_withdrawn_and_the_new_one_is_not_touched() {
    let world = World::new();
    let slot = bdf(SLOT);
    let (frontend, service) = attached(&world, slot);
    let stays = bdf("01:10.0");
    service.hold(stays).unwrap();
    service.attach(WEB, stays).unwrap();
    let old = frontend.read(0, 0, 4);
    world.simulation.unplug(slot);
    world.simulation.plug(OTHER).unwrap();
    let new = world.host().function(slot).unwrap();
    assert_ne!(old, u32::from(new.vendor) | u32::from(new.device) << 16);
    // Once it is withdrawn the ring has no function at that place; until then it reads all ones, and never what the new one is.
    wait_until("it is withdrawn", || {
        let (error, value, _) = frontend.ask(&read_op(0, 0, 4));
        assert!(error != 0 || value == u32::MAX || value == old, "the guest read {value:#x}");
        error != 0
    });
    wait_until("it is forgotten", || service.state(slot) == FunctionState::Host);
    let now = world.host().function(slot).unwrap();
    assert_eq!((now.driver, now.driver_override), (new.driver, None), "left to dom0 as it came");
    assert_eq!(world.simulation.owner(slot), Some(Owner::Host));
    assert_eq!(world.record(slot), None);
    assert_eq!(frontend.read(8, 0, 4), 0x10ca_8086);
    service.detach(WEB, stays).unwrap();
    wait_until("nothing is granted", || world.simulation.grants(WEB).is_empty());
}

#[test]
fn a_held_function_that_leaves_and_returns_is_a_new_one() {
    let world = World::new();
    let vf = bdf("01:10.0");
    let service = world.start();
    service.hold(vf).unwrap();
    world.simulation.unplug(bdf("01:00.0"));
    service.wait_for_state(vf, FunctionState::Host);
    assert_eq!(world.record(vf), None);
    assert_eq!(service.problems(), [""; 0]);
}

#[test]
fn a_function_removed_from_a_guest_stays_in_the_status_until_it_is_released() {
    let world = World::new();
    let vf = bdf("01:10.0");
    let (_frontend, service) = attached(&world, vf);
    world.simulation.unplug(vf);
    wait_until("it is withdrawn", || withdrawn(&service, vf));
    assert!(service.attach(WEB, vf).is_err());
    let service = {
        service.stop();
        world.start()
    };
    service.wait_for_state(vf, FunctionState::Gone);
    service.release(vf).unwrap();
    assert_eq!((service.state(vf), world.record(vf)), (FunctionState::Host, None));
}

#[test]
fn a_removed_function_is_detaching_until_it_is_withdrawn_from_its_guest() {
    let world = World::new();
    let vf = bdf("01:10.0");
    let (frontend, service) = attached(&world, vf);
    frontend.freeze();
    world.simulation.unplug(vf);
    service.wait_for_state(vf, FunctionState::Detaching);
}

#[test]
fn a_held_function_that_is_bound_to_a_driver_is_dom0s_again_in_xen_too() {
    let world = World::new();
    let vf = bdf("01:10.0");
    let service = world.start();
    service.hold(vf).unwrap();
    let host = world.host();
    host.set_driver_override(vf, Some("igbvf")).unwrap();
    host.unbind(vf, LIMIT).unwrap();
    host.probe(vf, LIMIT).unwrap();
    service.wait_for_state(vf, FunctionState::Host);
    wait_until("Xen knows it as dom0's", || world.simulation.owner(vf) == Some(Owner::Host));
}

#[test]
fn changes_are_found_even_if_events_are_lost() {
    let world = World::new();
    let (held, used) = (bdf("01:10.2"), bdf("01:10.0"));
    let (_frontend, service) = attached(&world, used);
    service.hold(held).unwrap();
    world.simulation.while_events_are_lost(|| {
        world.simulation.unplug(held);
        world.simulation.unplug(used);
    });
    wait_until("it is withdrawn", || withdrawn(&service, used));
    service.wait_for_state(held, FunctionState::Host);
}

#[test]
fn changes_while_the_service_was_stopped_are_found_at_its_start() {
    let world = World::new();
    let (held, used) = (bdf("01:10.2"), bdf("01:10.0"));
    let (_frontend, service) = attached(&world, used);
    service.hold(held).unwrap();
    service.kill();
    world.simulation.unplug(held);
    world.simulation.unplug(used);
    let service = world.start();
    wait_until("it is withdrawn", || withdrawn(&service, used));
    service.wait_for_state(held, FunctionState::Host);
    wait_until("nothing is granted", || world.simulation.grants(WEB).is_empty());
}

#[test]
fn a_function_removed_from_xens_list_is_planned_and_repaired() {
    let world = World::new();
    let (used, lost) = (bdf("01:10.0"), bdf("01:10.2"));
    let (frontend, service) = attached(&world, used);
    assert_eq!(synced(&service, false), [""; 0]);
    world.simulation.platform("somebody").unwrap().hypervisor.device_remove(lost).unwrap();
    let planned = synced(&service, true);
    assert!(planned.len() == 1 && planned[0].contains("report 0000:01:10.2 to Xen"), "{planned:?}");
    assert_eq!(world.simulation.owner(lost), None, "a dry run does nothing");
    assert_eq!(synced(&service, false), planned);
    assert_eq!(world.simulation.owner(lost), Some(Owner::Host));
    assert_eq!(synced(&service, false), [""; 0]);
    assert_eq!(frontend.read(0, 0, 4), 0x10ca_8086, "the guest never noticed");
}

#[test]
fn a_held_function_that_xen_forgot_is_held_again() {
    let world = World::new();
    let vf = bdf("01:10.0");
    let service = world.start();
    service.hold(vf).unwrap();
    world.simulation.platform("somebody").unwrap().hypervisor.device_remove(vf).unwrap();
    synced(&service, false);
    world.assert_held(&service, vf, "after sync");
    assert_eq!(synced(&service, true), [""; 0]);
}

#[test]
fn a_function_that_stops_answering_but_stays_is_quarantined() {
    let world = World::new();
    let vf = bdf("01:10.0");
    let (frontend, service) = attached(&world, vf);
    world.fail("config_read", Some(vf), Errno::ENODEV, 0);
    assert_eq!(frontend.read(0, 4, 2), 0xffff);
    service.wait_for_state(vf, FunctionState::Quarantined);
}
