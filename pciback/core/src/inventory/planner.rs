//! Plans the steps from the observed state to the wanted one.

use super::lists::Lists;
use super::{
    Function, GuestPlace, Intent, Left, Observed, Owner, Plan, Published, Reason, Remark, Repair, Step, Want,
    Wanted,
};
use crate::Sbdf;

/// Plans the repairs that bring the three lists into step with each other and with what is wanted.
///
/// The order is one that Xen accepts at every step (`docs/xen-answers.md`), from every state:
/// 1. distrust is noted before anything is done because of it, so that a plan that ends half-way is not forgotten;
/// 2. guests lose what they are not to have, VFs before PFs, nodes first: Xen does not protect a function that a guest has from
///    being removed from its list;
/// 3. MSI-X tables are released, only of functions that have one, that Xen knows and that no guest owns;
/// 4. functions of their own and PFs are reported; then VFs that left are removed, only while Xen knows their PF; then
///    what else left, only when Xen knows no VF of it any more; then VFs are reported;
/// 5. functions are held, or given back; nodes are written; records end.
///
/// What another program did on purpose is adopted and not undone: VFs that were made or unmade through sysfs are reported or
/// removed like all others and not restored; functions that xen-pciback holds for xl, and guests that got theirs from xl,
/// keep them ([`Remark::HeldByOthers`], [`Remark::GivenByOthers`]). Of a function without a record only Xen's list and our own
/// nodes are repaired; drivers and owners of functions are changed only where a record says so. A record is an intention:
/// a held function that lost its holding driver is held again. And what left the host is removed from Xen's list, whoever owns it
/// there, as dom0's kernel does: the next device in that slot would be that guest's.
///
/// An owner that Xen does not report exactly counts as the wanted one where both are possible; where Xen reported nothing, no
/// step is planned that depends on it.
pub fn plan(observed: &Observed, wanted: &Wanted) -> Plan {
    let mut planner =
        Planner { observed, wanted, lists: Lists::new(observed, wanted), out: Phases::default() };
    for node in &observed.published {
        planner.node(node);
    }
    let nothing = Function::default();
    for (&address, intent) in &wanted.functions {
        let function = observed.get(address).unwrap_or(&nothing);
        if !wanted.is_busy(address, function.physical_function) {
            planner.intent(address, function, intent);
        }
    }
    for (&address, function) in &observed.functions {
        if !wanted.is_busy(address, function.physical_function) {
            planner.remark(address, function);
        }
    }
    planner.finish()
}

/// Steps by the phase in which they run; those of Xen's list are apart.
#[derive(Default)]
struct Phases {
    distrust: Vec<Step>,
    leave: Vec<Step>,
    release_msix: Vec<Step>,
    hold: Vec<Step>,
    publish: Vec<Step>,
    records: Vec<Step>,
    left: Vec<Left>,
}

struct Planner<'a> {
    observed: &'a Observed,
    wanted: &'a Wanted,
    lists: Lists,
    out: Phases,
}

impl Planner<'_> {
    fn finish(self) -> Plan {
        let Self { observed, lists, mut out, .. } = self;
        let is_vf = |step: &Step| observed.pf(step.repair.address()).is_some();
        out.leave.sort_by_cached_key(|step| (!is_vf(step), step.repair.address()));
        let phases = [
            out.distrust,
            out.leave,
            out.release_msix,
            lists.report_plain,
            lists.remove,
            lists.report_vfs,
            out.hold,
            out.publish,
            out.records,
        ];
        let mut left = lists.left;
        left.append(&mut out.left);
        left.sort_by_key(|left| left.address);
        Plan { steps: phases.into_iter().flatten().collect(), left }
    }

    /// One function in one guest's nodes.
    fn node(&mut self, node: &Published) {
        let &Published { address, place } = node;
        let intent = self.wanted.functions.get(&address);
        // A place that is given up takes its nodes along.
        if intent.and_then(Intent::place) == Some(place)
            || self.wanted.is_busy(address, self.observed.pf(address))
        {
            return;
        }
        let exists = self.observed.domains.contains(&place.domain);
        let reason = if exists { Reason::Unrecorded } else { Reason::GuestEnded };
        self.out.leave.push(Step { repair: Repair::RemoveNodes { address, place }, reason });
        // Given by this service, of which no record is left: what else the guest has of it is unknown.
        let function = self.observed.get(address);
        let owner = function.filter(|function| function.host.is_some()).and_then(|function| function.xen);
        let owns = owner == Some(Owner::Domain(place.domain)) || owner == Some(Owner::Guest);
        if exists && owns && intent.is_none_or(|intent| intent.want == Want::Host) {
            self.distrust(address, Reason::Unrecorded);
        }
    }

    fn distrust(&mut self, address: Sbdf, reason: Reason) {
        let repair = Repair::Quarantine { address };
        // Nodes of two guests may say the same.
        if self.out.distrust.last().is_none_or(|last| last.repair != repair) {
            self.out.distrust.push(Step { repair, reason });
        }
    }

    fn intent(&mut self, address: Sbdf, function: &Function, intent: &Intent) {
        if let Some(place) = intent.place() {
            return self.with_guest(address, function, intent, place);
        }
        if intent.msix_prepared && may_release_msix(function) {
            let repair = Repair::ReleaseMsix { address };
            self.out.release_msix.push(Step { repair, reason: Reason::LeftPrepared });
        }
        let owner = self.lists.owner(address, function);
        match intent.want {
            Want::Held => self.held(address, function, intent, owner, false),
            Want::Gone if function.host.is_some() => {
                self.forget(address, function, owner, Reason::Returned);
            }
            Want::Host | Want::Gone | Want::Quarantined(_) | Want::Attached(_) => {}
        }
    }

    /// A function that a guest has.
    fn with_guest(&mut self, address: Sbdf, function: &Function, intent: &Intent, place: GuestPlace) {
        let attached = matches!(intent.want, Want::Attached(_));
        let Some(reason) = self.why_leave(function, intent, place) else {
            if attached && !self.observed.published.contains(&Published { address, place }) {
                let repair = Repair::Publish { address, place };
                self.out.publish.push(Step { repair, reason: Reason::NotPublished });
            }
            if function.host.as_ref().is_some_and(|host| !host.held) {
                self.out.left.push(Left { address, remark: Remark::NoHolderUnderGuest });
            }
            return;
        };
        let repair = match reason {
            Reason::GuestEnded => Repair::DetachFromDead { address, place },
            _ => Repair::Withdraw { address, place },
        };
        self.out.leave.push(Step { repair, reason });
        if !attached {
            return;
        }
        match reason {
            Reason::Replaced | Reason::OwnedBy { .. } => self.distrust(address, reason),
            Reason::Left => {
                self.out.records.push(Step { repair: Repair::MarkGone { address }, reason });
            }
            _ => {
                let owner = match self.lists.owner(address, function) {
                    Some(Owner::Domain(owner)) if owner == place.domain => Some(Owner::Quarantine),
                    Some(Owner::Guest) => Some(Owner::Quarantine),
                    other => other,
                };
                self.held(address, function, intent, owner, true);
            }
        }
    }

    /// Why a guest cannot keep a function, if so.
    fn why_leave(&self, function: &Function, intent: &Intent, place: GuestPlace) -> Option<Reason> {
        if !self.observed.domains.contains(&place.domain) {
            return Some(Reason::GuestEnded);
        }
        let Some(host) = &function.host else { return Some(Reason::Left) };
        if !is_recorded(function, intent) {
            return Some(Reason::Replaced);
        }
        match function.xen {
            None => Some(Reason::ForgottenUnderGuest),
            Some(Owner::Host | Owner::Quarantine | Owner::Free) => Some(Reason::LostByGuest),
            Some(Owner::Domain(owner)) if owner != place.domain => {
                Some(Reason::OwnedBy { owner: Some(owner) })
            }
            Some(Owner::Domain(_) | Owner::Guest | Owner::Unknown) => {
                (host.driver && !host.held).then_some(Reason::DriverUnderGuest)
            }
        }
    }

    /// A function that should be held. `taken`: this plan takes it from a guest.
    fn held(
        &mut self,
        address: Sbdf,
        function: &Function,
        intent: &Intent,
        owner: Option<Owner>,
        taken: bool,
    ) {
        let Some(host) = &function.host else {
            return self.forget(address, function, owner, Reason::Left);
        };
        if !is_recorded(function, intent) {
            return self.forget(address, function, owner, Reason::Replaced);
        }
        if host.bridge {
            return self.distrust(address, Reason::Bridge);
        }
        let reason = match owner {
            // Why Xen cannot know it is said where its list is repaired.
            None => return,
            Some(Owner::Domain(owner)) if !self.observed.domains.contains(&owner) => {
                self.out.left.push(Left { address, remark: Remark::OwnerEnding });
                return;
            }
            Some(Owner::Domain(owner)) => {
                return self.distrust(address, Reason::OwnedBy { owner: Some(owner) });
            }
            Some(Owner::Guest) => return self.distrust(address, Reason::OwnedBy { owner: None }),
            Some(Owner::Unknown) if host.held => return,
            Some(Owner::Unknown) => {
                self.out.left.push(Left { address, remark: Remark::OwnerUnknown });
                return;
            }
            _ if !host.held => Reason::NotHeld,
            Some(Owner::Host) => Reason::NotQuarantined,
            // Xen does not distinguish dom0 from the quarantine domain, and the guest did not own it.
            Some(Owner::Free) if taken => Reason::NotQuarantined,
            Some(Owner::Quarantine | Owner::Free) => return,
        };
        if !host.held && host.num_vfs > 0 {
            self.out.left.push(Left { address, remark: Remark::VfsInTheWay });
            return;
        }
        self.out.hold.push(Step { repair: Repair::Hold { address }, reason });
    }

    /// Ends a record: a function that is in the slot now belongs to dom0, or to the program that holds it.
    fn forget(&mut self, address: Sbdf, function: &Function, owner: Option<Owner>, reason: Reason) {
        let nobody_holds = function.host.as_ref().is_some_and(|host| !host.held);
        if nobody_holds && matches!(owner, Some(Owner::Quarantine | Owner::Free)) {
            let repair = Repair::Release { address };
            self.out.hold.push(Step { repair, reason: Reason::NobodyHolds });
        }
        self.out.records.push(Step { repair: Repair::Forget { address }, reason });
    }

    /// Reports about every function, whether it is wanted or not.
    fn remark(&mut self, address: Sbdf, function: &Function) {
        let Some(host) = &function.host else { return };
        let intent = self.wanted.functions.get(&address);
        let ours = intent.is_some_and(|intent| intent.want != Want::Host);
        let owned = match function.xen {
            Some(Owner::Domain(owner)) => self.observed.domains.contains(&owner),
            Some(Owner::Guest) => true,
            _ => false,
        };
        let remark = if usize::from(host.num_vfs) != host.virtual_functions.len() {
            Remark::Unsettled
        } else if !ours && owned {
            Remark::GivenByOthers
        } else if !ours && host.held {
            Remark::HeldByOthers
        } else {
            return;
        };
        self.out.left.push(Left { address, remark });
    }
}

/// Whether a function may be the one that was recorded.
fn is_recorded(function: &Function, intent: &Intent) -> bool {
    match (&function.host, &intent.identity) {
        (Some(host), Some(identity)) => host.identity.may_be(identity),
        _ => true,
    }
}

/// Whether Xen would not mind: the table is there, and no guest may have entries of it mapped.
fn may_release_msix(function: &Function) -> bool {
    function.host.as_ref().is_some_and(|host| host.msix)
        && matches!(function.xen, Some(Owner::Host | Owner::Quarantine | Owner::Free))
}
