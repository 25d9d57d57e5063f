//! What is persistent goes with the device, not with its address.

use std::fs;
use std::path::Path;

use super::*;

#[test]
fn another_device_at_its_address_is_not_given_to_the_guest() {
    let nic = bdf("02:00.0");
    let (world, service) = persistent(nic);
    world.simulation.destroy(WEB);
    service.wait_for_state(nic, FunctionState::Held);
    world.simulation.unplug(nic);
    wait_until("it is forgotten", || service.view(nic).is_none());
    world.simulation.plug(r#"{address: "02:00.0", model: nvme, irq: 11}"#).unwrap();
    service.hold(nic).unwrap();
    world.simulation.create_guest(AGAIN, "web", "pv", web_uuid()).unwrap();
    wait_until("it is reported", || problem(&service).contains("not the 1af4:1041"));
    // The function that replaced it belongs to no guest.
    service.attach(DB, nic).unwrap();
    service.detach(DB, nic).unwrap();
    service.detach_only(AGAIN, nic, Scope::Persistent).unwrap();
    assert_eq!(problem(&service), "");
}

/// The host with a card that has a serial number, at this address.
fn with_card(address: Sbdf) -> World {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/sim/two-guests.yaml");
    let model = "models:
  card:
    reset-methods: [flr]
    bars: {0: 4000}
    config: |
      00: 86 80 d3 10 00 00 10 00 00 00 00 02 00 00 00 00
      30: 00 00 00 00 a0 00 00 00 00 00 00 00 00 01 00 00
      a0: 10 00 02 00 00 00 00 10 00 00 00 00 11 04 00 00
      100: 03 00 01 00 56 34 12 ff ff 00 54 52 00 00 00 00
";
    let world = World::of(&fs::read_to_string(path).unwrap().replace("models: {}\n", model));
    plug(&world, address, "card");
    world
}

fn plug(world: &World, address: Sbdf, model: &str) {
    world.simulation.plug(&format!("{{address: \"{address}\", model: {model}}}")).unwrap();
}

/// The guest ends, and the service with it; a card is added, and bus numbers are others when the host has started again.
fn moved(world: &World, service: Service, from: Sbdf, to: Sbdf) {
    world.simulation.destroy(WEB);
    service.wait_for_state(from, FunctionState::Held);
    service.stop();
    world.simulation.unplug(from);
    plug(world, to, "card");
    plug(world, from, "nvme");
}

#[test]
fn a_moved_device_goes_to_its_guest_and_the_one_at_its_old_address_does_not() {
    let [old, new] = ["04:00.0", "06:00.0"].map(bdf);
    let world = with_card(old);
    let service = world.start();
    service.hold(old).unwrap();
    service.persist(WEB, old).unwrap();
    moved(&world, service, old, new);
    let service = world.start();
    assert_eq!(addresses(listed(&service, Some("web"))), [new]);
    service.hold(old).unwrap();
    service.hold(new).unwrap();
    let failure = service.attach(DB, new).unwrap_err();
    assert!(failure.message.contains("0000:06:00.0 is reserved for guest 'web'"), "{failure}");
    world.simulation.create_guest(AGAIN, "web", "pv", web_uuid()).unwrap();
    let _frontend = Frontend::load(&world, AGAIN);
    wait_until("its guest has it", || is_attached(&service, new, AGAIN));
    assert_eq!((service.state(old), problem(&service)), (FunctionState::Held, String::new()));
    // What came to its place can be another guest's, also persistently.
    service.persist(DB, old).unwrap();
    assert_eq!(addresses(listed(&service, None)), [old, new]);
    service.stop();
    let service = world.start();
    assert_eq!(addresses(listed(&service, Some("web"))), [new], "also after a restart");
    service.detach(AGAIN, new).unwrap();
    assert_eq!(addresses(listed(&service, None)), [old]);
}

#[test]
fn a_device_that_moves_while_its_guest_waits_for_it_is_given_at_its_new_address() {
    let [old, new] = ["04:00.0", "06:00.0"].map(bdf);
    let world = with_card(old);
    let service = world.start();
    service.hold(old).unwrap();
    service.persist(WEB, old).unwrap();
    world.simulation.destroy(WEB);
    service.wait_for_state(old, FunctionState::Held);
    world.simulation.unplug(old);
    wait_until("it is forgotten", || service.view(old).is_none());
    world.simulation.create_guest(AGAIN, "web", "pv", web_uuid()).unwrap();
    let _frontend = Frontend::load(&world, AGAIN);
    wait_until("it is missing", || {
        problem(&service).contains("0000:04:00.0 is missing in 'web' (domain 11)")
    });
    plug(&world, new, "card");
    service.hold(new).unwrap();
    wait_until("its guest has it", || is_attached(&service, new, AGAIN));
    assert_eq!(problem(&service), "");
}

#[test]
fn settings_by_address_mean_the_first_device_at_it() {
    let [old, new] = ["04:00.0", "06:00.0"].map(bdf);
    let world = with_card(old);
    let frontend = Frontend::load(&world, WEB);
    let service = world.start_with_guest("web", &["04:00.0"]);
    service.hold(old).unwrap();
    wait_until("its guest has it", || is_attached(&service, old, WEB));
    drop(frontend);
    moved(&world, service, old, new);
    let service = world.start_with_guest("web", &["04:00.0"]);
    service.hold(old).unwrap();
    world.simulation.create_guest(AGAIN, "web", "pv", web_uuid()).unwrap();
    let _frontend = Frontend::load(&world, AGAIN);
    wait_until("it is missing", || {
        problem(&service).contains("0000:06:00.0 is missing in 'web' (domain 11)")
    });
    service.hold(new).unwrap();
    wait_until("its guest has it", || is_attached(&service, new, AGAIN));
    assert_eq!((service.state(old), problem(&service)), (FunctionState::Held, String::new()));
    assert_eq!(addresses(listed(&service, None)), [new]);
}

#[test]
fn another_device_at_an_address_of_the_settings_is_reported_and_not_given() {
    let nic = bdf("04:00.0");
    let world = with_card(nic);
    let frontend = Frontend::load(&world, WEB);
    let service = world.start_with_guest("web", &["04:00.0"]);
    service.hold(nic).unwrap();
    wait_until("its guest has it", || is_attached(&service, nic, WEB));
    drop(frontend);
    world.simulation.destroy(WEB);
    service.wait_for_state(nic, FunctionState::Held);
    service.stop();
    world.simulation.unplug(nic);
    plug(&world, nic, "nvme");
    world.simulation.create_guest(AGAIN, "web", "pv", web_uuid()).unwrap();
    let _frontend = Frontend::load(&world, AGAIN);
    let service = world.start_with_guest("web", &["04:00.0"]);
    service.hold(nic).unwrap();
    wait_until("it is reported", || problem(&service).contains("not the 8086:10d3 that guest 'web'"));
    assert_eq!(service.state(nic), FunctionState::Held);
}
