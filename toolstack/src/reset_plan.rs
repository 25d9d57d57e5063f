//! How functions are reset, as the settings say and policies change.

use serde::{Deserialize, Serialize};

/// How a function is reset, how long that may take and how success is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct ResetPlan {
    /// The methods that will do, in the words of Linux's `reset_method`; one that touches other functions is not among them.
    pub methods: Vec<String>,
    /// How long the reset itself may take, in seconds.
    pub limit_seconds: u64,
    /// How long the function may take to answer afterwards, in seconds (PCI Express 6.0, section 6.6.2: at most 1 s).
    pub answer_seconds: u64,
    /// What must hold afterwards.
    pub checks: Vec<ResetCheck>,
    /// Whether a function without such a method is reset with all others on its bus. Only a policy says so.
    #[serde(skip)]
    pub together: bool,
    /// Whether a function that Linux cannot reset changes hands all the same. Only a policy permits that.
    #[serde(skip)]
    pub permit_none: bool,
}

/// What shows that a reset happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetCheck {
    /// Command and Status do not read all ones.
    Answers,
    /// A register that Linux does not write back has lost what was written into it before. It shows nothing in a function without MSI and
    /// MSI-X.
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
