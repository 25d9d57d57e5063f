//! Errors that functions report, and what follows from them: pure, so that every case stands in a table.
//!
//! [`decide`] makes an action of an error, its owner, the policy and what happened before; [`Recovery`] is the conversation with a
//! guest that is notified, [`Conversation`] what is noted of it; [`Account`] makes one error of its event and its count.

mod account;
mod conversation;
mod counters;
mod decision;
mod history;
mod policy;
mod recovery;

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Sbdf;
use crate::spec;

pub use account::Account;
pub use conversation::{Conversation, Heard};
pub use counters::ErrorCounters;
pub use decision::{Decision, Owner, Relation, Response, decide};
pub use history::{History, Storms};
pub use policy::{Action, ErrorPolicy, ErrorWishes};
pub use recovery::{AerAnswer, AerRequest, ChannelState, Next, Recovery};

/// How bad an error is (PCI Express 6.0, section 6.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Hardware corrected it; nothing was lost.
    Correctable,
    /// One transaction is lost, the link works on.
    NonFatal,
    /// The link cannot be relied on; the kernel resets it, with everything below.
    Fatal,
}

impl Severity {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Correctable, Self::NonFatal, Self::Fatal];
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Correctable => "correctable",
            Self::NonFatal => "non-fatal",
            Self::Fatal => "fatal",
        })
    }
}

/// How an error became known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Detection {
    /// The kernel's trace event.
    Event,
    /// The kernel's counters; no event reported it.
    Counters,
    /// Downstream Port Containment: a port cut off what is below it.
    Containment,
}

/// An error that a function reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Fault {
    /// The function that reported it, or that the port which reported it named.
    pub address: Sbdf,
    /// How bad it is.
    pub severity: Severity,
    /// The bits of Correctable or Uncorrectable Error Status that identify it; 0 where unknown.
    pub status: u32,
    /// How it became known.
    pub detection: Detection,
    /// How many of its kind it stands for.
    pub count: u64,
}

impl Fault {
    /// What went wrong, in the words of the specification.
    pub fn names(&self) -> Vec<&'static str> {
        let table: &[(u32, &str)] = match self.severity {
            Severity::Correctable => &spec::CORRECTABLE_ERRORS,
            Severity::NonFatal | Severity::Fatal => &spec::UNCORRECTABLE_ERRORS,
        };
        table.iter().filter(|(bit, _)| self.status & bit != 0).map(|(_, name)| *name).collect()
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} error of {}", self.severity, self.address)?;
        let names = self.names();
        if !names.is_empty() {
            write!(f, ": {}", names.join(", "))?;
        }
        if self.count > 1 {
            write!(f, ", {} times", self.count)?;
        }
        match self.detection {
            Detection::Event => Ok(()),
            Detection::Counters => f.write_str(" (found by the kernel's counters)"),
            Detection::Containment => f.write_str(" (found by Downstream Port Containment)"),
        }
    }
}
