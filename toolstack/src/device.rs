//! Identifies a device after bus numbers have changed, or its card has moved to another slot.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

/// What was read of a function.
#[derive(Debug, Clone)]
struct Read {
    incarnation: u64,
    device: Device,
    /// Whether the function answered; otherwise it has not shown its serial number.
    answered: bool,
}

/// The devices of functions, as threads that may block have read them. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Devices(Arc<Mutex<BTreeMap<Sbdf, Read>>>);

impl Devices {
    fn locked(&self) -> MutexGuard<'_, BTreeMap<Sbdf, Read>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was read of a function, if it is not another one by now.
    fn read(&self, function: &HostFunction) -> Option<Read> {
        let known = self.locked().get(&function.address).cloned();
        known.filter(|read| read.incarnation == function.incarnation)
    }

    /// The device of a function. It is read from config space, once if the function answers, and again each time if it does not.
    ///
    /// # Errors
    /// Those of [`Device::of`].
    pub fn of(&self, host: &dyn Host, function: &HostFunction) -> Result<Device, Failure> {
        if let Some(read) = self.read(function).filter(|read| read.answered) {
            return Ok(read.device);
        }
        let device = Device::of(host, function)?;
        let answered = answers(host, function.physical_function.unwrap_or(function.address));
        let read = Read { incarnation: function.incarnation, device, answered };
        let mut known = self.locked();
        // Another thread may have had an answer meanwhile.
        let is_better = |other: &Read| other.incarnation == read.incarnation && other.answered;
        if let Some(other) = known.get(&function.address).filter(|other| is_better(other)) {
            return Ok(other.device.clone());
        }
        known.insert(function.address, read.clone());
        Ok(read.device)
    }

    /// The device of a function, without reading it.
    ///
    /// # Errors
    /// No thread could read the function since it appeared.
    pub fn known(&self, function: &HostFunction) -> Result<Device, Failure> {
        let address = function.address;
        self.read(function).map(|read| read.device).ok_or_else(|| {
            let text =
                format!("it is not known which device {address} is: it was not read since it appeared");
            Failure::refused(text).on(address).hint("try again; if that does not help, see xpcid's log")
        })
    }
}

#[cfg(test)]
mod tests {
    use pciback::platform::sim::Simulation;

    use super::*;

    #[test]
    fn what_was_read_of_one_function_says_nothing_of_another_at_its_address() {
        let host = "drivers: []\nfunctions: [{address: 02:00.0, model: virtio-net}]\n";
        let platform = Simulation::from_yaml(host).unwrap().platform("test").unwrap();
        let function = platform.host.function("02:00.0".parse().unwrap()).unwrap();
        let devices = Devices::default();
        assert!(devices.known(&function).unwrap_err().message.contains("not known which device"));
        let read = devices.of(platform.host.as_ref(), &function).unwrap();
        assert_eq!(devices.known(&function).unwrap(), read);
        let other = HostFunction { incarnation: function.incarnation + 1, ..function };
        devices.known(&other).unwrap_err();
    }
}
