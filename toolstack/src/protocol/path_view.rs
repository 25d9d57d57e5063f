//! Views of the paths of functions.

use pciback::Sbdf;
use pciback::containment::Role;
use pciback::fault::ErrorCounters;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The paths of functions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct AerStatusView {
    /// The paths, by function.
    pub functions: Vec<PathView>,
}

/// A function and the functions above it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PathView {
    /// The function.
    pub address: Sbdf,
    /// Who handles its AER errors.
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
    /// The platform firmware, which has not granted AER control to the kernel; AER registers are not changed.
    Platform,
    /// There is no root port above; AER registers are not changed.
    NoRootPort,
}

/// One function of a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MemberView {
    /// Its address.
    pub address: Sbdf,
    /// Its role on the path.
    pub role: Role,
    /// The assigned functions that its registers are set for.
    pub users: Vec<Sbdf>,
    /// The kernel's error counters for it; absent if there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counters: Option<CountersView>,
    /// The registers that are set while a function below is assigned.
    pub registers: Vec<PathRegisterView>,
}

/// The kernel's error counters, since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CountersView {
    /// Correctable errors.
    pub correctable: u64,
    /// Non-fatal errors.
    pub non_fatal: u64,
    /// Fatal errors.
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
    /// Its offset in config space.
    pub offset: u16,
    /// Its width in bytes.
    pub width: u8,
    /// Its present value.
    pub value: u32,
    /// The bits that are set for assigned functions.
    pub mask: u32,
    /// The wanted values of these bits.
    pub wanted: u32,
    /// The earlier values of these bits; absent if they were not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<u32>,
    /// Whether they have the wanted values.
    pub as_wanted: bool,
    /// The reason, with the section of PCI Express 6.0.
    pub reason: String,
}
