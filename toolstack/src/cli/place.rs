//! A function and its place in a guest, as `xl` and xl.cfg write it (xl-pci-configuration(5), PCI_SPEC_STRING), and what is said of the
//! options in there that mean something else here.

use std::str::FromStr;

use pciback::{Sbdf, SbdfError};

use crate::outcome::{ErrorCode, Failure};

/// A function and where the guest sees it: `BDF[@SLOT][,KEY=VALUE]...`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The function.
    pub address: Sbdf,
    /// The guest's device number, 0-31.
    pub slot: Option<u8>,
    /// What is said of xl's options that have no effect.
    pub notes: Vec<&'static str>,
}

/// xl's options that have no effect here, and what does that instead.
const WITHOUT_EFFECT: [(&str, &str); 3] = [
    (
        "permissive",
        "permissive has no effect: unknown registers pass anyway; 'xpci policy explain' shows which do not, and how a policy opens them",
    ),
    ("msitranslate", "msitranslate has no effect: interrupts come as the guest sets them up"),
    ("power_mgmt", "power_mgmt has no effect: the guest's power states are virtual"),
];

fn usage(message: String) -> Failure {
    Failure::new(ErrorCode::Usage, message)
}

impl FromStr for Place {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let (address, slot) = match first.split_once('@') {
            Some((address, slot)) => (address, Some(slot)),
            None => (first, None),
        };
        let mut place = Self {
            address: address_of(address)?,
            slot: slot.map(|digits| slot_of(&format!("@{digits}"), digits)).transpose()?,
            notes: Vec::new(),
        };
        for option in parts {
            place.take(option)?;
        }
        Ok(place)
    }
}

impl Place {
    /// Takes one of xl's options.
    fn take(&mut self, option: &str) -> Result<(), Failure> {
        let (key, value) = option
            .split_once('=')
            .ok_or_else(|| usage(format!("'{option}' is no option: options are KEY=VALUE")))?;
        if let Some((_, note)) = WITHOUT_EFFECT.iter().find(|(name, _)| *name == key) {
            if is_on(key, value)? {
                self.notes.push(note);
            }
            return Ok(());
        }
        match (key, value) {
            ("vslot", digits) if self.slot.is_none() => self.slot = Some(slot_of(option, digits)?),
            ("vslot", _) => return Err(usage(format!("'{option}': the device number stands there already"))),
            ("rdm_policy", "relaxed") => {}
            ("rdm_policy", "strict") => {
                return Err(usage(format!("'{option}' is a policy's: write 'rdm-policy: strict' there")));
            }
            ("seize", _) if is_on(key, value)? => {
                let first = format!("'xpci pci-assignable-add {}' first", self.address);
                return Err(usage(format!("'{option}' is a command of its own: {first}")));
            }
            ("seize", _) => {}
            ("name", _) => {
                return Err(usage(format!("'{option}': functions have no names here; give the address")));
            }
            _ => {
                let known = "vslot, permissive, msitranslate, power_mgmt, seize, rdm_policy";
                return Err(usage(format!("'{option}' is none of the options {known}")));
            }
        }
        Ok(())
    }
}

/// xl's booleans.
fn is_on(key: &str, value: &str) -> Result<bool, Failure> {
    match value {
        "1" | "yes" | "true" | "on" => Ok(true),
        "0" | "no" | "false" | "off" => Ok(false),
        other => Err(usage(format!("'{key}={other}': {key} is 0 or 1"))),
    }
}

fn slot_of(shown: &str, digits: &str) -> Result<u8, Failure> {
    u8::from_str_radix(digits, 16)
        .ok()
        .filter(|slot| *slot < 32 && !digits.starts_with('+'))
        .ok_or_else(|| usage(format!("'{shown}' is no device number: it must be hexadecimal, 0 to 1f")))
}

fn address_of(text: &str) -> Result<Sbdf, Failure> {
    let parsed = text.parse().map_err(|error: SbdfError| error.to_string());
    parsed.map_err(|message| {
        usage(match foreign(text) {
            Some(what) => format!("{message}; {what}"),
            None => message,
        })
    })
}

/// What other tools' words for a function mean, when they are well formed.
fn foreign(text: &str) -> Option<String> {
    let address = |text: String| text.parse::<Sbdf>().ok();
    if let Some(rest) = text.strip_prefix("pci_") {
        let [segment, bus, device, function] = rest.split('_').collect::<Vec<_>>().try_into().ok()?;
        let meant = address(format!("{segment}:{bus}:{device}.{function}"))?;
        return Some(format!("this is libvirt's name of {meant}"));
    }
    if let Some(rest) = text.strip_prefix("dom0:") {
        let meant = address(rest.split(':').next()?.replace('_', ":"))?;
        return Some(format!("this is Qubes' name of {meant}"));
    }
    if text.ends_with(".*") {
        return Some("each function is given by a command of its own".to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        let failure = text.parse::<Place>().unwrap_err();
        assert_eq!(failure.code, ErrorCode::Usage, "{text}");
        failure.message
    }

    #[test]
    fn a_slot_is_hexadecimal_as_in_xl() {
        let place: Place = "1:10.2@1f".parse().unwrap();
        assert_eq!((place.address.to_string().as_str(), place.slot), ("0000:01:10.2", Some(0x1f)));
        assert_eq!("01:10.2,vslot=1f".parse::<Place>().unwrap().slot, Some(0x1f));
        assert_eq!("01:10.2".parse::<Place>().unwrap().slot, None);
        for text in ["01:10.2@", "01:10.2@20", "01:10.2@+1", "01:10.2@1@2", "@1", "01:10.2@1,vslot=2"] {
            refused(text);
        }
    }

    #[test]
    fn options_of_xl_without_effect_are_taken_with_a_word_on_what_replaces_them() {
        let place: Place = "01:10.2@5,permissive=1,msitranslate=0,power_mgmt=yes".parse().unwrap();
        let about: Vec<_> = place.notes.iter().filter_map(|note| note.split(' ').next()).collect();
        assert_eq!(about, ["permissive", "power_mgmt"]);
        assert_eq!("01:10.2,seize=0,rdm_policy=relaxed".parse::<Place>().unwrap().notes, [""; 0]);
    }

    #[test]
    fn options_of_xl_that_ask_for_more_are_refused_and_say_what_to_do() {
        for (text, said) in [
            ("01:10.2,seize=1", "pci-assignable-add 0000:01:10.2"),
            ("01:10.2,rdm_policy=strict", "rdm-policy: strict"),
            ("01:10.2,name=nic", "give the address"),
            ("01:10.2,permissive=2", "is 0 or 1"),
            ("01:10.2,permissive", "KEY=VALUE"),
            ("01:10.2,fast=1", "none of the options"),
            ("01:10.*", "command of its own"),
        ] {
            let message = refused(text);
            assert!(message.contains(said), "{text}: {message}");
        }
    }

    #[test]
    fn names_of_libvirt_and_qubes_are_refused_with_the_address_that_they_mean() {
        assert!(refused("pci_0000_01_10_2").ends_with("libvirt's name of 0000:01:10.2"));
        assert!(refused("dom0:01_10.2").ends_with("Qubes' name of 0000:01:10.2"));
        assert!(!refused("pci_0000_01").contains("libvirt"));
    }
}
