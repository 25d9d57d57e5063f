//! The type 0 header (PCI Express 6.0, sections 7.5.1.1 and 7.5.1.2).

use super::register::{Register, constant, control, register, rsvdz, rw1c, status, trigger};

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
/// Cache line size.
pub const CACHE_LINE_SIZE: u16 = 0x0c;
/// Latency timer.
pub const LATENCY_TIMER: u16 = 0x0d;
/// Built-in self test.
pub const BIST: u16 = 0x0f;
/// Header type.
pub const HEADER_TYPE: u16 = 0x0e;
/// Header type: the device has several functions.
pub const MULTI_FUNCTION: u8 = 0x80;
/// The first of six BARs.
pub const BAR0: u16 = 0x10;
/// Secondary Bus Number of a bridge (Type 1 header).
pub const SECONDARY_BUS: u16 = 0x19;
/// Subordinate Bus Number of a bridge (Type 1 header).
pub const SUBORDINATE_BUS: u16 = 0x1a;
/// Subsystem Vendor ID.
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
/// Subsystem ID.
pub const SUBSYSTEM_ID: u16 = 0x2e;
/// Expansion ROM base address.
pub const ROM: u16 = 0x30;
/// Expansion ROM base address: the ROM is decoded, where memory is.
pub const ROM_ENABLE: u32 = 1 << 0;
/// Capabilities pointer.
pub const CAPABILITIES_POINTER: u16 = 0x34;
/// Interrupt line.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Interrupt pin.
pub const INTERRUPT_PIN: u16 = 0x3d;
/// Bridge Control of a bridge (Type 1 header).
pub const BRIDGE_CONTROL: u16 = 0x3e;
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
/// Command: SERR# enable.
pub const COMMAND_SERR: u16 = 1 << 8;
/// Command: interrupt disable.
pub const COMMAND_INTERRUPT_DISABLE: u16 = 1 << 10;

/// The registers of the header, the BARs excepted: what those are depends on the function.
pub const REGISTERS: &[Register] = &[
    register(VENDOR_ID, 2, "Vendor ID", &[constant(0xffff, "Vendor ID")]),
    register(DEVICE_ID, 2, "Device ID", &[constant(0xffff, "Device ID")]),
    register(
        COMMAND,
        2,
        "Command",
        &[
            control(COMMAND_IO as u32, "I/O Space Enable"),
            control(COMMAND_MEMORY as u32, "Memory Space Enable"),
            control(COMMAND_BUS_MASTER as u32, "Bus Master Enable"),
            control(1 << 3, "Special Cycle Enable"),
            control(1 << 4, "Memory Write and Invalidate"),
            control(1 << 5, "VGA Palette Snoop"),
            control(1 << 6, "Parity Error Response"),
            control(1 << 7, "IDSEL Stepping"),
            control(COMMAND_SERR as u32, "SERR# Enable"),
            control(1 << 9, "Fast Back-to-Back Enable"),
            control(COMMAND_INTERRUPT_DISABLE as u32, "Interrupt Disable"),
        ],
    ),
    register(
        STATUS,
        2,
        "Status",
        &[
            status(1 << 0, "Immediate Readiness"),
            rsvdz(0x0006),
            status(1 << 3, "Interrupt Status"),
            constant(STATUS_CAPABILITIES as u32, "Capabilities List"),
            constant(1 << 5, "66 MHz Capable"),
            rsvdz(1 << 6),
            constant(1 << 7, "Fast Back-to-Back Capable"),
            rw1c(1 << 8, "Master Data Parity Error"),
            constant(0x0600, "DEVSEL Timing"),
            rw1c(1 << 11, "Signaled Target Abort"),
            rw1c(1 << 12, "Received Target Abort"),
            rw1c(1 << 13, "Received Master Abort"),
            rw1c(1 << 14, "Signaled System Error"),
            rw1c(1 << 15, "Detected Parity Error"),
        ],
    ),
    register(
        REVISION_ID,
        4,
        "Revision ID and Class Code",
        &[
            constant(0x0000_00ff, "Revision ID"),
            constant(0x0000_ff00, "Programming Interface"),
            constant(0x00ff_0000, "Sub-Class Code"),
            constant(0xff00_0000, "Base Class Code"),
        ],
    ),
    register(CACHE_LINE_SIZE, 1, "Cache Line Size", &[control(0xff, "Cache Line Size")]),
    register(LATENCY_TIMER, 1, "Latency Timer", &[control(0xff, "Latency Timer")]),
    register(
        HEADER_TYPE,
        1,
        "Header Type",
        &[constant(0x7f, "Header Layout"), constant(0x80, "Multi-Function Device")],
    ),
    register(
        BIST,
        1,
        "BIST",
        &[status(0x0f, "Completion Code"), trigger(1 << 6, "Start BIST"), constant(1 << 7, "BIST Capable")],
    ),
    register(0x28, 4, "CardBus CIS Pointer", &[constant(0xffff_ffff, "CardBus CIS Pointer")]),
    register(SUBSYSTEM_VENDOR_ID, 2, "Subsystem Vendor ID", &[constant(0xffff, "Subsystem Vendor ID")]),
    register(SUBSYSTEM_ID, 2, "Subsystem ID", &[constant(0xffff, "Subsystem ID")]),
    register(CAPABILITIES_POINTER, 1, "Capabilities Pointer", &[constant(0xff, "Capabilities Pointer")]),
    register(0x35, 1, "reserved", &[]),
    register(0x36, 2, "reserved", &[]),
    register(0x38, 4, "reserved", &[]),
    register(INTERRUPT_LINE, 1, "Interrupt Line", &[control(0xff, "Interrupt Line")]),
    register(INTERRUPT_PIN, 1, "Interrupt Pin", &[constant(0xff, "Interrupt Pin")]),
    register(0x3e, 1, "Min_Gnt", &[constant(0xff, "Min_Gnt")]),
    register(0x3f, 1, "Max_Lat", &[constant(0xff, "Max_Lat")]),
];
