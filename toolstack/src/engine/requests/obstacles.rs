//! Collects all obstacles to holding or attaching a function, so that one answer lists them together.

use pciback::platform::{HostFunction, Platform};
use pciback::policy::Reuse;
use pciback::{DomId, FunctionState, Sbdf};

use super::{holdable, not_in_state};
use crate::engine::Engine;
use crate::engine::tasks::TaskContext;
use crate::journal::Record;
use crate::outcome::Failure;
use crate::protocol::Success;
use crate::reply::Reply;
use crate::settings::Holder;
use crate::transaction::{
    Buses, choose_holder, guest_owned, holder_of, is_owned_by_other_toolstack, plan_for, refuse_in_use,
    refuse_unusable_rom,
};

/// A refused action.
pub(in crate::engine) struct Refusal {
    /// The function.
    pub address: Sbdf,
    /// The action, in words that follow "to".
    pub action: String,
    /// The obstacles.
    pub found: Vec<Failure>,
}

/// Whether a function is taken even while something in dom0 uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum InUse {
    /// It is refused then.
    Refused,
    /// It is taken even then (`--force`).
    Taken,
}

impl InUse {
    /// By the option `--force`.
    pub const fn by_force(force: bool) -> Self {
        if force { Self::Taken } else { Self::Refused }
    }
}

/// Whether former owners are waited for, by the option `--trust-former-owner`.
pub(in crate::engine) const fn reuse_with(trust_former_owner: bool) -> Reuse {
    if trust_former_owner { Reuse::Trusted } else { Reuse::AfterShutdown }
}

/// Checks that need a thread.
#[derive(Default)]
pub(in crate::engine) struct ThreadChecks {
    /// Check for obstacles to holding.
    pub hold: Option<InUse>,
    /// Check what the function shares with functions of owners other than this domain, or of any owner.
    pub shares: Option<Option<DomId>>,
}

/// Whether shared resources are relevant: a function in any other state cannot be attached anyway.
pub(super) fn shares_with_others(state: FunctionState, function: &HostFunction) -> bool {
    matches!(state, FunctionState::Held | FunctionState::Host) && !function.is_bridge()
}

/// Obstacles to an attachment that are checked on a thread: another toolstack owns the function (checked if it has a record), or it
/// shares resources with functions of owners other than `domain` (`None`: of any owner), or the ROM that policies give it is unusable.
pub(super) fn shared_obstacles(
    context: &TaskContext,
    address: Sbdf,
    record: Option<&Record>,
    domain: Option<DomId>,
) -> Vec<Failure> {
    let found = context.sharing().obstacles(address, domain);
    let mut found = found.unwrap_or_else(|failure| vec![failure]);
    if let Some(record) = record {
        match is_owned_by_other_toolstack(&context.platform, record) {
            Ok(false) => {}
            Ok(true) => found.insert(0, guest_owned(&context.platform, address)),
            Err(failure) => found.push(failure),
        }
    }
    let guest = domain.filter(|domain| *domain != DomId::DOM0);
    // Nothing of a guest's matters for a function that goes back to dom0.
    if domain != Some(DomId::DOM0)
        && let Err(failure) = refuse_unusable_rom(&context.platform, &context.policies, address, guest)
    {
        found.push(failure);
    }
    found
}

/// Obstacles to holding that are checked on a thread: the function is in use, or no holding driver is available.
pub(super) fn hold_obstacles(
    platform: &Platform,
    holder: Holder,
    address: Sbdf,
    in_use: InUse,
) -> Vec<Failure> {
    let host = platform.host.as_ref();
    let in_use = match in_use {
        InUse::Refused => refuse_in_use(host, address),
        InUse::Taken => Ok(()),
    };
    let held = host.function(address).is_ok_and(|function| holder_of(&function).is_some());
    let holder = if held { Ok(()) } else { choose_holder(host, holder).map(drop) };
    [in_use, holder].into_iter().filter_map(Result::err).collect()
}

/// The action of an attachment, in words that follow "to".
pub(super) fn attaching(address: Sbdf, domain: DomId) -> String {
    format!("attach {address} to domain {domain}")
}

/// The refusal to attach a function that dom0 has.
fn not_assignable(address: Sbdf) -> Failure {
    Failure::refused(format!("{address} is not assignable"))
        .on(address)
        .hint(format!("run 'xpci pci-assignable-add {address}' first, or attach it with --managed"))
}

impl TaskContext {
    /// Why a function that was just held cannot be attached yet, because of what it shares with functions of other owners.
    pub(in crate::engine) fn shares(&self, address: Sbdf) -> Vec<String> {
        match self.sharing().obstacles(address, None) {
            Ok(found) => {
                found.iter().map(|failure| format!("it cannot be attached yet: {failure}")).collect()
            }
            Err(failure) => vec![format!("what it shares with other functions is unknown: {failure}")],
        }
    }
}

impl Engine {
    /// Obstacles to an attachment to a domain, or to any, as far as they can be checked without waiting. With [`Reuse::Trusted`], former PV
    /// owners that can still reach the function are no obstacle.
    pub(in crate::engine) fn attach_obstacles(
        &self,
        function: &HostFunction,
        domain: Option<DomId>,
        reuse: Reuse,
    ) -> Vec<Failure> {
        let record = self.functions.records().get_or_new(function.address);
        match record.state {
            FunctionState::Held => self.held_obstacles(function, domain, reuse),
            FunctionState::Host if function.is_bridge() => holdable(&self.platform, function),
            FunctionState::Host => {
                [vec![not_assignable(function.address)], self.managed_obstacles(function, domain, reuse)]
                    .concat()
            }
            other => vec![not_in_state(&record, other, "attached")],
        }
    }

    /// The same for a function of dom0 that is held first.
    pub(super) fn managed_obstacles(
        &self,
        function: &HostFunction,
        domain: Option<DomId>,
        reuse: Reuse,
    ) -> Vec<Failure> {
        let found = holdable(&self.platform, function);
        match function.is_bridge() {
            // No other obstacle matters: a bridge can never be attached.
            true => found,
            false => [found, self.held_obstacles(function, domain, reuse)].concat(),
        }
    }

    /// Obstacles that do not depend on whether the function is held.
    fn held_obstacles(&self, function: &HostFunction, domain: Option<DomId>, reuse: Reuse) -> Vec<Failure> {
        let address = function.address;
        let not_reserved = |domain| self.persistent_context().not_reserved(function, domain);
        let reserved = domain.map_or(Ok(()), not_reserved);
        let action = match domain {
            Some(domain) => attaching(address, domain),
            None => format!("attach {address}"),
        };
        let reach = self.out_of_reach(address, domain, &action, reuse);
        // Checked before anything is changed: an attachment that ends without a reset leaves the function quarantined.
        let reset = self.refuse_unresettable(function, domain);
        let checks = [reserved, self.permitted(function, domain), reach, reset];
        checks.into_iter().filter_map(Result::err).collect()
    }

    /// Refuses a function that cannot be reset in a way that the policies permit. `domain`: its guest, if that is known.
    pub(in crate::engine) fn refuse_unresettable(
        &self,
        function: &HostFunction,
        domain: Option<DomId>,
    ) -> Result<(), Failure> {
        let plan = plan_for(&self.settings.reset, &self.policies, function);
        let buses = Buses {
            platform: &self.platform,
            journal: &self.files.journal,
            fresh: &self.functions.handover().fresh,
        };
        buses.refuse_unresettable(&plan, function, domain)
    }

    /// Answers with all obstacles to an action, including those that `checks` finds on a thread; with `otherwise` if there are none.
    pub(super) fn answer_with_obstacles(
        &self,
        refusal: Refusal,
        checks: ThreadChecks,
        otherwise: Success,
        reply: Reply,
    ) {
        let (context, holder) = (self.task_context(), self.settings.holder);
        let Refusal { address, action, found } = refusal;
        let record = self.functions.records().get(address).cloned();
        self.background("obstacles", move || {
            let hold = checks.hold;
            let hold = hold.map(|in_use| hold_obstacles(&context.platform, holder, address, in_use));
            let shares = checks.shares;
            let shares = shares.map(|domain| shared_obstacles(&context, address, record.as_ref(), domain));
            let found = [found, hold.unwrap_or_default(), shares.unwrap_or_default()].concat();
            reply.done(Failure::refuse_for(&action, found).map(|()| otherwise));
        });
    }
}
