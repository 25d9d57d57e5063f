//! Device numbers, and device and function number in one byte, as PCI, Linux and Xen pack them.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The number of a device on its bus, 0 to 31 (PCI Local Bus 3.0, section 3.2.2.3.4). `xl` and Linux call it slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct DeviceNumber(u8);

/// A number that is too large for a device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{0:#x} is not a device number (0 to 1f)")]
pub struct NoDeviceNumber(u8);

impl DeviceNumber {
    /// The largest one.
    pub const LAST: Self = Self(0x1f);

    /// `None` for a number above 31.
    pub const fn new(number: u8) -> Option<Self> {
        if number <= Self::LAST.0 { Some(Self(number)) } else { None }
    }

    /// Parses hexadecimal digits, without prefix or sign, as `xl` takes a slot.
    pub fn from_hex(digits: &str) -> Option<Self> {
        let digits = Some(digits).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        u8::from_str_radix(digits?, 16).ok().and_then(Self::new)
    }

    /// All of them, in order.
    pub fn all() -> impl DoubleEndedIterator<Item = Self> {
        (0..=Self::LAST.0).map(Self)
    }

    /// The number.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Function 0 of this device.
    pub const fn devfn(self) -> Devfn {
        Devfn(self.0 << 3)
    }
}

impl TryFrom<u8> for DeviceNumber {
    type Error = NoDeviceNumber;

    fn try_from(number: u8) -> Result<Self, NoDeviceNumber> {
        Self::new(number).ok_or(NoDeviceNumber(number))
    }
}

impl From<DeviceNumber> for u8 {
    fn from(number: DeviceNumber) -> Self {
        number.0
    }
}

impl fmt::LowerHex for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

impl JsonSchema for DeviceNumber {
    fn schema_name() -> Cow<'static, str> {
        "DeviceNumber".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer", "format": "uint8", "minimum": 0, "maximum": 31 })
    }
}

/// Device and function number in one byte: `device << 3 | function`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub struct Devfn(pub u8);

impl Devfn {
    /// The device number.
    pub const fn device(self) -> DeviceNumber {
        DeviceNumber(self.0 >> 3)
    }

    /// The function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

/// As in `pci=` options of Linux: `10.2`.
impl fmt::Display for Devfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{:x}", self.device(), self.function())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_number_has_five_bits() {
        assert_eq!(DeviceNumber::new(0x1f), Some(DeviceNumber::LAST));
        assert_eq!(DeviceNumber::new(0x20), None);
        let refused = serde_json::from_str::<DeviceNumber>("32").unwrap_err().to_string();
        assert_eq!(refused, "0x20 is not a device number (0 to 1f)");
        assert_eq!(DeviceNumber::all().count(), 32);
    }

    #[test]
    fn a_device_number_is_written_in_hexadecimal() {
        assert_eq!(DeviceNumber::from_hex("1f"), Some(DeviceNumber::LAST));
        for text in ["", "20", "+1", " 1", "1ff", "g"] {
            assert_eq!(DeviceNumber::from_hex(text), None, "{text}");
        }
    }

    #[test]
    fn every_byte_is_a_device_and_one_of_its_functions() {
        for byte in 0..=u8::MAX {
            let devfn = Devfn(byte);
            assert_eq!(devfn.device().devfn().0 | devfn.function(), byte);
        }
        assert_eq!(Devfn(0x82).to_string(), "10.2");
    }
}
