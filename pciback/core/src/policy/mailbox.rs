//! The key `mailbox` of a policy file: whether a function has one in its guest, and with whom.

use super::diagnostic::Diagnostics;
use super::read;
use super::rules;
use super::yaml::{Node, Value};
use crate::config::{MailboxPeers, MailboxWish};

/// Nobody.
pub(super) const OFF: &str = "off";
/// Those who may be on the other side.
pub(super) const PEERS: [&str; 2] = ["guest", "dom0"];

const REASON: &str = "the mailbox between a VF and the owner of its PF: served by xpcid, not by hardware";

pub(super) fn read(node: &Node, file: &str, diagnostics: &mut Diagnostics) -> Option<MailboxWish> {
    let is_list = matches!(node.value, Value::List(_));
    let words: Vec<(&'static str, &'static str)> =
        PEERS.iter().map(|word| (*word, *word)).chain((!is_list).then_some((OFF, OFF))).collect();
    let mut peers = MailboxPeers::default();
    for item in read::items(node) {
        match read::choice(item, "side of a mailbox", &words, diagnostics)? {
            "guest" => peers.guest = true,
            "dom0" => peers.dom0 = true,
            _ => {}
        }
    }
    Some(MailboxWish { peers, rule: rules::rule(Some(REASON.to_owned()), file, node.at) })
}

/// The words of a policy file for some peers.
pub fn words(peers: MailboxPeers) -> String {
    let words: Vec<&str> = PEERS
        .into_iter()
        .zip([peers.guest, peers.dom0])
        .filter_map(|(word, allowed)| allowed.then_some(word))
        .collect();
    if words.is_empty() { OFF.to_owned() } else { words.join(", ") }
}
