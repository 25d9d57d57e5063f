//! Extended capabilities that concern a function: errors, translation, identity, virtualization.

use super::register::{Kind, Length, Register, constant, control, register, rsvdz, rw1c, status};
use super::{AnyId, CapabilitySpec, ExtendedCapabilityId};

pub(super) const fn extended(
    id: ExtendedCapabilityId,
    section: &'static str,
    length: Length,
    rest: Kind,
    registers: &'static [Register],
) -> CapabilitySpec {
    CapabilitySpec { id: AnyId::Extended(id), section, length, registers, rest }
}

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    extended(
        ExtendedCapabilityId::AER,
        "PCI Express 6.0, 7.8.4",
        Length::UpTo(0x48),
        Kind::Status,
        &[
            register(
                0x04,
                4,
                "Uncorrectable Error Status",
                &[rw1c(0x1fff_f030, "errors"), rsvdz(0xe000_0fcf)],
            ),
            register(0x08, 4, "Uncorrectable Error Mask", &[control(0x1fff_f030, "masks")]),
            register(0x0c, 4, "Uncorrectable Error Severity", &[control(0x1fff_f030, "severities")]),
            register(0x10, 4, "Correctable Error Status", &[rw1c(0x0000_f1c1, "errors"), rsvdz(0xffff_0e3e)]),
            register(0x14, 4, "Correctable Error Mask", &[control(0x0000_f1c1, "masks")]),
            register(
                0x18,
                4,
                "Advanced Error Capabilities and Control",
                &[
                    status(0x001f, "First Error Pointer"),
                    constant(0x02a0, "ECRC and header recording capable"),
                    control(1 << 6, "ECRC Generation Enable"),
                    control(1 << 8, "ECRC Check Enable"),
                    control(1 << 10, "Multiple Header Recording Enable"),
                    status(0x1_f800, "prefix log present, timeout log, flit log"),
                ],
            ),
            register(0x1c, 4, "Header Log", &[status(0xffff_ffff, "dword 1")]),
            register(0x20, 4, "Header Log", &[status(0xffff_ffff, "dword 2")]),
            register(0x24, 4, "Header Log", &[status(0xffff_ffff, "dword 3")]),
            register(0x28, 4, "Header Log", &[status(0xffff_ffff, "dword 4")]),
            register(0x2c, 4, "Root Error Command", &[control(0x0000_0007, "reporting enables")]),
            register(
                0x30,
                4,
                "Root Error Status",
                &[rw1c(0x0000_01ff, "errors"), status(0xf800_0000, "message number")],
            ),
            register(0x34, 4, "Error Source Identification", &[status(0xffff_ffff, "sources")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::SERIAL_NUMBER,
        "PCI Express 6.0, 7.9.3",
        Length::Fixed(0x0c),
        Kind::Constant,
        &[
            register(0x04, 4, "Serial Number (lower)", &[constant(0xffff_ffff, "number")]),
            register(0x08, 4, "Serial Number (upper)", &[constant(0xffff_ffff, "number")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::POWER_BUDGETING,
        "PCI Express 6.0, 7.8.1",
        Length::UpTo(0x18),
        Kind::Constant,
        &[
            register(0x04, 1, "Data Select", &[control(0xff, "select")]),
            register(0x08, 4, "Data", &[status(0xffff_ffff, "power")]),
            register(0x0c, 4, "Power Budget Capability", &[constant(0xffff_ffff, "abilities")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::CONFIG_ACCESS_CORRELATION,
        "Trusted Configuration Space ECN, 7.24",
        Length::UpTo(0x20),
        Kind::Control,
        &[],
    ),
    extended(
        ExtendedCapabilityId::ACS,
        "PCI Express 6.0, 7.7.11",
        Length::UpTo(0x28),
        Kind::Control,
        &[
            register(0x04, 2, "ACS Capability", &[constant(0xffff, "abilities")]),
            register(0x06, 2, "ACS Control", &[control(0x1fff, "enables")]),
        ],
    ),
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
                &[constant(0x0003, "function groups"), constant(0xff00, "Next Function Number")],
            ),
            register(0x06, 2, "ARI Control", &[control(0x0073, "function groups")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::ATS,
        "PCI Express 6.0, 10.5.1",
        Length::Fixed(8),
        Kind::Constant,
        &[
            register(0x04, 2, "ATS Capability", &[constant(0x01ff, "abilities")]),
            register(0x06, 2, "ATS Control", &[control(0x801f, "enable, smallest translation unit")]),
        ],
    ),
    extended(ExtendedCapabilityId::SR_IOV, "PCI Express 6.0, 9.3.3", Length::Fixed(0x40), Kind::Control, &[]),
    extended(ExtendedCapabilityId::MR_IOV, "MR-IOV 1.0, 4.2", Length::UpTo(0x80), Kind::Control, &[]),
    extended(
        ExtendedCapabilityId::MULTICAST,
        "PCI Express 6.0, 7.9.11",
        Length::UpTo(0x30),
        Kind::Control,
        &[
            register(0x04, 2, "Multicast Capability", &[constant(0xffff, "abilities")]),
            register(0x06, 2, "Multicast Control", &[control(0x803f, "enable, groups")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::PAGE_REQUEST,
        "PCI Express 6.0, 10.5.2",
        Length::Fixed(0x10),
        Kind::Constant,
        &[
            register(0x04, 2, "Page Request Control", &[control(0x0003, "enable, reset")]),
            register(
                0x06,
                2,
                "Page Request Status",
                &[rw1c(0x0003, "errors"), status(0x0100, "stopped"), constant(0x8000, "PASID required")],
            ),
            register(0x08, 4, "Outstanding Page Request Capacity", &[constant(0xffff_ffff, "capacity")]),
            register(0x0c, 4, "Outstanding Page Request Allocation", &[control(0xffff_ffff, "allocation")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::RESIZABLE_BAR,
        "PCI Express 6.0, 7.8.6",
        Length::Counted { base: 4, unit: 8, at: 8, shift: 5, mask: 7 },
        Kind::Control,
        &[],
    ),
    extended(
        ExtendedCapabilityId::VF_RESIZABLE_BAR,
        "PCI Express 6.0, 7.8.7",
        Length::Counted { base: 4, unit: 8, at: 8, shift: 5, mask: 7 },
        Kind::Control,
        &[],
    ),
    extended(
        ExtendedCapabilityId::TPH_REQUESTER,
        "PCI Express 6.0, 7.9.13",
        Length::Counted { base: 0x0c, unit: 2, at: 4, shift: 16, mask: 0x7ff },
        Kind::Control,
        &[
            register(0x04, 4, "TPH Requester Capability", &[constant(0x07ff_0707, "abilities")]),
            register(0x08, 4, "TPH Requester Control", &[control(0x0000_0307, "mode, enable")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::PASID,
        "PCI Express 6.0, 7.8.9",
        Length::Fixed(8),
        Kind::Constant,
        &[
            register(0x04, 2, "PASID Capability", &[constant(0x1f0e, "abilities")]),
            register(0x06, 2, "PASID Control", &[control(0x000f, "enables")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::LN_REQUESTER,
        "PCI Express 5.0, 7.9.22",
        Length::Fixed(8),
        Kind::Constant,
        &[
            register(0x04, 2, "LNR Capability", &[constant(0x1f03, "abilities")]),
            register(0x06, 2, "LNR Control", &[control(0x1f03, "enable, registration limit")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::READINESS_TIME,
        "PCI Express 6.0, 7.9.16",
        Length::Fixed(0x0c),
        Kind::Constant,
        &[
            register(0x04, 4, "Readiness Time 1", &[constant(0xffff_ffff, "times")]),
            register(0x08, 4, "Readiness Time 2", &[constant(0xffff_ffff, "times")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::HIERARCHY_ID,
        "PCI Express 6.0, 7.9.17",
        Length::UpTo(0x3c),
        Kind::Status,
        &[],
    ),
    extended(ExtendedCapabilityId::NPEM, "PCI Express 6.0, 7.9.19", Length::Fixed(0x10), Kind::Control, &[]),
    extended(
        ExtendedCapabilityId::SHADOW_FUNCTIONS,
        "PCI Express 6.0, 7.9.25",
        Length::UpTo(0x20),
        Kind::Control,
        &[],
    ),
    extended(ExtendedCapabilityId::DOE, "PCI Express 6.0, 7.9.24", Length::Fixed(0x18), Kind::Control, &[]),
    extended(
        ExtendedCapabilityId::DEVICE_3,
        "PCI Express 6.0, 7.7.9",
        Length::Fixed(0x10),
        Kind::Constant,
        &[
            register(0x04, 4, "Device Capabilities 3", &[constant(0xffff_ffff, "abilities")]),
            register(0x08, 4, "Device Control 3", &[control(0xffff_ffff, "enables")]),
            register(0x0c, 4, "Device Status 3", &[status(0xffff_ffff, "state")]),
        ],
    ),
    extended(ExtendedCapabilityId::IDE, "PCI Express 6.0, 7.9.26", Length::UpTo(0x400), Kind::Control, &[]),
];
