//! Virtual channels and multicast.

use super::extended;
use crate::spec::register::{
    Count, Group, Kind, Length, Register, WHOLE, constant, control, counted, register, rsvdz, status, trigger,
};
use crate::spec::{CapabilitySpec, ExtendedCapabilityId};

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    channels(ExtendedCapabilityId::VIRTUAL_CHANNEL, "PCI Express 6.0, 7.9.1"),
    channels(ExtendedCapabilityId::VIRTUAL_CHANNEL_MFVC, "PCI Express 6.0, 7.9.1"),
    channels(ExtendedCapabilityId::MFVC, "PCI Express 6.0, 7.9.2"),
    extended(
        ExtendedCapabilityId::STREAMLINED_VIRTUAL_CHANNEL,
        "PCI Express 6.3, 7.9.29",
        Length::Counted { base: 0x14, unit: 0x0c, at: 4, shift: 0, mask: 7, more: 1 },
        Kind::Control,
        &[
            register(
                0x04,
                4,
                "SVC Port Capability 1",
                &[constant(0x0000_0007, "SVC Extended VC Count"), constant(0xffff_fff8, WHOLE)],
            ),
            register(0x08, 4, "SVC Port Capability 2", &[constant(0xffff_ffff, WHOLE)]),
            register(0x0c, 4, "SVC Port Control", &[control(0xffff_ffff, WHOLE)]),
            register(0x10, 4, "SVC Port Status", &[status(0xffff_ffff, WHOLE)]),
        ],
    )
    .with(&[counted(
        0x14,
        0x0c,
        Count::Field { at: 4, shift: 0, mask: 7, more: 1, given: 0 },
        &[
            register(0, 4, "SVC Resource Capability", &[constant(0xffff_ffff, WHOLE)]),
            register(4, 4, "SVC Resource Control", &[control(0xffff_ffff, WHOLE)]),
            register(8, 4, "SVC Resource Status", &[status(0xffff_ffff, WHOLE)]),
        ],
    )]),
    extended(
        ExtendedCapabilityId::MULTICAST,
        "PCI Express 6.0, 7.9.11",
        Length::UpTo(0x30),
        Kind::Control,
        MULTICAST,
    ),
];

/// Arbitration tables, which stand where other registers say, are what no register covers.
const fn channels(id: ExtendedCapabilityId, section: &'static str) -> CapabilitySpec {
    extended(id, section, Length::Channels, Kind::Control, PORT).with(RESOURCES)
}

const PORT: &[Register] = &[
    register(
        0x04,
        4,
        "Port VC Capability 1",
        &[
            constant(0x0000_0007, "Extended VC Count"),
            constant(0x0000_0070, "Low Priority Extended VC Count"),
            constant(0x0000_0300, "Reference Clock"),
            constant(0x0000_0c00, "Port Arbitration Table Entry Size"),
        ],
    ),
    register(
        0x08,
        4,
        "Port VC Capability 2",
        &[
            constant(0x0000_00ff, "VC Arbitration Capability"),
            constant(0xff00_0000, "VC Arbitration Table Offset"),
        ],
    ),
    register(
        0x0c,
        2,
        "Port VC Control",
        &[trigger(1 << 0, "Load VC Arbitration Table"), control(0x000e, "VC Arbitration Select")],
    ),
    register(0x0e, 2, "Port VC Status", &[status(1 << 0, "VC Arbitration Table Status"), rsvdz(0xfffe)]),
];

const RESOURCES: &[Group] = &[counted(
    0x10,
    0x0c,
    Count::Field { at: 4, shift: 0, mask: 7, more: 1, given: 0 },
    &[
        register(
            0,
            4,
            "VC Resource Capability",
            &[
                constant(0x0000_00ff, "Port Arbitration Capability"),
                constant(1 << 14, "Undefined"),
                constant(1 << 15, "Reject Snoop Transactions"),
                constant(0x007f_0000, "Maximum Time Slots"),
                constant(0xff00_0000, "Port Arbitration Table Offset"),
            ],
        ),
        register(
            4,
            4,
            "VC Resource Control",
            &[
                control(0x0000_00ff, "TC/VC Map"),
                trigger(1 << 16, "Load Port Arbitration Table"),
                control(0x000e_0000, "Port Arbitration Select"),
                control(0x0700_0000, "VC ID"),
                control(1 << 31, "VC Enable"),
            ],
        ),
        register(8, 2, "reserved", &[]),
        register(
            0x0a,
            2,
            "VC Resource Status",
            &[
                status(1 << 0, "Port Arbitration Table Status"),
                status(1 << 1, "VC Negotiation Pending"),
                rsvdz(0xfffc),
            ],
        ),
    ],
)];

const MULTICAST: &[Register] = &[
    register(
        0x04,
        2,
        "Multicast Capability",
        &[
            constant(0x003f, "MC_Max_Group"),
            constant(0x3f00, "MC_Window_Size_Requested"),
            constant(1 << 15, "MC_ECRC_Regeneration_Supported"),
        ],
    ),
    register(0x06, 2, "Multicast Control", &[control(0x003f, "MC_Num_Group"), control(1 << 15, "MC_Enable")]),
    register(
        0x08,
        4,
        "MC_Base_Address, lower",
        &[control(0x0000_003f, "MC_Index_Position"), control(0xffff_f000, "MC_Base_Address 31:12")],
    ),
    register(0x0c, 4, "MC_Base_Address, upper", &[control(0xffff_ffff, "MC_Base_Address 63:32")]),
    register(0x10, 4, "MC_Receive, lower", &[control(0xffff_ffff, "MC_Receive 31:0")]),
    register(0x14, 4, "MC_Receive, upper", &[control(0xffff_ffff, "MC_Receive 63:32")]),
    register(0x18, 4, "MC_Block_All, lower", &[control(0xffff_ffff, "MC_Block_All 31:0")]),
    register(0x1c, 4, "MC_Block_All, upper", &[control(0xffff_ffff, "MC_Block_All 63:32")]),
    register(0x20, 4, "MC_Block_Untranslated, lower", &[control(0xffff_ffff, "MC_Block_Untranslated 31:0")]),
    register(0x24, 4, "MC_Block_Untranslated, upper", &[control(0xffff_ffff, "MC_Block_Untranslated 63:32")]),
    register(
        0x28,
        4,
        "MC_Overlay_BAR, lower",
        &[control(0x0000_003f, "MC_Overlay_Size"), control(0xffff_ffc0, "MC_Overlay_BAR 31:6")],
    ),
    register(0x2c, 4, "MC_Overlay_BAR, upper", &[control(0xffff_ffff, "MC_Overlay_BAR 63:32")]),
];
