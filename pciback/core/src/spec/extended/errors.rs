//! Errors: Advanced Error Reporting and Downstream Port Containment.

use super::extended;
use crate::spec::register::{
    Field, Group, Kind, Length, Register, constant, control, each, fields, register, rsvdz, rw1c, status,
    trigger, when,
};
use crate::spec::{CapabilitySpec, ExtendedCapabilityId};

/// Registers of Advanced Error Reporting, from the beginning of the capability (PCI Express 6.0, section 7.8.4).
pub mod aer {
    /// Uncorrectable Error Status.
    pub const UNCORRECTABLE_STATUS: u16 = 0x04;
    /// Uncorrectable Error Mask.
    pub const UNCORRECTABLE_MASK: u16 = 0x08;
    /// Uncorrectable Error Severity.
    pub const UNCORRECTABLE_SEVERITY: u16 = 0x0c;
    /// Correctable Error Status.
    pub const CORRECTABLE_STATUS: u16 = 0x10;
    /// Correctable Error Mask.
    pub const CORRECTABLE_MASK: u16 = 0x14;
    /// Root Error Command, of root ports.
    pub const ROOT_ERROR_COMMAND: u16 = 0x2c;
}

/// Registers of Downstream Port Containment, from the beginning of the capability (PCI Express 6.0, section 7.9.14).
pub mod dpc {
    /// DPC Status.
    pub const STATUS: u16 = 0x08;
    /// DPC Status: the port has cut off what is below it.
    pub const TRIGGERED: u16 = 1 << 0;
    /// DPC Error Source ID: who sent the message that triggered it.
    pub const SOURCE: u16 = 0x0a;
}

/// What PCI Express says of them.
pub const CAPABILITIES: &[CapabilitySpec] = &[
    extended(
        ExtendedCapabilityId::AER,
        "PCI Express 6.0, 7.8.4",
        // Header Log Size: flit mode needs a longer log.
        Length::Cases {
            at: 0x18,
            cases: &[(0x0003_e000, 0, Length::UpTo(0x48)), (0, 0, Length::UpTo(0x60))],
        },
        Kind::Status,
        AER,
    )
    .with(&[each(
        0x38,
        4,
        &[register(0, 4, "TLP Prefix Log", &[status(0xffff_ffff, "TLP Prefix Log")])],
    )]),
    extended(ExtendedCapabilityId::DPC, "PCI Express 6.0, 7.9.14", Length::UpTo(0x5c), Kind::Status, DPC)
        .with(&[Group {
            groups: &[each(
                0x34,
                4,
                &[register(0, 4, "RP PIO TLP Prefix Log", &[status(0xffff_ffff, "TLP Prefix Log")])],
            )],
            // RP Extensions for DPC.
            ..when(4, 1 << 5, 1 << 5, ROOT_PORT_PIO)
        }]),
];

/// The bits of Uncorrectable Error Status, Mask and Severity (PCI Express 6.0, sections 7.8.4.2 to 7.8.4.4).
pub const UNCORRECTABLE: [(u32, &str); 22] = [
    (1 << 4, "Data Link Protocol Error"),
    (1 << 5, "Surprise Down Error"),
    (1 << 12, "Poisoned TLP Received"),
    (1 << 13, "Flow Control Protocol Error"),
    (1 << 14, "Completion Timeout"),
    (1 << 15, "Completer Abort"),
    (1 << 16, "Unexpected Completion"),
    (1 << 17, "Receiver Overflow"),
    (1 << 18, "Malformed TLP"),
    (1 << 19, "ECRC Error"),
    (1 << 20, "Unsupported Request Error"),
    (1 << 21, "ACS Violation"),
    (1 << 22, "Uncorrectable Internal Error"),
    (1 << 23, "MC Blocked TLP"),
    (1 << 24, "AtomicOp Egress Blocked"),
    (1 << 25, "TLP Prefix Blocked Error"),
    (1 << 26, "Poisoned TLP Egress Blocked"),
    (1 << 27, "DMWr Request Egress Blocked"),
    (1 << 28, "IDE Check Failed"),
    (1 << 29, "Misrouted IDE TLP"),
    (1 << 30, "PCRC Check Failed"),
    (1 << 31, "TLP Translation Egress Blocked"),
];

/// The bits of Correctable Error Status and Mask (PCI Express 6.0, sections 7.8.4.5 and 7.8.4.6).
pub const CORRECTABLE: [(u32, &str); 8] = [
    (1 << 0, "Receiver Error"),
    (1 << 6, "Bad TLP"),
    (1 << 7, "Bad DLLP"),
    (1 << 8, "REPLAY_NUM Rollover"),
    (1 << 12, "Replay Timer Timeout"),
    (1 << 13, "Advisory Non-Fatal Error"),
    (1 << 14, "Corrected Internal Error"),
    (1 << 15, "Header Log Overflow"),
];

const UNCORRECTABLE_STATUS: &[Field] = &fields::<22, 23>(Kind::Rw1c, UNCORRECTABLE);
const UNCORRECTABLE_CONTROL: &[Field] = &fields::<22, 22>(Kind::Control, UNCORRECTABLE);
const CORRECTABLE_STATUS: &[Field] = &fields::<8, 9>(Kind::Rw1c, CORRECTABLE);
const CORRECTABLE_CONTROL: &[Field] = &fields::<8, 8>(Kind::Control, CORRECTABLE);

const AER: &[Register] = &[
    register(aer::UNCORRECTABLE_STATUS, 4, "Uncorrectable Error Status", UNCORRECTABLE_STATUS),
    register(aer::UNCORRECTABLE_MASK, 4, "Uncorrectable Error Mask", UNCORRECTABLE_CONTROL),
    register(aer::UNCORRECTABLE_SEVERITY, 4, "Uncorrectable Error Severity", UNCORRECTABLE_CONTROL),
    register(aer::CORRECTABLE_STATUS, 4, "Correctable Error Status", CORRECTABLE_STATUS),
    register(aer::CORRECTABLE_MASK, 4, "Correctable Error Mask", CORRECTABLE_CONTROL),
    register(
        0x18,
        4,
        "Advanced Error Capabilities and Control",
        &[
            status(0x0000_001f, "First Error Pointer"),
            constant(1 << 5, "ECRC Generation Capable"),
            control(1 << 6, "ECRC Generation Enable"),
            constant(1 << 7, "ECRC Check Capable"),
            control(1 << 8, "ECRC Check Enable"),
            constant(1 << 9, "Multiple Header Recording Capable"),
            control(1 << 10, "Multiple Header Recording Enable"),
            status(1 << 11, "TLP Prefix Log Present"),
            constant(1 << 12, "Completion Timeout Prefix/Header Log Capable"),
            constant(0x0003_e000, "Header Log Size"),
            status(1 << 18, "Logged TLP was Flit Mode"),
            status(0x00f8_0000, "Logged TLP Size"),
        ],
    ),
    register(0x1c, 4, "Header Log", &[status(0xffff_ffff, "Header Byte 0 to 3")]),
    register(0x20, 4, "Header Log", &[status(0xffff_ffff, "Header Byte 4 to 7")]),
    register(0x24, 4, "Header Log", &[status(0xffff_ffff, "Header Byte 8 to 11")]),
    register(0x28, 4, "Header Log", &[status(0xffff_ffff, "Header Byte 12 to 15")]),
    register(
        aer::ROOT_ERROR_COMMAND,
        4,
        "Root Error Command",
        &[
            control(1 << 0, "Correctable Error Reporting Enable"),
            control(1 << 1, "Non-Fatal Error Reporting Enable"),
            control(1 << 2, "Fatal Error Reporting Enable"),
        ],
    ),
    register(
        0x30,
        4,
        "Root Error Status",
        &[
            rw1c(1 << 0, "ERR_COR Received"),
            rw1c(1 << 1, "Multiple ERR_COR Received"),
            rw1c(1 << 2, "ERR_FATAL/NONFATAL Received"),
            rw1c(1 << 3, "Multiple ERR_FATAL/NONFATAL Received"),
            rw1c(1 << 4, "First Uncorrectable Fatal"),
            rw1c(1 << 5, "Non-Fatal Error Messages Received"),
            rw1c(1 << 6, "Fatal Error Messages Received"),
            status(0x0000_0180, "ERR_COR Subclass"),
            status(0xf800_0000, "Advanced Error Interrupt Message Number"),
            rsvdz(0x07ff_fe00),
        ],
    ),
    register(
        0x34,
        4,
        "Error Source Identification",
        &[
            status(0x0000_ffff, "ERR_COR Source Identification"),
            status(0xffff_0000, "ERR_FATAL/NONFATAL Source Identification"),
        ],
    ),
];

const DPC: &[Register] = &[
    register(
        0x04,
        2,
        "DPC Capability",
        &[
            constant(0x001f, "DPC Interrupt Message Number"),
            constant(1 << 5, "RP Extensions for DPC"),
            constant(1 << 6, "Poisoned TLP Egress Blocking Supported"),
            constant(1 << 7, "DPC Software Triggering Supported"),
            constant(0x0f00, "RP PIO Log Size"),
            constant(1 << 12, "DL_Active ERR_COR Signaling Supported"),
        ],
    ),
    register(
        0x06,
        2,
        "DPC Control",
        &[
            control(0x0003, "DPC Trigger Enable"),
            control(1 << 2, "DPC Completion Control"),
            control(1 << 3, "DPC Interrupt Enable"),
            control(1 << 4, "DPC ERR_COR Enable"),
            control(1 << 5, "Poisoned TLP Egress Blocking Enable"),
            trigger(1 << 6, "DPC Software Trigger"),
            control(1 << 7, "DL_Active ERR_COR Enable"),
            control(1 << 8, "DPC SIG_SFW Enable"),
        ],
    ),
    register(
        dpc::STATUS,
        2,
        "DPC Status",
        &[
            rw1c(dpc::TRIGGERED as u32, "DPC Trigger Status"),
            status(0x0006, "DPC Trigger Reason"),
            rw1c(1 << 3, "DPC Interrupt Status"),
            status(1 << 4, "DPC RP Busy"),
            status(0x0060, "DPC Trigger Reason Extension"),
            status(0x1f00, "RP PIO First Error Pointer"),
            rw1c(1 << 13, "DPC SIG_SFW Status"),
            rsvdz(0xc080),
        ],
    ),
    register(dpc::SOURCE, 2, "DPC Error Source ID", &[status(0xffff, "DPC Error Source ID")]),
];

const PIO: [(u32, &str); 9] = [
    (1 << 0, "Cfg UR Cpl"),
    (1 << 1, "Cfg CA Cpl"),
    (1 << 2, "Cfg CTO"),
    (1 << 8, "I/O UR Cpl"),
    (1 << 9, "I/O CA Cpl"),
    (1 << 10, "I/O CTO"),
    (1 << 16, "Mem UR Cpl"),
    (1 << 17, "Mem CA Cpl"),
    (1 << 18, "Mem CTO"),
];

const PIO_STATUS: &[Field] = &fields::<9, 10>(Kind::Rw1c, PIO);
const PIO_CONTROL: &[Field] = &fields::<9, 9>(Kind::Control, PIO);

/// What root ports have of it.
const ROOT_PORT_PIO: &[Register] = &[
    register(0x0c, 4, "RP PIO Status", PIO_STATUS),
    register(0x10, 4, "RP PIO Mask", PIO_CONTROL),
    register(0x14, 4, "RP PIO Severity", PIO_CONTROL),
    register(0x18, 4, "RP PIO SysError", PIO_CONTROL),
    register(0x1c, 4, "RP PIO Exception", PIO_CONTROL),
    register(0x20, 4, "RP PIO Header Log", &[status(0xffff_ffff, "Header Byte 0 to 3")]),
    register(0x24, 4, "RP PIO Header Log", &[status(0xffff_ffff, "Header Byte 4 to 7")]),
    register(0x28, 4, "RP PIO Header Log", &[status(0xffff_ffff, "Header Byte 8 to 11")]),
    register(0x2c, 4, "RP PIO Header Log", &[status(0xffff_ffff, "Header Byte 12 to 15")]),
    register(0x30, 4, "RP PIO ImpSpec Log", &[status(0xffff_ffff, "ImpSpec Log")]),
];
