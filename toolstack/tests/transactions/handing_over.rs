//! What a function is like when it changes hands, and what the next guest finds.

use pciback::{DomId, FunctionState, Sbdf};

use crate::frontend::{Frontend, read_op, write_op};
use crate::world::{DB, Service, WEB, World, bdf, wait_until};

const VF: &str = "01:10.0";
/// A function with registers of its own, which a VF has not: Device Control, Link Control and Device Control 2 of its PCI Express
/// capability at 0x80.
const NVME: &str = "03:00.0";
const DEVICE_CONTROL: u32 = 0x88;
const LINK_CONTROL: u32 = 0x90;
const DEVICE_CONTROL_2: u32 = 0xa8;
const CONTROLS: [u32; 3] = [DEVICE_CONTROL, LINK_CONTROL, DEVICE_CONTROL_2];

/// Relaxed ordering on, snooping required; ASPM L1 and clock power management; a range of completion timeouts and IDO for requests.
fn firmware_sets_registers(world: &World) -> Vec<Vec<u8>> {
    for (at, value) in CONTROLS.into_iter().zip([0x2010u16, 0x0102, 0x0105]) {
        world.simulation.poke(bdf(NVME), at as u16, &value.to_le_bytes());
    }
    registers(world)
}

fn registers(world: &World) -> Vec<Vec<u8>> {
    CONTROLS.into_iter().map(|at| world.simulation.peek(bdf(NVME), at as u16, 2)).collect()
}

/// Attaches a function to a guest, whose frontend is connected to it when this returns.
fn give(world: &World, service: &Service, domain: DomId, address: Sbdf) -> Frontend {
    let frontend = Frontend::load(world, domain);
    service.attach(domain, address).unwrap();
    wait_until("the guest has it", || frontend.ask(&read_op(0, 0, 4)).0 == 0);
    frontend
}

/// Changes every register that it can reach in hardware.
fn guest_changes_registers(world: &World, frontend: &Frontend, before: &[Vec<u8>]) {
    for (at, value) in CONTROLS.into_iter().zip([0x0800, 0x0000, 0x020a]) {
        frontend.ask(&write_op(0, at, 2, value));
    }
    let changed = registers(world);
    for (at, (now, before)) in CONTROLS.into_iter().zip(changed.iter().zip(before)) {
        assert_ne!(now, before, "{at:#x} is one that the guest reaches");
    }
}

/// The controller with a guest that has changed its registers, and what they were before.
fn changed_by_its_guest() -> (World, Vec<Vec<u8>>, Service, Frontend) {
    let world = World::new();
    let before = firmware_sets_registers(&world);
    let service = world.start();
    service.hold(bdf(NVME)).unwrap();
    let web = give(&world, &service, WEB, bdf(NVME));
    guest_changes_registers(&world, &web, &before);
    (world, before, service, web)
}

#[test]
fn the_next_guest_finds_the_registers_as_they_were_when_the_function_was_first_held() {
    let world = World::new();
    let before = firmware_sets_registers(&world);
    let service = world.start();
    service.hold(bdf(NVME)).unwrap();
    let web = give(&world, &service, WEB, bdf(NVME));
    let seen_by_the_first = CONTROLS.map(|at| web.read(0, at, 2));
    guest_changes_registers(&world, &web, &before);
    service.detach(WEB, bdf(NVME)).unwrap();
    assert_eq!(registers(&world), before, "after the detach");
    let db = give(&world, &service, DB, bdf(NVME));
    assert_eq!(registers(&world), before, "after the attach");
    assert_eq!(CONTROLS.map(|at| db.read(0, at, 2)), seen_by_the_first);
}

#[test]
fn dom0_gets_a_function_back_with_the_registers_it_had() {
    let (world, before, service, _web) = changed_by_its_guest();
    service.detach(WEB, bdf(NVME)).unwrap();
    service.release(bdf(NVME)).unwrap();
    assert_eq!(registers(&world), before);
}

#[test]
fn registers_that_a_policy_opens_are_restored_too() {
    let world = World::new();
    let before = firmware_sets_registers(&world);
    let open = "match: {vendor: 1b36}\ncapabilities:\n  pci-express:\n    registers:\n      - at: Device Control\n        mask: 0x7000\n        action: pass\n        reason: a test\n";
    let service = world.start_with(&[open]);
    service.hold(bdf(NVME)).unwrap();
    let web = give(&world, &service, WEB, bdf(NVME));
    web.ask(&write_op(0, DEVICE_CONTROL, 2, 0x5010));
    assert_eq!(world.simulation.peek(bdf(NVME), DEVICE_CONTROL as u16, 2), [0x10, 0x50]);
    service.detach(WEB, bdf(NVME)).unwrap();
    assert_eq!(registers(&world), before);
}

#[test]
fn the_noted_registers_survive_a_killed_service() {
    let (world, before, service, _web) = changed_by_its_guest();
    service.kill();
    let service = world.start();
    assert_eq!(service.state(bdf(NVME)), FunctionState::Attached);
    service.detach(WEB, bdf(NVME)).unwrap();
    assert_eq!(registers(&world), before);
}

#[test]
fn registers_that_dom0_sets_while_a_function_is_held_are_kept() {
    let world = World::new();
    firmware_sets_registers(&world);
    let service = world.start();
    service.hold(bdf(NVME)).unwrap();
    // Max_Payload_Size, which no guest reaches.
    world.simulation.poke(bdf(NVME), DEVICE_CONTROL as u16, &0x2030u16.to_le_bytes());
    let _web = give(&world, &service, WEB, bdf(NVME));
    service.detach(WEB, bdf(NVME)).unwrap();
    assert_eq!(world.simulation.peek(bdf(NVME), DEVICE_CONTROL as u16, 2), [0x30, 0x20]);
}

#[test]
fn a_register_that_does_not_take_its_value_back_quarantines_the_function() {
    let world = World::new();
    // A VF's Device Control is read-only to software, and the resets clear this bit.
    world.simulation.poke(bdf(VF), 0xa8, &0x0800u16.to_le_bytes());
    let service = world.start();
    service.hold(bdf(VF)).unwrap();
    let _web = give(&world, &service, WEB, bdf(VF));
    let failure = service.detach(WEB, bdf(VF)).unwrap_err();
    assert!(failure.message.contains("Device Control at 0xa8, bits 0x800"), "{failure}");
    assert_eq!(service.state(bdf(VF)), FunctionState::Quarantined);
}

#[test]
fn errors_of_one_guest_are_not_shown_to_the_next() {
    let world = World::new();
    let service = world.start();
    service.hold(bdf(VF)).unwrap();
    let web = give(&world, &service, WEB, bdf(VF));
    world.simulation.poke(bdf(VF), 0x104, &0x0000_4000u32.to_le_bytes());
    assert_eq!(web.read(0, 0x104, 4), 0x4000);
    service.detach(WEB, bdf(VF)).unwrap();
    let db = give(&world, &service, DB, bdf(VF));
    assert_eq!(db.read(0, 0x104, 4), 0);
}

#[test]
fn msix_that_a_policy_hides_is_not_prepared_in_xen() {
    let world = World::new();
    let hide =
        "match: {vendor: 8086, device: 10ca}\ncapabilities:\n  msi-x: {action: hide, reason: a test}\n";
    let service = world.start_with(&[hide]);
    service.hold(bdf(VF)).unwrap();
    service.attach(WEB, bdf(VF)).unwrap();
    assert!(!world.simulation.msix_prepared(bdf(VF)));
    assert!(!world.record(bdf(VF)).unwrap().msix_prepared);
    service.detach(WEB, bdf(VF)).unwrap();
    assert_eq!(service.state(bdf(VF)), FunctionState::Held);
}

#[test]
fn a_reset_that_the_kernel_reports_and_hardware_ignored_is_no_reset() {
    let world = World::new();
    let service = world.start();
    service.hold(bdf(VF)).unwrap();
    world.simulation.ignore_resets(bdf(VF), true);
    let failure = service.attach(WEB, bdf(VF)).unwrap_err();
    assert!(failure.message.contains("still has its earlier value"), "{failure}");
    assert_eq!(service.state(bdf(VF)), FunctionState::Quarantined, "its way back needs a reset, too");
    assert_eq!(world.simulation.peek(bdf(VF), 0x72, 2)[1] & 0xc0, 0, "Function Mask is as before");
    world.simulation.ignore_resets(bdf(VF), false);
    service.clear(bdf(VF)).unwrap();
    service.attach(WEB, bdf(VF)).unwrap();
}
