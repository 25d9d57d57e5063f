//! How functions are reset, by the settings and the policies.

use serde::{Deserialize, Serialize};

/// How a function is reset, the time limits, and how success is verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct ResetPlan {
    /// The accepted methods, in the words of Linux's `reset_method`; methods that affect other functions are not in the default list.
    pub methods: Vec<String>,
    /// The limit for the reset itself, in seconds.
    pub limit_seconds: u64,
    /// The limit for the function to answer afterwards, in seconds (PCI Express 6.0, section 6.6.2: at most 1 s).
    pub answer_seconds: u64,
    /// The checks of the reset.
    pub checks: Vec<ResetCheck>,
    /// Whether a function without such a method is reset together with all others on its bus. Set by policies only.
    #[serde(skip)]
    pub together: bool,
    /// Whether a function that cannot be reset may get another owner without a reset. Set by policies only.
    #[serde(skip)]
    pub permit_none: bool,
}

/// A check that a reset has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetCheck {
    /// Command and Status do not read all ones.
    Answers,
    /// A register that Linux does not restore has lost the value that was written to it before. Functions without MSI and MSI-X have no
    /// such register and always pass.
    Cleared,
}

impl Default for ResetPlan {
    fn default() -> Self {
        Self {
            methods: ["flr", "af_flr", "pm", "device_specific"].map(str::to_owned).to_vec(),
            limit_seconds: 10,
            answer_seconds: 2,
            checks: vec![ResetCheck::Answers, ResetCheck::Cleared],
            together: false,
            permit_none: false,
        }
    }
}
