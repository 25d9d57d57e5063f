//! How users name a function: by address, as a VF by its PF and index, by network interface, or by a name in the settings.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use pciback::{Sbdf, SbdfError};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The prefix of a pool, before its PF.
const POOL: &str = "any:";
/// The longest name, in bytes.
const WORD_LIMIT: usize = 64;

/// A function as a user names it.
///
/// ```
/// use toolstack::target::Target;
/// for text in ["0000:01:10.0", "0000:01:00.0:3", "eth0", "eth0:3", "any:eth0", "any:0000:01:00.0"] {
///     assert_eq!(text.parse::<Target>()?.to_string(), text);
/// }
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// `[SSSS:]BB:DD.F` or `NAME`: the function itself.
    One(Parent),
    /// `PF:N`: a VF of this PF, by its index among the enabled ones, from 0.
    Vf(Parent, u16),
    /// `any:PF`: a free VF of this PF.
    Any(Parent),
}

/// A function by its address or by a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Parent {
    /// Its address.
    At(Sbdf),
    /// A name in the settings, or a network interface.
    Word(Word),
}

/// A name: a letter, then letters, digits, `-`, `_` and `.`, at most 64 in all.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Word(String);

impl Word {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Word {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let begins = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic());
        if begins && text.len() <= WORD_LIMIT && text.bytes().all(is_part) && text != "any" {
            return Ok(Self(text));
        }
        let shown: String = text.chars().take(WORD_LIMIT).collect();
        Err(format!(
            "'{shown}' is not a name: a letter, then letters, digits, '-', '_' and '.', and not 'any'"
        ))
    }
}

impl Target {
    /// The address, if the target is one.
    pub fn address(&self) -> Option<Sbdf> {
        match self {
            Self::One(Parent::At(address)) => Some(*address),
            _ => None,
        }
    }
}

impl From<Sbdf> for Target {
    fn from(address: Sbdf) -> Self {
        Self::One(Parent::At(address))
    }
}

impl FromStr for Parent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = match text.parse() {
            Ok(address) => return Ok(Self::At(address)),
            Err(error) => error,
        };
        if let Some(what) = foreign(text) {
            return Err(format!("{form}; {what}"));
        }
        // Text with a colon was probably meant as an address.
        Word::try_from(text.to_owned()).map(Self::Word).map_err(|_| explained(&form))
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(pf) = text.strip_prefix(POOL) {
            return pf.parse().map(Self::Any);
        }
        if let Some((pf, number)) = text.rsplit_once(':')
            && !number.is_empty()
            && number.bytes().all(|byte| byte.is_ascii_digit())
            && let Ok(pf) = pf.parse()
        {
            return match number.parse() {
                Ok(number) => Ok(Self::Vf(pf, number)),
                Err(_) => Err(format!("'{number}' is not the number of a VF: they are 0 to 65535")),
            };
        }
        text.parse().map(Self::One)
    }
}

/// Why a text is no address, and the other forms that are accepted.
fn explained(error: &SbdfError) -> String {
    match error {
        SbdfError::Form { .. } => {
            format!(
                "{error}; PF:N is VF N of a PF, any:PF a free one, NAME a network interface or a name of the settings"
            )
        }
        SbdfError::Component { .. } => error.to_string(),
    }
}

/// Recognises well-formed names of other tools for a function.
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
    text.ends_with(".*")
        .then(|| "this is a device, and one function is wanted: write each function of it".to_owned())
}

impl fmt::Display for Parent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(address) => write!(f, "{address}"),
            Self::Word(word) => f.write_str(word.as_str()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(function) => write!(f, "{function}"),
            Self::Vf(pf, number) => write!(f, "{pf}:{number}"),
            Self::Any(pf) => write!(f, "{POOL}{pf}"),
        }
    }
}

impl JsonSchema for Target {
    fn schema_name() -> Cow<'static, str> {
        "Target".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A function: its address [SSSS:]BB:DD.F, PF:N for a VF, any:PF for a free VF, a network interface, or a \
                            name of the settings.",
            "type": "string",
            "minLength": 1,
        })
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Parent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pf() -> Parent {
        Parent::At("01:00.0".parse().unwrap())
    }

    #[test]
    fn each_spelling_means_one_thing() {
        let word = |text: &str| Parent::Word(Word::try_from(text.to_owned()).unwrap());
        for (text, meant) in [
            ("01:00.0", Target::One(pf())),
            ("01:00.0:3", Target::Vf(pf(), 3)),
            ("0000:01:00.0:12", Target::Vf(pf(), 12)),
            ("any:01:00.0", Target::Any(pf())),
            ("eth0", Target::One(word("eth0"))),
            ("enp1s0f0:3", Target::Vf(word("enp1s0f0"), 3)),
            ("any:eth0", Target::Any(word("eth0"))),
        ] {
            assert_eq!(text.parse::<Target>().as_ref(), Ok(&meant), "{text}");
        }
    }

    #[test]
    fn an_invalid_target_is_refused_with_the_accepted_forms() {
        for (text, said) in [
            ("01:10", "not a PCI address"),
            ("01:10.8", "function must be"),
            ("01:00.0:70000", "0 to 65535"),
            ("01:00.0:-1", "PF:N"),
            ("any", "PF:N"),
            ("any:", "not a PCI address"),
            ("eth0:three", "PF:N"),
            ("1web", "NAME"),
            ("", "not a PCI address"),
            ("pci_0000_01_10_2", "libvirt's name of 0000:01:10.2"),
            ("dom0:01_10.2", "Qubes' name of 0000:01:10.2"),
            ("01:10.*", "one function is wanted"),
        ] {
            let message = text.parse::<Target>().unwrap_err();
            assert!(message.contains(said), "{text}: {message}");
        }
        assert!("a".repeat(WORD_LIMIT + 1).parse::<Target>().is_err());
    }
}
