//! What is written to hardware, and what is made of its answers.

use std::cell::RefCell;
use std::io;

use super::*;
use crate::spec::{header, legacy};

/// Registers of which some bits do not change.
struct Registers {
    bytes: RefCell<Vec<u8>>,
    stuck: u32,
    writes: RefCell<Vec<(u16, u32)>>,
}

/// Where its MSI and MSI-X capabilities are.
const MSI: u16 = 0x50;
const MSI_X: u16 = 0x70;

impl Registers {
    fn new() -> Self {
        let mut bytes = vec![0u8; 256];
        bytes[..8].copy_from_slice(&[0x86, 0x80, 0xca, 0x10, 0x07, 0x00, 0x10, 0x00]);
        bytes[0x34] = 0x50;
        bytes[0x50..0x54].copy_from_slice(&[0x05, 0x70, 0x01, 0x00]);
        bytes[0x70..0x74].copy_from_slice(&[0x11, 0x00, 0x02, 0xc0]);
        Self { bytes: RefCell::new(bytes), stuck: 0, writes: RefCell::default() }
    }

    fn silent() -> Self {
        Self { bytes: RefCell::new(vec![0xff; 256]), ..Self::new() }
    }
}

impl ConfigSpace for Registers {
    fn size(&self) -> u16 {
        256
    }

    fn read(&self, access: Access) -> io::Result<u32> {
        let bytes = self.bytes.borrow();
        let range = usize::from(access.offset())..usize::from(access.offset() + access.width().bytes());
        Ok(bytes[range].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    fn write(&self, access: Access, value: u32) -> io::Result<()> {
        let before = self.read(access)?;
        self.writes.borrow_mut().push((access.offset(), value));
        let kept = before & self.stuck | value & !self.stuck;
        let kept = if before == access.width().mask() { before } else { kept };
        for (at, byte) in
            (usize::from(access.offset())..).zip(&kept.to_le_bytes()[..usize::from(access.width().bytes())])
        {
            self.bytes.borrow_mut()[at] = *byte;
        }
        Ok(())
    }
}

#[test]
fn a_function_that_is_switched_off_masters_no_bus_and_sends_no_interrupt() {
    let registers = Registers::new();
    assert!(switch_off(&registers).unwrap());
    let read = |offset: u16| registers.read(Access::new(offset.into(), 2).unwrap()).unwrap() as u16;
    assert_eq!(
        read(header::COMMAND),
        header::COMMAND_IO | header::COMMAND_MEMORY | header::COMMAND_INTERRUPT_DISABLE
    );
    assert_eq!(read(MSI + legacy::MESSAGE_CONTROL) & legacy::MSI_ENABLE, 0);
    assert_eq!(read(MSI_X + legacy::MESSAGE_CONTROL), legacy::MSIX_FUNCTION_MASK | 2);
    // Bus mastering goes first.
    assert_eq!(registers.writes.borrow()[0], (header::COMMAND, 0x3));
}

#[test]
fn a_function_that_is_switched_off_decodes_no_rom_and_a_bridge_keeps_what_it_has_there() {
    let rom = Access::new(header::ROM.into(), 4).unwrap();
    for (header_type, left) in [(0u8, 0xfeb8_0000), (0x80, 0xfeb8_0000), (1, 0xfeb8_0001)] {
        let registers = Registers::new();
        registers.bytes.borrow_mut()[usize::from(header::HEADER_TYPE)] = header_type;
        registers.write(rom, 0xfeb8_0001).unwrap();
        switch_off(&registers).unwrap();
        assert_eq!(registers.read(rom).unwrap(), left, "{header_type:#x}");
    }
}

#[test]
fn a_bit_that_stays_set_is_an_error_that_names_the_register() {
    for (stuck, name) in [(0x4, "Bus Master Enable"), (0x1, "MSI Enable"), (0x8000, "MSI-X Enable")] {
        let registers = Registers { stuck, ..Registers::new() };
        let error = switch_off(&registers).unwrap_err().to_string();
        assert!(error.starts_with(name), "{stuck:#x}: {error}");
    }
    let registers = Registers { stuck: 0x4, ..Registers::new() };
    assert!(clear_bus_master(&registers).is_err());
    let registers = Registers::new();
    registers.write(Access::new(header::ROM.into(), 4).unwrap(), 1).unwrap();
    let registers = Registers { stuck: 0x1, ..registers };
    assert!(disable_rom(&registers).unwrap_err().to_string().starts_with("Expansion ROM Enable"));
}

#[test]
fn what_answers_all_ones_is_not_called_switched_off() {
    let registers = Registers::silent();
    assert!(!switch_off(&registers).unwrap());
    assert!(registers.writes.borrow().is_empty());
    assert_eq!(change(&registers, COMMAND, 1, 0).unwrap(), Changed::Silent);
}

#[test]
fn a_register_that_reads_as_wanted_is_not_written_unless_asked() {
    let registers = Registers::new();
    assert_eq!(change(&registers, COMMAND, 0, 0x2).unwrap(), Changed::Kept);
    assert!(registers.writes.borrow().is_empty());
    assert_eq!(rewrite(&registers, COMMAND, 0, 0x2).unwrap(), Changed::Kept);
    assert_eq!(*registers.writes.borrow(), [(header::COMMAND, 0x7)]);
}

#[test]
fn a_function_may_send_intx_unless_that_is_off_or_messages_take_its_place() {
    let function = |pin: u8, command: u16, msi: u16, msix: u16| {
        let mut bytes = vec![0; 256];
        (bytes[0x06], bytes[0x34], bytes[0x3d]) = (0x10, 0x50, pin);
        bytes[4..6].copy_from_slice(&command.to_le_bytes());
        (bytes[0x50], bytes[0x51], bytes[0x70]) = (0x05, 0x70, 0x11);
        bytes[0x52..0x54].copy_from_slice(&msi.to_le_bytes());
        bytes[0x72..0x74].copy_from_slice(&msix.to_le_bytes());
        may_send_intx(&bytes)
    };
    assert!(function(1, 0, 0, 0));
    assert!(!function(0, 0, 0, 0), "it has no pin");
    assert!(!function(1, header::COMMAND_INTERRUPT_DISABLE, 0, 0));
    assert!(!function(1, 0, legacy::MSI_ENABLE, 0));
    assert!(!function(1, 0, 0, legacy::MSIX_ENABLE));
}
