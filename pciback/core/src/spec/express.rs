//! The PCI Express capability (PCI Express 6.0, section 7.5.3).

use super::register::{Kind, Length, Register, constant, control, register, rsvdz, rw1c, status, trigger};
use super::{AnyId, CapabilityId, CapabilitySpec};

/// Device Capabilities.
pub const DEVICE_CAPABILITIES: u16 = 4;
/// Device Capabilities: function level reset is supported.
pub const FLR_CAPABLE: u32 = 1 << 28;
/// Device Control.
pub const DEVICE_CONTROL: u16 = 8;
/// Device Status.
pub const DEVICE_STATUS: u16 = 0x0a;
/// Link Control.
pub const LINK_CONTROL: u16 = 0x10;
/// Link Control: ASPM Control, Enable Clock Power Management.
pub const LINK_POWER: u16 = 0x0103;
/// Device Control: Max_Payload_Size, as a power of 2 from 128 bytes.
pub const PAYLOAD_SIZE: u16 = 0x00e0;
/// Device Control: Max_Read_Request_Size, likewise.
pub const READ_REQUEST_SIZE: u16 = 0x7000;
/// Root Control.
pub const ROOT_CONTROL: u16 = 0x1c;
/// Device Control: initiate function level reset.
pub const INITIATE_FLR: u16 = 1 << 15;

/// Device/Port Type, bits 23:20 of the first dword: a Root Port.
pub const ROOT_PORT: u32 = 4;
/// Device/Port Type: a switch's Downstream Port.
pub const DOWNSTREAM_PORT: u32 = 6;
/// Device Capabilities 2.
pub const DEVICE_CAPABILITIES_2: u16 = 0x24;
/// Device Control 2.
pub const DEVICE_CONTROL_2: u16 = 0x28;
/// Device Capabilities 2: ARI Forwarding Supported; Device Control 2: ARI Forwarding Enable.
pub const ARI_FORWARDING: u32 = 1 << 5;

/// The one capability here.
pub const CAPABILITIES: &[CapabilitySpec] = &[CapabilitySpec {
    id: AnyId::Legacy(CapabilityId::PCI_EXPRESS),
    section: "PCI Express 6.0, 7.5.3",
    length: Length::Express,
    registers: REGISTERS,
    groups: &[],
    rest: Some(Kind::Constant),
}];

const REGISTERS: &[Register] = &[
    register(
        2,
        2,
        "PCI Express Capabilities",
        &[
            constant(0x000f, "Capability Version"),
            constant(0x00f0, "Device/Port Type"),
            constant(1 << 8, "Slot Implemented"),
            constant(0x3e00, "Interrupt Message Number"),
            constant(1 << 14, "Undefined"),
            constant(1 << 15, "Flit Mode Supported"),
        ],
    ),
    register(
        DEVICE_CAPABILITIES,
        4,
        "Device Capabilities",
        &[
            constant(0x0000_0007, "Max_Payload_Size Supported"),
            constant(0x0000_0018, "Phantom Functions Supported"),
            constant(1 << 5, "Extended Tag Field Supported"),
            constant(0x0000_01c0, "Endpoint L0s Acceptable Latency"),
            constant(0x0000_0e00, "Endpoint L1 Acceptable Latency"),
            constant(0x0000_7000, "Undefined"),
            constant(1 << 15, "Role-Based Error Reporting"),
            constant(1 << 16, "ERR_COR Subclass Capable"),
            constant(1 << 17, "Rx_MPS_Fixed"),
            // Set by a message of the port above.
            status(0x03fc_0000, "Captured Slot Power Limit Value"),
            status(0x0c00_0000, "Captured Slot Power Limit Scale"),
            constant(FLR_CAPABLE, "Function Level Reset Capability"),
            constant(1 << 29, "Mixed_MPS_Supported"),
            constant(1 << 30, "TEE-IO Supported"),
        ],
    ),
    register(
        DEVICE_CONTROL,
        2,
        "Device Control",
        &[
            control(1 << 0, "Correctable Error Reporting Enable"),
            control(1 << 1, "Non-Fatal Error Reporting Enable"),
            control(1 << 2, "Fatal Error Reporting Enable"),
            control(1 << 3, "Unsupported Request Reporting Enable"),
            control(1 << 4, "Enable Relaxed Ordering"),
            control(0x00e0, "Max_Payload_Size"),
            control(1 << 8, "Extended Tag Field Enable"),
            control(1 << 9, "Phantom Functions Enable"),
            control(1 << 10, "Aux Power PM Enable"),
            control(1 << 11, "Enable No Snoop"),
            control(0x7000, "Max_Read_Request_Size"),
            trigger(INITIATE_FLR as u32, "Initiate Function Level Reset"),
        ],
    ),
    register(
        DEVICE_STATUS,
        2,
        "Device Status",
        &[
            rw1c(1 << 0, "Correctable Error Detected"),
            rw1c(1 << 1, "Non-Fatal Error Detected"),
            rw1c(1 << 2, "Fatal Error Detected"),
            rw1c(1 << 3, "Unsupported Request Detected"),
            status(1 << 4, "AUX Power Detected"),
            status(1 << 5, "Transactions Pending"),
            rw1c(1 << 6, "Emergency Power Reduction Detected"),
            rsvdz(0xff80),
        ],
    ),
    register(
        0x0c,
        4,
        "Link Capabilities",
        &[
            constant(0x0000_000f, "Max Link Speed"),
            constant(0x0000_03f0, "Maximum Link Width"),
            constant(0x0000_0c00, "ASPM Support"),
            constant(0x0000_7000, "L0s Exit Latency"),
            constant(0x0003_8000, "L1 Exit Latency"),
            constant(1 << 18, "Clock Power Management"),
            constant(1 << 19, "Surprise Down Error Reporting Capable"),
            constant(1 << 20, "Data Link Layer Link Active Reporting Capable"),
            constant(1 << 21, "Link Bandwidth Notification Capability"),
            constant(1 << 22, "ASPM Optionality Compliance"),
            constant(0xff00_0000, "Port Number"),
        ],
    ),
    register(
        LINK_CONTROL,
        2,
        "Link Control",
        &[
            control(0x0003, "ASPM Control"),
            control(1 << 2, "PTM Propagation Delay Adaptation Interpretation"),
            control(1 << 3, "Read Completion Boundary"),
            control(1 << 4, "Link Disable"),
            trigger(1 << 5, "Retrain Link"),
            control(1 << 6, "Common Clock Configuration"),
            control(1 << 7, "Extended Synch"),
            control(1 << 8, "Enable Clock Power Management"),
            control(1 << 9, "Hardware Autonomous Width Disable"),
            control(1 << 10, "Link Bandwidth Management Interrupt Enable"),
            control(1 << 11, "Link Autonomous Bandwidth Interrupt Enable"),
            control(1 << 12, "SRIS Clocking"),
            control(1 << 13, "Flit Mode Disable"),
            control(0xc000, "DRS Signaling Control"),
        ],
    ),
    register(
        0x12,
        2,
        "Link Status",
        &[
            status(0x000f, "Current Link Speed"),
            status(0x03f0, "Negotiated Link Width"),
            status(1 << 10, "Undefined"),
            status(1 << 11, "Link Training"),
            status(1 << 12, "Slot Clock Configuration"),
            status(1 << 13, "Data Link Layer Link Active"),
            rw1c(1 << 14, "Link Bandwidth Management Status"),
            rw1c(1 << 15, "Link Autonomous Bandwidth Status"),
        ],
    ),
    register(
        0x14,
        4,
        "Slot Capabilities",
        &[
            constant(1 << 0, "Attention Button Present"),
            constant(1 << 1, "Power Controller Present"),
            constant(1 << 2, "MRL Sensor Present"),
            constant(1 << 3, "Attention Indicator Present"),
            constant(1 << 4, "Power Indicator Present"),
            constant(1 << 5, "Hot-Plug Surprise"),
            constant(1 << 6, "Hot-Plug Capable"),
            constant(0x0000_7f80, "Slot Power Limit Value"),
            constant(0x0001_8000, "Slot Power Limit Scale"),
            constant(1 << 17, "Electromechanical Interlock Present"),
            constant(1 << 18, "No Command Completed Support"),
            constant(0xfff8_0000, "Physical Slot Number"),
        ],
    ),
    register(
        0x18,
        2,
        "Slot Control",
        &[
            control(1 << 0, "Attention Button Pressed Enable"),
            control(1 << 1, "Power Fault Detected Enable"),
            control(1 << 2, "MRL Sensor Changed Enable"),
            control(1 << 3, "Presence Detect Changed Enable"),
            control(1 << 4, "Command Completed Interrupt Enable"),
            control(1 << 5, "Hot-Plug Interrupt Enable"),
            control(0x00c0, "Attention Indicator Control"),
            control(0x0300, "Power Indicator Control"),
            control(1 << 10, "Power Controller Control"),
            trigger(1 << 11, "Electromechanical Interlock Control"),
            control(1 << 12, "Data Link Layer State Changed Enable"),
            control(1 << 13, "Auto Slot Power Limit Disable"),
            control(1 << 14, "In-Band PD Disable"),
        ],
    ),
    register(
        0x1a,
        2,
        "Slot Status",
        &[
            rw1c(1 << 0, "Attention Button Pressed"),
            rw1c(1 << 1, "Power Fault Detected"),
            rw1c(1 << 2, "MRL Sensor Changed"),
            rw1c(1 << 3, "Presence Detect Changed"),
            rw1c(1 << 4, "Command Completed"),
            status(1 << 5, "MRL Sensor State"),
            status(1 << 6, "Presence Detect State"),
            status(1 << 7, "Electromechanical Interlock Status"),
            rw1c(1 << 8, "Data Link Layer State Changed"),
            rsvdz(0xfe00),
        ],
    ),
    register(
        ROOT_CONTROL,
        2,
        "Root Control",
        &[
            control(1 << 0, "System Error on Correctable Error Enable"),
            control(1 << 1, "System Error on Non-Fatal Error Enable"),
            control(1 << 2, "System Error on Fatal Error Enable"),
            control(1 << 3, "PME Interrupt Enable"),
            control(1 << 4, "Configuration RRS Software Visibility Enable"),
            control(1 << 5, "No NFM Subtree Below This Root Port"),
        ],
    ),
    register(0x1e, 2, "Root Capabilities", &[constant(1 << 0, "Configuration RRS Software Visibility")]),
    register(
        0x20,
        4,
        "Root Status",
        &[
            status(0x0000_ffff, "PME Requester ID"),
            rw1c(1 << 16, "PME Status"),
            status(1 << 17, "PME Pending"),
            rsvdz(0xfffc_0000),
        ],
    ),
    register(
        0x24,
        4,
        "Device Capabilities 2",
        &[
            constant(0x0000_000f, "Completion Timeout Ranges Supported"),
            constant(1 << 4, "Completion Timeout Disable Supported"),
            constant(1 << 5, "ARI Forwarding Supported"),
            constant(1 << 6, "AtomicOp Routing Supported"),
            constant(1 << 7, "32-bit AtomicOp Completer Supported"),
            constant(1 << 8, "64-bit AtomicOp Completer Supported"),
            constant(1 << 9, "128-bit CAS Completer Supported"),
            constant(1 << 10, "No RO-enabled PR-PR Passing"),
            constant(1 << 11, "LTR Mechanism Supported"),
            constant(0x0000_3000, "TPH Completer Supported"),
            constant(0x0000_c000, "LN System CLS"),
            constant(1 << 16, "10-Bit Tag Completer Supported"),
            constant(1 << 17, "10-Bit Tag Requester Supported"),
            constant(0x000c_0000, "OBFF Supported"),
            constant(1 << 20, "Extended Fmt Field Supported"),
            constant(1 << 21, "End-End TLP Prefix Supported"),
            constant(0x00c0_0000, "Max End-End TLP Prefixes"),
            constant(0x0300_0000, "Emergency Power Reduction Supported"),
            constant(1 << 26, "Emergency Power Reduction Initialization Required"),
            constant(1 << 28, "DMWr Completer Supported"),
            constant(0x6000_0000, "DMWr Lengths Supported"),
            constant(1 << 31, "FRS Supported"),
        ],
    ),
    register(
        0x28,
        2,
        "Device Control 2",
        &[
            control(0x000f, "Completion Timeout Value"),
            control(1 << 4, "Completion Timeout Disable"),
            control(1 << 5, "ARI Forwarding Enable"),
            control(1 << 6, "AtomicOp Requester Enable"),
            control(1 << 7, "AtomicOp Egress Blocking"),
            control(1 << 8, "IDO Request Enable"),
            control(1 << 9, "IDO Completion Enable"),
            control(1 << 10, "LTR Mechanism Enable"),
            control(1 << 11, "Emergency Power Reduction Request"),
            control(1 << 12, "10-Bit Tag Requester Enable"),
            control(0x6000, "OBFF Enable"),
            control(1 << 15, "End-End TLP Prefix Blocking"),
        ],
    ),
    register(0x2a, 2, "Device Status 2", &[rsvdz(0xffff)]),
    register(
        0x2c,
        4,
        "Link Capabilities 2",
        &[
            constant(0x0000_00fe, "Supported Link Speeds Vector"),
            constant(1 << 8, "Crosslink Supported"),
            constant(0x0000_fe00, "Lower SKP OS Generation Supported Speeds Vector"),
            constant(0x007f_0000, "Lower SKP OS Reception Supported Speeds Vector"),
            constant(1 << 23, "Retimer Presence Detect Supported"),
            constant(1 << 24, "Two Retimers Presence Detect Supported"),
            constant(1 << 31, "DRS Supported"),
        ],
    ),
    register(
        0x30,
        2,
        "Link Control 2",
        &[
            control(0x000f, "Target Link Speed"),
            control(1 << 4, "Enter Compliance"),
            control(1 << 5, "Hardware Autonomous Speed Disable"),
            // HwInit, and only in ports.
            constant(1 << 6, "Selectable De-emphasis"),
            control(0x0380, "Transmit Margin"),
            control(1 << 10, "Enter Modified Compliance"),
            control(1 << 11, "Compliance SOS"),
            control(0xf000, "Compliance Preset/De-emphasis"),
        ],
    ),
    register(
        0x32,
        2,
        "Link Status 2",
        &[
            status(1 << 0, "Current De-emphasis Level"),
            status(1 << 1, "Equalization 8.0 GT/s Complete"),
            status(1 << 2, "Equalization 8.0 GT/s Phase 1 Successful"),
            status(1 << 3, "Equalization 8.0 GT/s Phase 2 Successful"),
            status(1 << 4, "Equalization 8.0 GT/s Phase 3 Successful"),
            rw1c(1 << 5, "Link Equalization Request 8.0 GT/s"),
            status(1 << 6, "Retimer Presence Detected"),
            status(1 << 7, "Two Retimers Presence Detected"),
            status(0x0300, "Crosslink Resolution"),
            status(1 << 10, "Flit Mode Status"),
            status(0x7000, "Downstream Component Presence"),
            rw1c(1 << 15, "DRS Message Received"),
            rsvdz(1 << 11),
        ],
    ),
    register(0x34, 4, "Slot Capabilities 2", &[constant(1 << 0, "In-Band PD Disable Supported")]),
    // All of it is reserved and preserved.
    register(0x38, 2, "Slot Control 2", &[]),
    register(0x3a, 2, "Slot Status 2", &[rsvdz(0xffff)]),
];
