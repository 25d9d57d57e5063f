//! A PCI function as the host's kernel describes it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Sbdf;

/// One address range of a function: a BAR, the expansion ROM, or a PF's VF BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resource {
    /// First address; 0 with `size` 0 where there is no such range.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Linux's `IORESOURCE_*` flags: type, prefetchable, 64-bit.
    pub flags: u64,
}

impl Resource {
    /// `IORESOURCE_IO`: the range lies in I/O space.
    pub const IO: u64 = 0x100;
    /// `IORESOURCE_MEM`: the range lies in memory space.
    pub const MEMORY: u64 = 0x200;
    /// `IORESOURCE_ROM_SHADOW`, of an expansion ROM: the range is the copy of it that firmware has left in memory.
    pub const ROM_SHADOW: u64 = 0x2;
    /// `IORESOURCE_PCI_EA_BEI`: the range is one of an Enhanced Allocation entry, and the register itself reads 0.
    pub const ENHANCED_ALLOCATION: u64 = 0x20;
    /// `IORESOURCE_PREFETCH`.
    pub const PREFETCH: u64 = 0x2000;
    /// `IORESOURCE_MEM_64`: the BAR takes two registers.
    pub const MEMORY_64: u64 = 0x10_0000;
    /// `IORESOURCE_UNSET`: Linux found no place for it; `start` is 0, and not an address.
    pub const UNSET: u64 = 0x2000_0000;

    /// Whether there is such a range.
    pub const fn exists(&self) -> bool {
        self.size != 0
    }

    /// Whether the range exists and has an address. Nothing answers for one that has none, and no guest gets anything for it.
    pub const fn is_placed(&self) -> bool {
        self.exists() && self.start != 0 && self.flags & Self::UNSET == 0
    }

    /// Whether the range lies in I/O space.
    pub const fn is_io(&self) -> bool {
        self.flags & Self::IO != 0
    }
}

/// What the host says of one function. A VF's identity is the one that follows from its PF.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFunction {
    /// Where it is.
    pub address: Sbdf,
    /// A number that no other function had at this address since the host was booted: what was pulled out and put back, or replaced by
    /// another device, has another one.
    pub incarnation: u64,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Class code: base class, subclass, programming interface, from the high byte on.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// BAR 0-5, the expansion ROM, then VF BAR 0-5 of a PF, as sysfs `resource` lists them.
    pub resources: [Resource; 13],
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// `driver_override`, where one is set.
    pub driver_override: Option<String>,
    /// The Linux interrupt number, under Xen the GSI; 0 where there is none.
    pub irq: u32,
    /// The PF of a VF.
    pub physical_function: Option<Sbdf>,
    /// A PF's VFs that are enabled now, in order.
    pub virtual_functions: Vec<Sbdf>,
    /// How many VFs a PF can have (`sriov_totalvfs`); 0 for everything but a PF.
    pub total_vfs: u16,
    /// How many of them are enabled (`sriov_numvfs`).
    pub num_vfs: u16,
    /// The NUMA node, where the host knows it.
    pub numa_node: Option<u32>,
    /// The ways Linux can reset it, in the order it tries them (`reset_method`), for example `flr`, `bus`.
    pub reset_methods: Vec<String>,
    /// Its network interfaces in dom0.
    pub interfaces: Vec<String>,
}

/// What people call a function, by its numbers; absent where the host's hardware database does not know it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Names {
    /// The vendor's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendor: Option<String>,
    /// The device's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The subclass's, for example `Ethernet controller`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
}

impl HostFunction {
    /// BAR 0-5, which a guest is given. A PF's VF BARs are never a guest's.
    pub fn bars(&self) -> &[Resource] {
        &self.resources[..6]
    }

    /// The expansion ROM, which a PV guest is given where a policy says so.
    pub const fn rom(&self) -> &Resource {
        &self.resources[6]
    }

    /// Everything that a guest may have been given of it.
    pub fn guest_ranges(&self) -> &[Resource] {
        &self.resources[..7]
    }

    /// Whether it is a bridge, which stays with the host (base class 06: PCI Code and ID Assignment 1.16, section 1).
    pub const fn is_bridge(&self) -> bool {
        self.class >> 16 == 0x06
    }
}
