//! The key `virtual-functions` of a policy file: VFs that the guest with their PF creates.

use super::diagnostic::Diagnostics;
use super::read::{self, KeyWord, key};
use super::rules;
use super::yaml::Node;
use crate::config::{ByGuest, MOST_BY_GUEST};

pub(super) const VIRTUAL_FUNCTION_KEYS: &[KeyWord] = &[key(
    "by-guest",
    "How many VFs the guest that has the PF can create, 1-256 (an HVM guest at most 7): it finds an SR-IOV capability, and xpci creates what it asks for.",
)];

pub(super) fn read(node: &Node, file: &str, diagnostics: &mut Diagnostics) -> Option<ByGuest> {
    let entries = read::entries(node, "'virtual-functions'", VIRTUAL_FUNCTION_KEYS, diagnostics);
    let (_, node) = entries.into_iter().next()?;
    let found = read::scalar(node, "by-guest", diagnostics)?;
    let count = read::parse_number(found).and_then(|count| u16::try_from(count).ok());
    let count = count.filter(|count| (1..=MOST_BY_GUEST).contains(count));
    if count.is_none() {
        let found: String = found.chars().take(60).collect();
        let expected = format!("a number from 1 to {MOST_BY_GUEST} is expected");
        diagnostics.say(node.at, format!("'{found}' is not a valid by-guest: {expected}"));
    }
    let reason = "how many VFs the guest can create".to_owned();
    count.map(|count| ByGuest { count, rule: rules::rule(Some(reason), file, node.at) })
}
