//! Views of policies.

use pciback::policy::Learned;
use pciback::{DomId, Sbdf};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The policies of one function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PolicyView {
    /// The function.
    pub address: Sbdf,
    /// `vendor:device`.
    pub id: String,
    /// The guest for which the policies are shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// All files, the least specific first; of those that apply, a later one takes precedence.
    pub files: Vec<PolicyFileView>,
    /// The permissions that the files give.
    pub permits: Vec<String>,
    /// The error policy of the function.
    #[serde(default)]
    pub errors: String,
    /// The RDM policy, for the case that Xen objects to its reserved memory: `strict` or `relaxed`.
    #[serde(default)]
    pub rdm_policy: String,
    /// The expansion ROM for a guest: `hide` (none), `device` (a copy for an HVM guest, the device's own for a PV guest), or the path of a
    /// file (for an HVM guest).
    #[serde(default)]
    pub rom: String,
    /// How many VFs a guest that gets the PF can create, an HVM guest at most 7; absent if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vfs_by_guest: Option<u16>,
    /// Who may be on the other side of its mailbox; absent if it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mailbox: Option<String>,
    /// The reset methods that the files accept; absent if they leave this to the settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reset_methods: Option<Vec<String>>,
    /// Whether it is reset together with all functions on its bus if it cannot be reset alone.
    #[serde(default)]
    pub reset_together: bool,
    /// Whether it may get another owner without a reset if it cannot be reset.
    #[serde(default)]
    pub without_reset: bool,
    /// The profile in force.
    pub profile: String,
    /// The treatment of unknown registers, and the rule that decides it.
    pub unknown: String,
    /// The files' rules for capabilities, in the order in which they are merged.
    pub capabilities: Vec<CapabilityRuleView>,
    /// The files' rules for registers, in the order in which they are merged.
    pub registers: Vec<RegisterRuleView>,
    /// Parts of the policies that cannot be applied, or not now.
    pub notes: Vec<String>,
}

/// One policy file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PolicyFileView {
    /// Its path.
    pub name: String,
    /// Its description of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The functions and guests that it matches.
    pub matches: String,
    /// Why it does not apply; absent if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mismatch: Option<String>,
}

/// A file's rule for a capability.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CapabilityRuleView {
    /// The capability's name in policies.
    pub capability: String,
    /// The treatment of the capability.
    pub action: String,
    /// The reason.
    pub reason: String,
    /// The file and line of the rule.
    pub origin: String,
}

/// A file's rule for bits of a register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct RegisterRuleView {
    /// The place: an offset in config space, or a capability and an offset in it.
    pub place: String,
    /// The width in bytes.
    pub width: u8,
    /// The bits.
    pub mask: u32,
    /// Their treatment.
    pub treatment: String,
    /// The reason.
    pub reason: String,
    /// The file and line of the rule.
    pub origin: String,
}

/// The blocked writes of a guest to one of its functions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct LearnedView {
    /// The function.
    pub address: Sbdf,
    /// The guest.
    pub domain: DomId,
    /// The guest's name, if xenstore has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The writes, and the policy that would permit them.
    #[serde(flatten)]
    pub learned: Learned,
}

/// The effect of a reload on one attached function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ReloadedView {
    /// The function.
    pub address: Sbdf,
    /// Whether its filter has changed.
    pub changed: bool,
    /// The registers with bits that are treated differently now.
    pub registers: Vec<String>,
    /// Changes that take effect only after the guest has released the function.
    pub deferred: Vec<String>,
    /// Why the old filter stays in force; absent if it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// A policy file without mistakes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CheckedView {
    /// Its path.
    pub name: String,
    /// The functions and guests that it matches.
    pub matches: String,
    /// The number of its rules for capabilities and registers.
    pub rules: usize,
}
