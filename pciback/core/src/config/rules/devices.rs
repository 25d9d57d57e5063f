//! Registers of known devices that stand in no capability. A guest that wrote them would reach firmware or functions of the host.

use super::{Row, row};
use crate::config::function::Identity;
use crate::config::policy::Treatment;

/// Registers of some devices, at their offsets in config space.
#[derive(Debug)]
pub struct DeviceRules {
    /// Only this vendor's; `None` where a specification places them for every vendor.
    vendor: Option<u16>,
    /// The class code and which of its bits count.
    class: u32,
    class_mask: u32,
    /// Where they are specified.
    pub section: &'static str,
    /// The name and the width in bytes of each, and how some of its bits are treated; the others stay unknown.
    pub registers: &'static [(&'static str, u8, Row)],
}

impl DeviceRules {
    fn are_for(&self, identity: &Identity) -> bool {
        self.vendor.is_none_or(|vendor| vendor == identity.vendor)
            && identity.class & self.class_mask == self.class
    }
}

/// The rules for a device.
pub fn device_rules(identity: &Identity) -> impl Iterator<Item = &'static DeviceRules> {
    DEVICES.iter().filter(|rules| rules.are_for(identity))
}

const INTEL: Option<u16> = Some(0x8086);
const OP_REGION: &str = "it starts system management code of the host's firmware";
const PORT_ROUTING: &str = "which controller has a port concerns other functions of the host";
const SATA_MODE: &str = "the mode of the controller and which ports it has are the host's decision";
const SMI: &str = "system management interrupts would be the host's";
const SATA: &[(&str, u8, Row)] = &[
    ("Address Map, Port Control and Status", 4, row(0x90, 0xffff_ffff, Treatment::ReadOnly, SATA_MODE)),
    ("SATA Clock Gating, Initialization", 4, row(0x94, 0xffff_ffff, Treatment::ReadOnly, SATA_MODE)),
    ("SATA Initialization", 4, row(0x98, 0xffff_ffff, Treatment::ReadOnly, SATA_MODE)),
    ("SATA Initialization", 4, row(0x9c, 0xffff_ffff, Treatment::ReadOnly, SATA_MODE)),
];

const DEVICES: &[DeviceRules] = &[
    DeviceRules {
        vendor: INTEL,
        class: 0x03_0000,
        class_mask: 0xff_0000,
        section: "Intel ACPI IGD OpRegion Specification",
        registers: &[
            ("Software SMI", 4, row(0xe0, 0xffff_ffff, Treatment::ReadOnly, OP_REGION)),
            ("Graphics Mailbox", 4, row(0xe4, 0xffff_ffff, Treatment::ReadOnly, OP_REGION)),
            ("Software SCI", 4, row(0xe8, 0xffff_ffff, Treatment::ReadOnly, OP_REGION)),
            (
                "ASL Storage",
                4,
                row(
                    0xfc,
                    0xffff_ffff,
                    Treatment::ZERO,
                    "it is an address in the host's memory, through which firmware and driver exchange data",
                ),
            ),
        ],
    },
    DeviceRules {
        vendor: None,
        class: 0x0c_0300,
        class_mask: 0xff_ffff,
        section: "UHCI Design Guide 1.1, 5.2.1",
        registers: &[
            ("Legacy Support", 2, row(0xc0, 0x0000_00bf, Treatment::VIRTUAL, SMI)),
            (
                "Legacy Support",
                2,
                row(0xc0, 0x0000_2000, Treatment::Pass, "it routes the controller's interrupt to its line"),
            ),
        ],
    },
    DeviceRules {
        vendor: INTEL,
        class: 0x0c_0320,
        class_mask: 0xff_ffff,
        section: "EHCI 1.0, 2.1.8",
        registers: &[
            ("USB Legacy Support Control/Status", 4, row(0x6c, 0x0000_e03f, Treatment::VIRTUAL, SMI)),
            ("USB Legacy Support Control/Status", 4, row(0x6c, 0x003f_0000, Treatment::ReadOnly, SMI)),
            ("USB Legacy Support Control/Status", 4, row(0x6c, 0xffc0_1fc0, Treatment::ZERO, SMI)),
        ],
    },
    DeviceRules {
        vendor: INTEL,
        class: 0x0c_0330,
        class_mask: 0xff_ffff,
        section: "Intel 8 Series Chipset data sheet, xHCI",
        registers: &[
            ("USB 2.0 Port Routing", 4, row(0xd0, 0xffff_ffff, Treatment::ReadOnly, PORT_ROUTING)),
            ("USB 2.0 Port Routing Mask", 4, row(0xd4, 0xffff_ffff, Treatment::ReadOnly, PORT_ROUTING)),
            ("USB 3.0 Port SuperSpeed Enable", 4, row(0xd8, 0xffff_ffff, Treatment::ReadOnly, PORT_ROUTING)),
            ("USB 3.0 Port Routing Mask", 4, row(0xdc, 0xffff_ffff, Treatment::ReadOnly, PORT_ROUTING)),
        ],
    },
    DeviceRules {
        vendor: INTEL,
        class: 0x01_0100,
        class_mask: 0xff_ff00,
        section: "Intel 5 Series Chipset data sheet, SATA",
        registers: SATA,
    },
    DeviceRules {
        vendor: INTEL,
        class: 0x01_0400,
        class_mask: 0xff_ff00,
        section: "Intel 5 Series Chipset data sheet, SATA",
        registers: SATA,
    },
    DeviceRules {
        vendor: INTEL,
        class: 0x01_0600,
        class_mask: 0xff_ff00,
        section: "Intel 5 Series Chipset data sheet, SATA",
        registers: SATA,
    },
];
