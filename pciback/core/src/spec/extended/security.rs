//! Mailboxes, keys and correlation of accesses.

use super::extended;
use crate::spec::register::{
    Count, Group, Kind, Length, Register, Stride, constant, control, counted, register, rw1c, status, trigger,
};
use crate::spec::{CapabilitySpec, ExtendedCapabilityId};

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    extended(ExtendedCapabilityId::DOE, "PCI Express 6.0, 7.9.24", Length::Fixed(0x18), Kind::Control, DOE),
    extended(ExtendedCapabilityId::IDE, "PCI Express 6.0, 7.9.26", Length::UpTo(0x400), Kind::Control, IDE)
        .with(IDE_STREAMS),
    extended(
        ExtendedCapabilityId::CONFIG_ACCESS_CORRELATION,
        "Trusted Configuration Space ECN",
        Length::UpTo(0x20),
        Kind::Control,
        &[register(0x04, 4, "Device Correlation", &[status(0xffff_ffff, "Device Correlation")])],
    ),
];

const DOE: &[Register] = &[
    register(
        0x04,
        4,
        "DOE Capabilities",
        &[constant(1 << 0, "DOE Interrupt Support"), constant(0x0000_0ffe, "DOE Interrupt Message Number")],
    ),
    register(
        0x08,
        4,
        "DOE Control",
        &[trigger(1 << 0, "DOE Abort"), control(1 << 1, "DOE Interrupt Enable"), trigger(1 << 31, "DOE Go")],
    ),
    register(
        0x0c,
        4,
        "DOE Status",
        &[
            status(1 << 0, "DOE Busy"),
            rw1c(1 << 1, "DOE Interrupt Status"),
            status(1 << 2, "DOE Error"),
            status(1 << 31, "Data Object Ready"),
        ],
    ),
    // Each write appends a dword, 0 too.
    register(0x10, 4, "DOE Write Data Mailbox", &[control(0xffff_ffff, "DOE Write Data Mailbox")]),
    // A write of any value removes the dword that it shows.
    register(0x14, 4, "DOE Read Data Mailbox", &[control(0xffff_ffff, "DOE Read Data Mailbox")]),
];

const IDE: &[Register] = &[
    register(
        0x04,
        4,
        "IDE Capability",
        &[
            constant(1 << 0, "Link IDE Stream Supported"),
            constant(1 << 1, "Selective IDE Streams Supported"),
            constant(1 << 2, "Flow-Through IDE Stream Supported"),
            constant(1 << 3, "Partial Header Encryption Supported"),
            constant(1 << 4, "Aggregation Supported"),
            constant(1 << 5, "PCRC Supported"),
            constant(1 << 6, "IDE_KM Protocol Supported"),
            constant(1 << 7, "Selective IDE for Configuration Requests Supported"),
            constant(0x0000_1f00, "Supported Algorithms"),
            constant(0x0000_e000, "Number of TCs Supported for Link IDE"),
            constant(0x00ff_0000, "Number of Selective IDE Streams Supported"),
            constant(1 << 24, "TEE-Limited Stream Supported"),
            constant(1 << 25, "XT Supported"),
        ],
    ),
    register(0x08, 4, "IDE Control", &[control(1 << 2, "Flow-Through IDE Stream Enabled")]),
];

const STREAM_STATUS: &[crate::spec::Field] =
    &[status(0x0000_000f, "Stream State"), rw1c(1 << 31, "Received Integrity Check Fail Message")];

const IDE_STREAMS: &[Group] = &[
    counted(
        0x0c,
        8,
        Count::Field { at: 4, shift: 13, mask: 7, more: 1, given: 1 << 0 },
        &[
            register(
                0,
                4,
                "Link IDE Stream Control",
                &[
                    control(1 << 0, "Link IDE Stream Enable"),
                    control(1 << 1, "Link IDE Stream XT Enable"),
                    control(0x0000_000c, "Tx Aggregation Mode NPR"),
                    control(0x0000_0030, "Tx Aggregation Mode PR"),
                    control(0x0000_00c0, "Tx Aggregation Mode CPL"),
                    control(1 << 8, "PCRC Enable"),
                    control(0x0000_3c00, "Partial Header Encryption Mode"),
                    control(0x0007_c000, "Selected Algorithm"),
                    control(0x0038_0000, "TC"),
                    control(0xff00_0000, "Stream ID"),
                ],
            ),
            register(4, 4, "Link IDE Stream Status", STREAM_STATUS),
        ],
    ),
    Group {
        first: None,
        stride: Stride::Own { base: 20, unit: 12, mask: 0xf },
        count: Count::Field { at: 4, shift: 16, mask: 0xff, more: 1, given: 1 << 1 },
        registers: SELECTIVE,
        groups: &[counted(
            20,
            12,
            Count::Field { at: 0, shift: 0, mask: 0xf, more: 0, given: 0 },
            &[
                register(
                    0,
                    4,
                    "IDE Address Association 1",
                    &[
                        control(1 << 0, "Valid"),
                        control(0x000f_ff00, "Memory Base Lower"),
                        control(0xfff0_0000, "Memory Limit Lower"),
                    ],
                ),
                register(4, 4, "IDE Address Association 2", &[control(0xffff_ffff, "Memory Limit Upper")]),
                register(8, 4, "IDE Address Association 3", &[control(0xffff_ffff, "Memory Base Upper")]),
            ],
        )],
    },
];

const SELECTIVE: &[Register] = &[
    register(
        0,
        4,
        "Selective IDE Stream Capability",
        &[constant(0x0000_000f, "Number of Address Association Register Blocks")],
    ),
    register(
        4,
        4,
        "Selective IDE Stream Control",
        &[
            control(1 << 0, "Selective IDE Stream Enable"),
            control(1 << 1, "Selective IDE Stream XT Enable"),
            control(0x0000_000c, "Tx Aggregation Mode NPR"),
            control(0x0000_0030, "Tx Aggregation Mode PR"),
            control(0x0000_00c0, "Tx Aggregation Mode CPL"),
            control(1 << 8, "PCRC Enable"),
            control(1 << 9, "Selective IDE for Configuration Requests Enable"),
            control(0x0000_3c00, "Partial Header Encryption Mode"),
            control(0x0007_c000, "Selected Algorithm"),
            control(0x0038_0000, "TC"),
            control(1 << 22, "Default Stream"),
            control(1 << 23, "TEE-Limited Stream"),
            control(0xff00_0000, "Stream ID"),
        ],
    ),
    register(8, 4, "Selective IDE Stream Status", STREAM_STATUS),
    register(0x0c, 4, "IDE RID Association 1", &[control(0x00ff_ff00, "RID Limit")]),
    register(
        0x10,
        4,
        "IDE RID Association 2",
        &[control(1 << 0, "Valid"), control(0x00ff_ff00, "RID Base"), control(0xff00_0000, "Segment Base")],
    ),
];
