//! The window to config space of HVM guests, in which their device model's functions answer beside ours.

use std::time::Duration;

use pciback::platform::sim;
use pciback::serve::hvm::ECAM_BASE;
use pciback::serve::hvm::wire::xen::{Access, memory};

use crate::hvm::{Guest, SLOT, WIN, assert_nothing_remains, attached};
use crate::world::{LIMIT, bdf, wait_until};

const INTERRUPT_LINE: u64 = 0x3c;
/// The host bridge, the ISA bridge, and the platform device.
const MODELS: [(u64, u32); 5] =
    [(0, 0x1237_8086), (0x08, 0x7000_8086), (0x09, 0x7010_8086), (0x0b, 0x7113_8086), (0x10, 0x0001_5853)];
/// `LIMIT` of an access, and the time after which an operation on the guest's thread is given up.
const ANSWERED: Duration = Duration::from_secs(1);

fn access(function: u64, at: u64, size: u32, write: Option<u64>) -> Access {
    memory(ECAM_BASE + function * 0x1000 + at, size, write)
}

fn id(guest: &Guest, function: u64) -> u32 {
    guest.ask(&access(function, 0, 4, None)) as u32
}

#[test]
fn a_system_that_uses_only_the_window_finds_all_functions_of_the_guest() {
    let (_world, guest, service) = attached();
    let found: Vec<_> = (0..256).map(|function| (function, id(&guest, function))).collect();
    let ours = (u64::from(SLOT) << 3, 0x10ca_8086);
    let all: Vec<_> = MODELS.into_iter().chain([ours]).collect();
    assert_eq!(found.into_iter().filter(|(_, id)| *id != u32::MAX).collect::<Vec<_>>(), all);
    assert_eq!(service.status().guests[0].errors, 0);
}

#[test]
fn registers_of_the_device_model_are_written_in_the_window() {
    let (_world, guest, _service) = attached();
    guest.ask(&access(0x10, INTERRUPT_LINE, 1, Some(0x5)));
    assert_eq!(guest.ask(&access(0x10, INTERRUPT_LINE, 1, None)), 5);
    // Those of a function have neighbours.
    guest.ask(&access(0x10, 0x41, 4, Some(0x4433_2211)));
    assert_eq!(guest.ask(&access(0x10, 0x40, 8, None)), 0x44_3322_1100);
    assert_eq!(guest.ask(&access(0x10, 0x100, 4, None)), 0xffff_ffff);
    assert_eq!(id(&guest, 0x10), 0x0001_5853);
}

#[test]
fn a_device_that_another_toolstack_plugs_is_found_in_the_window() {
    let (world, guest, _service) = attached();
    assert_eq!(id(&guest, 9 << 3), u32::MAX);
    world.simulation.hotplug(WIN).plug_other(9);
    wait_until("it is found", || id(&guest, 9 << 3) == 0x100e_8086);
}

#[test]
fn a_device_model_that_does_not_answer_keeps_the_service_from_nothing() {
    let (world, guest, service) = attached();
    world.simulation.fail(sim::Failure {
        operation: "functions_of_model".into(),
        delay: Duration::MAX,
        times: 1,
        ..sim::Failure::default()
    });
    let waiting = guest.begin(&access(0, 0, 4, None));
    wait_until("the device model is asked", || world.simulation.pending_failures() == 0);
    service.detach(WIN, bdf("01:10.0")).unwrap();
    assert_eq!(waiting.answer(LIMIT).unwrap() as u32, u32::MAX);
    assert_nothing_remains(&world, &guest, "detached");
}

#[test]
fn a_device_model_that_did_not_answer_is_asked_again_only_after_a_while() {
    let (world, guest, service) = attached();
    world.simulation.fail(sim::Failure {
        operation: "functions_of_model".into(),
        delay: Duration::MAX,
        times: 100,
        ..sim::Failure::default()
    });
    assert_eq!(guest.begin(&access(0, 0, 4, None)).answer(ANSWERED * 2).unwrap() as u32, u32::MAX);
    for function in 0..256 {
        assert_eq!(id(&guest, function) != u32::MAX, function == u64::from(SLOT) << 3, "{function:x}");
    }
    assert!(world.simulation.pending_failures() >= 98, "it is asked again and again");
    assert!((1..=2).contains(&service.status().guests[0].errors));
    world.simulation.forget_failures();
}
