//! Extended capabilities that concern the link, the fabric or a port.

use super::extended::extended;
use super::register::{Kind, Length, constant, control, register, rsvdz, rw1c, status};
use super::{CapabilitySpec, ExtendedCapabilityId};

/// Port VC registers, then one group of three per virtual channel; arbitration tables are elsewhere.
const VIRTUAL_CHANNELS: Length = Length::Counted { base: 0x10, unit: 0x0c, at: 4, shift: 0, mask: 7 };

const VC_REGISTERS: &[super::Register] = &[
    register(0x04, 4, "Port VC Capability 1", &[constant(0xffff_ffff, "abilities")]),
    register(0x08, 4, "Port VC Capability 2", &[constant(0xffff_ffff, "abilities")]),
    register(0x0c, 2, "Port VC Control", &[control(0x000f, "arbitration")]),
    register(0x0e, 2, "Port VC Status", &[status(0x0001, "table status"), rsvdz(0xfffe)]),
];

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    extended(
        ExtendedCapabilityId::VIRTUAL_CHANNEL,
        "PCI Express 6.0, 7.9.1",
        VIRTUAL_CHANNELS,
        Kind::Control,
        VC_REGISTERS,
    ),
    extended(
        ExtendedCapabilityId::VIRTUAL_CHANNEL_MFVC,
        "PCI Express 6.0, 7.9.1",
        VIRTUAL_CHANNELS,
        Kind::Control,
        VC_REGISTERS,
    ),
    extended(
        ExtendedCapabilityId::MFVC,
        "PCI Express 6.0, 7.9.2",
        VIRTUAL_CHANNELS,
        Kind::Control,
        VC_REGISTERS,
    ),
    extended(
        ExtendedCapabilityId::RC_LINK_DECLARATION,
        "PCI Express 6.0, 7.9.8",
        Length::Counted { base: 0x10, unit: 0x10, at: 4, shift: 8, mask: 0xff },
        Kind::Constant,
        &[],
    ),
    extended(
        ExtendedCapabilityId::RC_INTERNAL_LINK,
        "PCI Express 6.0, 7.9.9",
        Length::Fixed(0x0c),
        Kind::Control,
        &[],
    ),
    extended(
        ExtendedCapabilityId::RC_EVENT_COLLECTOR,
        "PCI Express 6.0, 7.9.10",
        Length::UpTo(0x0c),
        Kind::Constant,
        &[],
    ),
    extended(
        ExtendedCapabilityId::RCRB_HEADER,
        "PCI Express 6.0, 7.9.7",
        Length::Fixed(0x14),
        Kind::Control,
        &[],
    ),
    extended(
        ExtendedCapabilityId::DYNAMIC_POWER_ALLOCATION,
        "PCI Express 6.0, 7.9.12",
        Length::Counted { base: 0x10, unit: 1, at: 4, shift: 0, mask: 0x1f },
        Kind::Constant,
        &[
            register(0x04, 4, "DPA Capability", &[constant(0xffff_ffff, "abilities")]),
            register(0x08, 4, "DPA Latency Indicator", &[constant(0xffff_ffff, "latencies")]),
            register(
                0x0c,
                2,
                "DPA Status",
                &[status(0x001f, "substate"), rw1c(0x0100, "Substate Control Enabled")],
            ),
            register(0x0e, 2, "DPA Control", &[control(0x001f, "substate")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::LTR,
        "PCI Express 6.0, 7.8.2",
        Length::Fixed(8),
        Kind::Constant,
        &[
            register(0x04, 2, "Max Snoop Latency", &[control(0x1fff, "latency")]),
            register(0x06, 2, "Max No-Snoop Latency", &[control(0x1fff, "latency")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::SECONDARY_PCI_EXPRESS,
        "PCI Express 6.0, 7.7.3",
        Length::UpTo(0x2c),
        Kind::Status,
        &[
            register(0x04, 4, "Link Control 3", &[control(0x0000_fe03, "equalization")]),
            register(0x08, 4, "Lane Error Status", &[rw1c(0xffff_ffff, "lanes")]),
        ],
    ),
    extended(ExtendedCapabilityId::PMUX, "PCI Express 3.1, 7.26", Length::UpTo(0x50), Kind::Control, &[]),
    extended(ExtendedCapabilityId::DPC, "PCI Express 6.0, 7.9.14", Length::UpTo(0x5c), Kind::Control, &[]),
    extended(
        ExtendedCapabilityId::L1_PM_SUBSTATES,
        "PCI Express 6.0, 7.8.3",
        Length::UpTo(0x14),
        Kind::Constant,
        &[
            register(0x04, 4, "L1 PM Substates Capabilities", &[constant(0xffff_ffff, "abilities")]),
            register(0x08, 4, "L1 PM Substates Control 1", &[control(0xe3ff_ff3f, "enables, thresholds")]),
            register(0x0c, 4, "L1 PM Substates Control 2", &[control(0x0000_00fb, "power on time")]),
            register(0x10, 4, "L1 PM Substates Status", &[status(0x0000_0001, "link activation")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::PTM,
        "PCI Express 6.0, 7.9.15",
        Length::Fixed(0x0c),
        Kind::Constant,
        &[
            register(0x04, 4, "PTM Capability", &[constant(0x0000_ffff, "abilities")]),
            register(0x08, 4, "PTM Control", &[control(0x0000_ff03, "enable, root select, granularity")]),
        ],
    ),
    extended(ExtendedCapabilityId::MPCIE, "PCI Express 3.1, 8", Length::UpTo(0x20), Kind::Control, &[]),
    extended(
        ExtendedCapabilityId::FRS_QUEUEING,
        "PCI Express 6.0, 7.8.11",
        Length::Fixed(0x10),
        Kind::Control,
        &[],
    ),
    extended(
        ExtendedCapabilityId::DATA_LINK_FEATURE,
        "PCI Express 6.0, 7.7.4",
        Length::Fixed(0x0c),
        Kind::Constant,
        &[
            register(0x04, 4, "Data Link Feature Capabilities", &[constant(0xffff_ffff, "abilities")]),
            register(0x08, 4, "Data Link Feature Status", &[status(0xffff_ffff, "remote features")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::PHYSICAL_LAYER_16GT,
        "PCI Express 6.0, 7.7.5",
        Length::UpTo(0x40),
        Kind::Status,
        &[],
    ),
    extended(
        ExtendedCapabilityId::LANE_MARGINING,
        "PCI Express 6.0, 7.7.10",
        Length::UpTo(0x88),
        Kind::Control,
        &[],
    ),
    extended(
        ExtendedCapabilityId::PHYSICAL_LAYER_32GT,
        "PCI Express 6.0, 7.7.6",
        Length::UpTo(0x40),
        Kind::Status,
        &[],
    ),
    extended(
        ExtendedCapabilityId::ALTERNATE_PROTOCOL,
        "PCI Express 6.0, 7.9.20",
        Length::UpTo(0x14),
        Kind::Control,
        &[],
    ),
    extended(ExtendedCapabilityId::SFI, "PCI Express 6.0, 7.9.22", Length::Fixed(0x14), Kind::Control, &[]),
    extended(
        ExtendedCapabilityId::PHYSICAL_LAYER_64GT,
        "PCI Express 6.0, 7.7.7",
        Length::UpTo(0x20),
        Kind::Status,
        &[],
    ),
    extended(
        ExtendedCapabilityId::FLIT_LOGGING,
        "PCI Express 6.0, 7.7.8",
        Length::UpTo(0x3c),
        Kind::Status,
        &[],
    ),
    extended(
        ExtendedCapabilityId::FLIT_PERFORMANCE,
        "PCI Express 6.1, 7.8.12",
        Length::UpTo(0x20),
        Kind::Status,
        &[],
    ),
    extended(
        ExtendedCapabilityId::FLIT_ERROR_INJECTION,
        "PCI Express 6.1, 7.8.13",
        Length::UpTo(0x20),
        Kind::Control,
        &[],
    ),
];
