//! Capabilities whose header is specified and whose body is their vendor's.

use super::register::{Length, Register, constant, register};
use super::{AnyId, CapabilityId, CapabilitySpec, ExtendedCapabilityId};

const fn vendors(
    id: AnyId,
    section: &'static str,
    length: Length,
    registers: &'static [Register],
) -> CapabilitySpec {
    CapabilitySpec { id, section, length, registers, groups: &[], rest: None }
}

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    vendors(
        AnyId::Legacy(CapabilityId::VENDOR_SPECIFIC),
        "PCI Express 6.0, 7.9.4",
        Length::Byte(2),
        &[register(2, 1, "Capability Length", &[constant(0xff, "Capability Length")])],
    ),
    vendors(
        AnyId::Extended(ExtendedCapabilityId::VENDOR_SPECIFIC),
        "PCI Express 6.0, 7.9.5",
        Length::High12(4),
        &[register(
            4,
            4,
            "Vendor-Specific Header",
            &[
                constant(0x0000_ffff, "VSEC ID"),
                constant(0x000f_0000, "VSEC Rev"),
                constant(0xfff0_0000, "VSEC Length"),
            ],
        )],
    ),
    vendors(
        AnyId::Extended(ExtendedCapabilityId::DVSEC),
        "PCI Express 6.0, 7.9.6",
        Length::High12(4),
        &[
            register(
                4,
                4,
                "Designated Vendor-Specific Header 1",
                &[
                    constant(0x0000_ffff, "DVSEC Vendor ID"),
                    constant(0x000f_0000, "DVSEC Revision"),
                    constant(0xfff0_0000, "DVSEC Length"),
                ],
            ),
            register(8, 2, "Designated Vendor-Specific Header 2", &[constant(0xffff, "DVSEC ID")]),
        ],
    ),
];
