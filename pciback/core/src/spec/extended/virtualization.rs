//! Virtual functions and the size of BARs.

use super::extended;
use crate::spec::register::{
    Count, Group, Kind, Length, Register, WHOLE, constant, control, counted, register, rw1c, status,
};
use crate::spec::{CapabilitySpec, ExtendedCapabilityId, sriov};

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    extended(
        ExtendedCapabilityId::SR_IOV,
        "PCI Express 6.0, 9.3.3",
        Length::Fixed(0x40),
        Kind::Control,
        SR_IOV,
    ),
    extended(ExtendedCapabilityId::MR_IOV, "MR-IOV 1.0, 4", Length::UpTo(0x80), Kind::Control, &[]),
    resizable(ExtendedCapabilityId::RESIZABLE_BAR, "PCI Express 6.0, 7.8.6"),
    resizable(ExtendedCapabilityId::VF_RESIZABLE_BAR, "PCI Express 6.0, 7.8.7"),
    extended(
        ExtendedCapabilityId::SHADOW_FUNCTIONS,
        "PCI Express 6.0, 7.9.25",
        Length::UpTo(0x20),
        Kind::Control,
        &[
            register(0x04, 4, "Shadow Functions Capability", &[constant(0xffff_ffff, WHOLE)]),
            register(0x08, 4, "Shadow Functions Control", &[control(0xffff_ffff, WHOLE)]),
        ],
    ),
];

const SR_IOV: &[Register] = &[
    register(
        0x04,
        4,
        "SR-IOV Capabilities",
        &[
            constant(1 << 0, "VF Migration Capable"),
            constant(1 << 1, "ARI Capable Hierarchy Preserved"),
            constant(1 << 2, "VF 10-Bit Tag Requester Supported"),
            constant(1 << 3, "VF 14-Bit Tag Requester Supported"),
            constant(0xffe0_0000, "VF Migration Interrupt Message Number"),
        ],
    ),
    register(
        0x08,
        2,
        "SR-IOV Control",
        &[
            control(1 << 0, "VF Enable"),
            control(1 << 1, "VF Migration Enable"),
            control(1 << 2, "VF Migration Interrupt Enable"),
            control(1 << 3, "VF MSE"),
            control(1 << 4, "ARI Capable Hierarchy"),
            control(1 << 5, "VF 10-Bit Tag Requester Enable"),
            control(1 << 6, "VF 14-Bit Tag Requester Enable"),
        ],
    ),
    register(0x0a, 2, "SR-IOV Status", &[rw1c(1 << 0, "VF Migration Status")]),
    register(0x0c, 2, "InitialVFs", &[constant(0xffff, "InitialVFs")]),
    register(0x0e, 2, "TotalVFs", &[constant(0xffff, "TotalVFs")]),
    register(0x10, 2, "NumVFs", &[control(0xffff, "NumVFs")]),
    register(0x12, 1, "Function Dependency Link", &[constant(0xff, "Function Dependency Link")]),
    register(0x13, 1, "reserved", &[]),
    // Both may change with NumVFs and ARI Capable Hierarchy.
    register(0x14, 2, "First VF Offset", &[status(0xffff, "First VF Offset")]),
    register(0x16, 2, "VF Stride", &[status(0xffff, "VF Stride")]),
    register(0x18, 2, "reserved", &[]),
    register(sriov::VF_DEVICE_ID, 2, "VF Device ID", &[constant(0xffff, "VF Device ID")]),
    register(0x1c, 4, "Supported Page Sizes", &[constant(0xffff_ffff, "Supported Page Sizes")]),
    register(0x20, 4, "System Page Size", &[control(0xffff_ffff, "System Page Size")]),
    vf_bar(0, "VF BAR0"),
    vf_bar(1, "VF BAR1"),
    vf_bar(2, "VF BAR2"),
    vf_bar(3, "VF BAR3"),
    vf_bar(4, "VF BAR4"),
    vf_bar(5, "VF BAR5"),
    register(
        0x3c,
        4,
        "VF Migration State Array Offset",
        &[constant(0x7, "VF Migration State BIR"), constant(0xffff_fff8, "VF Migration State Offset")],
    ),
];

/// The upper half of a 64-bit BAR has address bits where the others say what they are.
const fn vf_bar(index: u16, name: &'static str) -> Register {
    let fields = const { &[constant(0xf, "Type"), control(0xffff_fff0, "Base Address")] };
    register(sriov::VF_BAR0 + 4 * index, 4, name, fields)
}

const fn resizable(id: ExtendedCapabilityId, section: &'static str) -> CapabilitySpec {
    let length = Length::Counted { base: 4, unit: 8, at: 8, shift: 5, mask: 7, more: 0 };
    extended(id, section, length, Kind::Control, &[]).with(RESIZABLE)
}

/// The control of the first says how many there are.
const RESIZABLE: &[Group] = &[counted(
    4,
    8,
    Count::Field { at: 8, shift: 5, mask: 7, more: 0, given: 0 },
    &[
        register(
            0,
            4,
            "Resizable BAR Capability",
            &[constant(0xffff_fff0, "Supports Sizes of 1 MB to 128 TB")],
        ),
        register(
            4,
            4,
            "Resizable BAR Control",
            &[
                constant(0x0000_0007, "BAR Index"),
                constant(0x0000_00e0, "Number of Resizable BARs"),
                control(0x0000_3f00, "BAR Size"),
                constant(0xffff_0000, "Supports Sizes of 256 TB to 8 EB"),
            ],
        ),
    ],
)];
