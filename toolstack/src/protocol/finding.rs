//! What the checks of `xpci doctor` found.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// It works, but not as well or as safely as it could.
    Warning,
    /// Functions cannot be given to guests, or not safely.
    Fault,
    /// It could not be looked at.
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

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Finding {
    /// The check's word, which stays the same.
    pub check: String,
    /// How it ended.
    pub verdict: Verdict,
    /// What was found, or why nothing could be.
    pub found: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl Finding {
    /// A check's finding.
    pub fn new(check: &str, verdict: Verdict, found: impl Into<String>) -> Self {
        Self { check: check.to_owned(), verdict, found: found.into(), mend: None }
    }

    /// Adds what to do.
    pub fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }
}

/// Whether a script may go on: no warning, no fault.
pub fn all_good(findings: &[Finding]) -> bool {
    !findings.iter().any(|finding| matches!(finding.verdict, Verdict::Warning | Verdict::Fault))
}
