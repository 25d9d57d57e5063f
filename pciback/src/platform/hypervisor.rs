//! What xpci asks of the hypervisor.

use super::Result;
use crate::policy::RdmPolicy;
use crate::{DomId, Sbdf, Uuid};

/// A guest's physical interrupt number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pirq(pub u32);

/// Which message-signalled interrupt of a function to map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MsiSource {
    /// The function's MSI.
    Msi,
    /// One entry of its MSI-X table; `table` is the start of the BAR that holds the table.
    MsiX {
        /// Index in the table.
        entry: u16,
        /// Address of the BAR that holds the table, without the table's offset.
        table: u64,
    },
}

impl MsiSource {
    /// The entry as it is noted; MSI has one, 0.
    pub const fn entry(self) -> u16 {
        match self {
            Self::Msi => 0,
            Self::MsiX { entry, .. } => entry,
        }
    }
}

impl std::fmt::Display for MsiSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Msi => f.write_str("MSI"),
            Self::MsiX { entry, .. } => write!(f, "MSI-X entry {entry}"),
        }
    }
}

/// Whether a call adds something to what a domain may do or has, or removes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edit {
    /// Adds it.
    Add,
    /// Removes it.
    Remove,
}

impl Edit {
    /// The verb of a message.
    pub(super) const fn verb(self, add: &'static str, remove: &'static str) -> &'static str {
        match self {
            Self::Add => add,
            Self::Remove => remove,
        }
    }

    /// As Xen's calls take it.
    pub(super) const fn is_add(self) -> bool {
        matches!(self, Self::Add)
    }
}

/// What a reset reached (PCI Express 6.0, sections 6.6.1 and 6.6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetReach {
    /// The function alone: a function level reset, or a method of the device's own that has the same effect.
    Function,
    /// All that is on its bus: a hot reset.
    Bus,
}

/// What dom0's kernel reports to Xen of a function (`PHYSDEVOP_pci_device_add`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceReport {
    /// An extended function of an ARI device (function number above 7).
    pub extended: bool,
    /// The PF, when it is a VF.
    pub physical_function: Option<Sbdf>,
    /// The proximity domain (NUMA node), where known.
    pub proximity: Option<u32>,
}

/// What Xen says of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DomainInfo {
    /// By what a guest is known over its reboots.
    pub uuid: Uuid,
    /// Whether it is paused by a toolstack.
    pub paused: bool,
    /// Whether it has been destroyed: it never runs again, although Xen still knows it.
    pub dying: bool,
    /// Whether it has stopped to be saved: it keeps its memory, and runs on only if a toolstack resumes it.
    pub suspended: bool,
    /// Whether a vCPU of it has run.
    pub has_run: bool,
    /// Whether it is an HVM or PVH guest without hardware-assisted paging (`hap=0`).
    pub shadow_paging: bool,
}

/// Device assignment, permissions and interrupts. All calls are hypercalls and answer with Xen's error numbers.
pub trait Hypervisor: Send + Sync {
    /// Major and minor version.
    fn version(&self) -> (u32, u32);
    /// Whether Xen knows this function.
    fn device_known(&self, address: Sbdf) -> Result<bool>;
    /// Reports a function to Xen. `ENODEV`: a VF whose PF is unknown.
    fn device_add(&self, address: Sbdf, report: DeviceReport) -> Result<()>;
    /// Withdraws a function. `EBUSY`: a PF that still has VFs.
    fn device_remove(&self, address: Sbdf) -> Result<()>;
    /// Gives a function to a domain, `DomId::IO` to hold it. `EOPNOTSUPP`: the domain was created without
    /// passthrough. `EBUSY`: a guest owns the function, or with [`RdmPolicy::Strict`] its reserved memory collides with the domain's
    /// memory. `EPERM`, with [`RdmPolicy::Strict`]: other functions have the same reserved memory. All answers: `docs/xen-answers.md`.
    fn assign(&self, domain: DomId, address: Sbdf, rdm: RdmPolicy) -> Result<()>;
    /// Takes a function from a domain: a guest's goes to `DomId::IO`, a held one back to dom0.
    fn deassign(&self, domain: DomId, address: Sbdf) -> Result<()>;
    /// Whether a function could be assigned now, that is, dom0 or `DomId::IO` owns it.
    fn assignable(&self, address: Sbdf) -> Result<bool>;
    /// Prepares the function's MSI-X table for use by a guest. `true` when this call did it, `false` when it was prepared.
    /// `EINVAL`: it has no MSI-X.
    fn prepare_msix(&self, address: Sbdf) -> Result<bool>;
    /// Undoes `prepare_msix`.
    fn release_msix(&self, address: Sbdf) -> Result<()>;
    /// Writes the messages and masks of a guest's interrupts into the function again, as needed after a reset.
    fn restore_msi(&self, address: Sbdf) -> Result<()>;
    /// Tells Xen that dom0 has reset the function, so that it drops what it has cached of its registers. `false`: Xen has no call for that, as
    /// before 4.20. `ENODEV`: it does not know the function.
    fn note_reset(&self, address: Sbdf, reach: ResetReach) -> Result<bool>;
    /// Lets a domain map `frames` pages from page frame `first` on, or not any more.
    fn iomem_permission(&self, domain: DomId, first: u64, frames: u64, edit: Edit) -> Result<()>;
    /// Lets a domain use `count` I/O ports from `first` on, or not any more.
    fn ioport_permission(&self, domain: DomId, first: u32, count: u32, edit: Edit) -> Result<()>;
    /// Maps a message-signalled interrupt to a new physical interrupt of the domain.
    fn map_msi(&self, domain: DomId, address: Sbdf, source: MsiSource) -> Result<Pirq>;
    /// Maps a message-signalled interrupt to a physical interrupt of the domain that nothing is mapped to. Xen does as if it had, and forgets an
    /// interrupt of the host, where something is: callers must know. `EINVAL`: the domain has no such number.
    fn map_msi_as(&self, domain: DomId, address: Sbdf, source: MsiSource, pirq: Pirq) -> Result<()>;
    /// Maps an INTx line to the domain's physical interrupt of the same number and permits it.
    fn map_gsi(&self, domain: DomId, gsi: u32) -> Result<Pirq>;
    /// Removes the domain's permission for the line that `map_gsi` mapped, and the mapping.
    fn unmap_gsi(&self, domain: DomId, gsi: u32, pirq: Pirq) -> Result<()>;
    /// Unmaps a physical interrupt of `map_msi` or `map_msi_as`. `EINVAL`: it is not mapped.
    fn unmap_pirq(&self, domain: DomId, pirq: Pirq) -> Result<()>;
    /// What it is and whether it runs. `ESRCH`: there is none.
    fn domain(&self, domain: DomId) -> Result<DomainInfo>;
    /// Pauses a domain until it is unpaused, as `xl pause` does.
    fn pause(&self, domain: DomId) -> Result<()>;
    /// Takes back one `pause`: Xen counts them, and the domain runs when none is left. `EINVAL`: it is not paused.
    fn unpause(&self, domain: DomId) -> Result<()>;
    /// Destroys a domain as `xl destroy` does: it is not asked, and its device model, backends and nodes go too. Where the
    /// toolstack fails, Xen does what it can alone.
    fn destroy(&self, domain: DomId) -> Result<()>;
}
