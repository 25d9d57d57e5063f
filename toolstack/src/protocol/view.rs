//! Views of functions and guests.

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
    /// Its address on the host.
    pub address: Sbdf,
    /// `vendor:device`, four hexadecimal digits each.
    pub id: String,
    /// Its state.
    pub state: FunctionState,
    /// The driver it is bound to in dom0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// The driver that it had before it was held, and that it is given back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_driver: Option<String>,
    /// Its PF, if it is a VF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_function: Option<Sbdf>,
    /// The guest that has it, or gets or loses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomId>,
    /// The name of that guest, if it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_name: Option<String>,
    /// Its address in the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_address: Option<Sbdf>,
    /// The guest that has it persistently.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent: Option<PersistentView>,
    /// The operation in progress, or what is wrong, as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// A guest that has a function persistently: it gets the function each time it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PersistentView {
    /// The guest's UUID.
    pub guest: Uuid,
    /// The guest's name when the function was made persistent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether the guest gets it only once, when it is restored, because it was saved with it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub saved: bool,
}

/// A guest that has functions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct GuestView {
    /// Its domain id.
    pub domain: DomId,
    /// Its name, if xenstore has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The state of the handshake with its frontend, as text.
    pub frontend: String,
    /// The number of requests that were answered since the service started.
    pub requests: u64,
    /// The number of requests that were answered with an error, except reads of functions that do not exist, which every bus scan makes.
    pub errors: u64,
    /// The durations of its requests, from receipt to answer.
    #[serde(default)]
    pub times: RequestTimes,
}

/// The durations of a guest's requests; every 16th is measured.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct RequestTimes {
    /// The numbers of requests by duration, the shortest first.
    pub buckets: Vec<TimeBucket>,
    /// The sum of these durations.
    pub total_nanoseconds: u64,
}

/// The number of requests in a range of durations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct TimeBucket {
    /// The upper bound of the range; absent in the last bucket, which has all longer durations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub up_to_microseconds: Option<u64>,
    /// The number of requests above the bound of the bucket before, and up to this one.
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
    /// Why only a policy with `untrusted-vf` permits attaching it, in words that follow its PF's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub untrusted: Option<String>,
}

/// The number of errors of guests' functions with one severity and action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceErrorsView {
    /// Their severity.
    pub severity: Severity,
    /// The action that was decided.
    pub action: Action,
    /// Their number.
    pub count: u64,
}

/// The state of the service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct StatusView {
    /// The service's version.
    pub service: String,
    /// The platform on which it runs.
    pub platform: String,
    /// The functions that it manages: all that are not in state `host`.
    pub functions: Vec<FunctionView>,
    /// The guests that it serves.
    pub guests: Vec<GuestView>,
    /// The errors of guests' functions since the service started, by severity and action.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device_errors: Vec<DeviceErrorsView>,
    /// The current problems.
    pub problems: Vec<ProblemView>,
    /// The last differences between sysfs, Xen and xenstore that the service repaired by itself, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub repaired: Vec<String>,
}

/// The differences between sysfs, Xen and xenstore, and their repairs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SyncView {
    /// Whether the repairs were only planned.
    pub dry_run: bool,
    /// The plan, as text.
    pub text: Vec<String>,
    /// The plan, for tools.
    pub plan: Plan,
}
