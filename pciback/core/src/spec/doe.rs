//! Offsets and bits in the Data Object Exchange extended capability (PCI Express 6.0, section 7.9.24).

/// Bytes that it takes.
pub const LENGTH: u16 = 0x18;
/// DOE Control.
pub const CONTROL: u16 = 0x08;
/// DOE Control: DOE Abort.
pub const ABORT: u32 = 1 << 0;
/// DOE Control: DOE Go.
pub const GO: u32 = 1 << 31;
/// DOE Status.
pub const STATUS: u16 = 0x0c;
/// DOE Status: DOE Error.
pub const ERROR: u32 = 1 << 2;
/// DOE Status: Data Object Ready.
pub const READY: u32 = 1 << 31;
/// DOE Write Data Mailbox.
pub const WRITE_DATA: u16 = 0x10;
/// DOE Read Data Mailbox.
pub const READ_DATA: u16 = 0x14;
