//! Capabilities of buses that are older than PCI Express: AGP and PCI-X.

use super::legacy::legacy;
use super::register::{Count, Group, Length, Register, Stride, constant, control, register, rw1c, status};
use super::{CapabilityId, CapabilitySpec};

/// What their specifications say.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    legacy(CapabilityId::AGP, "AGP 3.0", Length::Fixed(0x0c), AGP),
    legacy(CapabilityId::AGP_8X, "AGP 3.0", Length::Fixed(0x0c), AGP),
    legacy(
        CapabilityId::PCI_X,
        "PCI-X 2.0, 7.2",
        // Bits 13:12 of the command: versions 1 and 2 have ECC registers.
        Length::Cases { at: 0, cases: &[(0x3000_0000, 0, Length::Fixed(8)), (0, 0, Length::UpTo(0x18))] },
        PCI_X,
    )
    .with(&[Group {
        first: Some(0),
        stride: Stride::Fixed(0),
        count: Count::Field { at: 0, shift: 0, mask: 0, more: 1, given: 0x3000_0000 },
        registers: PCI_X_ECC,
        groups: &[],
    }]),
];

const AGP: &[Register] = &[
    register(2, 1, "AGP Identifier", &[constant(0x0f, "Minor Revision"), constant(0xf0, "Major Revision")]),
    register(3, 1, "reserved", &[]),
    register(
        4,
        4,
        "AGP Status",
        &[
            constant(0x0000_0007, "Data Rates"),
            constant(1 << 3, "AGP 3.0 Mode"),
            constant(1 << 4, "Fast Write"),
            constant(1 << 5, "Addresses Over 4 GiB"),
            constant(1 << 6, "Host Translation"),
            constant(1 << 7, "64-bit GART Entries"),
            constant(1 << 8, "In-Aperture Coherency"),
            constant(1 << 9, "Side Band Addressing"),
            constant(0x0000_1c00, "Calibration Cycle"),
            constant(0x0000_e000, "Asynchronous Request Size"),
            constant(1 << 16, "Isochronous Support"),
            constant(0xff00_0000, "Request Queue Depth"),
        ],
    ),
    register(
        8,
        4,
        "AGP Command",
        &[
            control(0x0000_0007, "Data Rate"),
            control(1 << 4, "Fast Write Enable"),
            control(1 << 5, "Addresses Over 4 GiB Enable"),
            control(1 << 7, "64-bit GART Entries Enable"),
            control(1 << 8, "AGP Enable"),
            control(1 << 9, "Side Band Addressing Enable"),
            control(0x0000_1c00, "Calibration Cycle"),
            control(0x0000_e000, "Asynchronous Request Size"),
            control(0xff00_0000, "Request Queue Depth"),
        ],
    ),
];

const PCI_X: &[Register] = &[
    register(
        2,
        2,
        "PCI-X Command",
        &[
            control(1 << 0, "Data Parity Error Recovery Enable"),
            control(1 << 1, "Enable Relaxed Ordering"),
            control(0x000c, "Maximum Memory Read Byte Count"),
            control(0x0070, "Maximum Outstanding Split Transactions"),
            constant(0x3000, "PCI-X Capabilities List Item Version"),
        ],
    ),
    register(
        4,
        4,
        "PCI-X Status",
        &[
            constant(0x0000_0007, "Function Number"),
            constant(0x0000_00f8, "Device Number"),
            constant(0x0000_ff00, "Bus Number"),
            constant(1 << 16, "64-bit Device"),
            constant(1 << 17, "133 MHz Capable"),
            rw1c(1 << 18, "Split Completion Discarded"),
            rw1c(1 << 19, "Unexpected Split Completion"),
            constant(1 << 20, "Device Complexity"),
            constant(0x0060_0000, "Designed Maximum Memory Read Byte Count"),
            constant(0x0380_0000, "Designed Maximum Outstanding Split Transactions"),
            constant(0x1c00_0000, "Designed Maximum Cumulative Read Size"),
            rw1c(1 << 29, "Received Split Completion Error Message"),
            constant(1 << 30, "PCI-X 266 Capable"),
            constant(1 << 31, "PCI-X 533 Capable"),
        ],
    ),
];

/// What the log holds is cleared through bits whose kind differs; they count as hardware's state, which no write reaches.
const PCI_X_ECC: &[Register] = &[
    register(
        8,
        4,
        "ECC Control and Status",
        &[
            status(0x0000_000f, "Other Bank, Additional Errors"),
            status(0x0000_0070, "ECC Error Phase"),
            status(1 << 7, "ECC Error Corrected"),
            status(0x0000_ff00, "Syndrome"),
            status(0x000f_0000, "Error First Command"),
            status(0x00f0_0000, "Error Second Command"),
            status(0x0f00_0000, "Error Upper Attributes"),
            control(1 << 28, "ECC Control Update Enable"),
            control(1 << 30, "Disable Single-Bit-Error Correction"),
            control(1 << 31, "ECC Mode"),
        ],
    ),
    register(0x0c, 4, "ECC First Address", &[status(0xffff_ffff, "Address")]),
    register(0x10, 4, "ECC Second Address", &[status(0xffff_ffff, "Address")]),
    register(0x14, 4, "ECC Attribute", &[status(0xffff_ffff, "Attribute")]),
];
