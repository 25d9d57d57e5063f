//! What a PF's network driver lets dom0 set for each of its VFs.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Result;
use crate::Sbdf;

/// A VF as its PF's driver knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VfPlace {
    /// The VF.
    pub address: Sbdf,
    /// Its PF.
    pub physical_function: Sbdf,
    /// Its number among the PF's VFs, from 0.
    pub index: u16,
}

impl fmt::Display for VfPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (VF {} of {})", self.address, self.index, self.physical_function)
    }
}

/// A PF's network interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PfNetwork {
    /// Its name.
    pub interface: String,
    /// What the driver reports of each VF, by index; empty where it reports nothing of VFs.
    pub vfs: BTreeMap<u16, VfSettings>,
}

/// The network settings of the VFs of PFs.
///
/// The calls may wait for the kernel's network lock: they are for threads that may block.
pub trait VfNetwork: Send + Sync {
    /// What a PF's driver reports of its VFs; `None` where the PF has no network interface in dom0.
    fn vf_settings(&self, physical_function: Sbdf) -> Result<Option<PfNetwork>>;
    /// Sets one thing of one VF. `EOPNOTSUPP`: the PF's driver cannot do this.
    fn set_vf_setting(&self, vf: VfPlace, setting: VfSetting) -> Result<()>;
}

/// An Ethernet address; all zeros stand for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

/// Why a text is no address that a VF can have.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MacAddressError {
    /// Not six bytes.
    #[error("'{0}' is not a MAC address: write it as 52:54:00:12:34:56")]
    Form(String),
    /// An address of a group.
    #[error("'{0}' is a multicast address; an interface must have an address of its own")]
    Multicast(String),
}

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> std::result::Result<Self, MacAddressError> {
        let byte = |digits: &str| {
            let valid = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            valid.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
        let bytes = bytes.ok_or_else(|| MacAddressError::Form(text.to_owned()))?;
        if bytes[0] & 1 != 0 {
            return Err(MacAddressError::Multicast(text.to_owned()));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacAddressError;

    fn try_from(text: String) -> std::result::Result<Self, MacAddressError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

/// The VLAN that a VF's packets are put into, and taken out of; id 0 stands for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct Vlan {
    /// The id, up to 4094.
    pub id: u16,
    /// The priority that the packets get, up to 7.
    pub qos: u8,
}

impl Vlan {
    /// The last id that a network can have.
    pub const LAST: u16 = 4094;
    /// The highest priority.
    pub const HIGHEST_QOS: u8 = 7;
}

/// Why a text is no VLAN.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{0}' is not a VLAN: write ID or ID:QOS, the id from 0 (none) to 4094, the priority from 0 to 7")]
pub struct VlanError(String);

impl FromStr for Vlan {
    type Err = VlanError;

    fn from_str(text: &str) -> std::result::Result<Self, VlanError> {
        let (id, qos) = text.split_once(':').unwrap_or((text, "0"));
        let number = |digits: &str, most: u16| {
            let plain = digits.bytes().all(|digit| digit.is_ascii_digit());
            digits.parse().ok().filter(|number| plain && *number <= most)
        };
        match (number(id, Self::LAST), number(qos, Self::HIGHEST_QOS.into())) {
            (Some(id), Some(qos)) => Ok(Self { id, qos: qos as u8 }),
            _ => Err(VlanError(text.to_owned())),
        }
    }
}

impl fmt::Display for Vlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.id, self.qos) {
            (id, 0) => write!(f, "{id}"),
            (id, qos) => write!(f, "{id}:{qos}"),
        }
    }
}

impl TryFrom<String> for Vlan {
    type Error = VlanError;

    fn try_from(text: String) -> std::result::Result<Self, VlanError> {
        text.parse()
    }
}

impl From<Vlan> for String {
    fn from(vlan: Vlan) -> Self {
        vlan.to_string()
    }
}

/// The link that a VF sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// The PF's.
    #[default]
    Auto,
    /// Always up.
    Enable,
    /// Always down.
    Disable,
}

/// One thing to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VfSetting {
    /// The MAC address.
    Mac(MacAddress),
    /// The VLAN.
    Vlan(Vlan),
    /// Whether packets with another sender's address are dropped.
    SpoofCheck(bool),
    /// Whether the guest may do what the PF's driver keeps from others, for example change its MAC address.
    Trust(bool),
    /// Limits of what it sends, in Mbit/s; 0 is no limit. The kernel only takes both together.
    Rate {
        /// What it is guaranteed.
        min: u32,
        /// What it may not exceed.
        max: u32,
    },
    /// The link that it sees.
    LinkState(LinkState),
}

impl VfSetting {
    /// What setting it is, as a verb phrase without a subject.
    pub const fn action(self) -> &'static str {
        match self {
            Self::Mac(_) => "set the MAC address of",
            Self::Vlan(_) => "set the VLAN of",
            Self::SpoofCheck(_) => "set the spoof check of",
            Self::Trust(_) => "set the trust of",
            Self::Rate { .. } => "set the transmit rate of",
            Self::LinkState(_) => "set the link state of",
        }
    }
}

/// Settings of one VF: those that are known, or those that are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct VfSettings {
    /// The MAC address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// The VLAN.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlan: Option<Vlan>,
    /// Whether packets with another sender's address are dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spoof_check: Option<bool>,
    /// Whether the guest may do what the PF's driver keeps from others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trust: Option<bool>,
    /// The most it may send, in Mbit/s; 0 is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rate: Option<u32>,
    /// What it is guaranteed, in Mbit/s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_rate: Option<u32>,
    /// The link that it sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_state: Option<LinkState>,
}

impl VfSettings {
    /// Whether nothing is known or wished.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// These, and where they say nothing, the others.
    pub fn or(self, others: Self) -> Self {
        Self {
            mac: self.mac.or(others.mac),
            vlan: self.vlan.or(others.vlan),
            spoof_check: self.spoof_check.or(others.spoof_check),
            trust: self.trust.or(others.trust),
            max_rate: self.max_rate.or(others.max_rate),
            min_rate: self.min_rate.or(others.min_rate),
            link_state: self.link_state.or(others.link_state),
        }
    }

    /// Those of these that `others` has, too.
    pub fn only(self, others: &Self) -> Self {
        Self {
            mac: self.mac.filter(|_| others.mac.is_some()),
            vlan: self.vlan.filter(|_| others.vlan.is_some()),
            spoof_check: self.spoof_check.filter(|_| others.spoof_check.is_some()),
            trust: self.trust.filter(|_| others.trust.is_some()),
            max_rate: self.max_rate.filter(|_| others.max_rate.is_some()),
            min_rate: self.min_rate.filter(|_| others.min_rate.is_some()),
            link_state: self.link_state.filter(|_| others.link_state.is_some()),
        }
    }

    /// Those of these that are not what `others` say; what `others` do not know counts as another value.
    pub fn unlike(self, others: &Self) -> Self {
        Self {
            mac: self.mac.filter(|_| self.mac != others.mac),
            vlan: self.vlan.filter(|_| self.vlan != others.vlan),
            spoof_check: self.spoof_check.filter(|_| self.spoof_check != others.spoof_check),
            trust: self.trust.filter(|_| self.trust != others.trust),
            max_rate: self.max_rate.filter(|_| self.max_rate != others.max_rate),
            min_rate: self.min_rate.filter(|_| self.min_rate != others.min_rate),
            link_state: self.link_state.filter(|_| self.link_state != others.link_state),
        }
    }

    /// What has to be set, one after the other; the rate that these leave open stays as it is at `present`.
    pub fn each(&self, present: &Self) -> Vec<VfSetting> {
        let rate = (self.min_rate.is_some() || self.max_rate.is_some()).then(|| VfSetting::Rate {
            min: self.min_rate.or(present.min_rate).unwrap_or(0),
            max: self.max_rate.or(present.max_rate).unwrap_or(0),
        });
        [
            self.vlan.map(VfSetting::Vlan),
            self.mac.map(VfSetting::Mac),
            self.spoof_check.map(VfSetting::SpoofCheck),
            self.trust.map(VfSetting::Trust),
            rate,
            self.link_state.map(VfSetting::LinkState),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// Takes over one that was set.
    pub fn take(&mut self, setting: VfSetting) {
        match setting {
            VfSetting::Mac(mac) => self.mac = Some(mac),
            VfSetting::Vlan(vlan) => self.vlan = Some(vlan),
            VfSetting::SpoofCheck(on) => self.spoof_check = Some(on),
            VfSetting::Trust(on) => self.trust = Some(on),
            VfSetting::Rate { min, max } => (self.min_rate, self.max_rate) = (Some(min), Some(max)),
            VfSetting::LinkState(state) => self.link_state = Some(state),
        }
    }

    /// The settings that are there as name and value, in the words of the command line.
    pub fn words(&self) -> Vec<(&'static str, String)> {
        let on_off = |on: bool| if on { "on" } else { "off" }.to_owned();
        let state = |state| match state {
            LinkState::Auto => "auto".to_owned(),
            LinkState::Enable => "enable".to_owned(),
            LinkState::Disable => "disable".to_owned(),
        };
        [
            ("mac", self.mac.map(|mac| mac.to_string())),
            ("vlan", self.vlan.map(|vlan| vlan.to_string())),
            ("spoof-check", self.spoof_check.map(on_off)),
            ("trust", self.trust.map(on_off)),
            ("max-rate", self.max_rate.map(|rate| rate.to_string())),
            ("min-rate", self.min_rate.map(|rate| rate.to_string())),
            ("link-state", self.link_state.map(state)),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_vlans_are_read_as_they_are_printed() {
        assert_eq!("52:54:00:AA:bb:01".parse::<MacAddress>().unwrap().to_string(), "52:54:00:aa:bb:01");
        for text in ["", "52:54:00:aa:bb", "52:54:00:aa:bb:01:02", "5:54:00:aa:bb:01", "+2:54:00:aa:bb:01"] {
            assert!(matches!(text.parse::<MacAddress>(), Err(MacAddressError::Form(_))), "{text}");
        }
        assert!(matches!("01:00:5e:00:00:01".parse::<MacAddress>(), Err(MacAddressError::Multicast(_))));
        for text in ["0", "0:3", "100", "4094:7"] {
            assert_eq!(text.parse::<Vlan>().unwrap().to_string(), text);
        }
        for text in ["", "4095", "-1", "+1", "1:8", "1:", ":1", "1:2:3"] {
            assert!(text.parse::<Vlan>().is_err(), "{text}");
        }
    }

    #[test]
    fn settings_combine_field_by_field() {
        let mac = "52:54:00:aa:bb:01".parse().unwrap();
        let wished = VfSettings { mac: Some(mac), max_rate: Some(100), ..VfSettings::default() };
        let present =
            VfSettings { mac: Some(MacAddress::default()), max_rate: Some(0), min_rate: Some(7), ..wished };
        assert_eq!(present.only(&wished).min_rate, None);
        assert_eq!(present.only(&wished).max_rate, Some(0));
        assert_eq!(wished.or(present), VfSettings { min_rate: Some(7), ..wished });
        assert_eq!(wished.unlike(&present), wished);
        assert!(wished.unlike(&wished).is_empty());
        // The kernel takes both rates together: the one that was not given stays.
        let rate = VfSetting::Rate { min: 7, max: 100 };
        assert_eq!(wished.each(&present), [VfSetting::Mac(mac), rate]);
    }

    #[test]
    fn settings_are_json_in_the_words_of_the_command_line() {
        let text = r#"{"mac":"52:54:00:aa:bb:01","vlan":"100:3","spoof-check":true,"link-state":"auto"}"#;
        let settings: VfSettings = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&settings).unwrap(), text);
        assert_eq!(settings.words()[1], ("vlan", "100:3".to_owned()));
        assert!(serde_json::from_str::<VfSettings>(r#"{"vlans":"1"}"#).is_err());
    }
}
