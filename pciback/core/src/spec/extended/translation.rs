//! Requests and where they go: access control, routing ids, address translation, hints.

use super::extended;
use crate::spec::register::{
    Group, Kind, Length, Register, constant, control, each, register, rsvdz, rw1c, status, trigger, when,
};
use crate::spec::{CapabilitySpec, ExtendedCapabilityId};

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    extended(ExtendedCapabilityId::ACS, "PCI Express 6.0, 7.7.11", Length::UpTo(0x28), Kind::Control, ACS)
        // P2P Egress Control.
        .with(&[Group {
            groups: &[each(
                8,
                4,
                &[register(0, 4, "Egress Control Vector", &[control(0xffff_ffff, "Egress Control Vector")])],
            )],
            ..when(4, 1 << 5, 1 << 5, &[])
        }]),
    extended(
        ExtendedCapabilityId::ARI,
        "PCI Express 6.0, 7.8.8",
        Length::Fixed(8),
        Kind::Constant,
        &[
            register(
                0x04,
                2,
                "ARI Capability",
                &[
                    constant(1 << 0, "MFVC Function Groups Capability"),
                    constant(1 << 1, "ACS Function Groups Capability"),
                    constant(0xff00, "Next Function Number"),
                ],
            ),
            register(
                0x06,
                2,
                "ARI Control",
                &[
                    control(1 << 0, "MFVC Function Groups Enable"),
                    control(1 << 1, "ACS Function Groups Enable"),
                    control(0x0070, "Function Group"),
                ],
            ),
        ],
    ),
    extended(
        ExtendedCapabilityId::ATS,
        "PCI Express 6.0, 10.5.1",
        Length::Fixed(8),
        Kind::Constant,
        &[
            register(
                0x04,
                2,
                "ATS Capability",
                &[
                    constant(0x001f, "Invalidate Queue Depth"),
                    constant(1 << 5, "Page Aligned Request"),
                    constant(1 << 6, "Global Invalidate Supported"),
                    constant(1 << 7, "Relaxed Ordering Supported"),
                    constant(1 << 8, "ATS Memory Attributes Supported"),
                ],
            ),
            register(
                0x06,
                2,
                "ATS Control",
                &[control(0x001f, "Smallest Translation Unit"), control(1 << 15, "Enable")],
            ),
        ],
    ),
    extended(
        ExtendedCapabilityId::PAGE_REQUEST,
        "PCI Express 6.0, 10.5.2",
        Length::Fixed(0x10),
        Kind::Constant,
        PAGE_REQUEST,
    ),
    extended(
        ExtendedCapabilityId::PASID,
        "PCI Express 6.0, 7.8.9",
        Length::Fixed(8),
        Kind::Constant,
        &[
            register(
                0x04,
                2,
                "PASID Capability",
                &[
                    constant(1 << 1, "Execute Permission Supported"),
                    constant(1 << 2, "Privileged Mode Supported"),
                    constant(1 << 3, "Translated Requests with PASID Supported"),
                    constant(0x1f00, "Max PASID Width"),
                ],
            ),
            register(
                0x06,
                2,
                "PASID Control",
                &[
                    control(1 << 0, "PASID Enable"),
                    control(1 << 1, "Execute Permission Enable"),
                    control(1 << 2, "Privileged Mode Enable"),
                    control(1 << 3, "Translated Requests with PASID Enable"),
                ],
            ),
        ],
    ),
    extended(ExtendedCapabilityId::TPH_REQUESTER, "PCI Express 6.0, 7.9.13", TPH_LENGTH, Kind::Control, TPH)
        .with(&[each(
            0x0c,
            2,
            &[register(0, 2, "ST Table Entry", &[control(0x00ff, "ST Lower"), control(0xff00, "ST Upper")])],
        )]),
    // Gone from 6.0 on.
    extended(
        ExtendedCapabilityId::LN_REQUESTER,
        "PCI Express 5.0, 7.9",
        Length::Fixed(8),
        Kind::Constant,
        &[
            register(
                0x04,
                2,
                "LNR Capability",
                &[
                    constant(1 << 0, "LNR-64 Supported"),
                    constant(1 << 1, "LNR-128 Supported"),
                    constant(0x1f00, "LNR Registration MAX"),
                ],
            ),
            register(
                0x06,
                2,
                "LNR Control",
                &[
                    control(1 << 0, "LNR Enable"),
                    control(1 << 1, "LNR CLS"),
                    control(0x1f00, "LNR Registration Limit"),
                ],
            ),
        ],
    ),
];

const ACS: &[Register] = &[
    register(
        0x04,
        2,
        "ACS Capability",
        &[
            constant(1 << 0, "ACS Source Validation"),
            constant(1 << 1, "ACS Translation Blocking"),
            constant(1 << 2, "ACS P2P Request Redirect"),
            constant(1 << 3, "ACS P2P Completion Redirect"),
            constant(1 << 4, "ACS Upstream Forwarding"),
            constant(1 << 5, "ACS P2P Egress Control"),
            constant(1 << 6, "ACS Direct Translated P2P"),
            constant(1 << 7, "ACS Enhanced Capability"),
            constant(0xff00, "Egress Control Vector Size"),
        ],
    ),
    register(
        0x06,
        2,
        "ACS Control",
        &[
            control(1 << 0, "ACS Source Validation Enable"),
            control(1 << 1, "ACS Translation Blocking Enable"),
            control(1 << 2, "ACS P2P Request Redirect Enable"),
            control(1 << 3, "ACS P2P Completion Redirect Enable"),
            control(1 << 4, "ACS Upstream Forwarding Enable"),
            control(1 << 5, "ACS P2P Egress Control Enable"),
            control(1 << 6, "ACS Direct Translated P2P Enable"),
            control(1 << 7, "ACS I/O Request Blocking Enable"),
            control(0x0300, "ACS DSP Memory Target Access Control"),
            control(0x0c00, "ACS USP Memory Target Access Control"),
            control(1 << 12, "ACS Unclaimed Request Redirect Control"),
        ],
    ),
];

const PAGE_REQUEST: &[Register] = &[
    register(0x04, 2, "Page Request Control", &[control(1 << 0, "Enable"), trigger(1 << 1, "Reset")]),
    register(
        0x06,
        2,
        "Page Request Status",
        &[
            rw1c(1 << 0, "Response Failure"),
            rw1c(1 << 1, "Unexpected Page Request Group Index"),
            status(1 << 8, "Stopped"),
            constant(1 << 15, "PRG Response PASID Required"),
            rsvdz(0x7efc),
        ],
    ),
    register(
        0x08,
        4,
        "Outstanding Page Request Capacity",
        &[constant(0xffff_ffff, "Outstanding Page Request Capacity")],
    ),
    register(
        0x0c,
        4,
        "Outstanding Page Request Allocation",
        &[control(0xffff_ffff, "Outstanding Page Request Allocation")],
    ),
];

/// The table is here only where its location says so.
const TPH_LENGTH: Length = Length::Cases {
    at: 4,
    cases: &[
        (0x600, 0x200, Length::Counted { base: 0x0c, unit: 2, at: 4, shift: 16, mask: 0x7ff, more: 1 }),
        (0, 0, Length::Fixed(0x0c)),
    ],
};

const TPH: &[Register] = &[
    register(
        0x04,
        4,
        "TPH Requester Capability",
        &[
            constant(1 << 0, "No ST Mode Supported"),
            constant(1 << 1, "Interrupt Vector Mode Supported"),
            constant(1 << 2, "Device Specific Mode Supported"),
            constant(1 << 8, "Extended TPH Requester Supported"),
            constant(0x0000_0600, "ST Table Location"),
            constant(0x07ff_0000, "ST Table Size"),
        ],
    ),
    register(
        0x08,
        4,
        "TPH Requester Control",
        &[control(0x0000_0007, "ST Mode Select"), control(0x0000_0300, "TPH Requester Enable")],
    ),
];
