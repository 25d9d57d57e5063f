//! The requests that the service accepts.

use pciback::platform::VfSettings;
use pciback::{DeviceNumber, Sbdf, Uuid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DomainName, ListFilter, ReservedFunction, Side};
use crate::saved::SavedGuest;
use crate::target::Target;

/// The effect of a detach on a function that a guest has persistently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// The guest loses the function, and does not get it again.
    #[default]
    All,
    /// The guest loses the function, and gets it again when it starts the next time.
    Live,
    /// The guest keeps the function, but does not get it again.
    Persistent,
}

impl Scope {
    /// Whether it is the default.
    pub fn is_all(&self) -> bool {
        *self == Self::All
    }
}

/// One of several functions for a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Placed<A = Sbdf> {
    /// The function.
    pub address: A,
    /// The device number in the guest, 0-31; if absent, the first free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<DeviceNumber>,
}

/// A request. `A` is the type of functions in it: what the user called them ([`Target`]) on the wire, addresses in the service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "command", content = "arguments", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
#[serde(deny_unknown_fields, bound(deserialize = "A: Deserialize<'de>"))]
pub enum Request<A = Sbdf> {
    /// Lists the host's functions.
    List {
        /// The functions to list.
        #[serde(default)]
        filter: ListFilter,
    },
    /// Checks dom0's configuration, with corrections for faults.
    Doctor,
    /// Shows the details of a function, and everything that prevents attaching it.
    Show {
        /// The function.
        address: A,
    },
    /// Lists the functions that can be attached.
    PciAssignableList,
    /// Takes a function from its driver and holds it for guests.
    PciAssignableAdd {
        /// The function.
        address: A,
        /// Take it even if dom0 uses it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
        /// Hold it again after a reboot of the host, and whenever it appears.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        persist: bool,
        /// Give it back to dom0 when the guest that gets it next has released it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        managed: bool,
        /// Change nothing; answer with what would be done, or with everything that prevents it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        dry_run: bool,
    },
    /// Gives a held function back to dom0 and to its original driver.
    PciAssignableRemove {
        /// The function.
        address: A,
        /// Do so even if a guest that does not run has it persistently.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
        /// Do so even if a PV guest that had it may still reach it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        trust_former_owner: bool,
    },
    /// Attaches a held function to a guest.
    PciAttach {
        /// The guest.
        domain: DomainName,
        /// The function.
        address: A,
        /// The device number in the guest, 0-31; if absent, the first free one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        slot: Option<DeviceNumber>,
        /// Make it persistent: the guest gets it again each time it starts.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        persist: bool,
        /// Hold it first if dom0 has it, and give it back to dom0 then when the guest has released it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        managed: bool,
        /// Do so even if a PV guest that had it may still reach it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        trust_former_owner: bool,
        /// Change nothing; answer with what would be done, or with everything that prevents it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        dry_run: bool,
    },
    /// Attaches several held functions to a guest, all or none.
    PciAttachAll {
        /// The guest.
        domain: DomainName,
        /// The functions, 1 to 32.
        functions: Vec<Placed<A>>,
        /// Make them persistent.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        persist: bool,
        /// Hold those that dom0 has, and give these back to dom0 when the guest has released them.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        managed: bool,
        /// Do so even if a PV guest that had one of them may still reach it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        trust_former_owner: bool,
        /// Change nothing; answer with what would be done, or with everything that prevents it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        dry_run: bool,
    },
    /// Takes a function from a guest and holds it again.
    PciDetach {
        /// The guest.
        domain: DomainName,
        /// The function.
        address: A,
        /// Do not wait for the guest to release it.
        #[serde(default)]
        force: bool,
        /// Whether the detach is persistent.
        #[serde(default, skip_serializing_if = "Scope::is_all")]
        scope: Scope,
    },
    /// Lists the functions of a guest.
    PciList {
        /// The guest.
        domain: DomainName,
    },
    /// Lists the functions that guests have persistently; the guests need not run.
    PciListPersistent {
        /// Only those of this guest, by name, number or UUID.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest: Option<DomainName>,
    },
    /// Detaches all functions of a guest that is about to be saved.
    Save {
        /// The guest.
        domain: DomainName,
    },
    /// Reserves the functions that a guest was saved with, or equivalent ones.
    Restore {
        /// The guest.
        guest: SavedGuest,
    },
    /// Makes sure that a restored guest, which is still paused, has the functions that were reserved for it.
    Restored {
        /// The guest.
        guest: Uuid,
        /// The reserved functions.
        functions: Vec<ReservedFunction>,
    },
    /// Describes a guest that is to move to another host, and notes that it leaves. It keeps its functions.
    Migrate {
        /// The guest.
        domain: DomainName,
        /// The other host, for messages.
        to: String,
        /// The process that moves it: there is one at a time, and problems are shown only when it has ended.
        process: u32,
    },
    /// Notes that only the other host may let a guest run from now on. The guest must be paused.
    MigrateHandOver {
        /// The guest.
        guest: Uuid,
    },
    /// Reserves functions for a guest that comes from another host, as `restore` does, and notes that it comes.
    MigrateReceive {
        /// The guest.
        guest: SavedGuest,
        /// The other host, for messages.
        from: String,
        /// The process that receives it.
        process: u32,
    },
    /// Ends this host's part of a move. A guest that was handed over has nothing on the host that it leaves any more.
    MigrateEnd {
        /// The guest.
        guest: Uuid,
        /// Which part.
        side: Side,
    },
    /// Enables VFs.
    VfCreate {
        /// The PF.
        address: A,
        /// The number of VFs, from 1 to the PF's TotalVFs.
        count: u16,
        /// Bind a PF without a driver to pci-pf-stub, which does not manage VFs.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        unmanaged: bool,
    },
    /// Sets the number of VFs of a PF.
    VfSetCount {
        /// The PF.
        address: A,
        /// The number of VFs, from 0 to the PF's TotalVFs.
        count: u16,
    },
    /// Disables all VFs of a PF.
    VfDestroy {
        /// The PF.
        address: A,
    },
    /// Lists the VFs of one PF, or of all PFs.
    VfList {
        /// The PF.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        address: Option<A>,
    },
    /// Sets network settings of a VF through its PF, for as long as it is held or attached.
    VfSet {
        /// The VF.
        address: A,
        /// The settings; absent ones are not changed.
        settings: VfSettings,
        /// Set them again after a reboot of the host.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        persist: bool,
    },
    /// Shows the network settings of a VF, or of all VFs of a PF.
    VfShow {
        /// The VF or PF.
        address: A,
    },
    /// Shows the registers on the path of a function that control error reporting.
    AerStatus {
        /// The function; without it, all functions that the service manages.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        address: Option<A>,
    },
    /// Shows the functions and guests that a failure of a function affects.
    BlastRadius {
        /// The function.
        address: A,
    },
    /// Shows the last errors of a function, and the responses.
    AerHistory {
        /// The function.
        address: A,
    },
    /// Shows the last events: errors, decisions, outcomes and changes of state.
    Events {
        /// Continue with a line for each new event, without a final line.
        #[serde(default)]
        follow: bool,
    },
    /// Shows the functions and guests that the service manages, and current problems.
    Status,
    /// Compares sysfs, Xen and xenstore, and repairs differences.
    Sync {
        /// Change nothing; answer with the plan.
        #[serde(default)]
        dry_run: bool,
    },
    /// Shows which policy files apply to a function, and the merged result.
    PolicyShow {
        /// The function.
        address: A,
        /// The guest that would get it; without it, the guest that has it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        domain: Option<String>,
    },
    /// Shows what a guest sees of a function, register by register.
    PolicyExplain {
        /// The function.
        address: A,
        /// The guest that would get it; without it, the guest that has it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        domain: Option<String>,
    },
    /// Shows the blocked writes of a guest.
    PolicyLearn {
        /// A function, or a guest with all its functions.
        target: String,
    },
    /// Reloads the policy files and applies them to all functions, including those of guests.
    PolicyReload,
    /// Starts the installed service in place of the running one, which serves its guests until the new one is ready.
    DaemonReexec,
    /// Clears a function's quarantine, after a verified reset.
    QuarantineClear {
        /// The function.
        address: A,
        /// Do so even if a PV guest that had it may still reach it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        trust_former_owner: bool,
    },
    /// Sends a message of dom0's to the guest of a VF.
    MailboxSend {
        /// The VF.
        address: A,
        /// The type of the message.
        #[serde(rename = "type")]
        kind: u16,
        /// A number for the driver of the VF.
        sequence: u32,
        /// The data in hexadecimal, at most 256 bytes.
        data: String,
    },
    /// Receives the messages for dom0 of a VF, or of all VFs of a PF: at most 64.
    MailboxReceive {
        /// The VF or PF.
        address: A,
    },
}

impl<A> Request<A> {
    /// The command's name in the protocol.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::List { .. } => "list",
            Self::Show { .. } => "show",
            Self::Doctor => "doctor",
            Self::PciAssignableList => "pci-assignable-list",
            Self::PciAssignableAdd { .. } => "pci-assignable-add",
            Self::PciAssignableRemove { .. } => "pci-assignable-remove",
            Self::PciAttach { .. } => "pci-attach",
            Self::PciAttachAll { .. } => "pci-attach-all",
            Self::PciDetach { .. } => "pci-detach",
            Self::PciList { .. } => "pci-list",
            Self::PciListPersistent { .. } => "pci-list-persistent",
            Self::Save { .. } => "save",
            Self::Restore { .. } => "restore",
            Self::Restored { .. } => "restored",
            Self::Migrate { .. } => "migrate",
            Self::MigrateHandOver { .. } => "migrate-hand-over",
            Self::MigrateReceive { .. } => "migrate-receive",
            Self::MigrateEnd { .. } => "migrate-end",
            Self::VfCreate { .. } => "vf-create",
            Self::VfSetCount { .. } => "vf-set-count",
            Self::VfDestroy { .. } => "vf-destroy",
            Self::VfList { .. } => "vf-list",
            Self::VfSet { .. } => "vf-set",
            Self::VfShow { .. } => "vf-show",
            Self::AerStatus { .. } => "aer-status",
            Self::BlastRadius { .. } => "blast-radius",
            Self::AerHistory { .. } => "aer-history",
            Self::Events { .. } => "events",
            Self::Status => "status",
            Self::Sync { .. } => "sync",
            Self::PolicyShow { .. } => "policy-show",
            Self::PolicyExplain { .. } => "policy-explain",
            Self::PolicyLearn { .. } => "policy-learn",
            Self::PolicyReload => "policy-reload",
            Self::DaemonReexec => "daemon-reexec",
            Self::QuarantineClear { .. } => "quarantine-clear",
            Self::MailboxSend { .. } => "mailbox-send",
            Self::MailboxReceive { .. } => "mailbox-receive",
        }
    }

    /// Whether the request changes nothing on the host, so that members of the status group may send it.
    pub const fn changes_nothing(&self) -> bool {
        match self {
            Self::List { .. }
            | Self::Doctor
            | Self::Show { .. }
            | Self::PciAssignableList
            | Self::PciList { .. }
            | Self::PciListPersistent { .. }
            | Self::VfList { .. }
            | Self::VfShow { .. }
            | Self::AerStatus { .. }
            | Self::BlastRadius { .. }
            | Self::AerHistory { .. }
            | Self::Events { .. }
            | Self::Status
            | Self::PolicyShow { .. }
            | Self::PolicyExplain { .. }
            | Self::PolicyLearn { .. } => true,
            Self::Sync { dry_run } => *dry_run,
            // Dry runs of these commands are only for those who may run the commands.
            Self::PciAssignableAdd { .. }
            | Self::PciAssignableRemove { .. }
            | Self::PciAttach { .. }
            | Self::PciAttachAll { .. }
            | Self::PciDetach { .. }
            | Self::Save { .. }
            | Self::Restore { .. }
            | Self::Restored { .. }
            | Self::Migrate { .. }
            | Self::MigrateHandOver { .. }
            | Self::MigrateReceive { .. }
            | Self::MigrateEnd { .. }
            | Self::VfCreate { .. }
            | Self::VfSetCount { .. }
            | Self::VfDestroy { .. }
            | Self::VfSet { .. }
            | Self::PolicyReload
            | Self::QuarantineClear { .. }
            | Self::MailboxSend { .. }
            | Self::MailboxReceive { .. }
            | Self::DaemonReexec => false,
        }
    }

    /// Converts the functions in the request with `of`.
    ///
    /// # Errors
    /// Those of `of`.
    pub fn map<B, E>(self, mut of: impl FnMut(A) -> Result<B, E>) -> Result<Request<B>, E> {
        Ok(match self {
            Self::List { filter } => Request::List { filter },
            Self::Doctor => Request::Doctor,
            Self::Show { address } => Request::Show { address: of(address)? },
            Self::PciAssignableList => Request::PciAssignableList,
            Self::PciAssignableAdd { address, force, persist, managed, dry_run } => {
                Request::PciAssignableAdd { address: of(address)?, force, persist, managed, dry_run }
            }
            Self::PciAssignableRemove { address, force, trust_former_owner } => {
                Request::PciAssignableRemove { address: of(address)?, force, trust_former_owner }
            }
            Self::PciAttach { address, domain, slot, persist, managed, trust_former_owner, dry_run } => {
                Request::PciAttach {
                    address: of(address)?,
                    domain,
                    slot,
                    persist,
                    managed,
                    trust_former_owner,
                    dry_run,
                }
            }
            Self::PciAttachAll { functions, domain, persist, managed, trust_former_owner, dry_run } => {
                let placed = |Placed { address, slot }| Ok(Placed { address: of(address)?, slot });
                let functions = functions.into_iter().map(placed).collect::<Result<_, E>>()?;
                Request::PciAttachAll { functions, domain, persist, managed, trust_former_owner, dry_run }
            }
            Self::PciDetach { address, domain, force, scope } => {
                Request::PciDetach { address: of(address)?, domain, force, scope }
            }
            Self::PciList { domain } => Request::PciList { domain },
            Self::PciListPersistent { guest } => Request::PciListPersistent { guest },
            Self::Save { domain } => Request::Save { domain },
            Self::Restore { guest } => Request::Restore { guest },
            Self::Restored { guest, functions } => Request::Restored { guest, functions },
            Self::Migrate { domain, to, process } => Request::Migrate { domain, to, process },
            Self::MigrateHandOver { guest } => Request::MigrateHandOver { guest },
            Self::MigrateReceive { guest, from, process } => Request::MigrateReceive { guest, from, process },
            Self::MigrateEnd { guest, side } => Request::MigrateEnd { guest, side },
            Self::VfCreate { address, count, unmanaged } => {
                Request::VfCreate { address: of(address)?, count, unmanaged }
            }
            Self::VfSetCount { address, count } => Request::VfSetCount { address: of(address)?, count },
            Self::VfDestroy { address } => Request::VfDestroy { address: of(address)? },
            Self::VfList { address } => Request::VfList { address: address.map(&mut of).transpose()? },
            Self::VfSet { address, settings, persist } => {
                Request::VfSet { address: of(address)?, settings, persist }
            }
            Self::VfShow { address } => Request::VfShow { address: of(address)? },
            Self::AerStatus { address } => Request::AerStatus { address: address.map(&mut of).transpose()? },
            Self::BlastRadius { address } => Request::BlastRadius { address: of(address)? },
            Self::AerHistory { address } => Request::AerHistory { address: of(address)? },
            Self::Events { follow } => Request::Events { follow },
            Self::Status => Request::Status,
            Self::Sync { dry_run } => Request::Sync { dry_run },
            Self::PolicyShow { address, domain } => Request::PolicyShow { address: of(address)?, domain },
            Self::PolicyExplain { address, domain } => {
                Request::PolicyExplain { address: of(address)?, domain }
            }
            Self::PolicyLearn { target } => Request::PolicyLearn { target },
            Self::PolicyReload => Request::PolicyReload,
            Self::DaemonReexec => Request::DaemonReexec,
            Self::QuarantineClear { address, trust_former_owner } => {
                Request::QuarantineClear { address: of(address)?, trust_former_owner }
            }
            Self::MailboxSend { address, kind, sequence, data } => {
                Request::MailboxSend { address: of(address)?, kind, sequence, data }
            }
            Self::MailboxReceive { address } => Request::MailboxReceive { address: of(address)? },
        })
    }
}

impl From<Request> for Request<Target> {
    fn from(request: Request) -> Self {
        let Ok(request) = request.map(|address| Ok::<_, std::convert::Infallible>(address.into()));
        request
    }
}
