//! The host's PCI functions, as sysfs shows them.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{AddressMap, HostEvents, HostFunction, Names, Result};
use crate::config::ConfigSpace;
use crate::{DomId, Sbdf};

/// The memory of one BAR, as the function's registers answer.
pub trait BarMemory: Send {
    /// Reads 1, 2, 4 or 8 bytes at an offset that is a multiple of that; all ones beyond the end.
    fn read(&self, offset: u64, bytes: u8) -> u64;
    /// Writes likewise; nothing happens beyond the end.
    fn write(&self, offset: u64, bytes: u8, value: u64);
}

/// Something in dom0 that uses a function through its driver, and loses it when the driver does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Use {
    /// A file system on one of its block devices is mounted.
    Mount {
        /// The block device, `/dev/...`.
        device: String,
        /// Where.
        at: String,
    },
    /// One of its block devices is swap space.
    Swap {
        /// The block device.
        device: String,
    },
    /// Another block device is made of one of its: by the device mapper, md, bcache.
    Holder {
        /// The block device.
        device: String,
        /// The one made of it, with the device mapper's name.
        holder: String,
    },
    /// One of its block devices is a guest's disk, served by dom0's kernel.
    Disk {
        /// The block device.
        device: String,
        /// The guest.
        domain: DomId,
    },
    /// One of its network interfaces is up, or part of a bridge, a bond or the like.
    Interface {
        /// Its name.
        name: String,
        /// `IFF_UP`.
        up: bool,
        /// What it is part of.
        master: Option<String>,
    },
    /// One of its block devices is opened exclusively, and none of the above shows by what.
    Claimed {
        /// The block device.
        device: String,
    },
    /// A process has one of its device files open.
    Process {
        /// What it has open, `/dev/...`.
        device: String,
        /// Its number.
        pid: u32,
        /// Its name.
        name: String,
    },
}

impl Use {
    /// The block device that it is about.
    pub fn block_device(&self) -> Option<&String> {
        match self {
            Self::Mount { device, .. }
            | Self::Swap { device }
            | Self::Holder { device, .. }
            | Self::Disk { device, .. }
            | Self::Claimed { device } => Some(device),
            Self::Interface { .. } | Self::Process { .. } => None,
        }
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { device, at } => write!(f, "{device} is mounted at {at}"),
            Self::Swap { device } => write!(f, "{device} is swap space"),
            Self::Holder { device, holder } => write!(f, "{device} is part of {holder}"),
            Self::Disk { device, domain } => write!(f, "{device} is a disk of domain {domain}"),
            Self::Interface { name, up, master: None } => {
                write!(f, "interface {name} is {}", if *up { "up" } else { "down" })
            }
            Self::Interface { name, up, master: Some(master) } => {
                write!(f, "interface {name} is {}part of {master}", if *up { "up and " } else { "" })
            }
            Self::Claimed { device } => {
                write!(
                    f,
                    "{device} is opened exclusively (a ZFS pool, a file system of several devices, a program)"
                )
            }
            Self::Process { device, pid, name } => write!(f, "process {pid} ({name}) has {device} open"),
        }
    }
}

/// The host's PCI functions and their drivers.
///
/// A change is done when the call returns; one that the host does not finish within `limit` is an error whose cause is
/// `TimedOut`, and continues in a child process of its own.
pub trait Host: Send + Sync {
    /// Subscribes to events about functions.
    fn events(&self) -> Result<Box<dyn HostEvents>>;
    /// The addresses of all functions.
    fn functions(&self) -> Result<Vec<Sbdf>>;
    /// One function; `Cause::Missing` where it is not, or no longer, there.
    fn function(&self, address: Sbdf) -> Result<HostFunction>;
    /// What the host has at its memory addresses (`/proc/iomem`).
    fn memory_map(&self) -> Result<AddressMap>;
    /// What the host has at its I/O ports (`/proc/ioports`).
    fn port_map(&self) -> Result<AddressMap>;
    /// What people call these functions, in their order.
    fn names(&self, functions: &[HostFunction]) -> Vec<Names>;
    /// Opens its config space.
    fn config(&self, address: Sbdf) -> Result<Box<dyn ConfigSpace>>;
    /// Maps the memory of a BAR (0-5).
    fn bar_memory(&self, address: Sbdf, bar: u8) -> Result<Box<dyn BarMemory>>;
    /// Reads its expansion ROM, at most so many bytes; `ENOENT` where it has none. Memory space must be on, and nothing may use the
    /// function: some do not decode their BARs during it (PCI 3.0, section 6.2.5.2).
    fn rom(&self, address: Sbdf, most: usize) -> Result<Vec<u8>>;
    /// The bridges above it, the nearest first and the root port last; none where it is on a root bus.
    fn ports_above(&self, address: Sbdf) -> Result<Vec<Sbdf>>;
    /// What in dom0 uses it through its driver; nothing where it has none.
    fn uses(&self, address: Sbdf) -> Result<Vec<Use>>;
    /// The names of the PCI drivers that are loaded.
    fn drivers(&self) -> Result<Vec<String>>;
    /// Sets `driver_override`, so that only this driver may take the function, or clears it.
    fn set_driver_override(&self, address: Sbdf, driver: Option<&str>) -> Result<()>;
    /// Makes xen-pciback forget that it was given the function at this address, which stays bound: whatever appears there later
    /// it would take, too.
    fn forget_slot(&self, address: Sbdf) -> Result<()>;
    /// Takes it from its driver; nothing happens where it has none.
    fn unbind(&self, address: Sbdf, limit: Duration) -> Result<()>;
    /// Lets the drivers probe it; the result says through `function` which took it.
    fn probe(&self, address: Sbdf, limit: Duration) -> Result<()>;
    /// Resets it by the best way Linux has, saving and restoring its config space.
    fn reset(&self, address: Sbdf, limit: Duration) -> Result<()>;
    /// Sets how many VFs a PF has. Linux wants 0 in between two other numbers.
    fn set_num_vfs(&self, physical_function: Sbdf, count: u16, limit: Duration) -> Result<()>;
    /// Sets whether native drivers take the VFs of this PF, and returns whether they did before. While they do not, Linux binds a
    /// VF to the driver of its `driver_override` only.
    fn set_vf_autoprobe(&self, physical_function: Sbdf, enabled: bool) -> Result<bool>;
}
