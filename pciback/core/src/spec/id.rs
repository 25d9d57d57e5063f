//! Capability ids. Values that are not listed here are as good as any other and survive a round trip.

use std::fmt;

macro_rules! ids {
    ($(#[$doc:meta])* $type:ident($int:ident) { $($(#[$const_doc:meta])* $name:ident = $value:literal, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $type(pub $int);

        impl $type {
            $(
                #[doc = $text]
                pub const $name: Self = Self($value);
            )*

            /// Every id that has a name, in order.
            pub const NAMED: &'static [Self] = &[$(Self::$name),*];

            /// What the specification calls it; `None` for an id that this table does not know.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some($text),)*
                    _ => None,
                }
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($type))
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    Some(name) => f.pad(name),
                    None => write!(f, "id {:#x}", self.0),
                }
            }
        }
    };
}

ids! {
    /// The id of a capability in the first 256 bytes (PCI Code and ID Assignment 1.16, section 2).
    CapabilityId(u8) {
        NULL = 0x00, "Null";
        POWER_MANAGEMENT = 0x01, "Power Management";
        AGP = 0x02, "AGP";
        VPD = 0x03, "Vital Product Data";
        SLOT_ID = 0x04, "Slot Identification";
        MSI = 0x05, "MSI";
        COMPACT_PCI_HOT_SWAP = 0x06, "CompactPCI Hot Swap";
        PCI_X = 0x07, "PCI-X";
        HYPER_TRANSPORT = 0x08, "HyperTransport";
        VENDOR_SPECIFIC = 0x09, "Vendor-Specific";
        DEBUG_PORT = 0x0a, "Debug Port";
        COMPACT_PCI_RESOURCE = 0x0b, "CompactPCI Central Resource Control";
        HOT_PLUG = 0x0c, "PCI Standard Hot-Plug Controller";
        SUBSYSTEM_ID = 0x0d, "Bridge Subsystem Vendor ID";
        AGP_8X = 0x0e, "AGP 8x";
        SECURE_DEVICE = 0x0f, "Secure Device";
        PCI_EXPRESS = 0x10, "PCI Express";
        MSI_X = 0x11, "MSI-X";
        SATA = 0x12, "SATA Data/Index Configuration";
        ADVANCED_FEATURES = 0x13, "Advanced Features";
        ENHANCED_ALLOCATION = 0x14, "Enhanced Allocation";
        FLATTENING_PORTAL_BRIDGE = 0x15, "Flattening Portal Bridge";
    }
}

ids! {
    /// The id of a capability in extended config space (PCI Code and ID Assignment 1.16, section 3).
    ExtendedCapabilityId(u16) {
        NULL = 0x0000, "Null";
        AER = 0x0001, "Advanced Error Reporting";
        VIRTUAL_CHANNEL = 0x0002, "Virtual Channel";
        SERIAL_NUMBER = 0x0003, "Device Serial Number";
        POWER_BUDGETING = 0x0004, "Power Budgeting";
        RC_LINK_DECLARATION = 0x0005, "Root Complex Link Declaration";
        RC_INTERNAL_LINK = 0x0006, "Root Complex Internal Link Control";
        RC_EVENT_COLLECTOR = 0x0007, "Root Complex Event Collector Endpoint Association";
        MFVC = 0x0008, "Multi-Function Virtual Channel";
        VIRTUAL_CHANNEL_MFVC = 0x0009, "Virtual Channel (MFVC present)";
        RCRB_HEADER = 0x000a, "RCRB Header";
        VENDOR_SPECIFIC = 0x000b, "Vendor-Specific Extended";
        CONFIG_ACCESS_CORRELATION = 0x000c, "Configuration Access Correlation";
        ACS = 0x000d, "Access Control Services";
        ARI = 0x000e, "Alternative Routing-ID Interpretation";
        ATS = 0x000f, "Address Translation Services";
        SR_IOV = 0x0010, "Single Root I/O Virtualization";
        MR_IOV = 0x0011, "Multi-Root I/O Virtualization";
        MULTICAST = 0x0012, "Multicast";
        PAGE_REQUEST = 0x0013, "Page Request Interface";
        RESIZABLE_BAR = 0x0015, "Resizable BAR";
        DYNAMIC_POWER_ALLOCATION = 0x0016, "Dynamic Power Allocation";
        TPH_REQUESTER = 0x0017, "TPH Requester";
        LTR = 0x0018, "Latency Tolerance Reporting";
        SECONDARY_PCI_EXPRESS = 0x0019, "Secondary PCI Express";
        PMUX = 0x001a, "Protocol Multiplexing";
        PASID = 0x001b, "Process Address Space ID";
        LN_REQUESTER = 0x001c, "LN Requester";
        DPC = 0x001d, "Downstream Port Containment";
        L1_PM_SUBSTATES = 0x001e, "L1 PM Substates";
        PTM = 0x001f, "Precision Time Measurement";
        MPCIE = 0x0020, "PCI Express over M-PHY";
        FRS_QUEUEING = 0x0021, "FRS Queueing";
        READINESS_TIME = 0x0022, "Readiness Time Reporting";
        DVSEC = 0x0023, "Designated Vendor-Specific Extended";
        VF_RESIZABLE_BAR = 0x0024, "VF Resizable BAR";
        DATA_LINK_FEATURE = 0x0025, "Data Link Feature";
        PHYSICAL_LAYER_16GT = 0x0026, "Physical Layer 16.0 GT/s";
        LANE_MARGINING = 0x0027, "Lane Margining at the Receiver";
        HIERARCHY_ID = 0x0028, "Hierarchy ID";
        NPEM = 0x0029, "Native PCIe Enclosure Management";
        PHYSICAL_LAYER_32GT = 0x002a, "Physical Layer 32.0 GT/s";
        ALTERNATE_PROTOCOL = 0x002b, "Alternate Protocol";
        SFI = 0x002c, "System Firmware Intermediary";
        SHADOW_FUNCTIONS = 0x002d, "Shadow Functions";
        DOE = 0x002e, "Data Object Exchange";
        DEVICE_3 = 0x002f, "Device 3";
        IDE = 0x0030, "Integrity and Data Encryption";
        PHYSICAL_LAYER_64GT = 0x0031, "Physical Layer 64.0 GT/s";
        FLIT_LOGGING = 0x0032, "Flit Logging";
        FLIT_PERFORMANCE = 0x0033, "Flit Performance Measurement";
        FLIT_ERROR_INJECTION = 0x0034, "Flit Error Injection";
        STREAMLINED_VIRTUAL_CHANNEL = 0x0035, "Streamlined Virtual Channel";
        MMIO_REGISTER_BLOCK_LOCATOR = 0x0036, "MMIO Register Block Locator";
        NOP_FLIT = 0x0037, "NOP Flit";
    }
}

/// Which capability, in which of the two lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AnyId {
    /// In the first 256 bytes.
    Legacy(CapabilityId),
    /// In extended config space.
    Extended(ExtendedCapabilityId),
}

impl fmt::Display for AnyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Legacy(id) => id.fmt(f),
            Self::Extended(id) => id.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_ids_keep_their_value_and_named_ones_have_their_name() {
        assert_eq!(CapabilityId(0x77).to_string(), "id 0x77");
        assert_eq!(ExtendedCapabilityId(0xfff0).name(), None);
        assert_eq!(CapabilityId(0x11), CapabilityId::MSI_X);
        assert_eq!(ExtendedCapabilityId(0x10).to_string(), "Single Root I/O Virtualization");
    }
}
