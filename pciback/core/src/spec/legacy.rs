//! Capabilities of the first 256 bytes, but for PCI Express, older buses and what is a vendor's.

use super::register::{
    Count, Group, Kind, Length, Register, Stride, WHOLE, constant, control, register, rw1c, status, trigger,
    when,
};
use super::{AnyId, CapabilityId, CapabilitySpec};

/// PMCSR's offset in Power Management.
pub const PMCSR: u16 = 4;
/// The address register's offset in VPD; its highest bit is the flag that starts a transfer.
pub const VPD_ADDRESS: u16 = 2;
/// Message Control's offset in MSI and MSI-X.
pub const MESSAGE_CONTROL: u16 = 2;
/// Message Control of MSI: enable.
pub const MSI_ENABLE: u16 = 1 << 0;
/// Message Control of MSI: Multiple Message Enable, how many vectors as a power of two.
pub const MSI_MULTIPLE_ENABLE: u16 = 0x70;
/// Message Control of MSI: addresses have 64 bits.
pub const MSI_ADDRESS_64: u16 = 1 << 7;
/// Message Control of MSI: mask and pending bits per vector.
pub const MSI_MASKABLE: u16 = 1 << 8;
/// Message Control of MSI-X: all vectors are masked.
pub const MSIX_FUNCTION_MASK: u16 = 1 << 14;
/// Message Control of MSI-X: enable.
pub const MSIX_ENABLE: u16 = 1 << 15;
/// Table Offset and BIR's offset in MSI-X.
pub const MSIX_TABLE: u16 = 4;
/// Table Offset and BIR of MSI-X: which BAR has the table.
pub const MSIX_BAR: u8 = 0x7;
/// The byte of Advanced Features that says what it can.
pub const AF_CAPABILITIES: u16 = 3;
/// Advanced Features: function level reset is supported.
pub const AF_FLR_CAPABLE: u8 = 1 << 1;
/// Advanced Features' control.
pub const AF_CONTROL: u16 = 4;

pub(super) const fn legacy(
    id: CapabilityId,
    section: &'static str,
    length: Length,
    registers: &'static [Register],
) -> CapabilitySpec {
    let id = AnyId::Legacy(id);
    CapabilitySpec { id, section, length, registers, groups: &[], rest: Some(Kind::Constant) }
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
                    constant(0x0007, "Version"),
                    constant(1 << 3, "PME Clock"),
                    constant(1 << 4, "Immediate Readiness on Return to D0"),
                    constant(1 << 5, "Device Specific Initialization"),
                    constant(0x01c0, "Aux Current"),
                    constant(1 << 9, "D1 Support"),
                    constant(1 << 10, "D2 Support"),
                    constant(0xf800, "PME Support"),
                ],
            ),
            register(
                PMCSR,
                2,
                "Power Management Control/Status",
                &[
                    control(0x0003, "PowerState"),
                    constant(1 << 3, "No Soft Reset"),
                    control(1 << 8, "PME Enable"),
                    control(0x1e00, "Data Select"),
                    constant(0x6000, "Data Scale"),
                    rw1c(1 << 15, "PME Status"),
                ],
            ),
            register(
                6,
                1,
                "Bridge Extensions",
                &[constant(1 << 6, "B2/B3 Support"), constant(1 << 7, "Bus Power/Clock Control Enable")],
            ),
            // It follows Data Select, which stays as it is.
            register(7, 1, "Data", &[constant(0xff, "Data")]),
        ],
    ),
    legacy(
        CapabilityId::VPD,
        "PCI Express 6.0, 7.9.18",
        Length::Fixed(8),
        &[
            register(VPD_ADDRESS, 2, "VPD Address", &[control(0x7fff, "VPD Address"), trigger(0x8000, "F")]),
            register(4, 4, "VPD Data", &[control(0xffff_ffff, "VPD Data")]),
        ],
    ),
    legacy(
        CapabilityId::SLOT_ID,
        "PCI-to-PCI Bridge 1.2, 13",
        Length::Fixed(4),
        &[
            register(
                2,
                1,
                "Expansion Slot",
                &[constant(0x1f, "Expansion Slots Provided"), constant(1 << 5, "First in Chassis")],
            ),
            register(3, 1, "Chassis Number", &[control(0xff, "Chassis Number")]),
        ],
    ),
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
                control(MSI_MULTIPLE_ENABLE as u32, "Multiple Message Enable"),
                constant(MSI_ADDRESS_64 as u32, "64-bit Address Capable"),
                constant(MSI_MASKABLE as u32, "Per-Vector Masking Capable"),
                constant(1 << 9, "Extended Message Data Capable"),
                control(1 << 10, "Extended Message Data Enable"),
            ],
        )],
    )
    .with(MSI_LAYOUTS),
    legacy(
        CapabilityId::COMPACT_PCI_HOT_SWAP,
        "PICMG 2.1, 3",
        Length::Fixed(4),
        &[
            register(
                2,
                1,
                "Hot Swap Control/Status",
                &[
                    control(1 << 0, "Device Hiding Arm"),
                    control(1 << 1, "ENUM# Signal Mask"),
                    status(1 << 2, "Pending Insertion or Extraction"),
                    control(1 << 3, "LED On/Off"),
                    constant(0x30, "Programming Interface"),
                    rw1c(1 << 6, "ENUM# Status: Extraction"),
                    rw1c(1 << 7, "ENUM# Status: Insertion"),
                ],
            ),
            register(3, 1, "reserved", &[]),
        ],
    ),
    legacy(
        CapabilityId::DEBUG_PORT,
        "EHCI 1.0, C",
        Length::Fixed(4),
        &[register(2, 2, "Debug Port", &[constant(0x1fff, "Offset"), constant(0xe000, "BAR Number")])],
    ),
    legacy(
        CapabilityId::COMPACT_PCI_RESOURCE,
        "PICMG 2.13",
        Length::Fixed(4),
        &[register(2, 2, "Central Resource Control", &[control(0xffff, WHOLE)])],
    ),
    legacy(
        CapabilityId::HOT_PLUG,
        "PCI Standard Hot-Plug Controller 1.0, 4",
        Length::Fixed(8),
        &[
            register(2, 1, "DWORD Select", &[control(0xff, "DWORD Select")]),
            register(
                3,
                1,
                "Controller Pending",
                &[status(1 << 2, "Controller SERR Pending"), status(1 << 3, "Controller Interrupt Pending")],
            ),
            register(4, 4, "DWORD Data", &[control(0xffff_ffff, "DWORD Data")]),
        ],
    ),
    legacy(
        CapabilityId::SUBSYSTEM_ID,
        "PCI Express 6.0, 7.9.23",
        Length::Fixed(8),
        &[
            register(2, 2, "reserved", &[]),
            register(4, 2, "Subsystem Vendor ID", &[constant(0xffff, "SSVID")]),
            register(6, 2, "Subsystem ID", &[constant(0xffff, "SSID")]),
        ],
    ),
    legacy(
        CapabilityId::SECURE_DEVICE,
        "AMD I/O Virtualization Technology, 3",
        Length::UpTo(0x18),
        SECURE_DEVICE,
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
                    control(MSIX_FUNCTION_MASK as u32, "Function Mask"),
                    control(MSIX_ENABLE as u32, "MSI-X Enable"),
                ],
            ),
            register(
                4,
                4,
                "Table Offset/Table BIR",
                &[constant(0x7, "Table BIR"), constant(0xffff_fff8, "Table Offset")],
            ),
            register(
                8,
                4,
                "PBA Offset/PBA BIR",
                &[constant(0x7, "PBA BIR"), constant(0xffff_fff8, "PBA Offset")],
            ),
        ],
    ),
    // Index and data are here only where the location says so; otherwise the bytes that follow belong to another structure.
    legacy(
        CapabilityId::SATA,
        "Serial ATA AHCI 1.3.1, 2.4",
        Length::Cases { at: 4, cases: &[(0xf, 0xf, Length::Fixed(0x10)), (0, 0, Length::Fixed(8))] },
        &[
            register(
                2,
                2,
                "SATA Capability 0",
                &[constant(0x000f, "Minor Revision"), constant(0x00f0, "Major Revision")],
            ),
            register(
                4,
                4,
                "SATA Capability 1",
                &[constant(0x0000_000f, "BAR Location"), constant(0x00ff_fff0, "BAR Offset")],
            ),
            register(8, 4, "Index", &[control(0xffff_ffff, "Index")]),
            register(12, 4, "Data", &[control(0xffff_ffff, "Data")]),
        ],
    ),
    legacy(
        CapabilityId::ADVANCED_FEATURES,
        "PCI Express 6.0, 7.9.21",
        Length::Fixed(6),
        &[
            register(2, 1, "AF Length", &[constant(0xff, "Length")]),
            register(
                AF_CAPABILITIES,
                1,
                "AF Capabilities",
                &[constant(1 << 0, "Transactions Pending"), constant(AF_FLR_CAPABLE as u32, "FLR")],
            ),
            register(AF_CONTROL, 1, "AF Control", &[trigger(1 << 0, "Initiate FLR")]),
            register(5, 1, "AF Status", &[status(1 << 0, "Transactions Pending")]),
        ],
    ),
    legacy(
        CapabilityId::ENHANCED_ALLOCATION,
        "PCI Express 6.0, 7.8.5",
        Length::UpTo(0xc0),
        &[register(2, 2, "Number of Entries", &[constant(0x003f, "Num Entries")])],
    )
    .with(ENHANCED_ALLOCATION_ENTRIES),
    legacy(
        CapabilityId::FLATTENING_PORTAL_BRIDGE,
        "PCI Express 6.0, 7.8.11",
        Length::Fixed(0x24),
        FLATTENING_PORTAL_BRIDGE,
    ),
];

/// With addresses of 32 or 64 bits, and with or without mask and pending bits. How many of these there are, the compiler knows.
const MSI_LAYOUTS: &[Group] = &[
    when(
        0,
        MSI_WIDE,
        0,
        &[
            register(4, 4, "Message Address", &[control(0xffff_fffc, "Message Address")]),
            register(8, 2, "Message Data", &[control(0xffff, "Message Data")]),
            register(10, 2, "Extended Message Data", &[control(0xffff, "Extended Message Data")]),
        ],
    ),
    when(
        0,
        MSI_WIDE,
        MSI_WIDE,
        &[
            register(4, 4, "Message Address", &[control(0xffff_fffc, "Message Address")]),
            register(8, 4, "Message Upper Address", &[control(0xffff_ffff, "Message Upper Address")]),
            register(12, 2, "Message Data", &[control(0xffff, "Message Data")]),
            register(14, 2, "Extended Message Data", &[control(0xffff, "Extended Message Data")]),
        ],
    ),
    when(
        0,
        MSI_WIDE | MSI_MASKS,
        MSI_MASKS,
        &[
            register(12, 4, "Mask Bits", &[control(0xffff_ffff, "Mask Bits")]),
            register(16, 4, "Pending Bits", &[status(0xffff_ffff, "Pending Bits")]),
        ],
    ),
    when(
        0,
        MSI_WIDE | MSI_MASKS,
        MSI_WIDE | MSI_MASKS,
        &[
            register(16, 4, "Mask Bits", &[control(0xffff_ffff, "Mask Bits")]),
            register(20, 4, "Pending Bits", &[status(0xffff_ffff, "Pending Bits")]),
        ],
    ),
];

/// Message Control's bits in the first dword.
const MSI_WIDE: u32 = (MSI_ADDRESS_64 as u32) << 16;
const MSI_MASKS: u32 = (MSI_MASKABLE as u32) << 16;

/// AMD's IOMMU.
const SECURE_DEVICE: &[Register] = &[
    register(
        2,
        2,
        "Capability Header",
        &[
            constant(0x0007, "Capability Block Type"),
            constant(0x00f8, "Capability Revision"),
            constant(1 << 8, "IOTLB Support"),
            constant(1 << 9, "HyperTransport Tunnel Support"),
            constant(1 << 10, "Not Present Table Entries Cached"),
            constant(1 << 11, "Extended Feature Register Support"),
            constant(1 << 12, "Miscellaneous Information 1 Support"),
        ],
    ),
    register(4, 4, "Base Address Low", &[control(1 << 0, "Enable"), control(0xffff_c000, "Base Address")]),
    register(8, 4, "Base Address High", &[control(0xffff_ffff, "Base Address")]),
    register(
        0x0c,
        4,
        "Range",
        &[
            constant(0x0000_001f, "HyperTransport UnitID"),
            constant(1 << 7, "Range Valid"),
            constant(0x0000_ff00, "Bus Number"),
            constant(0x00ff_0000, "First Device"),
            constant(0xff00_0000, "Last Device"),
        ],
    ),
    register(
        0x10,
        4,
        "Miscellaneous Information 0",
        &[
            constant(0x0000_001f, "MSI Message Number"),
            constant(0x0000_00e0, "Guest Virtual Address Size"),
            constant(0x0000_7f00, "Physical Address Size"),
            constant(0x003f_8000, "Virtual Address Size"),
            constant(1 << 22, "ATS Response Address Range Reserved"),
            constant(0xf800_0000, "Peripheral Page Request MSI Message Number"),
        ],
    ),
    register(
        0x14,
        4,
        "Miscellaneous Information 1",
        &[constant(0x1f, "Guest Virtual APIC MSI Message Number")],
    ),
];

/// An entry's first dword says how many more there are of it. Of the last two, which stands first depends on the sizes of base
/// and offset.
const ENHANCED_ALLOCATION_ENTRIES: &[Group] = &[Group {
    first: Some(4),
    stride: Stride::Own { base: 4, unit: 4, mask: 7 },
    count: Count::Field { at: 0, shift: 16, mask: 0x3f, more: 0, given: 0 },
    registers: &[
        register(
            0,
            4,
            "Entry Format",
            &[
                constant(0x0000_0007, "Entry Size"),
                constant(0x0000_00f0, "BAR Equivalent Indicator"),
                constant(0x0000_ff00, "Primary Properties"),
                constant(0x00ff_0000, "Secondary Properties"),
                constant(1 << 30, "Writable"),
                control(1 << 31, "Enable"),
            ],
        ),
        register(4, 4, "Base", &[constant(1 << 1, "64-bit Base"), control(0xffff_fffc, "Base")]),
        register(
            8,
            4,
            "MaxOffset",
            &[constant(1 << 1, "64-bit MaxOffset"), control(0xffff_fffc, "MaxOffset")],
        ),
        register(0x0c, 4, "Base or MaxOffset, upper", &[control(0xffff_ffff, "Upper 32 Bits")]),
        register(0x10, 4, "MaxOffset, upper", &[control(0xffff_ffff, "Upper 32 Bits")]),
    ],
    groups: &[],
}];

const FLATTENING_PORTAL_BRIDGE: &[Register] = &[
    register(2, 2, "reserved", &[]),
    register(
        4,
        4,
        "FPB Capabilities",
        &[
            constant(1 << 0, "FPB RID Decode Mechanism Supported"),
            constant(1 << 1, "FPB MEM Low Decode Mechanism Supported"),
            constant(1 << 2, "FPB MEM High Decode Mechanism Supported"),
            constant(0x0000_00f8, "FPB Num Sec Dev"),
            constant(0x0000_0700, "FPB RID Vector Size Supported"),
            constant(0x0007_0000, "FPB MEM Low Vector Size Supported"),
            constant(0x0700_0000, "FPB MEM High Vector Size Supported"),
        ],
    ),
    register(
        8,
        4,
        "FPB RID Vector Control 1",
        &[
            control(1 << 0, "FPB RID Decode Mechanism Enable"),
            control(0x0000_00f0, "FPB RID Vector Granularity"),
            control(0xfff8_0000, "FPB RID Vector Start"),
        ],
    ),
    register(0x0c, 4, "FPB RID Vector Control 2", &[control(0x0000_fff8, "RID Secondary Start")]),
    register(
        0x10,
        4,
        "FPB MEM Low Vector Control",
        &[
            control(1 << 0, "FPB MEM Low Decode Mechanism Enable"),
            control(0x0000_00f0, "FPB MEM Low Vector Granularity"),
            control(0xfff0_0000, "FPB MEM Low Vector Start"),
        ],
    ),
    register(
        0x14,
        4,
        "FPB MEM High Vector Control 1",
        &[
            control(1 << 0, "FPB MEM High Decode Mechanism Enable"),
            control(0x0000_00f0, "FPB MEM High Vector Granularity"),
            control(0xf000_0000, "FPB MEM High Vector Start Lower"),
        ],
    ),
    register(
        0x18,
        4,
        "FPB MEM High Vector Control 2",
        &[control(0xffff_ffff, "FPB MEM High Vector Start Upper")],
    ),
    register(
        0x1c,
        4,
        "FPB Vector Access Control",
        &[control(0x0000_00ff, "FPB Vector Access Offset"), control(0x0000_c000, "FPB Vector Select")],
    ),
    register(0x20, 4, "FPB Vector Access Data", &[control(0xffff_ffff, "FPB Vector Access Data")]),
];
