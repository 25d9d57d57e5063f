//! The physical layer at 16, 32 and 64 GT/s.

use super::extended;
use crate::spec::register::{
    Group, Kind, Length, Register, constant, control, each, register, rsvdz, rw1c, status,
};
use crate::spec::{CapabilitySpec, ExtendedCapabilityId};

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    extended(
        ExtendedCapabilityId::PHYSICAL_LAYER_16GT,
        "PCI Express 6.0, 7.7.5",
        Length::UpTo(0x40),
        Kind::Status,
        SPEED_16,
    )
    .with(&[lanes(0x20)]),
    extended(
        ExtendedCapabilityId::PHYSICAL_LAYER_32GT,
        "PCI Express 6.0, 7.7.6",
        Length::UpTo(0x40),
        Kind::Status,
        SPEED_32,
    )
    .with(&[lanes(0x20)]),
    extended(
        ExtendedCapabilityId::PHYSICAL_LAYER_64GT,
        "PCI Express 6.0, 7.7.7",
        Length::UpTo(0x20),
        Kind::Status,
        SPEED_64,
    )
    .with(&[lanes(0x10)]),
];

const fn lanes(first: u16) -> Group {
    each(first, 1, LANE)
}

/// One byte for each lane; an upstream port shows what the other end asked for.
const LANE: &[Register] = &[register(
    0,
    1,
    "Lane Equalization Control",
    &[status(0x0f, "Downstream Port Transmitter Preset"), status(0xf0, "Upstream Port Transmitter Preset")],
)];

const SPEED_16: &[Register] = &[
    register(0x04, 4, "16.0 GT/s Capabilities", &[]),
    register(0x08, 4, "16.0 GT/s Control", &[]),
    register(
        0x0c,
        4,
        "16.0 GT/s Status",
        &[
            status(1 << 0, "Equalization 16.0 GT/s Complete"),
            status(1 << 1, "Equalization 16.0 GT/s Phase 1 Successful"),
            status(1 << 2, "Equalization 16.0 GT/s Phase 2 Successful"),
            status(1 << 3, "Equalization 16.0 GT/s Phase 3 Successful"),
            rw1c(1 << 4, "Link Equalization Request 16.0 GT/s"),
            rsvdz(0xffff_ffe0),
        ],
    ),
    register(
        0x10,
        4,
        "16.0 GT/s Local Data Parity Mismatch Status",
        &[rw1c(0xffff_ffff, "Local Data Parity Mismatch Status")],
    ),
    register(
        0x14,
        4,
        "16.0 GT/s First Retimer Data Parity Mismatch Status",
        &[rw1c(0xffff_ffff, "First Retimer Data Parity Mismatch Status")],
    ),
    register(
        0x18,
        4,
        "16.0 GT/s Second Retimer Data Parity Mismatch Status",
        &[rw1c(0xffff_ffff, "Second Retimer Data Parity Mismatch Status")],
    ),
    register(0x1c, 4, "reserved", &[]),
];

const SPEED_32: &[Register] = &[
    register(
        0x04,
        4,
        "32.0 GT/s Capabilities",
        &[
            constant(1 << 0, "Equalization Bypass to Highest Rate Supported"),
            constant(1 << 1, "No Equalization Needed Supported"),
            constant(1 << 8, "Modified TS Usage Mode 0 Supported"),
            constant(1 << 9, "Modified TS Usage Mode 1 Supported"),
            constant(1 << 10, "Modified TS Usage Mode 2 Supported"),
            constant(0x0000_f800, "Modified TS Reserved Usage Modes"),
        ],
    ),
    register(
        0x08,
        4,
        "32.0 GT/s Control",
        &[
            control(1 << 0, "Equalization Bypass to Highest Rate Disable"),
            control(1 << 1, "No Equalization Needed Disable"),
            control(0x0000_0700, "Modified TS Usage Mode Selected"),
        ],
    ),
    register(
        0x0c,
        4,
        "32.0 GT/s Status",
        &[
            status(1 << 0, "Equalization 32.0 GT/s Complete"),
            status(1 << 1, "Equalization 32.0 GT/s Phase 1 Successful"),
            status(1 << 2, "Equalization 32.0 GT/s Phase 2 Successful"),
            status(1 << 3, "Equalization 32.0 GT/s Phase 3 Successful"),
            rw1c(1 << 4, "Link Equalization Request 32.0 GT/s"),
            status(1 << 5, "Modified TS Received"),
            status(0x0000_00c0, "Received Enhanced Link Behavior Control"),
            status(1 << 8, "Transmitter Precoding On"),
            status(1 << 9, "Transmitter Precode Request"),
            status(1 << 10, "No Equalization Needed Received"),
            rsvdz(0xffff_f800),
        ],
    ),
    register(
        0x10,
        4,
        "Received Modified TS Data 1",
        &[
            status(0x0000_0007, "Received Modified TS Usage Mode"),
            status(0x0000_fff8, "Received Modified TS Information 1"),
            status(0xffff_0000, "Received Modified TS Vendor ID"),
        ],
    ),
    register(
        0x14,
        4,
        "Received Modified TS Data 2",
        &[
            status(0x00ff_ffff, "Received Modified TS Information 2"),
            status(0x0300_0000, "Alternate Protocol Negotiation Status"),
        ],
    ),
    register(
        0x18,
        4,
        "Transmitted Modified TS Data 1",
        &[
            status(0x0000_0007, "Transmitted Modified TS Usage Mode"),
            status(0x0000_fff8, "Transmitted Modified TS Information 1"),
            status(0xffff_0000, "Transmitted Modified TS Vendor ID"),
        ],
    ),
    register(
        0x1c,
        4,
        "Transmitted Modified TS Data 2",
        &[
            status(0x00ff_ffff, "Transmitted Modified TS Information 2"),
            status(0x0300_0000, "Alternate Protocol Negotiation Status"),
        ],
    ),
];

const SPEED_64: &[Register] = &[
    register(0x04, 4, "64.0 GT/s Capabilities", &[]),
    register(0x08, 4, "64.0 GT/s Control", &[]),
    register(
        0x0c,
        4,
        "64.0 GT/s Status",
        &[
            status(1 << 0, "Equalization 64.0 GT/s Complete"),
            status(1 << 1, "Equalization 64.0 GT/s Phase 1 Successful"),
            status(1 << 2, "Equalization 64.0 GT/s Phase 2 Successful"),
            status(1 << 3, "Equalization 64.0 GT/s Phase 3 Successful"),
            rw1c(1 << 4, "Link Equalization Request 64.0 GT/s"),
            status(1 << 5, "Transmitter Precoding On"),
            status(1 << 6, "Transmitter Precode Request"),
            status(1 << 7, "No Equalization Needed Received"),
            rsvdz(0xffff_ff00),
        ],
    ),
];
