//! Any bytes as what the kernel says of an interface with VFs.

use std::collections::BTreeMap;

use pciback::platform::linux::{acknowledged, set_request, vfs};
use pciback::platform::{Cause, VfSetting, VfSettings};

/// `RTM_NEWLINK`, and where a message has its type.
const NEW_LINK: u16 = 16;
const TYPE: std::ops::Range<usize> = 4..6;
/// `IFLA_VFINFO_LIST` and, in it, `IFLA_VF_INFO`.
const VF_LIST: u16 = 22;
const VF: u16 = 1;

/// The first byte says what the others are: a message, the attributes of an interface, those of one VF.
pub fn netlink(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else { return };
    let found = match choice % 3 {
        0 => {
            if let Err(cause) = acknowledged(bytes) {
                check_cause(&cause);
            }
            vfs(bytes)
        }
        1 => vfs(&interface(bytes)),
        _ => vfs(&interface(&attribute(VF_LIST, &attribute(VF, bytes)))),
    };
    match found {
        Ok(found) => found.iter().for_each(|(index, settings)| check(*index, settings)),
        Err(cause) => check_cause(&cause),
    }
}

fn check_cause(cause: &Cause) {
    let said = cause.to_string();
    assert!(said.len() < 500 && !said.contains(char::is_control), "{said:?}");
}

/// What is accepted is possible, and is what is read after it was set.
fn check(index: u16, settings: &VfSettings) {
    let VfSettings { mac, vlan, spoof_check, trust, max_rate, min_rate, link_state } = *settings;
    assert!(vlan.is_none_or(|vlan| vlan.id <= 4094 && vlan.qos <= 7), "{vlan:?}");
    assert_eq!(max_rate.is_some(), min_rate.is_some());
    let nothing = VfSettings::default();
    let rate = max_rate.zip(min_rate).map(|(max, min)| VfSetting::Rate { min, max });
    for (setting, alone) in [
        (mac.map(VfSetting::Mac), VfSettings { mac, ..nothing }),
        (vlan.map(VfSetting::Vlan), VfSettings { vlan, ..nothing }),
        (spoof_check.map(VfSetting::SpoofCheck), VfSettings { spoof_check, ..nothing }),
        (trust.map(VfSetting::Trust), VfSettings { trust, ..nothing }),
        (rate, VfSettings { max_rate, min_rate, ..nothing }),
        (link_state.map(VfSetting::LinkState), VfSettings { link_state, ..nothing }),
    ] {
        let Some(setting) = setting else { continue };
        let mut answer = set_request(7, index, setting);
        answer[TYPE].copy_from_slice(&NEW_LINK.to_ne_bytes());
        let read = vfs(&answer).expect("the answer to a request of ours");
        assert_eq!(read, BTreeMap::from([(index, alone)]), "{setting:?}");
    }
}

/// A message about an interface with these attributes.
fn interface(attributes: &[u8]) -> Vec<u8> {
    let mut message = (32 + attributes.len() as u32).to_ne_bytes().to_vec();
    message.extend(NEW_LINK.to_ne_bytes());
    message.resize(32, 0);
    message.extend(attributes);
    message
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(&value[..usize::from(length) - 4]);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}
