//! Names that the settings give to functions, and which function of the host somebody means.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use pciback::Sbdf;
use pciback::platform::{Host, HostFunction};
use pciback::policy::nearest;
use serde::{Deserialize, Serialize, Serializer};

use crate::outcome::Failure;
use crate::spec::{existing, serial_number};
use crate::target::{Parent, Target, Word};

/// Names and what they mean.
pub type Names = BTreeMap<Word, Name>;

/// What a name means.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Entry")]
pub struct Name {
    by: By,
    /// With a serial number: the function of the device, 0-7.
    function: Option<u8>,
    /// A VF of what was found, by its number.
    vf: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum By {
    Address(Sbdf),
    Serial(u64),
    Path(PciPath),
}

/// A name as the settings have it.
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
                // Below a bridge, udev's ID_PATH says no more than this.
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

/// A Device Serial Number as lspci prints it.
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

/// The way to a function from its root bus: the function there, then device and function number below each bridge. It stays when bus
/// numbers change.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PciPath {
    root: Sbdf,
    below: Vec<u8>,
}

impl PciPath {
    /// The way to a function.
    ///
    /// # Errors
    /// The bridges above it cannot be found.
    pub fn of(host: &dyn Host, address: Sbdf) -> Result<Self, Failure> {
        let mut way: Vec<Sbdf> = host.ports_above(address)?;
        way.reverse();
        way.push(address);
        let below = way[1..].iter().map(|function| function.devfn()).collect();
        Ok(Self { root: way[0], below })
    }
}

impl FromStr for PciPath {
    type Err = String;

    /// Reads `SSSS:BB:DD.F/DD.F...`, as Linux' `pci=` options have it, or what a link in `/sys/bus/pci/devices` points to.
    fn from_str(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().take(120).collect();
        let wrong = || {
            format!(
                "'{shown}' is not a path: write it as 'xpci show' does, 0000:00:1c.0/00.0, or as sysfs has it"
            )
        };
        let in_sysfs = text.split_once("/pci").map(|(_, rest)| rest);
        let parts: Vec<&str> = match in_sysfs {
            Some(rest) => rest.split('/').skip(1).collect(),
            None => text.split('/').collect(),
        };
        let (first, rest) = parts.split_first().ok_or_else(wrong)?;
        let root = first.parse().map_err(|_| wrong())?;
        let devfn = |part: &&str| {
            let full = if part.contains(':') { (*part).to_owned() } else { format!("00:{part}") };
            full.parse().map(|address: Sbdf| address.devfn()).map_err(|_| wrong())
        };
        Ok(Self { root, below: rest.iter().map(devfn).collect::<Result<_, _>>()? })
    }
}

impl TryFrom<String> for PciPath {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl Serialize for PciPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for PciPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.root)?;
        self.below.iter().try_for_each(|devfn| write!(f, "/{:02x}.{:x}", devfn >> 3, devfn & 7))
    }
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

/// A Device Serial Number as lspci prints it.
pub fn printed(serial: u64) -> String {
    serial.to_be_bytes().map(|byte| format!("{byte:02x}")).join("-")
}

impl Name {
    /// Whether it means a function that is no VF.
    pub fn means(&self, host: &dyn Host, function: &HostFunction) -> bool {
        let address = function.address;
        function.physical_function.is_none()
            && self.vf.is_none()
            && match &self.by {
                By::Address(wanted) => *wanted == address,
                By::Serial(wanted) => {
                    self.function.is_none_or(|number| number == address.function())
                        && serial_number(host, address) == Some(*wanted)
                }
                By::Path(wanted) => PciPath::of(host, address).is_ok_and(|path| path == *wanted),
            }
    }

    fn find(&self, host: &dyn Host, name: &Word) -> Result<Sbdf, Failure> {
        let found = match self.by {
            By::Address(address) => address,
            _ => {
                let device = Self { vf: None, ..self.clone() };
                let found = functions(host)?.into_iter().filter(|function| device.means(host, function));
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

/// The functions of the host; one that leaves meanwhile is not among them.
fn functions(host: &dyn Host) -> Result<Vec<HostFunction>, Failure> {
    Ok(host.functions()?.into_iter().filter_map(|address| host.function(address).ok()).collect())
}

/// A VF by its number.
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

/// The function that has an address, a name or a network interface.
fn function(host: &dyn Host, names: &Names, parent: &Parent) -> Result<Sbdf, Failure> {
    let word = match parent {
        Parent::At(address) => return Ok(*address),
        Parent::Word(word) => word,
    };
    if let Some(name) = names.get(word) {
        return name.find(host, word);
    }
    let has_it = |function: &HostFunction| function.interfaces.iter().any(|name| name == word.as_str());
    if let Some(found) = functions(host)?.iter().find(|function| has_it(function)) {
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

/// Finds the function that is meant. What remains is an address, or a pool of a PF that is given by its address.
///
/// # Errors
/// There is no such function, or several, or the host cannot be asked.
pub fn find(host: &dyn Host, names: &Names, target: &Target) -> Result<Target, Failure> {
    Ok(match target {
        Target::One(parent) => function(host, names, parent)?.into(),
        Target::Vf(pf, number) => virtual_function(host, function(host, names, pf)?, *number)?.into(),
        Target::Any(pf) => Target::Any(Parent::At(function(host, names, pf)?)),
    })
}

/// Whether a function is what somebody means who calls it so.
pub fn means(host: &dyn Host, names: &Names, parent: &Parent, function: &HostFunction) -> bool {
    match parent {
        Parent::At(address) => *address == function.address,
        Parent::Word(word) => match names.get(word) {
            Some(name) => name.means(host, function),
            None => function.interfaces.iter().any(|name| name == word.as_str()),
        },
    }
}

/// Whether a function is what somebody means who writes this; none of a pool is.
pub fn means_one(host: &dyn Host, names: &Names, target: &Target, function: &HostFunction) -> bool {
    match target {
        Target::Any(_) => false,
        Target::Vf(pf, number) => is_vf(host, function, *number, |parent| means(host, names, pf, parent)),
        Target::One(Parent::Word(word)) => match names.get(word) {
            Some(Name { vf: Some(number), by, function: of_device }) => {
                let device = Name { by: by.clone(), function: *of_device, vf: None };
                is_vf(host, function, *number, |parent| device.means(host, parent))
            }
            _ => means(host, names, &Parent::Word(word.clone()), function),
        },
        Target::One(parent) => means(host, names, parent, function),
    }
}

/// Whether a function is this VF of a PF.
fn is_vf(
    host: &dyn Host,
    function: &HostFunction,
    number: u16,
    is_pf: impl Fn(&HostFunction) -> bool,
) -> bool {
    let pf = function.physical_function.and_then(|pf| host.function(pf).ok());
    pf.is_some_and(|pf| {
        pf.virtual_functions.get(usize::from(number)) == Some(&function.address) && is_pf(&pf)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> PciPath {
        text.parse().unwrap()
    }

    #[test]
    fn a_path_is_the_same_whatever_the_bus_numbers_below_the_root_are() {
        let short = path("0000:00:1c.0/00.1/02.0");
        assert_eq!(short.to_string(), "0000:00:1c.0/00.1/02.0");
        assert_eq!(path("/sys/devices/pci0000:00/0000:00:1c.0/0000:03:00.1/0000:04:02.0"), short);
        assert_eq!(path("../../../devices/pci0000:00/0000:00:1c.0/0000:08:00.1/0000:09:02.0"), short);
        assert_ne!(path("0000:00:1c.0/00.0/02.0"), short);
        for text in ["", "/", "00.0", "0000:00:1c.0/", "0000:00:1c.0/eth0", "/sys/devices/pci0000:00"] {
            assert!(text.parse::<PciPath>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_serial_number_is_written_as_lspci_prints_it() {
        assert_eq!(serial_of("52-54-00-FF-ff-12-34-56"), Ok(0x5254_00ff_ff12_3456));
        assert_eq!(printed(0x5254_00ff_ff12_3456), "52-54-00-ff-ff-12-34-56");
        for text in ["", "52-54-00-ff-ff-12-34", "52540-0-ff-ff-12-34-5", "+2-54-00-ff-ff-12-34-56"] {
            assert!(serial_of(text).is_err(), "{text}");
        }
    }
}
