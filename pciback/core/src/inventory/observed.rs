//! What the three lists say of every function.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::GuestPlace;
use crate::host::HostFunction;
use crate::{DomId, Sbdf};

/// What distinguishes a device from another one in the same slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Identity {
    /// Vendor id; a VF's is its PF's.
    pub vendor: u16,
    /// Device id; a VF's is in its PF's SR-IOV capability.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Class code.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Device Serial Number, where there is one and it could be read; a VF's is its PF's, so that VFs of another card of the same
    /// kind are distinguished too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<u64>,
}

impl Identity {
    /// What the host says of a function, without its serial number.
    pub fn of(host: &HostFunction) -> Self {
        Self {
            vendor: host.vendor,
            device: host.device,
            subsystem_vendor: host.subsystem_vendor,
            subsystem: host.subsystem,
            class: host.class,
            revision: host.revision,
            serial: None,
        }
    }

    /// Whether both may be the same device: a serial number that only one side knows does not make another device.
    pub fn may_be(&self, other: &Self) -> bool {
        let serials_differ = matches!((self.serial, other.serial), (Some(one), Some(two)) if one != two);
        !serials_differ && Self { serial: None, ..*self } == Self { serial: None, ..*other }
    }
}

/// What sysfs shows of a function.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostView {
    /// What it is.
    pub identity: Identity,
    /// Whether it is a bridge, which is never assigned.
    pub bridge: bool,
    /// Whether it has an MSI-X capability. Xen panics when it is asked to prepare the table of one that has none.
    pub msix: bool,
    /// Whether it is a function of an ARI device with a number above 7, which is reported to Xen.
    pub extended: bool,
    /// A PF's VFs, in order.
    pub virtual_functions: Vec<Sbdf>,
    /// How many VFs the PF has enabled, `sriov_numvfs`.
    pub num_vfs: u16,
    /// Whether a driver is bound to it.
    pub driver: bool,
    /// Whether that driver is one that only holds, no matter which program bound it.
    pub held: bool,
}

/// Who owns a function in Xen, as far as Xen reports it: it says only whether the function could be assigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// dom0.
    Host,
    /// The quarantine domain, `DomId::IO`.
    Quarantine,
    /// This domain.
    Domain(DomId),
    /// dom0 or the quarantine domain: it is assignable.
    Free,
    /// Some guest: it is not assignable.
    Guest,
    /// Xen knows the function but did not say.
    Unknown,
}

/// What the host and Xen say of one function.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Function {
    /// What sysfs shows; `None` when it is not there.
    pub host: Option<HostView>,
    /// The PF of a VF; of one that left, the PF that it had when it was seen last.
    pub physical_function: Option<Sbdf>,
    /// Its owner in Xen; `None` when Xen does not know the function.
    pub xen: Option<Owner>,
}

/// One function in our backend nodes of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Published {
    /// The function.
    pub address: Sbdf,
    /// Whose nodes, and where they place the function in that guest.
    pub place: GuestPlace,
}

/// The three lists.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    /// All functions of sysfs, and all others that Xen was asked about: those with a record or in nodes, and those that were
    /// there before. Xen cannot be asked for a list.
    pub functions: BTreeMap<Sbdf, Function>,
    /// What our nodes publish. Nodes of another type than ours (xen-pciback's) do not belong here.
    pub published: BTreeSet<Published>,
    /// The guests that are alive.
    pub domains: BTreeSet<DomId>,
}

impl Observed {
    /// One function; nothing is known of one that is not listed.
    pub(super) fn get(&self, address: Sbdf) -> Option<&Function> {
        self.functions.get(&address)
    }

    pub(super) fn pf(&self, address: Sbdf) -> Option<Sbdf> {
        self.get(address).and_then(|function| function.physical_function)
    }
}
