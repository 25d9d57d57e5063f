//! The path to a function through the host's bridges.

use std::fmt;
use std::str::FromStr;

use pciback::platform::Host;
use pciback::{Devfn, Sbdf};
use serde::{Deserialize, Serialize, Serializer};

use crate::outcome::Failure;

/// The path to a function from its root bus: the function on the root bus, then the device and function number below each bridge. It does
/// not depend on bus numbers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PciPath {
    root: Sbdf,
    below: Vec<Devfn>,
}

impl PciPath {
    /// The path to a function.
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

    /// Parses `SSSS:BB:DD.F/DD.F...`, as in Linux' `pci=` options, or the target of a link in `/sys/bus/pci/devices`.
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
        self.below.iter().try_for_each(|devfn| write!(f, "/{devfn}"))
    }
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
}
