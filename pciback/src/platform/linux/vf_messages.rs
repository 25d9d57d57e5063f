//! The rtnetlink messages about VFs, as bytes.
//!
//! Requests are made by `netlink-packet-route`. Of an answer only the part about VFs is looked at: the kernel may say things
//! of a link that no crate knows yet, and those are none of our business.

use std::collections::BTreeMap;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, NlaBuffer,
    NlasIterator, Parseable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    LinkAttribute, LinkExtentMask, LinkMessage, LinkVfInfo, VfInfo, VfInfoLinkState, VfInfoMac, VfInfoRate,
    VfInfoSpoofCheck, VfInfoTrust, VfInfoVlan, VfLinkState,
};
use nix::errno::Errno;

use crate::platform::Cause;
use crate::platform::network::{LinkState, MacAddress, VfSetting, VfSettings, Vlan};

/// `NLMSG_ERROR`, which is also an acknowledgement, and `RTM_NEWLINK`.
const ERROR: u16 = 2;
const NEW_LINK: u16 = 16;
/// Bytes of `struct ifinfomsg`, which comes before a link's attributes.
const LINK_HEADER: usize = 16;
/// `IFLA_VFINFO_LIST` and, in it, `IFLA_VF_INFO`.
const VF_LIST: u16 = 22;
const VF: u16 = 1;

type Result<T> = std::result::Result<T, Cause>;

fn request(payload: RouteNetlinkMessage, flags: u16) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = 1;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(payload));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// Asks for an interface with its VFs; without their counters, which make the list longer than its length field can say.
pub fn read_request(interface: u32) -> Vec<u8> {
    let mut link = LinkMessage::default();
    link.header.index = interface;
    link.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::Vf, LinkExtentMask::SkipStats])];
    request(RouteNetlinkMessage::GetLink(link), NLM_F_REQUEST)
}

/// Sets one thing of one VF. One message each: the kernel stops at the first that the driver refuses, and does not say which.
pub fn set_request(interface: u32, index: u16, setting: VfSetting) -> Vec<u8> {
    let vf = u32::from(index);
    let info = match setting {
        VfSetting::Mac(mac) => VfInfo::Mac(VfInfoMac::new(vf, &mac.0)),
        VfSetting::Vlan(vlan) => VfInfo::Vlan(VfInfoVlan::new(vf, vlan.id.into(), vlan.qos.into())),
        VfSetting::SpoofCheck(on) => VfInfo::SpoofCheck(VfInfoSpoofCheck::new(vf, on)),
        VfSetting::Trust(on) => VfInfo::Trust(VfInfoTrust::new(vf, on)),
        VfSetting::Rate { min, max } => VfInfo::Rate(VfInfoRate::new(vf, min, max)),
        VfSetting::LinkState(state) => VfInfo::LinkState(VfInfoLinkState::new(
            vf,
            match state {
                LinkState::Auto => VfLinkState::Auto,
                LinkState::Enable => VfLinkState::Enable,
                LinkState::Disable => VfLinkState::Disable,
            },
        )),
    };
    let mut link = LinkMessage::default();
    link.header.index = interface;
    link.attributes = vec![LinkAttribute::VfInfoList(vec![LinkVfInfo(vec![info])])];
    request(RouteNetlinkMessage::SetLink(link), NLM_F_REQUEST | NLM_F_ACK)
}

/// How much is said of what cannot be read, in characters: an attribute has up to 64 KiB.
const REASON: usize = 200;

fn malformed(error: impl std::fmt::Display) -> Cause {
    let why: String = error.to_string().chars().take(REASON).collect();
    Cause::Malformed(format!("the kernel's answer about the interface: {why}"))
}

/// The error number of an answer that is one; 0 acknowledges.
fn error_number(payload: &[u8]) -> Result<()> {
    let number = payload.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes));
    match number {
        Some(0) => Ok(()),
        Some(number) => Err(Errno::from_raw(number.saturating_neg()).into()),
        None => Err(malformed("an error without a number")),
    }
}

/// The answer to a change.
pub fn acknowledged(answer: &[u8]) -> Result<()> {
    let message = NetlinkBuffer::new_checked(answer).map_err(malformed)?;
    match message.message_type() {
        ERROR => error_number(message.payload()),
        other => Err(malformed(format!("type {other} instead of an acknowledgement"))),
    }
}

/// The VFs in the answer to a question, by index.
pub fn vfs(answer: &[u8]) -> Result<BTreeMap<u16, VfSettings>> {
    let message = NetlinkBuffer::new_checked(answer).map_err(malformed)?;
    match message.message_type() {
        NEW_LINK => {}
        ERROR => {
            error_number(message.payload())?;
            return Err(malformed("an acknowledgement instead of an interface"));
        }
        other => return Err(malformed(format!("type {other} instead of an interface"))),
    }
    let attributes = message.payload().get(LINK_HEADER..).ok_or_else(|| malformed("it is too short"))?;
    let mut found = BTreeMap::new();
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute.map_err(malformed)?;
        if attribute.kind() != VF_LIST {
            continue;
        }
        for vf in NlasIterator::new(attribute.value()) {
            let vf = vf.map_err(malformed)?;
            if vf.kind() == VF
                && let Some((index, settings)) = one_vf(vf.value())?
            {
                found.insert(index, settings);
            }
        }
    }
    Ok(found)
}

/// One VF; `None` where the driver says nothing that we know.
fn one_vf(attributes: &[u8]) -> Result<Option<(u16, VfSettings)>> {
    let (mut settings, mut place) = (VfSettings::default(), None);
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute.map_err(malformed)?;
        let info: VfInfo = VfInfo::parse(&attribute).map_err(malformed)?;
        let index = match &info {
            VfInfo::Mac(mac) => {
                let mut bytes = [0; 6];
                bytes.copy_from_slice(&mac.mac[..6]);
                settings.mac = Some(MacAddress(bytes));
                mac.vf_id
            }
            VfInfo::Vlan(vlan) => {
                settings.vlan = plausible(vlan);
                vlan.vf_id
            }
            VfInfo::Rate(rate) => {
                (settings.min_rate, settings.max_rate) = (Some(rate.min_tx_rate), Some(rate.max_tx_rate));
                rate.vf_id
            }
            VfInfo::SpoofCheck(check) => {
                settings.spoof_check = known(&attribute).then_some(check.enabled);
                check.vf_id
            }
            VfInfo::Trust(trust) => {
                settings.trust = known(&attribute).then_some(trust.enabled);
                trust.vf_id
            }
            VfInfo::LinkState(link) => {
                settings.link_state = match link.state {
                    VfLinkState::Auto => Some(LinkState::Auto),
                    VfLinkState::Enable => Some(LinkState::Enable),
                    VfLinkState::Disable => Some(LinkState::Disable),
                    _ => None,
                };
                link.vf_id
            }
            _ => continue,
        };
        // All attributes of one VF carry the same index.
        place = Some(u16::try_from(index).map_err(|_| malformed(format!("VF {index}")))?);
    }
    Ok(place.map(|index| (index, settings)))
}

fn plausible(vlan: &VfInfoVlan) -> Option<Vlan> {
    let id = u16::try_from(vlan.vlan_id).ok().filter(|id| *id <= Vlan::LAST)?;
    let qos = u8::try_from(vlan.qos).ok().filter(|qos| *qos <= Vlan::HIGHEST_QOS)?;
    Some(Vlan { id, qos })
}

/// Whether the driver filled a switch in: the kernel presets those it may not know of with all ones, which the crate reads as off.
fn known(attribute: &NlaBuffer<&[u8]>) -> bool {
    attribute.value().get(4..8) != Some(&[0xff; 4])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An attribute with its length, type and padding.
    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = 4 + value.len() as u16;
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = words(&[16 + payload.len() as u32]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&words(&[1, 4711]));
        bytes.extend_from_slice(payload);
        bytes
    }

    /// What Linux 6.1 answers for a VF of igb, in its order, with unknown attributes in between.
    fn vf(index: u32, spoof_check: u32, trust: u32) -> Vec<u8> {
        let mut mac = words(&[index]);
        mac.extend_from_slice(&[0x52, 0x54, 0, 0xaa, 0xbb, 1]);
        mac.resize(36, 0);
        let attributes = [
            attribute(1, &mac),
            attribute(13, &[0xff; 32]),
            attribute(2, &words(&[index, 100, 3])),
            attribute(6, &words(&[index, 0, 500])),
            attribute(3, &words(&[index, 500])),
            attribute(4, &words(&[index, spoof_check])),
            attribute(5, &words(&[index, 2])),
            attribute(7, &words(&[index, u32::MAX])),
            attribute(9, &words(&[index, trust])),
            attribute(12, &attribute(1, &[&words(&[index, 100, 3])[..], &[0x81, 0, 0, 0]].concat())),
            attribute(200, &[1, 2, 3]),
        ];
        attribute(1, &attributes.concat())
    }

    fn link(attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut payload = vec![0; LINK_HEADER];
        payload.extend(attributes.concat());
        message(NEW_LINK, &payload)
    }

    #[test]
    fn a_question_asks_for_vfs_without_counters() {
        let expected =
            [words(&[40]), vec![18, 0, 1, 0], words(&[1, 0, 0, 7, 0, 0]), attribute(29, &words(&[9]))];
        assert_eq!(read_request(7), expected.concat());
    }

    #[test]
    fn each_setting_is_one_nested_attribute_of_the_kernel_s_layout() {
        let mac = "52:54:00:aa:bb:01".parse().unwrap();
        let mut mac_bytes = words(&[2]);
        mac_bytes.extend_from_slice(&[0x52, 0x54, 0, 0xaa, 0xbb, 1]);
        mac_bytes.resize(36, 0);
        for (setting, kind, value) in [
            (VfSetting::Mac(mac), 1, mac_bytes),
            (VfSetting::Vlan(Vlan { id: 100, qos: 3 }), 2, words(&[2, 100, 3])),
            (VfSetting::SpoofCheck(true), 4, words(&[2, 1])),
            (VfSetting::LinkState(LinkState::Disable), 5, words(&[2, 2])),
            (VfSetting::Rate { min: 10, max: 500 }, 6, words(&[2, 10, 500])),
            (VfSetting::Trust(false), 9, words(&[2, 0])),
        ] {
            let request = set_request(7, 2, setting);
            let list = attribute(VF_LIST, &attribute(VF, &attribute(kind, &value)));
            assert_eq!(request[..8], [words(&[32 + list.len() as u32]), vec![19, 0, 5, 0]].concat());
            assert_eq!(request[16..32], words(&[0, 7, 0, 0]));
            assert_eq!(request[32..], list, "{setting:?}");
        }
    }

    #[test]
    fn an_answer_is_read_and_what_is_unknown_in_it_passed_over() {
        let name = attribute(3, b"eth0\0");
        let answer = link(&[name, attribute(22, &[vf(0, 1, 0), vf(1, u32::MAX, u32::MAX)].concat())]);
        let found = vfs(&answer).unwrap();
        let expected = VfSettings {
            mac: Some("52:54:00:aa:bb:01".parse().unwrap()),
            vlan: Some(Vlan { id: 100, qos: 3 }),
            spoof_check: Some(true),
            trust: Some(false),
            max_rate: Some(500),
            min_rate: Some(0),
            link_state: Some(LinkState::Disable),
        };
        assert_eq!(found[&0], expected);
        // A driver that knows no such switch is not one that has switched it off.
        assert_eq!(found[&1], VfSettings { spoof_check: None, trust: None, ..expected });
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn a_driver_that_reports_no_vfs_is_no_error() {
        assert!(vfs(&link(&[attribute(3, b"eth0\0")])).unwrap().is_empty());
        assert!(vfs(&link(&[attribute(22, &attribute(1, &[]))])).unwrap().is_empty());
    }

    #[test]
    fn errors_come_back_with_their_number() {
        let error = |number: i32| message(ERROR, &[&number.to_ne_bytes()[..], &[0; 16]].concat());
        assert!(acknowledged(&error(0)).is_ok());
        let refused = acknowledged(&error(-(Errno::EOPNOTSUPP as i32)));
        assert!(matches!(refused, Err(Cause::Os(Errno::EOPNOTSUPP))));
        assert!(matches!(vfs(&error(-(Errno::ENODEV as i32))), Err(Cause::Os(Errno::ENODEV))));
    }

    #[test]
    fn answers_that_are_cut_off_or_of_another_kind_are_refused() {
        let whole = link(&[attribute(22, &vf(0, 1, 0))]);
        for length in 0..whole.len() - 1 {
            assert!(matches!(vfs(&whole[..length]), Err(Cause::Malformed(_))), "{length}");
        }
        // A list of VLANs that is none, of which the crate repeats each byte.
        let long = link(&[attribute(22, &attribute(1, &attribute(12, &[0xff; 1000])))]);
        let error = vfs(&long).unwrap_err().to_string();
        assert!(error.len() < 300, "{error}");
        assert!(matches!(acknowledged(&whole), Err(Cause::Malformed(_))));
        assert!(matches!(vfs(&message(3, &[0; 4])), Err(Cause::Malformed(_))));
    }
}
