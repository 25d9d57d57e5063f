//! By what a function is known again after bus numbers have changed, or its card has moved to another slot.

use pciback::Sbdf;
use pciback::inventory::Identity;
use pciback::platform::{Host, HostFunction};
use serde::{Deserialize, Serialize};

use crate::names::PciPath;
use crate::outcome::Failure;
use crate::spec::{existing, identity};

/// A function of the host, whatever its address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Where it was when it was noted, for people.
    pub address: Sbdf,
    identity: Identity,
    /// The way to it, of a VF to its PF.
    path: PciPath,
    /// The function number, of a VF its PF's.
    function: u8,
    /// A VF's number among those of its PF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vf: Option<u16>,
}

impl Device {
    /// What is known of a function.
    ///
    /// # Errors
    /// The host cannot be asked, or a VF leaves just now.
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

    /// Whether both are the same device: of the same kind, and at the same place or with the same serial number.
    pub fn is(&self, other: &Self) -> bool {
        let same_card = self.identity.serial.is_some()
            && self.identity.serial == other.identity.serial
            && self.function == other.function;
        self.identity.may_be(&other.identity) && self.vf == other.vf && (same_card || self.path == other.path)
    }
}
