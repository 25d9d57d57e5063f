//! By what a guest is known over its reboots.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// A domain's UUID, which Xen calls its handle: a guest that reboots is another domain with the same one.
///
/// ```
/// use xpci_core::Uuid;
/// let uuid: Uuid = "0C3dca5e-5a1f-4d4c-9d5c-7d9f3b7a1e02".parse()?;
/// assert_eq!(uuid.to_string(), "0c3dca5e-5a1f-4d4c-9d5c-7d9f3b7a1e02");
/// # Ok::<(), xpci_core::uuid::UuidError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid(pub [u8; 16]);

/// A text is no UUID.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{0}' is no UUID: 32 hexadecimal digits are expected, as in 0c3dca5e-5a1f-4d4c-9d5c-7d9f3b7a1e02")]
pub struct UuidError(String);

/// Where the dashes are.
const DASHES: [usize; 4] = [8, 13, 18, 23];
const LENGTH: usize = 36;

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let dash = if matches!(index, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for Uuid {
    type Err = UuidError;

    fn from_str(text: &str) -> Result<Self, UuidError> {
        let error = || UuidError(text.chars().take(LENGTH + 1).collect());
        let well_formed = text.len() == LENGTH
            && text.bytes().enumerate().all(|(at, byte)| match DASHES.contains(&at) {
                true => byte == b'-',
                false => byte.is_ascii_hexdigit(),
            });
        let number = u128::from_str_radix(&text.replace('-', ""), 16).ok().filter(|_| well_formed);
        number.map(|number| Self(number.to_be_bytes())).ok_or_else(error)
    }
}

impl Serialize for Uuid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Uuid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Uuid {
    fn schema_name() -> Cow<'static, str> {
        "Uuid".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "The UUID of a guest, which stays when it reboots.",
            "type": "string",
            "format": "uuid",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_uuid_is_refused() {
        let good = "0c3dca5e-5a1f-4d4c-9d5c-7d9f3b7a1e02";
        assert_eq!(good.parse::<Uuid>().unwrap().0[..3], [0x0c, 0x3d, 0xca]);
        for bad in [&good[1..], &good.replace('-', "0"), &good.replace('5', "g"), "", &format!("{good}0")] {
            assert!(bad.parse::<Uuid>().is_err(), "{bad}");
        }
    }
}
