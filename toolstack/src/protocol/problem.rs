//! Problems, as in `xpci status`.

use std::fmt;

use pciback::{DomId, Sbdf};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The type of a problem: a stable word for tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// A function is quarantined.
    Quarantine,
    /// A function that policies hold at once is not held, or its holding driver lost a function.
    Holding,
    /// A function is missing in the guest that has it persistently.
    Persistent,
    /// The service cannot detect starting guests, which therefore do not get their persistent functions.
    Starts,
    /// A VF has other network settings than requested.
    Network,
    /// VFs that the settings ask for are not enabled, or VFs did not come up.
    VirtualFunctions,
    /// sysfs, Xen and xenstore disagree on a function.
    OutOfStep,
    /// Errors of functions are not reported, or not all of them.
    ErrorReporting,
    /// A guest cannot be served, or stays paused.
    Guest,
    /// The settings cannot be used.
    Settings,
    /// The policies cannot be used, or no copy of them can be kept.
    Policies,
    /// The audit log cannot be written.
    AuditLog,
    /// Another file of the service cannot be read or written.
    StateFiles,
    /// The service itself.
    Service,
}

/// One problem, in the answer as long as it lasts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ProblemView {
    /// What is wrong, and why.
    pub message: String,
    /// The type of the problem.
    pub cause: Cause,
    /// Since when the service knows of it, in UTC, for example `2026-11-21T10:43:47.123Z`. Absent: since the host booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// The function, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Sbdf>,
    /// The domain, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomId>,
}

impl fmt::Display for ProblemView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.since.as_ref().map_or(Ok(()), |since| write!(f, " (since {since})"))
    }
}
