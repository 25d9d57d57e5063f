//! Which functions a policy file is for.

use std::cmp::Ordering;
use std::fmt;

use crate::Sbdf;
use crate::config::{FunctionSpec, Identity};
use crate::host::HostFunction;

/// Physical or virtual functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Physical functions, with SR-IOV or without.
    Physical,
    /// Virtual functions.
    Virtual,
}

impl Kind {
    pub(super) const WORDS: &[(&str, Self)] = &[("physical", Self::Physical), ("virtual", Self::Virtual)];
}

/// The beginning of a class code: two, four or six hexadecimal digits (PCI Code and ID Assignment 1.16, section 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClassPrefix {
    /// The digits as a number.
    pub value: u32,
    /// How many: 2, 4 or 6.
    pub digits: u8,
}

impl ClassPrefix {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        let is_class =
            matches!(digits.len(), 2 | 4 | 6) && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        let value = is_class.then(|| u32::from_str_radix(digits, 16).ok()).flatten()?;
        Some(Self { value, digits: digits.len() as u8 })
    }

    fn matches(self, class: u32) -> bool {
        class >> (4 * (6 - u32::from(self.digits))) == self.value
    }
}

impl fmt::Display for ClassPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:0width$x}", self.value, width = usize::from(self.digits))
    }
}

/// The function that a policy is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Where it is.
    pub address: Sbdf,
    /// Who it says it is.
    pub identity: Identity,
    /// Physical or virtual.
    pub kind: Kind,
    /// The name of the guest that it is or will be attached to.
    pub domain: Option<String>,
}

impl Subject {
    /// A function, for a guest with this name.
    pub fn of(spec: &FunctionSpec, domain: Option<&str>) -> Self {
        let kind = if spec.is_virtual() { Kind::Virtual } else { Kind::Physical };
        Self { address: spec.address, identity: spec.identity, kind, domain: domain.map(str::to_owned) }
    }

    /// A function as the host shows it, for a guest with this name.
    pub fn of_host(function: &HostFunction, domain: Option<String>) -> Self {
        let kind = if function.physical_function.is_some() { Kind::Virtual } else { Kind::Physical };
        Self { address: function.address, identity: Identity::of(function), kind, domain }
    }
}

/// What a policy file demands of a function. Each list that is not empty must hold the function's value.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Match {
    /// Vendor ids.
    pub vendor: Vec<u16>,
    /// Device ids; a VF's is the VF Device ID of its PF.
    pub device: Vec<u16>,
    /// Subsystem vendor ids.
    pub subsystem_vendor: Vec<u16>,
    /// Subsystem ids.
    pub subsystem_device: Vec<u16>,
    /// Classes.
    pub class: Vec<ClassPrefix>,
    /// Physical or virtual.
    pub function: Option<Kind>,
    /// Addresses.
    pub address: Vec<Sbdf>,
    /// Names of guests.
    pub domain: Vec<String>,
}

/// How closely a match describes its functions: the order in which policies are laid over each other. It compares as the numbers
/// of a version do: what names an address wins over all that do not, then what names a guest, a subsystem device, a subsystem
/// vendor, a device, a vendor, more digits of a class, and the kind of function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Specificity([u8; 8]);

impl Match {
    /// Why a function is not meant; `None` where it is.
    pub fn mismatch(&self, subject: &Subject) -> Option<String> {
        let Subject { address, identity, kind, domain } = subject;
        let id = |what: &str, wanted: &[u16], found: u16| {
            let differs = !wanted.is_empty() && !wanted.contains(&found);
            differs.then(|| format!("its {what} is {found:04x}"))
        };
        id("vendor", &self.vendor, identity.vendor)
            .or_else(|| id("device", &self.device, identity.device))
            .or_else(|| id("subsystem-vendor", &self.subsystem_vendor, identity.subsystem_vendor))
            .or_else(|| id("subsystem-device", &self.subsystem_device, identity.subsystem))
            .or_else(|| {
                let meant =
                    self.class.is_empty() || self.class.iter().any(|class| class.matches(identity.class));
                (!meant).then(|| format!("its class is {:06x}", identity.class))
            })
            .or_else(|| {
                let other = self.function.is_some_and(|wanted| wanted != *kind);
                let is = if *kind == Kind::Virtual { "a virtual" } else { "a physical" };
                other.then(|| format!("it is {is} function"))
            })
            .or_else(|| {
                let other = !self.address.is_empty() && !self.address.contains(address);
                other.then(|| format!("it is at {address}"))
            })
            .or_else(|| match domain {
                _ if self.domain.is_empty() => None,
                Some(name) if self.domain.contains(name) => None,
                Some(name) => Some(format!("its guest is {name}")),
                None => Some("it has no guest".to_owned()),
            })
    }

    /// How closely it describes its functions.
    pub fn specificity(&self) -> Specificity {
        let named = |is_empty: bool| u8::from(!is_empty);
        Specificity([
            named(self.address.is_empty()),
            named(self.domain.is_empty()),
            named(self.subsystem_device.is_empty()),
            named(self.subsystem_vendor.is_empty()),
            named(self.device.is_empty()),
            named(self.vendor.is_empty()),
            self.class.iter().map(|class| class.digits).min().unwrap_or(0),
            u8::from(self.function.is_some()),
        ])
    }

    /// Compares by specificity, the least specific first.
    pub fn order(&self, other: &Self) -> Ordering {
        self.specificity().cmp(&other.specificity())
    }
}

fn list<T>(values: &[T], show: impl Fn(&T) -> String) -> String {
    values.iter().map(show).collect::<Vec<_>>().join("|")
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = |value: &u16| format!("{value:04x}");
        let parts = [
            ("vendor", list(&self.vendor, hex)),
            ("device", list(&self.device, hex)),
            ("subsystem-vendor", list(&self.subsystem_vendor, hex)),
            ("subsystem-device", list(&self.subsystem_device, hex)),
            ("class", list(&self.class, ToString::to_string)),
            (
                "function",
                match self.function {
                    None => String::new(),
                    Some(Kind::Physical) => "physical".to_owned(),
                    Some(Kind::Virtual) => "virtual".to_owned(),
                },
            ),
            ("address", list(&self.address, ToString::to_string)),
            ("domain", list(&self.domain, Clone::clone)),
        ];
        let said: Vec<String> = parts
            .iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(key, value)| format!("{key} {value}"))
            .collect();
        f.write_str(if said.is_empty() { "every function" } else { "" })?;
        f.write_str(&said.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject() -> Subject {
        let identity = Identity { vendor: 0x8086, device: 0x10ca, class: 0x020000, ..Identity::default() };
        Subject {
            address: Sbdf::from_devfn(0, 1, 0x80),
            identity,
            kind: Kind::Virtual,
            domain: Some("web".into()),
        }
    }

    #[test]
    fn every_key_that_is_given_must_hold() {
        let everything = Match {
            vendor: vec![0x10ec, 0x8086],
            device: vec![0x10ca],
            class: vec![ClassPrefix::parse("0200").unwrap()],
            function: Some(Kind::Virtual),
            address: vec![subject().address],
            domain: vec!["web".into()],
            ..Match::default()
        };
        assert_eq!(everything.mismatch(&subject()), None);
        assert_eq!(Match::default().mismatch(&subject()), None);
        type Change = fn(&mut Match);
        let changes: [(Change, &str); 6] = [
            (|m| m.vendor = vec![1], "its vendor is 8086"),
            (|m| m.device = vec![1], "its device is 10ca"),
            (|m| m.class = vec![ClassPrefix::parse("0108").unwrap()], "its class is 020000"),
            (|m| m.function = Some(Kind::Physical), "it is a virtual function"),
            (|m| m.address = vec![Sbdf::from_devfn(0, 2, 0)], "it is at 0000:01:10.0"),
            (|m| m.domain = vec!["mail".into()], "its guest is web"),
        ];
        for (change, reason) in changes {
            let mut other = everything.clone();
            change(&mut other);
            assert_eq!(other.mismatch(&subject()).as_deref(), Some(reason));
        }
        let nobody = Subject { domain: None, ..subject() };
        assert_eq!(everything.mismatch(&nobody).as_deref(), Some("it has no guest"));
    }

    #[test]
    fn what_names_more_is_more_specific_and_an_address_is_most_specific() {
        let vendor = Match { vendor: vec![1], ..Match::default() };
        let device = Match { device: vec![1], ..vendor.clone() };
        let class = |text: &str| Match { class: vec![ClassPrefix::parse(text).unwrap()], ..Match::default() };
        let subsystem = Match { subsystem_device: vec![1], ..device.clone() };
        let guest = Match { domain: vec!["a".into()], ..Match::default() };
        let address = Match { address: vec![subject().address], ..Match::default() };
        let function = Match { function: Some(Kind::Virtual), ..Match::default() };
        let order = [
            Match::default(),
            function,
            class("02"),
            class("0200"),
            vendor,
            device,
            subsystem,
            guest,
            address,
        ];
        for pair in order.windows(2) {
            assert_eq!(pair[0].order(&pair[1]), Ordering::Less, "{} and {}", pair[0], pair[1]);
        }
    }
}
