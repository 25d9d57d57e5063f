//! Names that the settings give to functions, and finding the function for a name.

use std::collections::BTreeMap;
use std::fmt;

use pciback::Sbdf;
use pciback::platform::{Host, HostFunction};
use pciback::policy::nearest;
use serde::Deserialize;

use crate::device::Device;
use crate::outcome::Failure;
use crate::pci_path::PciPath;
use crate::spec::existing;
use crate::target::{Parent, Target, Word};

/// Names and their meanings.
pub type Names = BTreeMap<Word, Name>;

/// The meaning of a name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Entry")]
pub struct Name {
    by: By,
    /// With a serial number: the function number, 0-7.
    function: Option<u8>,
    /// The index of a VF of the function that was found.
    vf: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum By {
    Address(Sbdf),
    Serial(u64),
    Path(PciPath),
}

/// A name in the settings.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    #[serde(default)]
    address: Option<Sbdf>,
    #[serde(default)]
    serial: Option<String>,
    #[serde(default)]
    path: Option<String>,
    #[serde(default)]
    function: Option<u8>,
    #[serde(default)]
    vf: Option<u16>,
}

impl TryFrom<Entry> for Name {
    type Error = String;

    fn try_from(entry: Entry) -> Result<Self, String> {
        let Entry { function, vf, .. } = entry;
        let by = match (entry.address, entry.serial, entry.path) {
            (Some(address), None, None) => By::Address(address),
            (None, Some(serial), None) => By::Serial(serial_of(&serial)?),
            (None, None, Some(path)) => match path.strip_prefix("pci-").map(str::parse) {
                // udev's ID_PATH has only the address of the function.
                Some(Ok(address)) => By::Address(address),
                _ => By::Path(path.parse()?),
            },
            _ => return Err("a name means a function by one of address, serial, path".to_owned()),
        };
        if function.is_some() && !matches!(by, By::Serial(_)) {
            return Err("'function' goes with 'serial' only".to_owned());
        }
        if function.is_some_and(|function| function > 7) {
            return Err("'function' must be 0 to 7".to_owned());
        }
        Ok(Self { by, function, vf })
    }
}

/// Parses a Device Serial Number in lspci's format.
fn serial_of(text: &str) -> Result<u64, String> {
    let wrong =
        || format!("'{text}' is not a serial number: write it as lspci does, 01-23-45-67-89-ab-cd-ef");
    let digits: String = text.split('-').collect();
    let formed = text.len() == 23 && text.split('-').all(|byte| byte.len() == 2);
    let hexadecimal = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if !formed || !hexadecimal {
        return Err(wrong());
    }
    u64::from_str_radix(&digits, 16).map_err(|_| wrong())
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.by {
            By::Address(address) => write!(f, "address {address}")?,
            By::Serial(serial) => write!(f, "serial number {}", printed(*serial))?,
            By::Path(path) => write!(f, "path {path}")?,
        }
        self.function.map_or(Ok(()), |function| write!(f, ", function {function}"))?;
        self.vf.map_or(Ok(()), |vf| write!(f, ", VF {vf}"))
    }
}

/// A Device Serial Number in lspci's format.
pub fn printed(serial: u64) -> String {
    serial.to_be_bytes().map(|byte| format!("{byte:02x}")).join("-")
}

impl Name {
    /// Whether the name means a device; the VF index is ignored.
    fn is_of(&self, device: &Device) -> bool {
        match &self.by {
            By::Address(wanted) => *wanted == device.address,
            By::Serial(wanted) => {
                self.function.is_none_or(|number| number == device.function)
                    && device.identity.serial == Some(*wanted)
            }
            By::Path(wanted) => device.path == *wanted,
        }
    }

    fn find(&self, host: &dyn Host, name: &Word) -> Result<Sbdf, Failure> {
        let found = match self.by {
            By::Address(address) => address,
            _ => {
                let device = Self { vf: None, ..self.clone() };
                let all =
                    functions(host)?.into_iter().filter(|function| function.physical_function.is_none());
                let found = all.filter(|function| {
                    Device::of(host, function).is_ok_and(|function| self.is_of(&function))
                });
                let found: Vec<Sbdf> = found.map(|function| function.address).collect();
                match found.as_slice() {
                    [only] => *only,
                    [] => {
                        let text = format!("no function of this host is '{}' ({device})", name.as_str());
                        return Err(
                            Failure::not_found(text).hint("'xpci show' shows serial numbers and paths")
                        );
                    }
                    several => {
                        let list: Vec<String> = several.iter().map(ToString::to_string).collect();
                        let text = format!(
                            "'{}' ({device}) is several functions: {}",
                            name.as_str(),
                            list.join(", ")
                        );
                        return Err(
                            Failure::refused(text).hint("add 'function: N' to the name, or use a path")
                        );
                    }
                }
            }
        };
        self.vf.map_or(Ok(found), |number| virtual_function(host, found, number))
    }
}

/// The functions of the host; one that leaves meanwhile is skipped.
fn functions(host: &dyn Host) -> Result<Vec<HostFunction>, Failure> {
    Ok(host.functions()?.into_iter().filter_map(|address| host.function(address).ok()).collect())
}

/// A VF by its index.
fn virtual_function(host: &dyn Host, pf: Sbdf, number: u16) -> Result<Sbdf, Failure> {
    let function = existing(host, pf)?;
    if function.total_vfs == 0 {
        return Err(Failure::refused(format!("{pf} is not a PF: it has no VF {number}")).on(pf));
    }
    function.virtual_functions.get(usize::from(number)).copied().ok_or_else(|| {
        let text = match function.virtual_functions.len() {
            0 => format!("{pf} has no VF {number}: none is enabled"),
            count => format!("{pf} has no VF {number}: {count} are enabled, numbered from 0"),
        };
        Failure::not_found(text).on(pf).hint("'xpci vf create' enables VFs")
    })
}

/// The function with an address, a name or a network interface.
fn function(host: &dyn Host, names: &Names, parent: &Parent) -> Result<Sbdf, Failure> {
    let word = match parent {
        Parent::At(address) => return Ok(*address),
        Parent::Word(word) => word,
    };
    if let Some(name) = names.get(word) {
        return name.find(host, word);
    }
    if let Some(found) = functions(host)?.iter().find(|function| has_interface(function, word)) {
        return Ok(found.address);
    }
    let text = format!(
        "there is no function '{word}': it is neither a name of the settings nor a network interface in dom0",
        word = word.as_str()
    );
    Err(Failure::not_found(text).hint(match nearest(word.as_str(), names.keys().map(Word::as_str)) {
        Some(meant) => format!("did you mean '{meant}'?"),
        None => "'xpci list' lists the functions; 'names' in xpcid.yaml gives them names".to_owned(),
    }))
}

/// Finds the function for a target. The result is an address, or a pool with the PF's address.
///
/// # Errors
/// There is no such function, or several, or the host cannot be read.
pub fn find(host: &dyn Host, names: &Names, target: &Target) -> Result<Target, Failure> {
    Ok(match target {
        Target::One(parent) => function(host, names, parent)?.into(),
        Target::Vf(pf, number) => virtual_function(host, function(host, names, pf)?, *number)?.into(),
        Target::Any(pf) => Target::Any(Parent::At(function(host, names, pf)?)),
    })
}

/// Whether a target's parent means this function, which is no VF.
pub fn means(host: &dyn Host, names: &Names, parent: &Parent, function: &HostFunction) -> bool {
    match parent {
        Parent::At(address) => *address == function.address,
        Parent::Word(word) => match names.get(word) {
            Some(name) => {
                name.vf.is_none() && Device::of(host, function).is_ok_and(|device| name.is_of(&device))
            }
            None => has_interface(function, word),
        },
    }
}

/// Whether a target means this function; a pool means none. `device` is the function's device.
pub fn means_one(
    host: &dyn Host,
    names: &Names,
    target: &Target,
    function: &HostFunction,
    device: &Device,
) -> bool {
    // The device of a VF has its PF's serial number and path.
    let pf = function.physical_function;
    let of_pf =
        |name: &Name| pf.is_some_and(|address| name.is_of(&Device { address, vf: None, ..device.clone() }));
    match target {
        Target::Any(_) => false,
        Target::One(Parent::At(address)) => *address == function.address,
        Target::One(Parent::Word(word)) => match names.get(word) {
            Some(name) if name.vf.is_some() => name.vf == device.vf && of_pf(name),
            Some(name) => match name.by {
                By::Address(_) => name.is_of(device),
                _ => pf.is_none() && name.is_of(device),
            },
            None => has_interface(function, word),
        },
        Target::Vf(parent, number) => {
            device.vf == Some(*number)
                && match parent {
                    Parent::At(address) => pf == Some(*address),
                    Parent::Word(word) => match names.get(word) {
                        Some(name) => name.vf.is_none() && of_pf(name),
                        None => pf
                            .and_then(|pf| host.function(pf).ok())
                            .is_some_and(|pf| has_interface(&pf, word)),
                    },
                }
        }
    }
}

fn has_interface(function: &HostFunction, word: &Word) -> bool {
    function.interfaces.iter().any(|name| name == word.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_number_is_written_as_lspci_prints_it() {
        assert_eq!(serial_of("52-54-00-FF-ff-12-34-56"), Ok(0x5254_00ff_ff12_3456));
        assert_eq!(printed(0x5254_00ff_ff12_3456), "52-54-00-ff-ff-12-34-56");
        for text in ["", "52-54-00-ff-ff-12-34", "52540-0-ff-ff-12-34-5", "+2-54-00-ff-ff-12-34-56"] {
            assert!(serial_of(text).is_err(), "{text}");
        }
    }
}
