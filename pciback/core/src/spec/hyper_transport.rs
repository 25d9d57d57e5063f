//! HyperTransport's capabilities: one id, whose command says which of them it is (HyperTransport 3.10, chapter 7).

use super::legacy::legacy;
use super::register::{
    Group, Kind, Length, Register, constant, control, each, register, rw1c, status, trigger, when,
};
use super::{CapabilityId, CapabilitySpec};

/// The one id. What the types that are not described hold is shown and not written.
pub const CAPABILITIES: &[CapabilitySpec] = &[CapabilitySpec {
    rest: Some(Kind::Status),
    ..legacy(CapabilityId::HYPER_TRANSPORT, "HyperTransport 3.10, 7", HYPER_TRANSPORT_LENGTH, &[])
        .with(HYPER_TRANSPORT)
}];

/// The command's highest bits, in the dword at 0, say which of HyperTransport's capabilities it is: three or five of them.
const TYPE_3: u32 = 0xe000_0000;
const TYPE_5: u32 = 0xf800_0000;

const SLAVE: u32 = 0;
const HOST: u32 = 0x2000_0000;
const SWITCH: u32 = 0x4000_0000;
const INTERRUPTS: u32 = 0x8000_0000;
const REVISION: u32 = 0x8800_0000;
const UNIT_ID_CLUMPING: u32 = 0x9000_0000;
const EXTENDED_ACCESS: u32 = 0x9800_0000;
const ADDRESS_MAPPING: u32 = 0xa000_0000;
const MSI_MAPPING: u32 = 0xa800_0000;
const DIRECT_ROUTE: u32 = 0xb000_0000;
const VC_SET: u32 = 0xb800_0000;
const RETRY: u32 = 0xc000_0000;
/// Address mapping: bits 10:9 of the command say how wide addresses are.
const MAP_TYPE: u32 = 0x0600_0000;

const HYPER_TRANSPORT_LENGTH: Length = Length::Cases {
    at: 0,
    cases: &[
        (TYPE_3, SLAVE, Length::Fixed(0x1c)),
        (TYPE_3, HOST, Length::Fixed(0x18)),
        (TYPE_5, SWITCH, Length::Fixed(0x18)),
        (TYPE_5, INTERRUPTS, Length::Fixed(8)),
        (TYPE_5, UNIT_ID_CLUMPING, Length::Fixed(0x0c)),
        (TYPE_5, EXTENDED_ACCESS, Length::Fixed(0x0c)),
        (
            TYPE_5 | MAP_TYPE,
            ADDRESS_MAPPING,
            Length::Counted { base: 0x0c, unit: 8, at: 0, shift: 16, mask: 0xf, more: 0 },
        ),
        (TYPE_5, ADDRESS_MAPPING, Length::Fixed(0x10)),
        // A fixed mapping has no address.
        (TYPE_5 | 0x0002_0000, MSI_MAPPING | 0x0002_0000, Length::Fixed(4)),
        (TYPE_5, MSI_MAPPING, Length::Fixed(0x0c)),
        (TYPE_5, DIRECT_ROUTE, Length::Fixed(0x0c)),
        (TYPE_5, VC_SET, Length::Fixed(0x10)),
        (TYPE_5, RETRY, Length::Fixed(0x0c)),
        (0, 0, Length::Fixed(4)),
    ],
};

const fn link_control(offset: u16, name: &'static str) -> Register {
    register(
        offset,
        2,
        name,
        const {
            &[
                control(1 << 1, "CRC Flood Enable"),
                trigger(1 << 2, "CRC Start Test"),
                control(1 << 3, "CRC Force Error"),
                rw1c(1 << 4, "Link Failure"),
                status(1 << 5, "Initialization Complete"),
                control(1 << 6, "End of Chain"),
                control(1 << 7, "Transmitter Off"),
                rw1c(0x0f00, "CRC Error"),
                control(1 << 12, "Isochronous Flow Control Enable"),
                control(1 << 13, "LDTSTOP# Tristate Enable"),
                control(1 << 14, "Extended CTL Time"),
                control(1 << 15, "64-bit Addressing Enable"),
            ]
        },
    )
}

const fn link_configuration(offset: u16, name: &'static str) -> Register {
    register(
        offset,
        2,
        name,
        const {
            &[
                constant(0x0007, "Max Link Width In"),
                constant(1 << 3, "Doubleword Flow Control In"),
                constant(0x0070, "Max Link Width Out"),
                constant(1 << 7, "Doubleword Flow Control Out"),
                control(0x0700, "Link Width In"),
                control(1 << 11, "Doubleword Flow Control In Enable"),
                control(0x7000, "Link Width Out"),
                control(1 << 15, "Doubleword Flow Control Out Enable"),
            ]
        },
    )
}

const fn revision_id(offset: u16) -> Register {
    register(
        offset,
        1,
        "Revision ID",
        const { &[constant(0x1f, "Minor Revision"), constant(0xe0, "Major Revision")] },
    )
}

const fn link_frequency(offset: u16, name: &'static str) -> Register {
    register(
        offset,
        1,
        name,
        const {
            &[
                control(0x0f, "Link Frequency"),
                rw1c(1 << 4, "Protocol Error"),
                rw1c(1 << 5, "Overflow Error"),
                rw1c(1 << 6, "End of Chain Error"),
                control(1 << 7, "CTL Timeout"),
            ]
        },
    )
}

const fn link_frequencies(offset: u16, name: &'static str) -> Register {
    register(offset, 2, name, const { &[constant(0xffff, "Link Frequency Capability")] })
}

const fn feature(offset: u16) -> Register {
    register(
        offset,
        1,
        "Feature Capability",
        const {
            &[
                constant(1 << 0, "Isochronous Flow Control Mode"),
                constant(1 << 1, "LDTSTOP#"),
                constant(1 << 2, "CRC Test Mode"),
                constant(1 << 3, "Extended CTL Time Required"),
                constant(1 << 4, "64-bit Addressing"),
                constant(1 << 5, "UnitID Reorder Disable"),
            ]
        },
    )
}

const fn error_handling(offset: u16) -> Register {
    register(
        offset,
        2,
        "Error Handling",
        const {
            &[
                control(1 << 0, "Protocol Error Flood Enable"),
                control(1 << 1, "Overflow Error Flood Enable"),
                control(1 << 2, "Protocol Error Fatal Enable"),
                control(1 << 3, "Overflow Error Fatal Enable"),
                control(1 << 4, "End of Chain Error Fatal Enable"),
                control(1 << 5, "Response Error Fatal Enable"),
                control(1 << 6, "CRC Error Fatal Enable"),
                control(1 << 7, "System Error Fatal Enable"),
                status(1 << 8, "Chain Fail"),
                rw1c(1 << 9, "Response Error"),
                control(1 << 10, "Protocol Error Nonfatal Enable"),
                control(1 << 11, "Overflow Error Nonfatal Enable"),
                control(1 << 12, "End of Chain Error Nonfatal Enable"),
                control(1 << 13, "Response Error Nonfatal Enable"),
                control(1 << 14, "CRC Error Nonfatal Enable"),
                control(1 << 15, "System Error Nonfatal Enable"),
            ]
        },
    )
}

/// A command of which only the type is known, or that has nothing else.
const TYPE_ONLY: Register = register(2, 2, "Command", &[constant(0xf800, "Capability Type")]);

const HYPER_TRANSPORT: &[Group] = &[
    when(
        0,
        TYPE_3,
        SLAVE,
        &[
            register(
                2,
                2,
                "Slave Command",
                &[
                    control(0x001f, "Base UnitID"),
                    constant(0x03e0, "Unit Count"),
                    status(1 << 10, "Master Host"),
                    control(1 << 11, "Default Direction"),
                    control(1 << 12, "Drop on Uninitialized Link"),
                    constant(0xe000, "Capability Type"),
                ],
            ),
            link_control(4, "Link Control 0"),
            link_configuration(6, "Link Configuration 0"),
            link_control(8, "Link Control 1"),
            link_configuration(0x0a, "Link Configuration 1"),
            revision_id(0x0c),
            link_frequency(0x0d, "Link Frequency and Error 0"),
            link_frequencies(0x0e, "Link Frequency Capability 0"),
            feature(0x10),
            link_frequency(0x11, "Link Frequency and Error 1"),
            link_frequencies(0x12, "Link Frequency Capability 1"),
            register(0x14, 2, "Enumeration Scratchpad", &[control(0xffff, "Scratchpad")]),
            error_handling(0x16),
            register(0x18, 1, "Memory Base Upper", &[control(0xff, "Memory Base Upper")]),
            register(0x19, 1, "Memory Limit Upper", &[control(0xff, "Memory Limit Upper")]),
            register(0x1a, 1, "Bus Number", &[control(0xff, "Bus Number")]),
            register(0x1b, 1, "reserved", &[]),
        ],
    ),
    when(
        0,
        TYPE_3,
        HOST,
        &[
            register(
                2,
                2,
                "Host Command",
                &[
                    trigger(1 << 0, "Warm Reset"),
                    control(1 << 1, "Double-Ended"),
                    status(0x007c, "Device Number"),
                    status(1 << 7, "Chain Side"),
                    control(1 << 8, "Host Hide"),
                    control(1 << 10, "Act as Slave"),
                    rw1c(1 << 11, "Host Inbound End of Chain Error"),
                    control(1 << 12, "Drop on Uninitialized Link"),
                    constant(0xe000, "Capability Type"),
                ],
            ),
            link_control(4, "Link Control"),
            link_configuration(6, "Link Configuration"),
            revision_id(8),
            link_frequency(9, "Link Frequency and Error"),
            link_frequencies(0x0a, "Link Frequency Capability"),
            register(
                0x0c,
                2,
                "Feature Capability",
                &[
                    constant(0x003f, "As of a Slave"),
                    constant(1 << 8, "Extended Register Set"),
                    control(1 << 9, "Upstream Configuration Enable"),
                ],
            ),
            register(0x0e, 2, "reserved", &[]),
            register(0x10, 2, "Enumeration Scratchpad", &[control(0xffff, "Scratchpad")]),
            error_handling(0x12),
            register(0x14, 1, "Memory Base Upper", &[control(0xff, "Memory Base Upper")]),
            register(0x15, 1, "Memory Limit Upper", &[control(0xff, "Memory Limit Upper")]),
            register(0x16, 2, "reserved", &[]),
        ],
    ),
    when(
        0,
        TYPE_5,
        SWITCH,
        &[
            register(
                2,
                2,
                "Switch Command",
                &[
                    rw1c(1 << 7, "VIB Error"),
                    control(1 << 8, "VIB Flood Enable"),
                    control(1 << 9, "VIB Fatal Enable"),
                    control(1 << 10, "VIB Nonfatal Enable"),
                    constant(0xf800, "Capability Type"),
                ],
            ),
            register(4, 4, "Partition Mask", &[control(0xffff_ffff, "Partition Mask")]),
            register(
                8,
                4,
                "Switch Info",
                &[
                    control(0x0000_001f, "Default Port"),
                    control(1 << 5, "Enable Decode"),
                    control(1 << 6, "Cold Reset"),
                    control(0x0000_0f00, "Performance Counter Index"),
                    control(0x0003_f000, "Base/Limit Range Index"),
                    control(1 << 18, "Hot Plug"),
                    control(1 << 19, "Hide Port"),
                ],
            ),
            register(0x0c, 4, "Performance Counter Data", &[control(0xffff_ffff, "Data")]),
            register(0x10, 4, "Base/Limit Range Data", &[control(0xffff_ffff, "Data")]),
            register(0x14, 4, "Secondary Base Data", &[control(0xffff_ffff, "Data")]),
        ],
    ),
    when(
        0,
        TYPE_5,
        INTERRUPTS,
        &[
            register(2, 1, "Interrupt Index", &[control(0xff, "Index")]),
            register(3, 1, "Command", &[constant(0xf8, "Capability Type")]),
            register(4, 4, "Interrupt Data", &[control(0xffff_ffff, "Data")]),
        ],
    ),
    when(
        0,
        TYPE_5,
        REVISION,
        &[revision_id(2), register(3, 1, "Command", &[constant(0xf8, "Capability Type")])],
    ),
    when(
        0,
        TYPE_5,
        UNIT_ID_CLUMPING,
        &[
            TYPE_ONLY,
            register(4, 4, "Clumping Support", &[constant(0xffff_ffff, "Clumping Support")]),
            register(8, 4, "Clumping Enable", &[control(0xffff_ffff, "Clumping Enable")]),
        ],
    ),
    when(
        0,
        TYPE_5,
        EXTENDED_ACCESS,
        &[
            TYPE_ONLY,
            register(
                4,
                4,
                "Configuration Address",
                &[
                    control(0x0000_0ffc, "Register"),
                    control(0x0000_7000, "Function"),
                    control(0x000f_8000, "Device"),
                    control(0x0ff0_0000, "Bus"),
                    control(1 << 28, "Access Type"),
                ],
            ),
            register(8, 4, "Configuration Data", &[control(0xffff_ffff, "Data")]),
        ],
    ),
    Group {
        groups: &[each(
            0x0c,
            8,
            &[
                register(
                    0,
                    4,
                    "DMA Window Primary Base and Control",
                    &[control(0x00ff_ffff, "Primary Base"), control(0xf000_0000, "Window Control")],
                ),
                register(4, 2, "DMA Window Secondary Limit", &[control(0xffff, "Secondary Limit")]),
                register(6, 2, "DMA Window Secondary Base", &[control(0xffff, "Secondary Base")]),
            ],
        )],
        ..when(
            0,
            TYPE_5 | MAP_TYPE,
            ADDRESS_MAPPING,
            &[
                ADDRESS_MAPPING_COMMAND,
                register(
                    4,
                    4,
                    "Secondary Bus Non-Prefetchable Window",
                    &[control(0x000f_ffff, "Window Base"), control(0xf000_0000, "Window Control")],
                ),
                register(
                    8,
                    4,
                    "Secondary Bus Prefetchable Window",
                    &[control(0x000f_ffff, "Window Base"), control(0xf000_0000, "Window Control")],
                ),
            ],
        )
    },
    when(
        0,
        TYPE_5 | MAP_TYPE,
        ADDRESS_MAPPING | 0x0200_0000,
        &[
            ADDRESS_MAPPING_COMMAND,
            register(4, 4, "Window Index", &[control(0xffff_ffff, "Index")]),
            register(8, 4, "Window Data Lower", &[control(0xffff_ffff, "Data")]),
            register(0x0c, 4, "Window Data Upper", &[control(0xffff_ffff, "Data")]),
        ],
    ),
    when(
        0,
        TYPE_5,
        MSI_MAPPING,
        &[
            register(
                2,
                2,
                "MSI Mapping Command",
                &[
                    control(1 << 0, "Mapping Enable"),
                    constant(1 << 1, "Fixed Mapping"),
                    constant(0xf800, "Capability Type"),
                ],
            ),
            register(4, 4, "MSI Mapping Address Lower", &[control(0xfff0_0000, "Address")]),
            register(8, 4, "MSI Mapping Address Upper", &[control(0xffff_ffff, "Address")]),
        ],
    ),
    when(
        0,
        TYPE_5,
        DIRECT_ROUTE,
        &[
            register(
                2,
                2,
                "DirectRoute Command",
                &[
                    constant(0x000f, "Number of DirectRoute Spaces"),
                    control(0x01f0, "Index"),
                    constant(0xf800, "Capability Type"),
                ],
            ),
            register(4, 4, "DirectRoute Enable Vector", &[control(0xffff_ffff, "Enable Vector")]),
            register(8, 4, "DirectRoute Data", &[control(0xffff_ffff, "Data")]),
        ],
    ),
    when(
        0,
        TYPE_5,
        VC_SET,
        &[
            TYPE_ONLY,
            register(4, 1, "VCSets Supported", &[constant(0xff, "VCSets")]),
            register(5, 1, "Link 1 VCSets Enabled", &[control(0xff, "VCSets")]),
            register(6, 1, "Link 0 VCSets Enabled", &[control(0xff, "VCSets")]),
            register(7, 1, "reserved", &[]),
            register(8, 1, "Stream Bucket Depth", &[control(0xff, "Depth")]),
            register(9, 1, "Stream Interval", &[control(0xff, "Interval")]),
            register(0x0a, 1, "Streaming VCs Supported", &[constant(0xff, "Number")]),
            register(0x0b, 1, "reserved", &[]),
            register(0x0c, 1, "Non-FC Bucket Depth", &[control(0xff, "Depth")]),
            register(0x0d, 1, "Non-FC Bucket Interval", &[control(0xff, "Interval")]),
            register(0x0e, 2, "reserved", &[]),
        ],
    ),
    when(
        0,
        TYPE_5,
        RETRY,
        &[
            TYPE_ONLY,
            retry_control(4, "Retry Control 0"),
            retry_status(5, "Retry Status 0"),
            retry_control(6, "Retry Control 1"),
            retry_status(7, "Retry Status 1"),
            register(8, 2, "Retry Count 0", &[status(0xffff, "Count")]),
            register(0x0a, 2, "Retry Count 1", &[status(0xffff, "Count")]),
        ],
    ),
];

const ADDRESS_MAPPING_COMMAND: Register = register(
    2,
    2,
    "Address Mapping Command",
    &[
        constant(0x000f, "Number of DMA Mappings"),
        constant(0x01f0, "I/O Size"),
        constant(0x0600, "Map Type"),
        constant(0xf800, "Capability Type"),
    ],
);

const fn retry_control(offset: u16, name: &'static str) -> Register {
    register(
        offset,
        1,
        name,
        const {
            &[
                control(1 << 0, "Link Retry Enable"),
                trigger(1 << 1, "Force Single Error"),
                control(1 << 2, "Rollover Nonfatal Enable"),
                trigger(1 << 3, "Force Single Stomp"),
                control(1 << 4, "Retry Nonfatal Enable"),
                control(1 << 5, "Retry Fatal Enable"),
                control(0xc0, "Allowed Attempts"),
            ]
        },
    )
}

const fn retry_status(offset: u16, name: &'static str) -> Register {
    register(
        offset,
        1,
        name,
        const { &[rw1c(1 << 0, "Retry Sent"), rw1c(1 << 1, "Count Rollover"), rw1c(1 << 2, "Stomp Received")] },
    )
}
