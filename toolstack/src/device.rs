//! Identifies a device after bus numbers have changed, or its card has moved to another slot.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use pciback::Sbdf;
use pciback::inventory::Identity;
use pciback::platform::{Host, HostFunction};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::outcome::Failure;
use crate::pci_path::PciPath;
use crate::spec::{answers, existing, identity};

/// A function of the host, independent of its address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Its address when it was noted, for messages.
    pub address: Sbdf,
    /// Its ids; for a VF, with its PF's serial number.
    pub identity: Identity,
    /// Its path from the root bus; for a VF, its PF's path.
    #[schemars(with = "String")]
    pub path: PciPath,
    /// Its function number; for a VF, its PF's.
    pub function: u8,
    /// For a VF, its index among the VFs of its PF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf: Option<u16>,
}

impl Device {
    /// Determines the device of a function.
    ///
    /// # Errors
    /// The host cannot be read, or the VF is just being removed.
    pub fn of(host: &dyn Host, function: &HostFunction) -> Result<Self, Failure> {
        let address = function.address;
        let top = function.physical_function.unwrap_or(address);
        let vf = match function.physical_function {
            None => None,
            Some(pf) => {
                let vfs = existing(host, pf)?.virtual_functions;
                let index = vfs.iter().position(|vf| *vf == address);
                let left =
                    || Failure::not_found(format!("{address} is not among the VFs of {pf}")).on(address);
                Some(index.ok_or_else(left)? as u16)
            }
        };
        let (identity, path) = (identity(host, function), PciPath::of(host, top)?);
        Ok(Self { address, identity, path, function: top.function(), vf })
    }

    /// Whether a function has the same ids.
    pub fn is_kind_of(&self, function: &HostFunction) -> bool {
        Identity { serial: None, ..self.identity } == Identity::of(function)
    }

    /// Whether both are the same device: the same ids, and the same path or serial number.
    pub fn is(&self, other: &Self) -> bool {
        let same_card = self.identity.serial.is_some()
            && self.identity.serial == other.identity.serial
            && self.function == other.function;
        self.identity.may_be(&other.identity) && self.vf == other.vf && (same_card || self.path == other.path)
    }
}

/// The devices of functions, read once per incarnation, because this reads config space. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Devices(Arc<Mutex<BTreeMap<Sbdf, (u64, Device)>>>);

impl Devices {
    /// The device of a function. If it is not known yet, it is read, which only threads that may block should do.
    ///
    /// # Errors
    /// Those of [`Device::of`].
    pub fn of(&self, host: &dyn Host, function: &HostFunction) -> Result<Device, Failure> {
        let key = |known: &BTreeMap<Sbdf, (u64, Device)>| {
            let (incarnation, device) = known.get(&function.address)?;
            (*incarnation == function.incarnation).then(|| device.clone())
        };
        if let Some(known) = key(&self.0.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(known);
        }
        let device = Device::of(host, function)?;
        // A function that does not answer now has not shown its serial number, so it is read again the next time.
        if answers(host, function.physical_function.unwrap_or(function.address)) {
            let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert(function.address, (function.incarnation, device.clone()));
        }
        Ok(device)
    }
}
