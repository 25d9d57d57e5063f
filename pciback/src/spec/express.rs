//! The PCI Express capability (PCI Express 6.0, section 7.5.3).

use super::register::{Kind, Length, constant, control, register, rsvdz, rw1c, status};
use super::{AnyId, CapabilityId, CapabilitySpec};

/// Device Capabilities.
pub const DEVICE_CAPABILITIES: u16 = 4;
/// Device Capabilities: function level reset is supported.
pub const FLR_CAPABLE: u32 = 1 << 28;
/// Device Control.
pub const DEVICE_CONTROL: u16 = 8;
/// Device Control: initiate function level reset.
pub const INITIATE_FLR: u16 = 1 << 15;

/// The one capability here.
pub const CAPABILITIES: &[CapabilitySpec] = &[CapabilitySpec {
    id: AnyId::Legacy(CapabilityId::PCI_EXPRESS),
    section: "PCI Express 6.0, 7.5.3",
    length: Length::Express,
    rest: Kind::Constant,
    registers: &[
        register(2, 2, "PCI Express Capabilities", &[constant(0x7fff, "version, type, slot, message")]),
        register(DEVICE_CAPABILITIES, 4, "Device Capabilities", &[constant(0xffff_ffff, "abilities")]),
        register(
            DEVICE_CONTROL,
            2,
            "Device Control",
            &[
                control(0x000f, "error reporting enables"),
                control(1 << 4, "Enable Relaxed Ordering"),
                control(0x00e0, "Max_Payload_Size"),
                control(1 << 8, "Extended Tag Field Enable"),
                control(1 << 9, "Phantom Functions Enable"),
                control(1 << 10, "Aux Power PM Enable"),
                control(1 << 11, "Enable No Snoop"),
                control(0x7000, "Max_Read_Request_Size"),
                control(INITIATE_FLR as u32, "Initiate Function Level Reset"),
            ],
        ),
        register(
            0x0a,
            2,
            "Device Status",
            &[
                rw1c(0x000f, "errors detected"),
                status(0x0030, "AUX Power, Transactions Pending"),
                rw1c(1 << 6, "Emergency Power Reduction Detected"),
                rsvdz(0xff80),
            ],
        ),
        register(0x0c, 4, "Link Capabilities", &[constant(0xffff_ffff, "abilities")]),
        register(
            0x10,
            2,
            "Link Control",
            &[
                control(0x0003, "ASPM Control"),
                control(1 << 2, "PTM Propagation Delay Adaptation"),
                control(1 << 3, "Read Completion Boundary"),
                control(1 << 4, "Link Disable"),
                control(1 << 5, "Retrain Link"),
                control(1 << 6, "Common Clock Configuration"),
                control(1 << 7, "Extended Synch"),
                control(1 << 8, "Clock Power Management"),
                control(1 << 9, "Hardware Autonomous Width Disable"),
                control(0x0c00, "bandwidth interrupt enables"),
                control(1 << 12, "SRIS Clocking"),
                control(1 << 13, "Flit Mode Disable"),
                control(0xc000, "DRS Signaling Control"),
            ],
        ),
        register(
            0x12,
            2,
            "Link Status",
            &[status(0x3fff, "speed, width, training, clock, active"), rw1c(0xc000, "bandwidth changes")],
        ),
        register(0x14, 4, "Slot Capabilities", &[constant(0xffff_ffff, "abilities")]),
        register(0x18, 2, "Slot Control", &[control(0x7fff, "control")]),
        register(0x1a, 2, "Slot Status", &[rw1c(0x011f, "changes"), status(0x00e0, "state")]),
        register(0x1c, 2, "Root Control", &[control(0x003f, "control")]),
        register(0x1e, 2, "Root Capabilities", &[constant(0x0001, "abilities")]),
        register(
            0x20,
            4,
            "Root Status",
            &[status(0x0002_ffff, "PME requester, pending"), rw1c(1 << 16, "PME Status")],
        ),
        register(0x24, 4, "Device Capabilities 2", &[constant(0xffff_ffff, "abilities")]),
        register(
            0x28,
            2,
            "Device Control 2",
            &[
                control(0x001f, "completion timeout"),
                control(1 << 5, "ARI Forwarding Enable"),
                control(0x00c0, "AtomicOp Requester Enable, Egress Blocking"),
                control(0x0300, "IDO enables"),
                control(1 << 10, "LTR Mechanism Enable"),
                control(1 << 11, "Emergency Power Reduction Request"),
                control(1 << 12, "10-Bit Tag Requester Enable"),
                control(0x6000, "OBFF Enable"),
                control(1 << 15, "End-End TLP Prefix Blocking"),
            ],
        ),
        register(0x2a, 2, "Device Status 2", &[rsvdz(0xffff)]),
        register(0x2c, 4, "Link Capabilities 2", &[constant(0xffff_ffff, "abilities")]),
        register(0x30, 2, "Link Control 2", &[control(0xffff, "speed, compliance, margin")]),
        register(
            0x32,
            2,
            "Link Status 2",
            &[
                status(0x70df & !(1 << 5), "equalization, retimers, component presence"),
                rw1c(0x8020, "events"),
            ],
        ),
        register(0x34, 4, "Slot Capabilities 2", &[constant(0xffff_ffff, "abilities")]),
        register(0x38, 2, "Slot Control 2", &[control(0xffff, "control")]),
        register(0x3a, 2, "Slot Status 2", &[rsvdz(0xffff)]),
    ],
}];
