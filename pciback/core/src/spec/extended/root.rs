//! Root complexes, root ports and slots.

use super::extended;
use crate::spec::register::{Count, Kind, Length, constant, control, counted, register, rsvdz, rw1c, status};
use crate::spec::{CapabilitySpec, ExtendedCapabilityId};

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    extended(
        ExtendedCapabilityId::RC_LINK_DECLARATION,
        "PCI Express 6.0, 7.9.8",
        Length::Counted { base: 0x10, unit: 0x10, at: 4, shift: 8, mask: 0xff, more: 0 },
        Kind::Constant,
        &[
            register(
                0x04,
                4,
                "Element Self Description",
                &[
                    constant(0x0000_000f, "Element Type"),
                    constant(0x0000_ff00, "Number of Link Entries"),
                    constant(0x00ff_0000, "Component ID"),
                    constant(0xff00_0000, "Port Number"),
                ],
            ),
            register(0x08, 4, "reserved", &[]),
            register(0x0c, 4, "reserved", &[]),
        ],
    )
    .with(&[counted(
        0x10,
        0x10,
        Count::Field { at: 4, shift: 8, mask: 0xff, more: 0, given: 0 },
        &[
            register(
                0,
                4,
                "Link Description",
                &[
                    constant(1 << 0, "Link Valid"),
                    constant(1 << 1, "Link Type"),
                    constant(1 << 2, "Associate RCRB Header"),
                    constant(0x00ff_0000, "Target Component ID"),
                    constant(0xff00_0000, "Target Port Number"),
                ],
            ),
            register(4, 4, "reserved", &[]),
            register(8, 4, "Link Address, lower", &[constant(0xffff_ffff, "Link Address 31:0")]),
            register(0x0c, 4, "Link Address, upper", &[constant(0xffff_ffff, "Link Address 63:32")]),
        ],
    )]),
    extended(
        ExtendedCapabilityId::RC_INTERNAL_LINK,
        "PCI Express 6.0, 7.9.9",
        Length::Fixed(0x0c),
        Kind::Control,
        &[
            register(
                0x04,
                4,
                "Root Complex Link Capabilities",
                &[
                    constant(0x0000_000f, "Max Link Speed"),
                    constant(0x0000_03f0, "Maximum Link Width"),
                    constant(0x0000_0c00, "ASPM Support"),
                    constant(0x0000_7000, "L0s Exit Latency"),
                    constant(0x0003_8000, "L1 Exit Latency"),
                    constant(0x01fc_0000, "Supported Link Speeds Vector"),
                ],
            ),
            register(
                0x08,
                2,
                "Root Complex Link Control",
                &[control(0x0003, "ASPM Control"), control(1 << 7, "Extended Synch")],
            ),
            register(
                0x0a,
                2,
                "Root Complex Link Status",
                &[status(0x000f, "Current Link Speed"), status(0x03f0, "Negotiated Link Width")],
            ),
        ],
    ),
    extended(
        ExtendedCapabilityId::RC_EVENT_COLLECTOR,
        "PCI Express 6.0, 7.9.10",
        // Bus numbers came with version 2.
        Length::Cases {
            at: 0,
            cases: &[(0x000f_0000, 0x0001_0000, Length::Fixed(8)), (0, 0, Length::UpTo(0x0c))],
        },
        Kind::Constant,
        &[
            register(
                0x04,
                4,
                "Association Bitmap for RCiEPs",
                &[constant(0xffff_ffff, "Association Bitmap for RCiEPs")],
            ),
            register(
                0x08,
                4,
                "RCEC Associated Bus Numbers",
                &[constant(0x0000_ff00, "RCEC Next Bus"), constant(0x00ff_0000, "RCEC Last Bus")],
            ),
        ],
    ),
    extended(
        ExtendedCapabilityId::RCRB_HEADER,
        "PCI Express 6.0, 7.9.7",
        Length::UpTo(0x14),
        Kind::Control,
        &[
            register(0x04, 2, "Vendor ID", &[constant(0xffff, "Vendor ID")]),
            register(0x06, 2, "Device ID", &[constant(0xffff, "Device ID")]),
            register(
                0x08,
                4,
                "RCRB Capabilities",
                &[constant(1 << 0, "Configuration RRS Software Visibility")],
            ),
            register(
                0x0c,
                4,
                "RCRB Control",
                &[control(1 << 0, "Configuration RRS Software Visibility Enable")],
            ),
        ],
    ),
    extended(
        ExtendedCapabilityId::FRS_QUEUEING,
        "PCI Express 6.0, 7.8.10",
        Length::Fixed(0x10),
        Kind::Control,
        &[
            register(
                0x04,
                4,
                "FRS Queueing Capability",
                &[
                    constant(0x0000_0fff, "FRS Queue Max Depth"),
                    constant(0x001f_0000, "FRS Interrupt Message Number"),
                ],
            ),
            register(
                0x08,
                2,
                "FRS Queueing Status",
                &[rw1c(1 << 0, "FRS Message Received"), rw1c(1 << 1, "FRS Message Overflow"), rsvdz(0xfffc)],
            ),
            register(0x0a, 2, "FRS Queueing Control", &[control(1 << 0, "FRS Interrupt Enable")]),
            // A write takes the oldest message off.
            register(
                0x0c,
                4,
                "FRS Message Queue",
                &[
                    status(0x0000_ffff, "FRS Message Queue Function ID"),
                    status(0x000f_0000, "FRS Message Queue Reason"),
                ],
            ),
        ],
    ),
    extended(
        ExtendedCapabilityId::SFI,
        "PCI Express 6.0, 7.9.22",
        Length::Fixed(0x14),
        Kind::Control,
        &[
            register(
                0x04,
                2,
                "SFI Capability",
                &[constant(1 << 0, "SFI OOB PD Supported"), constant(1 << 1, "Enhanced SFI Supported")],
            ),
            register(
                0x06,
                2,
                "SFI Control",
                &[control(1 << 0, "SFI PD State Mask"), control(1 << 1, "SFI DLL State Mask")],
            ),
            register(
                0x08,
                4,
                "SFI Status",
                &[status(1 << 0, "SFI PD State"), status(1 << 1, "SFI OOB PD State")],
            ),
            register(0x0c, 4, "SFI CAM Address", &[control(0xffff_ffff, "SFI CAM Address")]),
            register(0x10, 4, "SFI CAM Data", &[control(0xffff_ffff, "SFI CAM Data")]),
        ],
    ),
];
