//! The key `reset` of a policy file: how a function is reset when its owner changes.

use super::diagnostic::Diagnostics;
use super::errors::SWITCH;
use super::read::{self, KeyWord, key};
use super::yaml::Node;

/// The words of Linux's `reset_method` (Documentation/ABI/testing/sysfs-bus-pci).
pub const RESET_METHODS: [&str; 7] = ["device_specific", "acpi", "flr", "af_flr", "pm", "bus", "cxl_bus"];

pub(super) const RESET_KEYS: &[KeyWord] = &[
    key(
        "methods",
        "The ways to reset the function that are accepted, in the words of Linux's reset_method, instead of those of xpcid.yaml.",
    ),
    key(
        "together",
        "Whether a function without such a way is reset by its bus, where all functions on that go to the same guest: true or false.",
    ),
    key(
        "none",
        "What happens to a function that Linux cannot reset: refuse, or permit: it changes hands without a reset, with a warning.",
    ),
];

/// What happens to a function that cannot be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WithoutReset {
    /// No guest gets it.
    Refuse,
    /// Its owner changes without a reset.
    Permit,
}

impl WithoutReset {
    /// The words of a policy file.
    pub const WORDS: &[(&str, Self)] = &[("refuse", Self::Refuse), ("permit", Self::Permit)];
}

/// What a policy says about resets; a key that it does not have leaves what a less specific one said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResetWishes {
    /// The accepted methods, of [`RESET_METHODS`].
    pub methods: Option<Vec<String>>,
    /// Whether it is reset with all others on its bus.
    pub together: Option<bool>,
    /// What happens to a function that cannot be reset.
    pub none: Option<WithoutReset>,
}

impl ResetWishes {
    pub(super) fn lay_over(&self, less_specific: &Self) -> Self {
        Self {
            methods: self.methods.clone().or_else(|| less_specific.methods.clone()),
            together: self.together.or(less_specific.together),
            none: self.none.or(less_specific.none),
        }
    }

    /// Whether a function that cannot be reset may still get another owner.
    pub fn permits_none(&self) -> bool {
        self.none == Some(WithoutReset::Permit)
    }

    /// Whether a function that cannot be reset alone is reset with all others on its bus.
    pub fn wants_together(&self) -> bool {
        self.together == Some(true)
    }
}

pub(super) fn reset(node: &Node, diagnostics: &mut Diagnostics) -> ResetWishes {
    let mut wishes = ResetWishes::default();
    for (key, node) in read::entries(node, "'reset'", RESET_KEYS, diagnostics) {
        match key {
            "methods" => {
                let items = read::items(node);
                if items.is_empty() {
                    diagnostics.say(node.at, "an empty list: no method would be accepted".to_owned());
                }
                wishes.methods = Some(items.iter().filter_map(|item| method(item, diagnostics)).collect());
            }
            "together" => wishes.together = read::choice(node, "switch", SWITCH, diagnostics),
            _ => {
                wishes.none =
                    read::choice(node, "answer to 'without a reset?'", WithoutReset::WORDS, diagnostics);
            }
        }
    }
    wishes
}

fn method(node: &Node, diagnostics: &mut Diagnostics) -> Option<String> {
    let found = read::scalar(node, "a method of reset", diagnostics)?;
    let known = RESET_METHODS.contains(&found);
    if !known {
        diagnostics.unknown(node.at, "method of reset", found, RESET_METHODS.iter().copied());
    }
    known.then(|| found.to_owned())
}
