//! What is wrong, as `xpci status` shows it.

use std::fmt;

use pciback::{DomId, Sbdf};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What kind of problem it is: a stable word for tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// A function is quarantined.
    Quarantine,
    /// A function that policies hold at once is not held, or a held function lost its holder.
    Holding,
    /// A guest does not have a function that it has persistently.
    Persistent,
    /// Starting guests are not seen, so that they do not get what they have persistently.
    Starts,
    /// A VF has other network settings than requested.
    Network,
    /// VFs that the settings ask for are not enabled, or VFs did not come up.
    VirtualFunctions,
    /// sysfs, Xen and xenstore disagree on a function.
    OutOfStep,
    /// Errors of functions are not reported, or not completely.
    ErrorReporting,
    /// A guest cannot be served, or stays paused.
    Guest,
    /// The settings cannot be used.
    Settings,
    /// The policies cannot be used.
    Policies,
    /// The audit log cannot be written.
    AuditLog,
    /// Another file of the service cannot be read or written.
    StateFiles,
    /// The service itself.
    Service,
}

/// One problem. It is in the answer for as long as it lasts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ProblemView {
    /// What is wrong, and why.
    pub message: String,
    /// What kind of problem it is.
    pub cause: Cause,
    /// Since when the service knows of it: UTC, as `2026-11-21T10:43:47.123Z`. Absent: since the host booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// The function that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Sbdf>,
    /// The domain that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomId>,
}

impl fmt::Display for ProblemView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.since.as_ref().map_or(Ok(()), |since| write!(f, " (since {since})"))
    }
}
