//! The findings of `xpci doctor`.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Correct.
    Good,
    /// It works, but not as well or as safely as possible.
    Warning,
    /// Functions cannot be attached to guests, or not safely.
    Fault,
    /// The check could not be made.
    NotChecked,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Good => "good",
            Self::Warning => "warning",
            Self::Fault => "FAULT",
            Self::NotChecked => "not checked",
        })
    }
}

/// The finding of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Finding {
    /// The name of the check, which is stable.
    pub check: String,
    /// The result.
    pub verdict: Verdict,
    /// What was found, or why the check could not be made.
    pub found: String,
    /// How to correct it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl Finding {
    /// A finding without a correction.
    pub fn new(check: &str, verdict: Verdict, found: impl Into<String>) -> Self {
        Self { check: check.to_owned(), verdict, found: found.into(), mend: None }
    }

    /// Adds how to correct it.
    pub fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }
}

/// Whether there is neither a warning nor a fault.
pub fn all_good(findings: &[Finding]) -> bool {
    !findings.iter().any(|finding| matches!(finding.verdict, Verdict::Warning | Verdict::Fault))
}
