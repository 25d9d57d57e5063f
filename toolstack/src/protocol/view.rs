//! What the service shows of functions and guests.

use pciback::fault::{Action, Severity};
use pciback::inventory::Plan;
use pciback::{DomId, FunctionState, Sbdf, Uuid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ProblemView;

/// One function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FunctionView {
    /// Where it is on the host.
    pub address: Sbdf,
    /// `vendor:device`, four hexadecimal digits each.
    pub id: String,
    /// Where it stands.
    pub state: FunctionState,
    /// The driver it is bound to in dom0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// The driver it came from, and goes back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_driver: Option<String>,
    /// Its PF, when it is a VF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_function: Option<Sbdf>,
    /// The guest that has it, or gets or loses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomId>,
    /// Where the guest sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_address: Option<Sbdf>,
    /// Which guest has it persistently.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent: Option<PersistentView>,
    /// What is going on or wrong, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// A guest that has a function persistently: it gets it again whenever it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PersistentView {
    /// By what it is known over its reboots.
    pub guest: Uuid,
    /// Its name when that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether it gets it once only, when it is restored: it was saved with it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub saved: bool,
}

/// One guest that has functions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct GuestView {
    /// Its number.
    pub domain: DomId,
    /// Its name, where xenstore has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How far the handshake with its frontend is, for people.
    pub frontend: String,
    /// Requests answered since the service started.
    pub requests: u64,
    /// Those of them answered with an error; reads of functions that are not there, as every bus scan makes them, do not count.
    pub errors: u64,
    /// How long the requests took, from being taken to their answers.
    #[serde(default)]
    pub times: RequestTimes,
}

/// How long a guest's requests took; every 16th is timed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct RequestTimes {
    /// How many took how long, the shortest times first.
    pub buckets: Vec<TimeBucket>,
    /// How long these took together.
    pub total_nanoseconds: u64,
}

/// Requests that took about the same time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct TimeBucket {
    /// The longest time that is counted here; absent in the last bucket, which has all that took longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub up_to_microseconds: Option<u64>,
    /// How many took no longer than that, and longer than those of the bucket before.
    pub requests: u64,
}

/// One VF of a PF.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct VfView {
    /// Its index, from 0.
    pub index: u16,
    /// The VF.
    #[serde(flatten)]
    pub function: FunctionView,
    /// Why a guest gets it only where a policy permits untrusted VFs, in words that follow its PF's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub untrusted: Option<String>,
}

/// How many errors of one kind guests' functions had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceErrorsView {
    /// How bad they were.
    pub severity: Severity,
    /// What was decided.
    pub action: Action,
    /// How many.
    pub count: u64,
}

/// The state of the service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct StatusView {
    /// The service's version.
    pub service: String,
    /// What it runs on.
    pub platform: String,
    /// The functions it manages: all that are not in state `host`.
    pub functions: Vec<FunctionView>,
    /// The guests it serves.
    pub guests: Vec<GuestView>,
    /// Errors of guests' functions since the service started, by severity and by what was decided.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device_errors: Vec<DeviceErrorsView>,
    /// What is wrong, for as long as it lasts.
    pub problems: Vec<ProblemView>,
    /// What sysfs, Xen and xenstore disagreed on and the service repaired by itself: the last of it, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub repaired: Vec<String>,
}

/// What sysfs, Xen and xenstore disagreed on, and what was done about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SyncView {
    /// Whether it was only planned.
    pub dry_run: bool,
    /// The plan, for people.
    pub text: Vec<String>,
    /// The plan, for tools.
    pub plan: Plan,
}
