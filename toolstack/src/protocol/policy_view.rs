//! What the service shows of policies.

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
    /// The guest it is shown for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// All files, the least specific first: of those that apply a later one wins.
    pub files: Vec<PolicyFileView>,
    /// What the files permit that is refused otherwise.
    pub permits: Vec<String>,
    /// What is done about errors of the function.
    #[serde(default)]
    pub errors: String,
    /// What happens where Xen objects to its reserved memory: strict or relaxed.
    #[serde(default)]
    pub rdm_policy: String,
    /// Which expansion ROM an HVM guest finds: `hide` (none), `device`, or the path of a file.
    #[serde(default)]
    pub rom: String,
    /// The methods of reset that the files accept; absent where they leave that to the settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reset_methods: Option<Vec<String>>,
    /// Whether it is reset with all other functions on its bus where it cannot be reset alone.
    #[serde(default)]
    pub reset_together: bool,
    /// Whether it changes hands even where it cannot be reset.
    #[serde(default)]
    pub without_reset: bool,
    /// The profile in force.
    pub profile: String,
    /// What happens to unknown registers, and which rule says so.
    pub unknown: String,
    /// The files' rules for capabilities, in the order in which they are laid over each other.
    pub capabilities: Vec<CapabilityRuleView>,
    /// The files' rules for registers, likewise.
    pub registers: Vec<RegisterRuleView>,
    /// What was asked for and cannot be, or not now.
    pub notes: Vec<String>,
}

/// One policy file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PolicyFileView {
    /// Its path.
    pub name: String,
    /// What it says it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// What it matches.
    pub matches: String,
    /// Why it does not apply; absent where it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mismatch: Option<String>,
}

/// A file's rule for a capability.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CapabilityRuleView {
    /// The capability's word.
    pub capability: String,
    /// What is done with it.
    pub action: String,
    /// Why.
    pub reason: String,
    /// Which file and line says so.
    pub origin: String,
}

/// A file's rule for some bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct RegisterRuleView {
    /// Where: an offset in config space, or a capability and an offset in it.
    pub place: String,
    /// Bytes.
    pub width: u8,
    /// Which bits.
    pub mask: u32,
    /// How they are treated.
    pub treatment: String,
    /// Why.
    pub reason: String,
    /// Which file and line says so.
    pub origin: String,
}

/// What one guest wrote without effect to one of its functions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct LearnedView {
    /// The function.
    pub address: Sbdf,
    /// The guest.
    pub domain: DomId,
    /// Its name, where xenstore has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What can be learned.
    #[serde(flatten)]
    pub learned: Learned,
}

/// What a reload did to one function in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ReloadedView {
    /// The function.
    pub address: Sbdf,
    /// Whether its filter is another now.
    pub changed: bool,
    /// The registers whose bits are treated otherwise now.
    pub registers: Vec<String>,
    /// What waits until its guest has let go of it.
    pub deferred: Vec<String>,
    /// Why the old filter stayed in force; absent where it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// A policy file without mistakes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CheckedView {
    /// Its path.
    pub name: String,
    /// What it matches.
    pub matches: String,
    /// How many rules it has for capabilities and registers.
    pub rules: usize,
}
