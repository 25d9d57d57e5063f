//! What the service shows of the paths of functions.

use pciback::Sbdf;
use pciback::containment::Role;
use pciback::fault::ErrorCounters;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The paths of functions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct AerStatusView {
    /// By function.
    pub functions: Vec<PathView>,
}

/// A function and everybody above it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PathView {
    /// The function.
    pub address: Sbdf,
    /// Who handles AER errors of it.
    pub aer_owner: AerOwner,
    /// From the root port down to the function itself.
    pub members: Vec<MemberView>,
}

/// Who handles the errors that arrive at a root port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AerOwner {
    /// dom0's kernel.
    Linux,
    /// The platform, which has not granted it to the kernel; AER's registers are not changed.
    Platform,
    /// There is no root port above: AER's registers are not changed.
    NoRootPort,
}

/// One function of a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MemberView {
    /// Where it is.
    pub address: Sbdf,
    /// What it is there.
    pub role: Role,
    /// The assigned functions that its registers are set for.
    pub users: Vec<Sbdf>,
    /// The errors that the kernel has counted for it; absent where it counts none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counters: Option<CountersView>,
    /// The registers that are set while a function below is assigned.
    pub registers: Vec<PathRegisterView>,
}

/// Errors that the kernel has counted, since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CountersView {
    /// Correctable ones.
    pub correctable: u64,
    /// Non-fatal ones.
    pub non_fatal: u64,
    /// Fatal ones.
    pub fatal: u64,
}

impl From<ErrorCounters> for CountersView {
    fn from(counters: ErrorCounters) -> Self {
        let ErrorCounters { correctable, non_fatal, fatal } = counters;
        Self { correctable, non_fatal, fatal }
    }
}

/// One register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PathRegisterView {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub offset: u16,
    /// Its width in bytes.
    pub width: u8,
    /// What it reads.
    pub value: u32,
    /// Which of its bits are set for assigned functions.
    pub mask: u32,
    /// What they are then.
    pub wanted: u32,
    /// What they were before; absent while nobody has set them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<u32>,
    /// Whether they are what is wanted.
    pub as_wanted: bool,
    /// Why, with the section of PCI Express 6.0.
    pub reason: String,
}
