//! The link: its features, power states, lanes and other protocols.

use super::extended;
use crate::spec::register::{
    Kind, Length, Register, constant, control, each, register, rw1c, status, trigger, when,
};
use crate::spec::{CapabilitySpec, ExtendedCapabilityId};

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    extended(
        ExtendedCapabilityId::SECONDARY_PCI_EXPRESS,
        "PCI Express 6.0, 7.7.3",
        Length::UpTo(0x2c),
        Kind::Status,
        &[
            register(
                0x04,
                4,
                "Link Control 3",
                &[
                    trigger(1 << 0, "Perform Equalization"),
                    control(1 << 1, "Link Equalization Request Interrupt Enable"),
                    control(0x0000_fe00, "Enable Lower SKP OS Generation Vector"),
                ],
            ),
            register(0x08, 4, "Lane Error Status", &[rw1c(0xffff_ffff, "Lane Error Status Bits")]),
        ],
    )
    .with(&[each(
        0x0c,
        2,
        &[register(
            0,
            2,
            "Lane Equalization Control",
            &[
                status(0x000f, "Downstream Port 8.0 GT/s Transmitter Preset"),
                status(0x0070, "Downstream Port 8.0 GT/s Receiver Preset Hint"),
                status(0x0f00, "Upstream Port 8.0 GT/s Transmitter Preset"),
                status(0x7000, "Upstream Port 8.0 GT/s Receiver Preset Hint"),
            ],
        )],
    )]),
    extended(
        ExtendedCapabilityId::DATA_LINK_FEATURE,
        "PCI Express 6.0, 7.7.4",
        Length::Fixed(0x0c),
        Kind::Constant,
        DATA_LINK_FEATURE,
    ),
    extended(
        ExtendedCapabilityId::LANE_MARGINING,
        "PCI Express 6.0, 7.7.10",
        Length::UpTo(0x88),
        Kind::Control,
        &[
            register(
                0x04,
                2,
                "Margining Port Capabilities",
                &[constant(1 << 0, "Margining uses Driver Software")],
            ),
            register(
                0x06,
                2,
                "Margining Port Status",
                &[status(1 << 0, "Margining Ready"), status(1 << 1, "Margining Software Ready")],
            ),
        ],
    )
    .with(&[each(
        8,
        4,
        &[
            register(
                0,
                2,
                "Margining Lane Control",
                &[
                    control(0x0007, "Receiver Number"),
                    control(0x0038, "Margin Type"),
                    control(1 << 6, "Usage Model"),
                    control(0xff00, "Margin Payload"),
                ],
            ),
            register(
                2,
                2,
                "Margining Lane Status",
                &[
                    status(0x0007, "Receiver Number Status"),
                    status(0x0038, "Margin Type Status"),
                    status(1 << 6, "Usage Model Status"),
                    status(0xff00, "Margin Payload Status"),
                ],
            ),
        ],
    )]),
    extended(
        ExtendedCapabilityId::L1_PM_SUBSTATES,
        "PCI Express 6.0, 7.8.3",
        Length::UpTo(0x14),
        Kind::Constant,
        L1_PM_SUBSTATES,
    ),
    extended(
        ExtendedCapabilityId::ALTERNATE_PROTOCOL,
        "PCI Express 6.0, 7.9.20",
        Length::UpTo(0x18),
        Kind::Control,
        ALTERNATE_PROTOCOL,
    )
    // Selective Enable Supported.
    .with(&[when(
        4,
        1 << 8,
        1 << 8,
        &[register(
            0x14,
            4,
            "Alternate Protocol Selective Enable Mask",
            &[control(0xffff_ffff, "Alternate Protocol Selective Enable Mask")],
        )],
    )]),
    extended(ExtendedCapabilityId::PMUX, "PCI Express 3.1, 7", Length::UpTo(0x50), Kind::Control, &[]),
    extended(ExtendedCapabilityId::MPCIE, "PCI Express 3.1, 8", Length::UpTo(0x20), Kind::Control, &[]),
];

const DATA_LINK_FEATURE: &[Register] = &[
    register(
        0x04,
        4,
        "Data Link Feature Capabilities",
        &[
            constant(1 << 0, "Local Scaled Flow Control Supported"),
            constant(1 << 1, "Local Immediate Readiness"),
            constant(0x0000_001c, "Local Extended VC Count"),
            constant(0x0000_00e0, "Local L0p Exit Latency"),
            constant(0x007f_ff00, "Local Data Link Features Supported"),
            constant(1 << 31, "Data Link Feature Exchange Enable"),
        ],
    ),
    register(
        0x08,
        4,
        "Data Link Feature Status",
        &[
            status(1 << 0, "Remote Scaled Flow Control Supported"),
            status(1 << 1, "Remote Immediate Readiness"),
            status(0x0000_001c, "Remote Extended VC Count"),
            status(0x0000_00e0, "Remote L0p Exit Latency"),
            status(0x007f_ff00, "Remote Data Link Features Supported"),
            status(1 << 31, "Remote Data Link Feature Supported Valid"),
        ],
    ),
];

const L1_PM_SUBSTATES: &[Register] = &[
    register(
        0x04,
        4,
        "L1 PM Substates Capabilities",
        &[
            constant(1 << 0, "PCI-PM L1.2 Supported"),
            constant(1 << 1, "PCI-PM L1.1 Supported"),
            constant(1 << 2, "ASPM L1.2 Supported"),
            constant(1 << 3, "ASPM L1.1 Supported"),
            constant(1 << 4, "L1 PM Substates Supported"),
            constant(1 << 5, "Link Activation Supported"),
            constant(0x0000_ff00, "Port Common_Mode_Restore_Time"),
            constant(0x0003_0000, "Port T_POWER_ON Scale"),
            constant(0x00f8_0000, "Port T_POWER_ON Value"),
        ],
    ),
    register(
        0x08,
        4,
        "L1 PM Substates Control 1",
        &[
            control(1 << 0, "PCI-PM L1.2 Enable"),
            control(1 << 1, "PCI-PM L1.1 Enable"),
            control(1 << 2, "ASPM L1.2 Enable"),
            control(1 << 3, "ASPM L1.1 Enable"),
            control(1 << 4, "Link Activation Interrupt Enable"),
            control(1 << 5, "Link Activation Control"),
            control(0x0000_ff00, "Common_Mode_Restore_Time"),
            control(0x03ff_0000, "LTR_L1.2_THRESHOLD_Value"),
            control(0xe000_0000, "LTR_L1.2_THRESHOLD_Scale"),
        ],
    ),
    register(
        0x0c,
        4,
        "L1 PM Substates Control 2",
        &[control(0x0000_0003, "T_POWER_ON Scale"), control(0x0000_00f8, "T_POWER_ON Value")],
    ),
    register(0x10, 4, "L1 PM Substates Status", &[rw1c(1 << 0, "Link Activation Status")]),
];

const ALTERNATE_PROTOCOL: &[Register] = &[
    register(
        0x04,
        4,
        "Alternate Protocol Capabilities",
        &[
            constant(0x0000_00ff, "Alternate Protocol Count"),
            constant(1 << 8, "Alternate Protocol Selective Enable Supported"),
        ],
    ),
    register(
        0x08,
        4,
        "Alternate Protocol Control",
        &[
            control(0x0000_00ff, "Alternate Protocol Index Select"),
            control(1 << 8, "Alternate Protocol Negotiation Global Enable"),
        ],
    ),
    // Both follow the index.
    register(
        0x0c,
        4,
        "Alternate Protocol Data 1",
        &[
            status(0x0000_0007, "Alternate Protocol Usage Information"),
            status(0x0000_ffe0, "Alternate Protocol Details"),
            status(0xffff_0000, "Alternate Protocol Vendor ID"),
        ],
    ),
    register(0x10, 4, "Alternate Protocol Data 2", &[status(0x00ff_ffff, "Modified TS Information 2")]),
];
