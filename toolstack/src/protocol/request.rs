//! What the service can be asked for.

use pciback::platform::VfSettings;
use pciback::{Sbdf, Uuid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DomainName, ListFilter, ReservedFunction};
use crate::saved::SavedGuest;
use crate::target::Target;

/// What a guest loses with a function that it has persistently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// The function, persistently.
    #[default]
    All,
    /// The function, until it starts again.
    Live,
    /// Not the function, but it does not get it again.
    Persistent,
}

impl Scope {
    /// Whether it is the usual one.
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
    /// The device number the guest sees it at, 0-31; the first free one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
}

/// What the service can do. `A` is what functions are called: on the wire what the user calls them ([`Target`]), in the service their
/// addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "command", content = "arguments", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
#[serde(deny_unknown_fields, bound(deserialize = "A: Deserialize<'de>"))]
pub enum Request<A = Sbdf> {
    /// Lists the host's functions, whoever has them.
    List {
        /// Which.
        #[serde(default)]
        filter: ListFilter,
    },
    /// Checks how dom0 is set up, and says what to do where something is amiss.
    Doctor,
    /// Shows all that is known of a function, and what keeps it from a guest.
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
        /// Takes it even while something in dom0 uses it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
        /// It is held again after a reboot of the host, and whenever it appears.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        persist: bool,
        /// Only says what would be done, or all that is in the way.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        dry_run: bool,
    },
    /// Gives a held function back to dom0 and the driver it came from.
    PciAssignableRemove {
        /// The function.
        address: A,
        /// Takes it even from the guest that has it persistently, and does not run.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
        /// Does so although a PV guest that had it may still reach it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        trust_former_owner: bool,
    },
    /// Gives a held function to a guest.
    PciAttach {
        /// The guest.
        domain: DomainName,
        /// The function.
        address: A,
        /// The device number the guest sees it at, 0-31; the first free one when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        slot: Option<u8>,
        /// The guest has it persistently: it gets it again whenever it starts.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        persist: bool,
        /// Does so although a PV guest that had it may still reach it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        trust_former_owner: bool,
        /// Only says what would be done, or all that is in the way.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        dry_run: bool,
    },
    /// Gives several held functions to a guest, all or none.
    PciAttachAll {
        /// The guest.
        domain: DomainName,
        /// The functions, 1 to 32.
        functions: Vec<Placed<A>>,
        /// The guest has them persistently.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        persist: bool,
        /// Does so although a PV guest that had one of them may still reach it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        trust_former_owner: bool,
        /// Only says what would be done, or all that is in the way.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        dry_run: bool,
    },
    /// Takes a function from a guest and holds it again.
    PciDetach {
        /// The guest.
        domain: DomainName,
        /// The function.
        address: A,
        /// Does not wait for the guest to let go.
        #[serde(default)]
        force: bool,
        /// What it loses.
        #[serde(default, skip_serializing_if = "Scope::is_all")]
        scope: Scope,
    },
    /// Lists the functions of a guest.
    PciList {
        /// The guest.
        domain: DomainName,
    },
    /// Lists the functions that guests have persistently, whether they run or not.
    PciListPersistent {
        /// Only those of this guest, by name, number or UUID.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest: Option<DomainName>,
    },
    /// Takes all functions of a guest that is about to be saved.
    Save {
        /// The guest.
        domain: DomainName,
    },
    /// Reserves what a guest was saved with, or its equals.
    Restore {
        /// The guest.
        guest: SavedGuest,
    },
    /// Makes sure that a restored guest, paused still, has what was reserved for it.
    Restored {
        /// The guest.
        guest: Uuid,
        /// What was reserved.
        functions: Vec<ReservedFunction>,
    },
    /// Enables VFs.
    VfCreate {
        /// The PF.
        address: A,
        /// How many, from 1 to the PF's total.
        count: u16,
        /// Binds a PF that has no driver to pci-pf-stub, which manages nothing.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        unmanaged: bool,
    },
    /// Makes a PF have this many VFs, 0 included.
    VfSetCount {
        /// The PF.
        address: A,
        /// How many, up to the PF's total.
        count: u16,
    },
    /// Disables all VFs of a PF.
    VfDestroy {
        /// The PF.
        address: A,
    },
    /// Lists the VFs of one PF, or of all.
    VfList {
        /// The PF.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        address: Option<A>,
    },
    /// Sets network settings of a VF through its PF, for as long as it is held or attached.
    VfSet {
        /// The VF.
        address: A,
        /// What to set; the rest stays as it is.
        settings: VfSettings,
        /// They are in force after a reboot of the host too.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        persist: bool,
    },
    /// Shows the network settings of a VF, or of all VFs of a PF.
    VfShow {
        /// The VF or PF.
        address: A,
    },
    /// The registers on the path of a function that decide over its errors.
    AerStatus {
        /// The function; without it, all that the service looks after.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        address: Option<A>,
    },
    /// Who is hit when a function fails.
    BlastRadius {
        /// The function.
        address: A,
    },
    /// What happened to a function as far as errors are concerned.
    AerHistory {
        /// The function.
        address: A,
    },
    /// What happened last to functions: errors, what was decided, what came of it, and where they stand.
    Events {
        /// Goes on: each event that comes is a line of its own, and there is no final one.
        #[serde(default)]
        follow: bool,
    },
    /// What the service knows: functions, guests, what is wrong.
    Status,
    /// Brings sysfs, Xen and xenstore into step.
    Sync {
        /// Only says what would be done.
        #[serde(default)]
        dry_run: bool,
    },
    /// Which policy files apply to a function, and what they say together.
    PolicyShow {
        /// The function.
        address: A,
        /// The guest that would get it; without it, the one that has it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        domain: Option<String>,
    },
    /// What a guest sees of a function, register by register.
    PolicyExplain {
        /// The function.
        address: A,
        /// The guest that would get it; without it, the one that has it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        domain: Option<String>,
    },
    /// What a guest wrote without effect.
    PolicyLearn {
        /// A function, or a guest with all its functions.
        target: String,
    },
    /// Reads the policy files again and puts them in force for all functions, those of guests included.
    PolicyReload,
    /// Starts the installed service in place of the running one, which serves its guests until the new one is ready.
    DaemonReexec,
    /// Clears a function's quarantine, after a verified reset.
    QuarantineClear {
        /// The function.
        address: A,
        /// Does so although a PV guest that had it may still reach it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        trust_former_owner: bool,
    },
}

impl<A> Request<A> {
    /// The command's word, as in the protocol.
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
        }
    }

    /// Whether answering it leaves the host, its guests and the service as they are: users without root may be answered.
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
            // Also where they are only to say what they would do: that is a question of those who may do it.
            Self::PciAssignableAdd { .. }
            | Self::PciAssignableRemove { .. }
            | Self::PciAttach { .. }
            | Self::PciAttachAll { .. }
            | Self::PciDetach { .. }
            | Self::Save { .. }
            | Self::Restore { .. }
            | Self::Restored { .. }
            | Self::VfCreate { .. }
            | Self::VfSetCount { .. }
            | Self::VfDestroy { .. }
            | Self::VfSet { .. }
            | Self::PolicyReload
            | Self::QuarantineClear { .. }
            | Self::DaemonReexec => false,
        }
    }

    /// The same request, with what `of` makes of what the function is called.
    ///
    /// # Errors
    /// That of `of`.
    pub fn map<B, E>(self, mut of: impl FnMut(A) -> Result<B, E>) -> Result<Request<B>, E> {
        Ok(match self {
            Self::List { filter } => Request::List { filter },
            Self::Doctor => Request::Doctor,
            Self::Show { address } => Request::Show { address: of(address)? },
            Self::PciAssignableList => Request::PciAssignableList,
            Self::PciAssignableAdd { address, force, persist, dry_run } => {
                Request::PciAssignableAdd { address: of(address)?, force, persist, dry_run }
            }
            Self::PciAssignableRemove { address, force, trust_former_owner } => {
                Request::PciAssignableRemove { address: of(address)?, force, trust_former_owner }
            }
            Self::PciAttach { address, domain, slot, persist, trust_former_owner, dry_run } => {
                Request::PciAttach {
                    address: of(address)?,
                    domain,
                    slot,
                    persist,
                    trust_former_owner,
                    dry_run,
                }
            }
            Self::PciAttachAll { functions, domain, persist, trust_former_owner, dry_run } => {
                let placed = |Placed { address, slot }| Ok(Placed { address: of(address)?, slot });
                let functions = functions.into_iter().map(placed).collect::<Result<_, E>>()?;
                Request::PciAttachAll { functions, domain, persist, trust_former_owner, dry_run }
            }
            Self::PciDetach { address, domain, force, scope } => {
                Request::PciDetach { address: of(address)?, domain, force, scope }
            }
            Self::PciList { domain } => Request::PciList { domain },
            Self::PciListPersistent { guest } => Request::PciListPersistent { guest },
            Self::Save { domain } => Request::Save { domain },
            Self::Restore { guest } => Request::Restore { guest },
            Self::Restored { guest, functions } => Request::Restored { guest, functions },
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
        })
    }
}

impl From<Request> for Request<Target> {
    fn from(request: Request) -> Self {
        let Ok(request) = request.map(|address| Ok::<_, std::convert::Infallible>(address.into()));
        request
    }
}
