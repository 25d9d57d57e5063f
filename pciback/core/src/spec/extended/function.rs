//! What a function says of itself: identity, power, latency, time and tags.

use super::extended;
use crate::spec::register::{
    Field, Kind, Length, Register, constant, control, each, fields, register, rw1c, status, trigger,
};
use crate::spec::{CapabilitySpec, ExtendedCapabilityId};

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    extended(
        ExtendedCapabilityId::SERIAL_NUMBER,
        "PCI Express 6.0, 7.9.3",
        Length::Fixed(0x0c),
        Kind::Constant,
        &[
            register(0x04, 4, "Serial Number, lower", &[constant(0xffff_ffff, "Serial Number 31:0")]),
            register(0x08, 4, "Serial Number, upper", &[constant(0xffff_ffff, "Serial Number 63:32")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::POWER_BUDGETING,
        "PCI Express 6.0, 7.8.1",
        Length::UpTo(0x18),
        Kind::Constant,
        &[
            register(0x04, 1, "Power Budgeting Data Select", &[control(0xff, "Data Select")]),
            // It follows Data Select.
            register(
                0x08,
                4,
                "Power Budgeting Data",
                &[
                    status(0x0000_00ff, "Base Power"),
                    status(0x0000_0300, "Data Scale"),
                    status(0x0000_1c00, "PM Sub State"),
                    status(0x0000_6000, "PM State"),
                    status(0x0003_8000, "Type"),
                    status(0x001c_0000, "Power Rail"),
                ],
            ),
            register(0x0c, 1, "Power Budgeting Capability", &[constant(1 << 0, "System Allocated")]),
        ],
    ),
    extended(
        ExtendedCapabilityId::DYNAMIC_POWER_ALLOCATION,
        "PCI Express 6.0, 7.9.12",
        Length::Counted { base: 0x10, unit: 1, at: 4, shift: 0, mask: 0x1f, more: 1 },
        Kind::Constant,
        DPA,
    )
    .with(&[each(
        0x10,
        1,
        &[register(0, 1, "Substate Power Allocation", &[constant(0xff, "Substate Power Allocation")])],
    )]),
    extended(
        ExtendedCapabilityId::LTR,
        "PCI Express 6.0, 7.8.2",
        Length::Fixed(8),
        Kind::Constant,
        &[
            register(
                0x04,
                2,
                "Max Snoop Latency",
                &[control(0x03ff, "Max Snoop LatencyValue"), control(0x1c00, "Max Snoop LatencyScale")],
            ),
            register(
                0x06,
                2,
                "Max No-Snoop Latency",
                &[control(0x03ff, "Max No-Snoop LatencyValue"), control(0x1c00, "Max No-Snoop LatencyScale")],
            ),
        ],
    ),
    extended(
        ExtendedCapabilityId::READINESS_TIME,
        "PCI Express 6.0, 7.9.16",
        Length::Fixed(0x0c),
        Kind::Constant,
        &[
            register(
                0x04,
                4,
                "Readiness Time Reporting 1",
                &[
                    constant(0x0000_0fff, "Reset Time"),
                    constant(0x00ff_f000, "DL_Up Time"),
                    constant(1 << 31, "Valid"),
                ],
            ),
            register(
                0x08,
                4,
                "Readiness Time Reporting 2",
                &[constant(0x0000_0fff, "FLR Time"), constant(0x00ff_f000, "D3Hot to D0 Time")],
            ),
        ],
    ),
    extended(
        ExtendedCapabilityId::HIERARCHY_ID,
        "PCI Express 6.0, 7.9.17",
        Length::Fixed(0x20),
        Kind::Status,
        HIERARCHY_ID,
    ),
    extended(
        ExtendedCapabilityId::NPEM,
        "PCI Express 6.0, 7.9.19",
        Length::Fixed(0x10),
        Kind::Control,
        &[
            register(0x04, 4, "NPEM Capability", NPEM_CAPABILITY),
            register(0x08, 4, "NPEM Control", NPEM_CONTROL),
            register(
                0x0c,
                4,
                "NPEM Status",
                &[rw1c(1 << 0, "NPEM Command Completed"), status(0xff00_0000, "Enclosure-specific Status")],
            ),
        ],
    ),
    extended(
        ExtendedCapabilityId::PTM,
        "PCI Express 6.0, 7.9.15",
        Length::Fixed(0x0c),
        Kind::Constant,
        &[
            register(
                0x04,
                4,
                "PTM Capability",
                &[
                    constant(1 << 0, "PTM Requester Capable"),
                    constant(1 << 1, "PTM Responder Capable"),
                    constant(1 << 2, "PTM Root Capable"),
                    constant(1 << 3, "ePTM Capable"),
                    constant(1 << 4, "PTM Propagation Delay Adaptation Capable"),
                    constant(0x0000_ff00, "Local Clock Granularity"),
                ],
            ),
            register(
                0x08,
                4,
                "PTM Control",
                &[
                    control(1 << 0, "PTM Enable"),
                    control(1 << 1, "Root Select"),
                    control(0x0000_ff00, "Effective Granularity"),
                ],
            ),
        ],
    ),
    // Where blocks of registers are in the function's BARs; two dwords for each.
    extended(
        ExtendedCapabilityId::MMIO_REGISTER_BLOCK_LOCATOR,
        "PCI Express 6.3, 7.9.30",
        Length::Counted { base: 0, unit: 1, at: 4, shift: 0, mask: 0xfff, more: 0 },
        Kind::Constant,
        &[register(0x04, 4, "MRBL Capabilities", &[constant(0x0000_0fff, "MRBL Structure Length")])],
    )
    .with(&[each(
        8,
        8,
        &[
            register(
                0,
                4,
                "MRBL Locator, lower",
                &[
                    constant(0x0000_0007, "MRBL BIR"),
                    constant(0x0000_ff00, "MRBL Block ID"),
                    constant(0xffff_0000, "MRBL Offset 31:16"),
                ],
            ),
            register(4, 4, "MRBL Locator, upper", &[constant(0xffff_ffff, "MRBL Offset 63:32")]),
        ],
    )]),
    extended(
        ExtendedCapabilityId::DEVICE_3,
        "PCI Express 6.0, 7.7.9",
        Length::Fixed(0x10),
        Kind::Constant,
        DEVICE_3,
    ),
];

const DPA: &[Register] = &[
    register(
        0x04,
        4,
        "DPA Capability",
        &[
            constant(0x0000_001f, "Substate_Max"),
            constant(0x0000_0300, "Transition Latency Unit"),
            constant(0x0000_3000, "Power Allocation Scale"),
            constant(0x00ff_0000, "Transition Latency Value 0"),
            constant(0xff00_0000, "Transition Latency Value 1"),
        ],
    ),
    register(0x08, 4, "DPA Latency Indicator", &[constant(0xffff_ffff, "Transition Latency Indicator Bits")]),
    register(
        0x0c,
        2,
        "DPA Status",
        &[status(0x001f, "Substate Status"), rw1c(1 << 8, "Substate Control Enabled")],
    ),
    register(0x0e, 2, "DPA Control", &[control(0x001f, "Substate Control")]),
];

/// The upstream ports send it in a message.
const HIERARCHY_ID: &[Register] = &[
    register(
        0x04,
        4,
        "Hierarchy ID Status",
        &[
            status(0x0000_ffff, "Message Requester ID"),
            status(1 << 28, "Hierarchy ID Valid"),
            constant(1 << 29, "Hierarchy ID Writeable"),
        ],
    ),
    register(
        0x08,
        4,
        "Hierarchy ID Data",
        &[status(0x0000_00ff, "System GUID Authority ID"), status(0xffff_0000, "Hierarchy ID")],
    ),
    register(0x0c, 4, "Hierarchy ID GUID 1", &[status(0xffff_ffff, "System GUID")]),
    register(0x10, 4, "Hierarchy ID GUID 2", &[status(0xffff_ffff, "System GUID")]),
    register(0x14, 4, "Hierarchy ID GUID 3", &[status(0xffff_ffff, "System GUID")]),
    register(0x18, 4, "Hierarchy ID GUID 4", &[status(0xffff_ffff, "System GUID")]),
    register(0x1c, 4, "Hierarchy ID GUID 5", &[status(0xffff_ffff, "System GUID")]),
];

const INDICATORS: [(u32, &str); 11] = [
    (1 << 2, "OK"),
    (1 << 3, "Locate"),
    (1 << 4, "Fail"),
    (1 << 5, "Rebuild"),
    (1 << 6, "PFA"),
    (1 << 7, "Hot Spare"),
    (1 << 8, "In A Critical Array"),
    (1 << 9, "In A Failed Array"),
    (1 << 10, "Invalid Device Type"),
    (1 << 11, "Disabled"),
    (0xff00_0000, "Enclosure-specific"),
];

const NPEM_CAPABILITY: &[Field] =
    &with_command(fields::<11, 11>(Kind::Constant, INDICATORS), constant(1, "NPEM Capable"), Kind::Constant);
const NPEM_CONTROL: &[Field] =
    &with_command(fields::<11, 11>(Kind::Control, INDICATORS), control(1, "NPEM Enable"), Kind::Trigger);

const fn with_command(indicators: [Field; 11], enable: Field, reset: Kind) -> [Field; 13] {
    let mut all = [enable; 13];
    all[1] = Field { kind: reset, ..trigger(1 << 1, "NPEM Reset") };
    let mut index = 0;
    while index < indicators.len() {
        all[index + 2] = indicators[index];
        index += 1;
    }
    all
}

const DEVICE_3: &[Register] = &[
    register(
        0x04,
        4,
        "Device Capabilities 3",
        &[
            constant(1 << 0, "DMWr Request Routing Supported"),
            constant(1 << 1, "14-Bit Tag Completer Supported"),
            constant(1 << 2, "14-Bit Tag Requester Supported"),
            constant(1 << 3, "Receiver L0p Supported"),
            constant(0x0000_0070, "Port L0p Exit Latency"),
            constant(0x0000_0380, "Retimer L0p Exit Latency"),
            constant(1 << 10, "UIO Memory Read/Write Completer Supported"),
            constant(1 << 11, "UIO Memory Read/Write Requester Supported"),
        ],
    ),
    register(
        0x08,
        4,
        "Device Control 3",
        &[
            control(1 << 0, "DMWr Requester Enable"),
            control(1 << 1, "DMWr Egress Blocking"),
            control(1 << 2, "14-Bit Tag Requester Enable"),
            control(1 << 3, "L0p Enable"),
            control(0x0000_0070, "Target Link Width"),
            control(1 << 7, "UIO Memory Read/Write Requester Enable"),
            control(1 << 8, "UIO Request 256B Boundary Disable"),
        ],
    ),
    register(
        0x0c,
        4,
        "Device Status 3",
        &[
            status(0x0000_0007, "Initial Link Width"),
            status(1 << 3, "Segment Captured"),
            status(1 << 4, "Remote L0p Supported"),
        ],
    ),
];
