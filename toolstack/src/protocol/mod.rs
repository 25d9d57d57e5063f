//! The control protocol between `xpci` and `xpcid`: JSON lines over a Unix socket, version 1.
//!
//! The client sends one [`Call`] per line. The service answers each with any number of progress lines and one final line, all with the
//! `id` of the call. Unknown commands and fields are refused, so that a typo never has another effect. `xpci --json` prints the
//! [`Envelope`] of the final answer.

mod event_view;
mod finding;
mod list_view;
mod message_view;
mod moving_view;
mod network_view;
mod path_view;
mod policy_view;
mod problem;
mod request;
mod sriov_view;
mod texts;
mod view;
mod xl_config_view;

use pciback::containment::radius::Radius;
use pciback::policy::Explanation;
use pciback::{DomId, Sbdf, Uuid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use event_view::{EventView, Happening, RegisterValue, utc_of};
pub use finding::{Finding, Verdict, all_good};
pub use list_view::{ListFilter, ListedView, ShownView};
pub use message_view::{MessageView, message_data};
pub use moving_view::{ReservedFunction, Side};
pub use network_view::VfNetworkView;
pub use path_view::{AerOwner, AerStatusView, CountersView, MemberView, PathRegisterView, PathView};
pub use policy_view::{
    CapabilityRuleView, CheckedView, LearnedView, PolicyFileView, PolicyView, RegisterRuleView, ReloadedView,
};
pub use problem::{Cause, ProblemView};
pub use request::{Placed, Request, Scope};
pub use sriov_view::SriovView;
pub use view::{
    DeviceErrorsView, FunctionView, GuestView, PersistentView, RequestTimes, StatusView, SyncView,
    TimeBucket, VfView,
};

pub use xl_config_view::XlConfigView;

pub use crate::domains::DomainName;
use crate::outcome::{ErrorCode, Failure};
use crate::saved::SavedGuest;
use crate::target::Target;

/// The version of the protocol and of the envelope.
pub const VERSION: u32 = 1;
/// The file name of the socket for the status group, in the directory of the control socket.
pub const STATUS_SOCKET: &str = "status";
/// The longest request that the service accepts, in bytes.
pub const LINE_LIMIT: usize = 1 << 20;
/// The longest answer that a client accepts, in bytes; an explanation of all registers of a function has about half a MiB.
pub const ANSWER_LIMIT: usize = 1 << 26;

/// One line from the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Call {
    /// The version of the protocol, 1; the service refuses others.
    pub version: u32,
    /// A number that the client chooses, repeated in each answer.
    pub id: u64,
    /// The request.
    #[serde(flatten)]
    pub request: Request<Target>,
}

impl Call {
    /// Parses a line of a client; an error has the id for the answer.
    pub fn parse(line: &[u8]) -> Result<Self, (u64, Failure)> {
        let usage = |id, message: String| (id, Failure::new(ErrorCode::Usage, message));
        let value: serde_json::Value = serde_json::from_slice(line)
            .map_err(|error| usage(0, format!("the request is not JSON: {error}")))?;
        let id = value.get("id").and_then(serde_json::Value::as_u64).unwrap_or(0);
        let version = value.get("version").and_then(serde_json::Value::as_u64);
        if version != Some(u64::from(VERSION)) {
            let text = format!("xpcid speaks version {VERSION} of the control protocol");
            return Err((
                id,
                Failure::new(ErrorCode::Usage, text).hint("xpci and xpcid must be of the same version"),
            ));
        }
        serde_json::from_value(value)
            .map_err(|error| usage(id, format!("the request is not understood: {error}")))
    }
}

/// The result of a successful request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum Success {
    /// Something was changed.
    Changed {
        /// What was changed, as text.
        message: String,
        /// Warnings for the user.
        #[serde(default)]
        warnings: Vec<String>,
        /// The functions concerned, in their present state.
        functions: Vec<FunctionView>,
    },
    /// Nothing had to be changed.
    Already {
        /// The present state, as text.
        message: String,
    },
    /// Answer to a dry run: nothing was changed, and no obstacle was found.
    Possible {
        /// What would be done, as text.
        message: String,
    },
    /// Functions.
    Functions {
        /// The list.
        functions: Vec<FunctionView>,
    },
    /// The functions of the host.
    Listed {
        /// The functions, by address.
        functions: Vec<ListedView>,
    },
    /// The checks of dom0's configuration.
    Checkup {
        /// The finding of each check.
        findings: Vec<Finding>,
    },
    /// The details of one function.
    Shown(Box<ShownView>),
    /// VFs, by PF.
    Vfs {
        /// The list.
        vfs: Vec<VfView>,
    },
    /// The differences between sysfs, Xen and xenstore.
    Synced(SyncView),
    /// The network settings of a VF.
    VfNetwork(VfNetworkView),
    /// The registers on the paths of functions.
    AerStatus(AerStatusView),
    /// The functions and guests that a failure of a function affects.
    BlastRadius(Box<Radius>),
    /// The network settings of a PF's VFs.
    VfNetworks {
        /// The PF.
        physical_function: Sbdf,
        /// Its SR-IOV capability; absent while the PF does not answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sriov: Option<SriovView>,
        /// Its VFs, in order.
        vfs: Vec<VfNetworkView>,
    },
    /// The policies that apply to a function.
    Policy(Box<PolicyView>),
    /// What guests see of functions.
    Explained {
        /// The functions.
        devices: Vec<Explanation>,
        /// The lines of a dump that could not be read, with file and line.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        damage: Vec<String>,
    },
    /// Blocked writes of guests.
    Learned {
        /// The blocked writes, by function.
        functions: Vec<LearnedView>,
    },
    /// The policies were reloaded.
    Reloaded {
        /// The number of files in force.
        files: usize,
        /// The changes, by function.
        functions: Vec<ReloadedView>,
    },
    /// An xl configuration file was converted.
    XlConfig(XlConfigView),
    /// Policy files were checked.
    Checked {
        /// The files; none has a mistake.
        files: Vec<CheckedView>,
    },
    /// The schema of policy files.
    Schema {
        /// The schema, in JSON Schema draft-07.
        schema: serde_json::Value,
    },
    /// A guest has released its functions and can be saved.
    Saved {
        /// The domain.
        domain: DomId,
        /// The guest and the functions that it had.
        guest: SavedGuest,
    },
    /// Functions are reserved for a guest, which can be restored now.
    Reserved {
        /// The guest's UUID.
        guest: Uuid,
        /// One function for each that the guest had.
        functions: Vec<ReservedFunction>,
    },
    /// A restored guest has its functions and may run.
    Restored {
        /// The new domain.
        domain: DomId,
        /// Warnings for the user.
        #[serde(default)]
        warnings: Vec<String>,
    },
    /// Messages that were received.
    Messages {
        /// The messages, in the order in which they were received.
        messages: Vec<MessageView>,
    },
    /// Metrics of the service for Prometheus.
    Metrics {
        /// The metrics, in Prometheus' text format.
        text: String,
    },
    /// The last events.
    Events {
        /// The events, the oldest first.
        events: Vec<EventView>,
    },
    /// The state of the service.
    Status(StatusView),
}

impl Success {
    /// The exit code of `xpci`.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Checkup { findings } if !all_good(findings) => ErrorCode::Failed.exit_code(),
            _ => 0,
        }
    }

    /// Whether the answer is a status with problems.
    pub fn has_problems(&self) -> bool {
        matches!(self, Self::Status(status) if !status.problems.is_empty())
    }
}

/// One line from the service, and what `xpci --json` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Envelope {
    /// The version of the protocol, 1.
    pub version: u32,
    /// The `id` of the call.
    pub id: u64,
    /// The command, as in the protocol.
    pub command: String,
    /// Whether the request succeeded; absent in lines before the final one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ok: Option<bool>,
    /// What is being done; only in lines before the final one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// An event; only in lines before the final one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<EventView>,
    /// The result, on success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Success>,
    /// The failure, if the request failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
}

/// The output of `xpci --json` for a command that makes several requests: one object with all answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Answers {
    /// The version of the protocol, 1.
    pub version: u32,
    /// The command as typed, its words joined by `-`.
    pub command: String,
    /// Whether all requests succeeded.
    pub ok: bool,
    /// One answer per function, in the order of the command line.
    pub answers: Vec<Envelope>,
}

impl Answers {
    /// The answers to requests of one command.
    pub fn of(answers: Vec<Envelope>) -> Self {
        let command = answers.first().map(|answer| answer.command.clone()).unwrap_or_default();
        let ok = answers.iter().all(|answer| answer.ok == Some(true));
        Self { version: VERSION, command, ok, answers }
    }
}

impl Envelope {
    /// The final answer.
    pub fn done(id: u64, command: &str, outcome: Result<Success, Failure>) -> Self {
        let ok = Some(outcome.is_ok());
        let (result, error) = match outcome {
            Ok(success) => (Some(success), None),
            Err(failure) => (None, Some(failure)),
        };
        Self {
            version: VERSION,
            id,
            command: command.to_owned(),
            ok,
            progress: None,
            event: None,
            result,
            error,
        }
    }

    /// A progress line.
    pub fn progress(id: u64, command: &str, text: String) -> Self {
        let command = command.to_owned();
        let progress = Some(text);
        Self { version: VERSION, id, command, ok: None, progress, event: None, result: None, error: None }
    }

    /// A line with an event.
    pub fn event(id: u64, command: &str, event: EventView) -> Self {
        let (command, event) = (command.to_owned(), Some(event));
        Self { version: VERSION, id, command, ok: None, progress: None, event, result: None, error: None }
    }
}

#[cfg(test)]
mod tests {
    use pciback::DeviceNumber;
    use pciback::platform::VfSettings;

    use super::*;

    #[test]
    fn a_call_is_one_flat_object_with_named_fields() {
        let text =
            r#"{"version":1,"id":7,"command":"pci-attach","arguments":{"domain":"web","address":"01:10.0"}}"#;
        let call: Call = serde_json::from_str(text).unwrap();
        assert_eq!(call.id, 7);
        let Request::PciAttach {
            domain,
            address,
            slot: None,
            persist: false,
            managed: false,
            trust_former_owner: false,
            dry_run: false,
        } = call.request
        else {
            panic!("{call:?}")
        };
        assert_eq!((domain.0.as_str(), address.to_string().as_str()), ("web", "0000:01:10.0"));
    }

    #[test]
    fn an_invalid_call_is_answered_with_its_id_and_an_error() {
        for (line, id, said) in [
            (&b"\xff\n"[..], 0, "not JSON"),
            (b"{\"id\":3}\n", 3, "version 1"),
            (b"{\"version\":2,\"id\":4,\"command\":\"status\"}\n", 4, "version 1"),
            (b"{\"version\":1,\"id\":5,\"command\":\"dance\"}\n", 5, "dance"),
        ] {
            let (found, failure) = Call::parse(line).unwrap_err();
            assert_eq!(found, id);
            assert!(failure.message.contains(said), "{failure}");
        }
        assert!(Call::parse(b"{\"version\":1,\"id\":5,\"command\":\"status\"}\n").is_ok());
    }

    #[test]
    fn unknown_commands_fields_and_addresses_are_refused() {
        for text in [
            r#"{"version":1,"id":7,"command":"pci-burn","arguments":{"address":"01:10.0"}}"#,
            r#"{"version":1,"id":7,"command":"pci-assignable-add","arguments":{"address":"01:10.0","forced":true}}"#,
            r#"{"version":1,"id":7,"command":"pci-assignable-add","arguments":{"address":"01:10.9"}}"#,
            r#"{"version":1,"id":7,"command":"pci-assignable-add"}"#,
        ] {
            assert!(serde_json::from_str::<Call>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_request_round_trips_under_its_name() {
        let address = Sbdf::from_devfn(0, 1, 0x80);
        let domain = DomainName("pv1".into());
        for request in [
            Request::List { filter: ListFilter { class: Some("02".into()), ..ListFilter::default() } },
            Request::Show { address },
            Request::Doctor,
            Request::PciAssignableList,
            Request::PciAssignableAdd { address, force: true, persist: true, managed: true, dry_run: true },
            Request::PciAssignableRemove { address, force: true, trust_former_owner: true },
            Request::PciAttach {
                domain: domain.clone(),
                address,
                slot: DeviceNumber::new(3),
                persist: true,
                managed: true,
                trust_former_owner: true,
                dry_run: true,
            },
            Request::PciAttachAll {
                domain: domain.clone(),
                functions: vec![
                    Placed { address, slot: DeviceNumber::new(3) },
                    Placed { address, slot: None },
                ],
                persist: true,
                managed: true,
                trust_former_owner: true,
                dry_run: true,
            },
            Request::PciDetach { domain: domain.clone(), address, force: true, scope: Scope::Live },
            Request::PciList { domain: domain.clone() },
            Request::Save { domain: domain.clone() },
            Request::Restored { guest: Uuid([7; 16]), functions: Vec::new() },
            Request::Migrate { domain: domain.clone(), to: "other".into(), process: 7 },
            Request::MigrateHandOver { guest: Uuid([7; 16]) },
            Request::MigrateEnd { guest: Uuid([7; 16]), side: Side::Arriving },
            Request::PciListPersistent { guest: Some(domain) },
            Request::VfCreate { address, count: 3, unmanaged: true },
            Request::VfSetCount { address, count: 0 },
            Request::VfDestroy { address },
            Request::VfList { address: None },
            Request::VfSet {
                address,
                persist: true,
                settings: VfSettings { trust: Some(true), ..VfSettings::default() },
            },
            Request::VfShow { address },
            Request::AerStatus { address: None },
            Request::BlastRadius { address },
            Request::AerHistory { address },
            Request::Events { follow: true },
            Request::Status,
            Request::PolicyShow { address, domain: Some("web".into()) },
            Request::PolicyExplain { address, domain: None },
            Request::PolicyLearn { target: "web".into() },
            Request::PolicyReload,
            Request::Sync { dry_run: true },
            Request::QuarantineClear { address, trust_former_owner: true },
            Request::MailboxSend { address, kind: 1, sequence: 2, data: "00ff".into() },
            Request::MailboxReceive { address },
        ] {
            let name = request.name();
            let call = Call { version: VERSION, id: 1, request: request.into() };
            let text = serde_json::to_string(&call).unwrap();
            assert!(text.contains(&format!("\"command\":\"{name}\"")), "{text}");
            assert_eq!(serde_json::from_str::<Call>(&text).unwrap(), call);
        }
    }
}
