//! How errors of an assigned function are kept from the rest of the host: what has to be set in the function, its PF and every port
//! above, computed from what they show.
//!
//! Pure: [`settings`] says what shall be in which register, [`Setting::merged`] what to write. A status bit that a written 1 clears is never
//! written as 1, because every access covers control registers only, and the few such bits among them are written as 0.

pub mod radius;
mod rules;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::bytes::Bytes;
use crate::config::{Access, CapabilityList};
use crate::spec::{CapabilityId, ExtendedCapabilityId, header};

pub use rules::{PROVOKABLE, ROWS};

/// What a function on the path is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The assigned function where it is no VF, or the PF of an assigned VF.
    Physical,
    /// A VF: its error controls are reserved, the PF's count for it (PCI Express 6.0, sections 9.3.5.4 and 9.4).
    Virtual,
    /// A port of a switch, or a bridge.
    Port,
    /// A root port.
    RootPort,
}

/// Where a register is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegisterPlace {
    /// In the header.
    Header(u16),
    /// From the beginning of the PCI Express capability.
    Express(u16),
    /// From the beginning of the AER capability.
    Aer(u16),
}

/// One decision.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// The register's name.
    pub name: &'static str,
    /// Its section in PCI Express 6.0.
    pub section: &'static str,
    /// Where it is.
    pub place: RegisterPlace,
    /// Its width in bytes.
    pub width: u8,
    /// In which functions of the path it is set.
    pub roles: &'static [Role],
    /// The bits that are decided here; the others stay as they are.
    pub mask: u32,
    /// What they shall be.
    pub wanted: u32,
    /// Bits that are always written as 0.
    pub write_zero: u32,
    /// Bits that are set only while other software changes the register.
    pub busy: u32,
    /// Whether they are left alone where the platform keeps AER from the operating system (PCI Firmware 3.3, section 4.5.1).
    pub os_only: bool,
    /// Whether a bit that does not become what is wanted is an error. The others may be hardwired.
    pub must_hold: bool,
    /// Why.
    pub reason: &'static str,
}

/// One register of one function and what shall be in it.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The decision.
    pub row: &'static Row,
    /// Where the register is in this function.
    pub access: Access,
}

/// Device/Port Type: root port of a root complex (PCI Express 6.0, section 7.5.3.2).
const ROOT_PORT: u16 = 4;
/// Header Type: a bridge.
const BRIDGE: u8 = 1;

/// What a function is, by its config space; `is_virtual` says whether the host calls it a VF.
pub fn role(bytes: &[u8], is_virtual: bool) -> Role {
    if is_virtual {
        return Role::Virtual;
    }
    if bytes.byte(header::HEADER_TYPE) & !header::MULTI_FUNCTION != BRIDGE {
        return Role::Physical;
    }
    let express = CapabilityList::walk(bytes).legacy(CapabilityId::PCI_EXPRESS).copied();
    let port_type = express.map(|capability| bytes.word(capability.offset + 2) >> 4 & 0xf);
    if port_type == Some(ROOT_PORT) { Role::RootPort } else { Role::Port }
}

/// What shall be set in a function of the path. A capability that it does not have is no error; nothing is set in what answers all
/// ones. `os_owns_aer`: whether the platform leaves AER to the operating system.
pub fn settings(bytes: &[u8], role: Role, os_owns_aer: bool) -> Vec<Setting> {
    if bytes.dword(header::VENDOR_ID) == u32::MAX && role != Role::Virtual {
        return Vec::new();
    }
    let list = CapabilityList::walk(bytes);
    let express = list.legacy(CapabilityId::PCI_EXPRESS).map(|capability| capability.offset);
    let aer = list.extended(ExtendedCapabilityId::AER).map(|capability| capability.offset);
    let applies = |row: &&Row| row.roles.contains(&role) && (os_owns_aer || !row.os_only);
    let setting = |row: &'static Row| {
        let offset = match row.place {
            RegisterPlace::Header(offset) => offset,
            RegisterPlace::Express(offset) => express? + offset,
            RegisterPlace::Aer(offset) => aer? + offset,
        };
        let fits = usize::from(offset) + usize::from(row.width) <= bytes.len();
        let access = Access::new(offset.into(), row.width.into()).ok().filter(|_| fits)?;
        Some(Setting { row, access })
    };
    ROWS.iter().filter(applies).filter_map(setting).collect()
}

impl Setting {
    /// What to write where the register reads `current`, so that the decided bits become `bits`; `None` where they are that.
    pub const fn merged(&self, current: u32, bits: u32) -> Option<u32> {
        if current & self.row.mask == bits & self.row.mask {
            return None;
        }
        Some((current & !self.row.mask | bits & self.row.mask) & !self.row.write_zero)
    }

    /// The decided bits that are not what is wanted.
    pub const fn unlike(&self, current: u32) -> u32 {
        (current ^ self.row.wanted) & self.row.mask
    }
}

#[cfg(test)]
mod tests;
