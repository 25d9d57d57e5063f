//! Capabilities of the first 256 bytes, but for PCI Express.

use super::register::{Kind, Length, constant, control, register, rw1c, status, trigger};
use super::{AnyId, CapabilityId, CapabilitySpec};

/// PMCSR's offset in Power Management.
pub const PMCSR: u16 = 4;
/// The address register's offset in VPD; its highest bit is the flag that starts a transfer.
pub const VPD_ADDRESS: u16 = 2;
/// Message Control's offset in MSI and MSI-X.
pub const MESSAGE_CONTROL: u16 = 2;
/// Message Control of MSI: enable.
pub const MSI_ENABLE: u16 = 1 << 0;
/// Message Control of MSI: addresses have 64 bits.
pub const MSI_ADDRESS_64: u16 = 1 << 7;
/// Message Control of MSI: mask and pending bits per vector.
pub const MSI_MASKABLE: u16 = 1 << 8;
/// Message Control of MSI-X: enable.
pub const MSIX_ENABLE: u16 = 1 << 15;
/// The byte of Advanced Features that says what it can.
pub const AF_CAPABILITIES: u16 = 3;
/// Advanced Features: function level reset is supported.
pub const AF_FLR_CAPABLE: u8 = 1 << 1;
/// Advanced Features' control.
pub const AF_CONTROL: u16 = 4;

const fn legacy(
    id: CapabilityId,
    section: &'static str,
    length: Length,
    registers: &'static [super::Register],
) -> CapabilitySpec {
    CapabilitySpec { id: AnyId::Legacy(id), section, length, registers, rest: Kind::Constant }
}

/// What their specifications say.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    legacy(
        CapabilityId::POWER_MANAGEMENT,
        "PCI Express 6.0, 7.5.2",
        Length::Fixed(8),
        &[
            register(
                2,
                2,
                "Power Management Capabilities",
                &[
                    constant(0x07ff, "version, clocks, auxiliary current, D1 and D2 support"),
                    constant(0xf800, "PME Support"),
                ],
            ),
            register(
                PMCSR,
                2,
                "Power Management Control/Status",
                &[
                    control(0x0003, "Power State"),
                    constant(1 << 3, "No Soft Reset"),
                    control(1 << 8, "PME Enable"),
                    control(0x1e00, "Data Select"),
                    constant(0x6000, "Data Scale"),
                    rw1c(1 << 15, "PME Status"),
                ],
            ),
            register(6, 1, "Bridge Extensions", &[constant(0xc0, "B2/B3 support")]),
            register(7, 1, "Data", &[constant(0xff, "data")]),
        ],
    ),
    legacy(
        CapabilityId::AGP,
        "AGP 3.0, 4.1",
        Length::Fixed(0x0c),
        &[
            register(2, 2, "AGP Identifier", &[constant(0x00ff, "revision")]),
            register(4, 4, "AGP Status", &[constant(0xffff_ffff, "abilities")]),
            register(8, 4, "AGP Command", &[control(0xffff_ffff, "command")]),
        ],
    ),
    legacy(
        CapabilityId::VPD,
        "PCI Express 6.0, 7.9.18",
        Length::Fixed(8),
        &[
            register(
                VPD_ADDRESS,
                2,
                "VPD Address",
                &[control(0x7fff, "address"), trigger(0x8000, "start of a write, end of a read")],
            ),
            register(4, 4, "VPD Data", &[control(0xffff_ffff, "data")]),
        ],
    ),
    legacy(
        CapabilityId::SLOT_ID,
        "PCI-to-PCI Bridge 1.2, 13",
        Length::Fixed(4),
        &[
            register(2, 1, "Expansion Slot", &[constant(0x3f, "slots, first in chassis")]),
            register(3, 1, "Chassis Number", &[control(0xff, "number")]),
        ],
    ),
    // What follows Message Control depends on it: see the four layouts below.
    legacy(
        CapabilityId::MSI,
        "PCI Express 6.0, 7.7.1",
        Length::Msi,
        &[register(
            MESSAGE_CONTROL,
            2,
            "Message Control",
            &[
                control(MSI_ENABLE as u32, "MSI Enable"),
                constant(0x000e, "Multiple Message Capable"),
                control(0x0070, "Multiple Message Enable"),
                constant(MSI_ADDRESS_64 as u32, "64-bit Address Capable"),
                constant(MSI_MASKABLE as u32, "Per-Vector Masking Capable"),
                constant(1 << 9, "Extended Message Data Capable"),
                control(1 << 10, "Extended Message Data Enable"),
            ],
        )],
    ),
    legacy(
        CapabilityId::COMPACT_PCI_HOT_SWAP,
        "PICMG 2.1, 3.1.1",
        Length::Fixed(4),
        &[register(2, 1, "Hot Swap Control/Status", &[control(0x3f, "control"), rw1c(0xc0, "INS, EXT")])],
    ),
    legacy(
        CapabilityId::PCI_X,
        "PCI-X 2.0, 7.2",
        Length::PciX,
        &[
            register(
                2,
                2,
                "PCI-X Command",
                &[
                    control(1 << 0, "Data Parity Error Recovery Enable"),
                    control(1 << 1, "Enable Relaxed Ordering"),
                    control(0x000c, "Maximum Memory Read Byte Count"),
                    control(0x0070, "Maximum Outstanding Split Transactions"),
                    constant(0x3000, "version"),
                ],
            ),
            register(
                4,
                4,
                "PCI-X Status",
                &[
                    constant(0x0003_ffff, "function, device, bus, width, 133 MHz"),
                    rw1c(1 << 18, "Split Completion Discarded"),
                    rw1c(1 << 19, "Unexpected Split Completion"),
                    constant(0xdff0_0000, "complexity, limits, message, 266/533 MHz"),
                    rw1c(1 << 29, "Received Split Completion Error Message"),
                ],
            ),
        ],
    ),
    legacy(
        CapabilityId::HYPER_TRANSPORT,
        "HyperTransport 3.10, 7",
        Length::Fixed(4),
        &[register(2, 2, "Command", &[control(0xffff, "command")])],
    ),
    legacy(
        CapabilityId::DEBUG_PORT,
        "USB 2.0 Debug Device 1.0",
        Length::Fixed(4),
        &[register(2, 2, "Debug Port", &[constant(0xffff, "BAR and offset")])],
    ),
    legacy(
        CapabilityId::COMPACT_PCI_RESOURCE,
        "PICMG 2.13",
        Length::Fixed(4),
        &[register(2, 2, "Resource Control", &[control(0xffff, "control")])],
    ),
    legacy(
        CapabilityId::HOT_PLUG,
        "PCI Standard Hot-Plug Controller 1.0, 4",
        Length::Fixed(8),
        &[
            register(2, 1, "DWORD Select", &[control(0xff, "select")]),
            register(3, 1, "Controller Status", &[status(0xff, "pending")]),
            register(4, 4, "DWORD Data", &[control(0xffff_ffff, "data")]),
        ],
    ),
    legacy(
        CapabilityId::SUBSYSTEM_ID,
        "PCI-to-PCI Bridge 1.2, 13; PCI Express 6.0, 7.9.23",
        Length::Fixed(8),
        &[register(4, 4, "Subsystem IDs", &[constant(0xffff_ffff, "ids")])],
    ),
    legacy(
        CapabilityId::AGP_8X,
        "AGP 3.0, 4.1",
        Length::Fixed(0x0c),
        &[
            register(4, 4, "AGP Status", &[constant(0xffff_ffff, "abilities")]),
            register(8, 4, "AGP Command", &[control(0xffff_ffff, "command")]),
        ],
    ),
    legacy(
        CapabilityId::SECURE_DEVICE,
        "AMD I/O Virtualization 3.0, 3",
        Length::UpTo(0x18),
        &[register(4, 4, "Base Address Low", &[control(0xffff_ffff, "base")])],
    ),
    legacy(
        CapabilityId::MSI_X,
        "PCI Express 6.0, 7.7.2",
        Length::Fixed(0x0c),
        &[
            register(
                MESSAGE_CONTROL,
                2,
                "Message Control",
                &[
                    constant(0x07ff, "Table Size"),
                    control(1 << 14, "Function Mask"),
                    control(MSIX_ENABLE as u32, "MSI-X Enable"),
                ],
            ),
            register(4, 4, "Table Offset/BIR", &[constant(0xffff_ffff, "offset and BAR")]),
            register(8, 4, "PBA Offset/BIR", &[constant(0xffff_ffff, "offset and BAR")]),
        ],
    ),
    legacy(
        CapabilityId::SATA,
        "Serial ATA AHCI 1.3.1, 2.4",
        Length::UpTo(0x10),
        &[
            register(2, 2, "SATA Capability 0", &[constant(0x00ff, "revision")]),
            register(4, 4, "SATA Capability 1", &[constant(0x00ff_ffff, "BAR and offset")]),
            register(8, 4, "Index", &[control(0xffff_ffff, "index")]),
            register(12, 4, "Data", &[control(0xffff_ffff, "data")]),
        ],
    ),
    legacy(
        CapabilityId::ADVANCED_FEATURES,
        "PCI Advanced Features ECN, 6.x; PCI Express 6.0, 7.9.21",
        Length::Fixed(6),
        &[
            register(2, 1, "AF Length", &[constant(0xff, "length")]),
            register(AF_CAPABILITIES, 1, "AF Capabilities", &[constant(0x03, "TP, FLR")]),
            register(AF_CONTROL, 1, "AF Control", &[control(1 << 0, "Initiate FLR")]),
            register(5, 1, "AF Status", &[status(1 << 0, "Transactions Pending")]),
        ],
    ),
    legacy(
        CapabilityId::ENHANCED_ALLOCATION,
        "PCI Express 6.0, 7.8.5",
        Length::UpTo(0xc0),
        &[register(2, 2, "Number of Entries", &[constant(0x003f, "number")])],
    ),
    legacy(CapabilityId::FLATTENING_PORTAL_BRIDGE, "PCI Express 6.0, 7.8.10", Length::Fixed(0x24), &[]),
];
