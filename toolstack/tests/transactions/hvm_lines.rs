//! Interrupt lines of HVM guests: how they are delivered, several functions on one, and who may signal.
//!
//! The level itself is between hardware and Xen, which keeps the line asserted for the guest until that has handled it.

use nix::errno::Errno;
use pciback::serve::hvm::wire::xen::config;
use pciback::{FunctionState, Sbdf};

use crate::crashes::{at_each_change, settled};
use crate::hvm::{DEVICE_CONTROL, Guest, SLOT, VENDOR, WIN, assert_nothing_remains, attach_at};
use crate::world::{Service, World, bdf, wait_until};

/// Two functions on one interrupt line, INTA and INTB, with MSI.
const HOST: &str = r#"
drivers: [pci-stub]
models:
  inta:
    size: 256
    reset-methods: [flr]
    bars: {0: 1000}
    config: |
      00: 86 80 d3 10 00 00 10 00 00 00 00 02 00 00 00 00
      30: 00 00 00 00 a0 00 00 00 00 00 00 00 00 01 00 00
      50: 05 00 80 00 00 00 00 00 00 00 00 00 00 00 00 00
      a0: 10 50 02 00 00 00 00 10 00 00 00 00 11 04 00 00
  intb:
    size: 256
    reset-methods: [flr]
    bars: {0: 1000}
    config: |
      00: 86 80 d3 10 00 00 10 00 00 00 00 02 00 00 00 00
      30: 00 00 00 00 a0 00 00 00 00 00 00 00 00 02 00 00
      50: 05 00 80 00 00 00 00 00 00 00 00 00 00 00 00 00
      a0: 10 50 02 00 00 00 00 10 00 00 00 00 11 04 00 00
functions:
  - {address: "00:05.0", model: inta, irq: 20}
  - {address: "00:06.0", model: intb, irq: 20}
domains:
  - {id: 1, name: web, type: pv, passthrough: true}
"#;
const INTA: &str = "00:05.0";
const INTB: &str = "00:06.0";
const SECOND: u8 = 9;
const LINE: u32 = 20;
const COMMAND: u16 = 4;
const MEMORY: u32 = 2;
const INTX_OFF: u32 = 0x400;
const MSI: u16 = 0x50;

fn write(guest: &Guest, slot: u8, offset: u16, value: u32) {
    guest.ask(&config(slot, offset, 2, Some(value)));
}

/// Whether hardware may signal INTx.
fn signals(world: &World, address: Sbdf) -> bool {
    world.simulation.peek(address, COMMAND, 2)[1] & 4 == 0
}

/// Both functions are held: what dom0 had would keep the line from the guest.
fn held(world: &World) -> Service {
    let service = world.start();
    for function in [INTA, INTB] {
        service.hold(bdf(function)).unwrap();
    }
    service
}

fn attach(guest: &Guest, service: &Service, function: &str, slot: u8) {
    attach_at(service, bdf(function), slot).unwrap();
    wait_until("it is served", || guest.read(slot, VENDOR, 2) == 0x8086);
}

/// Both functions are the guest's, and decode.
fn attached() -> (World, Guest, Service) {
    let world = World::of(HOST);
    let guest = Guest::new(&world);
    let service = held(&world);
    for (function, slot) in [(INTA, SLOT), (INTB, SECOND)] {
        attach(&guest, &service, function, slot);
        assert!(!signals(&world, bdf(function)), "before its driver starts");
        write(&guest, slot, COMMAND, MEMORY);
        assert!(signals(&world, bdf(function)));
    }
    (world, guest, service)
}

#[test]
fn functions_of_one_guest_share_a_line_until_the_last_one_is_detached() {
    let (world, guest, service) = attached();
    let granted = || world.simulation.grants(WIN).lines;
    assert_eq!(guest.lines(), [(LINE, SECOND, 1), (LINE, SLOT, 0)]);
    assert_eq!(granted(), [LINE]);
    service.detach(WIN, bdf(INTA)).unwrap();
    assert_eq!(guest.lines(), [(LINE, SECOND, 1)]);
    assert_eq!(granted(), [LINE], "the other one needs it");
    assert!(signals(&world, bdf(INTB)) && !signals(&world, bdf(INTA)));
    service.detach(WIN, bdf(INTB)).unwrap();
    assert_nothing_remains(&world, &guest, "detached");
}

/// Xen would forget that the guest has still to acknowledge an interrupt.
#[test]
fn a_line_is_left_alone_while_the_guest_has_it() {
    let (world, guest, service) = attached();
    world.fail("bind_line", None, Errno::EIO, 0);
    for command in [INTX_OFF | MEMORY, MEMORY, 0, MEMORY] {
        write(&guest, SLOT, COMMAND, command);
    }
    enable_msi(&guest, true);
    enable_msi(&guest, false);
    service.kill();
    let service = world.start();
    assert_eq!(guest.read(SLOT, VENDOR, 2), 0x8086);
    reset(&guest, &service);
    assert_eq!(guest.lines(), [(LINE, SECOND, 1), (LINE, SLOT, 0)]);
    assert_eq!(world.simulation.pending_failures(), 1, "it was bound or unbound");
    world.simulation.forget_failures();
}

#[test]
fn interrupt_disable_keeps_one_function_off_a_line_that_the_other_goes_on_using() {
    let (world, guest, _service) = attached();
    write(&guest, SLOT, COMMAND, MEMORY | INTX_OFF);
    assert_eq!(guest.read(SLOT, COMMAND, 2), u64::from(MEMORY | INTX_OFF));
    assert_eq!((signals(&world, bdf(INTA)), signals(&world, bdf(INTB))), (false, true));
    write(&guest, SLOT, COMMAND, MEMORY);
    assert_eq!(guest.read(SLOT, COMMAND, 2), u64::from(MEMORY));
    assert_eq!((signals(&world, bdf(INTA)), signals(&world, bdf(INTB))), (true, true));
}

fn enable_msi(guest: &Guest, on: bool) {
    guest.ask(&config(SLOT, MSI + 4, 4, Some(0xfee0_0000)));
    guest.ask(&config(SLOT, MSI + 12, 2, Some(0x41)));
    write(guest, SLOT, MSI + 2, on.into());
}

#[test]
fn a_function_signals_by_its_line_again_when_msi_is_disabled() {
    let (world, guest, _service) = attached();
    enable_msi(&guest, true);
    assert_eq!((signals(&world, bdf(INTA)), signals(&world, bdf(INTB))), (false, true));
    assert_eq!(guest.read(SLOT, COMMAND, 2), u64::from(MEMORY), "that is not the guest's Interrupt Disable");
    enable_msi(&guest, false);
    assert!(signals(&world, bdf(INTA)));
}

/// The guest asks for a function level reset and waits for its end.
fn reset(guest: &Guest, service: &Service) {
    write(guest, SLOT, DEVICE_CONTROL, 0x8000);
    wait_until("it is reset", || guest.read(SLOT, VENDOR, 2) == 0x8086);
    service.wait_for_state(bdf(INTA), FunctionState::Attached);
}

#[test]
fn a_function_that_was_reset_signals_when_its_guest_has_switched_it_on() {
    let (world, guest, service) = attached();
    write(&guest, SLOT, COMMAND, MEMORY | INTX_OFF);
    reset(&guest, &service);
    assert_eq!(guest.read(SLOT, COMMAND, 2) as u32 & (MEMORY | INTX_OFF), 0, "a reset clears both");
    assert!(!signals(&world, bdf(INTA)));
    write(&guest, SLOT, COMMAND, MEMORY);
    assert!(signals(&world, bdf(INTA)));
}

/// While it is reset the guest reads all ones, also of the pin. A line that stayed bound would be dead for the next function on it.
#[test]
fn a_function_whose_reset_fails_leaves_its_line() {
    let (world, guest, service) = attached();
    world.fail("reset", Some(bdf(INTA)), Errno::EIO, 0);
    write(&guest, SLOT, DEVICE_CONTROL, 0x8000);
    service.wait_for_state(bdf(INTA), FunctionState::Quarantined);
    wait_until("its line is taken from the guest", || guest.lines() == [(LINE, SECOND, 1)]);
    assert!(signals(&world, bdf(INTB)));
}

#[test]
fn an_attach_that_is_killed_anywhere_leaves_no_line_or_a_bound_one() {
    at_each_change(5..100, |change, moment, why| {
        let world = World::of(HOST);
        let guest = Guest::new(&world);
        let service = held(&world);
        attach(&guest, &service, INTB, SECOND);
        service.fuse.arm(change, moment);
        if attach_at(&service, bdf(INTA), SLOT).is_ok() && !service.fuse.is_blown() {
            return false;
        }
        service.kill();
        let service = world.start();
        settled(&service, why);
        let both = [(LINE, SECOND, 1), (LINE, SLOT, 0)];
        match service.state(bdf(INTA)) {
            FunctionState::Held => assert_eq!(guest.lines(), both[..1], "{why}"),
            _ => assert_eq!(guest.lines(), both, "{why}"),
        }
        assert_eq!(world.simulation.grants(WIN).lines, [LINE], "{why}");
        true
    });
}
