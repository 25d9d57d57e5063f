//! The type 0 header (PCI Express 6.0, section 7.5.1.1 and 7.5.1.2).

/// Vendor ID.
pub const VENDOR_ID: u16 = 0x00;
/// Device ID.
pub const DEVICE_ID: u16 = 0x02;
/// Command.
pub const COMMAND: u16 = 0x04;
/// Status.
pub const STATUS: u16 = 0x06;
/// Status: a capability list exists.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Revision ID, then three bytes of class code.
pub const REVISION_ID: u16 = 0x08;
/// Header type.
pub const HEADER_TYPE: u16 = 0x0e;
/// Header type: the device has several functions.
pub const MULTI_FUNCTION: u8 = 0x80;
/// The first of six BARs.
pub const BAR0: u16 = 0x10;
/// Subsystem Vendor ID.
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
/// Subsystem ID.
pub const SUBSYSTEM_ID: u16 = 0x2e;
/// Expansion ROM base address.
pub const ROM: u16 = 0x30;
/// Capabilities pointer.
pub const CAPABILITIES_POINTER: u16 = 0x34;
/// Interrupt line.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Interrupt pin.
pub const INTERRUPT_PIN: u16 = 0x3d;
/// Bytes of the header.
pub const SIZE: u16 = 0x40;
/// Where extended config space begins.
pub const EXTENDED: u16 = 0x100;

/// Command: I/O space enable.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command: memory space enable.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: bus master enable.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
