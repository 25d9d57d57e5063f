//! A function and its device number in a guest, in the syntax of `xl` and xl.cfg (xl-pci-configuration(5), PCI_SPEC_STRING), with notes
//! about options that have no effect.

use std::str::FromStr;

use pciback::DeviceNumber;

use super::Functions;
use crate::outcome::{ErrorCode, Failure};
use crate::target::{Parent, Target, Word};

/// A function and its device number: `BDF[@SLOT][,KEY=VALUE]...`, or with `bdf=BDF` or `name=NAME` among the options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciSpec {
    /// The function, or the device.
    pub functions: Functions,
    /// The guest's device number, 0-31.
    pub slot: Option<DeviceNumber>,
    /// Notes about xl's options that have no effect.
    pub notes: Vec<&'static str>,
}

/// xl's options that have no effect here, with a note.
const WITHOUT_EFFECT: [(&str, &str); 3] = [
    (
        "permissive",
        "permissive has no effect: unknown registers pass by default; 'xpci policy explain' shows which do not",
    ),
    ("msitranslate", "msitranslate has no effect: the guest sets up its own interrupts"),
    ("power_mgmt", "power_mgmt has no effect: the guest's power states are virtual"),
];

fn usage(message: String) -> Failure {
    Failure::new(ErrorCode::Usage, message)
}

impl FromStr for PciSpec {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        // A name begins with a letter, an address has colons: this is xl's third argument.
        if matches!(text.as_bytes(), [b'0'..=b'9'] | [b'0'..=b'9', b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F']) {
            return Err(usage(format!(
                "'{text}' is no function; write a device number of the guest as BDF@{text}"
            )));
        }
        let mut options = text.split(',').peekable();
        let mut given = Given::default();
        if let Some(first) = options.next_if(|first| !first.contains('=')) {
            given.take_function(first)?;
        }
        options.try_for_each(|option| given.take_option(option))?;
        given.complete(text)
    }
}

/// What was read of the text so far.
#[derive(Default)]
struct Given<'a> {
    functions: Option<Functions>,
    slot: Option<DeviceNumber>,
    notes: Vec<&'static str>,
    /// The option `seize`, if it is on.
    seize: Option<&'a str>,
}

impl<'a> Given<'a> {
    /// Takes `BDF[@SLOT]`.
    fn take_function(&mut self, text: &str) -> Result<(), Failure> {
        let (function, digits) = match text.split_once('@') {
            Some((function, digits)) => (function, Some(digits)),
            None => (text, None),
        };
        self.functions = Some(parse(function)?);
        self.slot = digits.map(|digits| slot_of(&format!("@{digits}"), digits)).transpose()?;
        Ok(())
    }

    /// Takes `KEY=VALUE`.
    fn take_option(&mut self, option: &'a str) -> Result<(), Failure> {
        let (key, value) = option
            .split_once('=')
            .ok_or_else(|| usage(format!("'{option}' is not an option: options are KEY=VALUE")))?;
        if let Some((_, note)) = WITHOUT_EFFECT.iter().find(|(name, _)| *name == key) {
            if is_on(key, value)? {
                self.notes.push(*note);
            }
            return Ok(());
        }
        match (key, value) {
            ("vslot", digits) if self.slot.is_none() => self.slot = Some(slot_of(option, digits)?),
            ("vslot", _) => return Err(usage(format!("'{option}': the device number is given twice"))),
            ("bdf" | "name", _) if self.functions.is_some() => {
                return Err(usage(format!("'{option}': the function is given twice")));
            }
            ("bdf", value) => self.functions = Some(parse(value)?),
            ("name", value) => {
                let word = Word::try_from(value.to_owned()).map_err(usage)?;
                self.functions = Some(Functions::One(Target::One(Parent::Word(word))));
            }
            ("rdm_policy", "relaxed") => {}
            ("rdm_policy", "strict") => {
                return Err(usage(format!(
                    "'{option}' is set in a policy: write 'rdm-policy: strict' there"
                )));
            }
            ("seize", _) => self.seize = is_on(key, value)?.then_some(option),
            _ => {
                let known = "bdf, name, vslot, permissive, msitranslate, power_mgmt, seize, rdm_policy";
                return Err(usage(format!("unknown option '{option}'; the options are {known}")));
            }
        }
        Ok(())
    }

    fn complete(self, text: &str) -> Result<PciSpec, Failure> {
        let Self { functions, slot, notes, seize } = self;
        let Some(functions) = functions else {
            return Err(usage(format!("'{text}' has no function: write BDF, bdf=BDF or name=NAME")));
        };
        if matches!(functions, Functions::OfDevice(_)) && slot.is_some() {
            return Err(usage(format!(
                "'{text}': each function gets a device number of its own; give them one by one to choose the numbers"
            )));
        }
        match seize {
            None => Ok(PciSpec { functions, slot, notes }),
            Some(option) => {
                let first = format!("'xpci pci-assignable-add {functions}' first, or pci-attach --managed");
                Err(usage(format!("'{option}' is a command of its own: {first}")))
            }
        }
    }
}

fn parse(text: &str) -> Result<Functions, Failure> {
    text.parse().map_err(usage)
}

/// Parses xl's booleans.
fn is_on(key: &str, value: &str) -> Result<bool, Failure> {
    match value {
        "1" | "yes" | "true" | "on" => Ok(true),
        "0" | "no" | "false" | "off" => Ok(false),
        other => Err(usage(format!("'{key}={other}': {key} is 0 or 1"))),
    }
}

fn slot_of(shown: &str, digits: &str) -> Result<DeviceNumber, Failure> {
    DeviceNumber::from_hex(digits)
        .ok_or_else(|| usage(format!("'{shown}' is not a device number: it must be hexadecimal, 0 to 1f")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        let failure = text.parse::<PciSpec>().unwrap_err();
        assert_eq!(failure.code, ErrorCode::Usage, "{text}");
        failure.message
    }

    #[test]
    fn a_slot_is_hexadecimal_as_in_xl() {
        let place: PciSpec = "1:10.2@1f".parse().unwrap();
        assert_eq!(
            (place.functions.to_string().as_str(), place.slot),
            ("0000:01:10.2", Some(DeviceNumber::LAST))
        );
        assert_eq!("01:10.2,vslot=1f".parse::<PciSpec>().unwrap().slot, Some(DeviceNumber::LAST));
        assert_eq!("01:10.2".parse::<PciSpec>().unwrap().slot, None);
        for text in ["01:10.2@", "01:10.2@20", "01:10.2@+1", "01:10.2@1@2", "@1", "01:10.2@1,vslot=2"] {
            refused(text);
        }
    }

    #[test]
    fn options_of_xl_without_effect_are_accepted_with_a_note() {
        let place: PciSpec = "01:10.2@5,permissive=1,msitranslate=0,power_mgmt=yes".parse().unwrap();
        let about: Vec<_> = place.notes.iter().filter_map(|note| note.split(' ').next()).collect();
        assert_eq!(about, ["permissive", "power_mgmt"]);
        assert_eq!("01:10.2,seize=0,rdm_policy=relaxed".parse::<PciSpec>().unwrap().notes, [""; 0]);
    }

    #[test]
    fn unsupported_options_of_xl_are_refused_with_a_hint() {
        for (text, said) in [
            ("01:10.2,seize=1", "pci-assignable-add 0000:01:10.2"),
            ("01:10.2,rdm_policy=strict", "rdm-policy: strict"),
            ("01:10.2,name=nic", "is given twice"),
            ("name=01:10.2", "not a name"),
            ("vslot=3", "has no function"),
            ("01:10.2,permissive=2", "is 0 or 1"),
            ("01:10.2,permissive", "KEY=VALUE"),
            ("01:10.2,fast=1", "unknown option"),
            ("01:10.*@5", "each function gets a device number of its own"),
        ] {
            let message = refused(text);
            assert!(message.contains(said), "{text}: {message}");
        }
    }

    #[test]
    fn a_function_is_given_by_xls_keys_too() {
        for (text, meant, slot) in [
            ("name=nic,vslot=5", "nic", Some(5)),
            ("bdf=01:10.2,vslot=5", "0000:01:10.2", Some(5)),
            ("bdf=01:10.*,permissive=1", "0000:01:10.*", None),
        ] {
            let place: PciSpec = text.parse().unwrap();
            assert_eq!(
                (place.functions.to_string().as_str(), place.slot),
                (meant, slot.and_then(DeviceNumber::new))
            );
        }
    }
}
