//! The address of a PCI function: segment, bus, device, function.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

use crate::{Devfn, DeviceNumber};

/// Segment, bus, device and function of one PCI function, as Xen packs them.
///
/// Text is accepted as `xl` accepts it: hexadecimal `[SSSS:]BB:DD.F`; it is printed with its segment in lower case.
///
/// ```
/// use xpci_core::Sbdf;
/// let vf: Sbdf = "1:10.2".parse()?;
/// assert_eq!(vf.to_string(), "0000:01:10.2");
/// assert_eq!(vf, Sbdf::new(0, 1, 0x10, 2)?);
/// assert!("01:20.0".parse::<Sbdf>().unwrap_err().to_string().contains("device"));
/// # Ok::<(), xpci_core::SbdfError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sbdf {
    segment: u16,
    bus: u8,
    devfn: Devfn,
}

/// Why a text or a set of numbers is no address of a PCI function.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SbdfError {
    /// The text has not the form `[SSSS:]BB:DD.F`.
    #[error("'{text}' is not a PCI address: write it as [SSSS:]BB:DD.F, for example 0000:01:10.0")]
    Form {
        /// What was given.
        text: String,
    },
    /// One component is not hexadecimal or too large.
    #[error("'{text}' is not a PCI address: {component} must be a hexadecimal number from 0 to {max:x}")]
    Component {
        /// What was given.
        text: String,
        /// `segment`, `bus`, `device` or `function`.
        component: &'static str,
        /// The largest value it may have.
        max: u16,
    },
}

impl Sbdf {
    /// Builds an address; device is 0-31 and function 0-7 (PCI Local Bus 3.0, section 3.2.2.3.4).
    pub fn new(segment: u16, bus: u8, device: u8, function: u8) -> Result<Self, SbdfError> {
        let error = |component, max| SbdfError::Component {
            text: format!("{segment:04x}:{bus:02x}:{device:02x}.{function:x}"),
            component,
            max,
        };
        if device > 0x1f {
            return Err(error("device", 0x1f));
        }
        if function > 7 {
            return Err(error("function", 7));
        }
        Ok(Self { segment, bus, devfn: Devfn(device << 3 | function) })
    }

    /// Builds an address from segment, bus, and device and function in one byte.
    pub const fn from_devfn(segment: u16, bus: u8, devfn: u8) -> Self {
        Self { segment, bus, devfn: Devfn(devfn) }
    }

    /// The address at which a guest finds a function: on bus 0 of segment 0.
    pub const fn in_guest(devfn: Devfn) -> Self {
        Self { segment: 0, bus: 0, devfn }
    }

    /// Unpacks `segment << 16 | bus << 8 | devfn`.
    pub const fn from_packed(packed: u32) -> Self {
        Self { segment: (packed >> 16) as u16, bus: (packed >> 8) as u8, devfn: Devfn(packed as u8) }
    }

    /// The segment group (Linux: domain).
    pub const fn segment(self) -> u16 {
        self.segment
    }

    /// The bus number.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// The device number.
    pub const fn device(self) -> DeviceNumber {
        self.devfn.device()
    }

    /// The function number, 0-7.
    pub const fn function(self) -> u8 {
        self.devfn.function()
    }

    /// Device and function number.
    pub const fn devfn(self) -> Devfn {
        self.devfn
    }

    /// `segment << 16 | bus << 8 | devfn`, the form of Xen's domctls.
    pub const fn packed(self) -> u32 {
        (self.segment as u32) << 16 | (self.bus as u32) << 8 | self.devfn.0 as u32
    }

    /// The function `offset` Routing IDs further on, within the segment: how a VF's address follows from its PF's
    /// (PCI Express 6.0, section 9.3.3.8). `None` when that leaves the segment.
    pub fn offset_by(self, offset: u32) -> Option<Self> {
        let rid = u32::from(self.bus) << 8 | u32::from(self.devfn.0);
        let rid = u16::try_from(rid.checked_add(offset)?).ok()?;
        Some(Self { segment: self.segment, bus: (rid >> 8) as u8, devfn: Devfn(rid as u8) })
    }
}

impl FromStr for Sbdf {
    type Err = SbdfError;

    fn from_str(text: &str) -> Result<Self, SbdfError> {
        let form = || SbdfError::Form { text: text.chars().take(64).collect() };
        let mut parts = text.split(':');
        let (first, second, third) = (parts.next(), parts.next(), parts.next());
        if parts.next().is_some() {
            return Err(form());
        }
        let (segment, bus, slot) = match (first, second, third) {
            (Some(segment), Some(bus), Some(slot)) => (segment, bus, slot),
            (Some(bus), Some(slot), None) => ("0", bus, slot),
            _ => return Err(form()),
        };
        let (device, function) = slot.split_once('.').ok_or_else(form)?;
        let hex = |digits: &str, component, max: u16| {
            let fits =
                !digits.is_empty() && digits.len() <= 4 && digits.bytes().all(|b| b.is_ascii_hexdigit());
            fits.then(|| u16::from_str_radix(digits, 16).ok())
                .flatten()
                .filter(|value| *value <= max)
                .ok_or_else(|| SbdfError::Component { text: text.chars().take(64).collect(), component, max })
        };
        let segment = hex(segment, "segment", 0xffff)?;
        let bus = hex(bus, "bus", 0xff)?;
        let device = hex(device, "device", 0x1f)?;
        let function = hex(function, "function", 7)?;
        Ok(Self { segment, bus: bus as u8, devfn: Devfn((device as u8) << 3 | function as u8) })
    }
}

impl fmt::Display for Sbdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{}", self.segment, self.bus, self.devfn)
    }
}

impl Serialize for Sbdf {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sbdf {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Sbdf {
    fn schema_name() -> Cow<'static, str> {
        "Sbdf".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "The address of a PCI function: segment, bus, device, function.",
            "type": "string",
            "pattern": "^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\\.[0-7]$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_xl_accepts() {
        for (text, printed) in [
            ("01:10.0", "0000:01:10.0"),
            ("0000:01:10.0", "0000:01:10.0"),
            ("1:1.1", "0000:01:01.1"),
            ("ffff:FF:1f.7", "ffff:ff:1f.7"),
        ] {
            assert_eq!(text.parse::<Sbdf>().unwrap().to_string(), printed);
        }
    }

    #[test]
    fn names_the_component_that_is_wrong() {
        for (text, component) in [
            ("10000:01:10.0", "segment"),
            ("100:10.0", "bus"),
            ("01:20.0", "device"),
            ("01:1f.8", "function"),
            ("01:1f.", "function"),
            ("01:+1.0", "device"),
            ("01:1 .0", "device"),
            ("0000:01:10.0@3", "function"),
        ] {
            match text.parse::<Sbdf>() {
                Err(SbdfError::Component { component: found, .. }) => assert_eq!(found, component, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn refuses_other_forms() {
        for text in ["", "01", "01:10", "a:b:c:d.0"] {
            assert!(matches!(text.parse::<Sbdf>(), Err(SbdfError::Form { .. })), "{text}");
        }
    }

    #[test]
    fn routing_ids_carry_into_the_bus_and_stay_in_the_segment() {
        let pf = Sbdf::from_devfn(0, 1, 0);
        assert_eq!(pf.offset_by(128).unwrap().to_string(), "0000:01:10.0");
        assert_eq!(pf.offset_by(256).unwrap().to_string(), "0000:02:00.0");
        assert_eq!(Sbdf::from_devfn(0, 0xff, 0xff).offset_by(1), None);
    }

    proptest::proptest! {
        #[test]
        fn packing_and_printing_round_trip(packed: u32) {
            let address = Sbdf::from_packed(packed);
            assert_eq!(address.packed(), packed);
            assert_eq!(address.to_string().parse::<Sbdf>(), Ok(address));
        }

        #[test]
        fn never_panics_on_any_text(text in ".{0,40}") {
            let _ = text.parse::<Sbdf>();
        }
    }
}
