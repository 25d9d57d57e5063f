//! Hardware stays as the host set it up, against changes by guests and functions.

use crate::Sbdf;
use crate::config::{Access, InterruptMode};
use crate::platform::MsiSource;
use crate::serve::GuestFunction;
use crate::serve::test_machine::{DEVICE_CONTROL, MSI, Machine};

const ADDRESS: Sbdf = Sbdf::from_devfn(0, 1, 0x10);
const LINE: u32 = 17;
const COMMAND: u16 = 4;
const DECODING: u16 = 3;
const BUS_MASTER: u16 = 4;
const INTX_OFF: u16 = 0x400;

fn write(function: &mut GuestFunction, offset: u16, size: u32, value: u32) {
    let access = Access::new(offset.into(), size).unwrap();
    assert!(!function.write_config(access, value).failed, "{offset:#x}: {value:#x}");
}

fn read(function: &mut GuestFunction, offset: u16) -> u16 {
    function.read_config(Access::new(offset.into(), 2).unwrap()).value as u16
}

fn enable_msi(function: &mut GuestFunction) {
    assert_eq!(function.enable(InterruptMode::Msi, &[MsiSource::Msi]).unwrap().len(), 1);
}

#[test]
fn hardware_goes_on_decoding_what_the_guest_switches_off() {
    let machine = Machine::new();
    let mut function = machine.open(ADDRESS);
    for (written, on) in [(0x0002u32, 2), (0, 0), (0x0006, 2), (0x0400, 0)] {
        write(&mut function, COMMAND, 2, written);
        assert_eq!(machine.word(ADDRESS, COMMAND) & DECODING, 2, "hardware after {written:#x}");
        assert_eq!(read(&mut function, COMMAND) & DECODING, on, "the guest after {written:#x}");
    }
    write(&mut function, COMMAND, 1, 0);
    assert_eq!(machine.word(ADDRESS, COMMAND) & DECODING, 2);
}

#[test]
fn a_function_that_reset_itself_gets_its_bars_and_decoding_back_when_its_driver_writes_them() {
    let machine = Machine::new();
    let mut function = machine.open(ADDRESS);
    write(&mut function, COMMAND, 2, 6);
    let restores: [fn(&mut GuestFunction); 2] =
        [|function| write(function, 0x10, 4, 0xfe00_0000), |function| write(function, COMMAND, 2, 6)];
    for restore in restores {
        for offset in [COMMAND, 0x10, 0x12] {
            machine.set_word(ADDRESS, offset, 0);
        }
        restore(&mut function);
        assert_eq!((machine.word(ADDRESS, 0x12), machine.word(ADDRESS, 0x10)), (0xfe00, 0));
        assert_eq!(machine.word(ADDRESS, COMMAND) & DECODING, 2);
    }
    assert_eq!(machine.word(ADDRESS, COMMAND) & BUS_MASTER, BUS_MASTER);
}

#[test]
fn a_function_that_reset_itself_gets_its_message_back_when_its_driver_writes_msi_enable() {
    let machine = Machine::new();
    let mut function = machine.open(ADDRESS);
    enable_msi(&mut function);
    for offset in [MSI + 2, MSI + 4] {
        machine.set_word(ADDRESS, offset, 0);
    }
    // As Linux restores MSI: first off, then on.
    let control = u32::from(read(&mut function, MSI + 2));
    write(&mut function, MSI + 2, 2, control & !1);
    write(&mut function, MSI + 2, 2, control | 1);
    assert_eq!((machine.word(ADDRESS, MSI + 2) & 1, machine.word(ADDRESS, MSI + 4)), (1, 0xfee0));
}

#[test]
fn intx_is_masked_in_hardware_where_the_guest_masks_it_or_cannot_hear_it() {
    for (line, command, masked) in [
        (LINE, 0x0002, false),
        (LINE, 0x0402, true),
        (LINE, 0x0000, true),
        (LINE, 0x0003, false),
        (0, 0x0002, true),
    ] {
        let machine = Machine::new();
        let mut function = machine.open_with_line(ADDRESS, line);
        function.keep_hardware().unwrap();
        assert_ne!(machine.word(ADDRESS, COMMAND) & INTX_OFF, 0, "before its driver starts");
        write(&mut function, COMMAND, 2, command);
        let found = machine.word(ADDRESS, COMMAND) & INTX_OFF != 0;
        assert_eq!(found, masked, "line {line}, Command {command:#x}");
        assert_eq!(read(&mut function, COMMAND) & INTX_OFF, command as u16 & INTX_OFF);
    }
}

/// As uio_pci_generic and vfio-pci ask whether Interrupt Disable works: toggled by one write, read back, toggled back.
#[test]
fn drivers_that_mask_intx_by_command_find_that_it_works() {
    let machine = Machine::new();
    let mut function = machine.open_with_line(ADDRESS, LINE);
    write(&mut function, COMMAND, 2, 2);
    let before = read(&mut function, COMMAND);
    write(&mut function, COMMAND, 2, u32::from(before ^ INTX_OFF));
    let after = read(&mut function, COMMAND);
    assert_eq!((after ^ before, machine.word(ADDRESS, COMMAND) & INTX_OFF), (INTX_OFF, INTX_OFF));
    write(&mut function, COMMAND, 2, before.into());
    assert_eq!((read(&mut function, COMMAND), machine.word(ADDRESS, COMMAND) & INTX_OFF), (before, 0));
}

#[test]
fn intx_is_masked_while_messages_are_enabled_and_when_the_guest_loses_the_function() {
    let machine = Machine::new();
    let mut function = machine.open_with_line(ADDRESS, LINE);
    write(&mut function, COMMAND, 2, 6);
    let masked = || machine.word(ADDRESS, COMMAND) & INTX_OFF != 0;
    assert!(!masked());
    enable_msi(&mut function);
    assert!(masked(), "with MSI");
    function.release().unwrap();
    assert!(!masked(), "without MSI");
    function.quiesce().unwrap();
    assert!(masked(), "quiesced");
    assert_eq!(machine.word(ADDRESS, COMMAND) & DECODING, 2, "a guest may still reach its BARs");
}

#[test]
fn a_reset_leaves_the_function_decoding_for_the_host_and_switched_off_for_the_guest() {
    let machine = Machine::new();
    let mut function = machine.open_with_line(ADDRESS, LINE);
    write(&mut function, COMMAND, 2, 6);
    write(&mut function, DEVICE_CONTROL, 2, 0x8000);
    machine.set_word(ADDRESS, COMMAND, 0);
    function.reset_done().unwrap();
    assert_eq!(read(&mut function, COMMAND) & (DECODING | BUS_MASTER), 0);
    assert_eq!(machine.word(ADDRESS, COMMAND) & (DECODING | INTX_OFF), 2 | INTX_OFF);
}
