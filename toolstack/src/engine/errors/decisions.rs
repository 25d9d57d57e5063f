//! Which functions are watched, and what is decided about an error that one of them reports.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use log::{info, warn};
use nix::errno::Errno;
use pciback::config::Identity;
use pciback::fault::{
    self, Action, ChannelState, Conversation, Decision, ErrorPolicy, Fault, Owner, Relation, Severity,
};
use pciback::policy::{self, Subject};
use pciback::{DomId, FunctionState, Sbdf};

use super::responses::{self, Response};
use super::watched::Position;
use super::{Context, Effect, Errors};
use crate::domains;
use crate::outcome::Failure;
use crate::protocol::EventView;

impl Errors {
    /// Updates which functions are watched, after one of them may have got another owner.
    pub(super) fn watch(&mut self, address: Sbdf, context: &Context<'_>) -> Result<(), Failure> {
        let records = context.functions.records();
        let given = [FunctionState::Attaching, FunctionState::Attached, FunctionState::Resetting];
        let attached = records
            .get(address)
            .is_some_and(|record| record.guest.is_some() && given.contains(&record.state));
        if !attached {
            self.responses.end(address);
            self.unmask(address, context);
            if !self.watched.remove(address) {
                return Ok(());
            }
        } else if self.watched.position(address).is_none() {
            let host = context.platform.host.as_ref();
            let function = match host.function(address) {
                // The function has left the host, which the engine handles.
                Err(error) if error.errno() == Some(Errno::ENOENT) => return Ok(()),
                other => other?,
            };
            let (physical_function, ports) = (function.physical_function, host.ports_above(address)?);
            self.watched.add(address, Position { physical_function, ports });
        }
        let counters = |address| context.platform.errors.counters(address).ok().flatten();
        let guests: BTreeSet<DomId> =
            records.all().filter_map(|record| record.guest).map(|place| place.domain).collect();
        self.watched.update(self.polls.begun(), counters, &guests);
        self.schedule_polls();
        Ok(())
    }

    /// Whether an error of this function concerns a guest or the service, and not dom0 alone.
    fn concerns(&self, address: Sbdf, context: &Context<'_>) -> bool {
        self.watched.contains(address) || context.functions.records().get(address).is_some() || {
            // A function of dom0 below a port that is also above a guest's function.
            let ports = context.platform.host.ports_above(address).unwrap_or_default();
            ports.iter().any(|port| self.watched.contains(*port))
        }
    }

    /// Enters a report into the account of the function. Returns the errors that become due by it, to be handled.
    pub(super) fn account(&mut self, fault: &Fault, context: &Context<'_>) -> Option<Effect> {
        if !self.watched.has_account(fault.address) && !self.concerns(fault.address, context) {
            return None;
        }
        let due = self.watched.heard(fault, self.polls.begun())?;
        // Further errors are found by reading the counters.
        self.polls.soon(Instant::now());
        Some(Effect::Handle(due))
    }

    pub(super) fn handle_error(&mut self, fault: &Fault, context: &Context<'_>) -> Vec<Effect> {
        let ports = |address| context.platform.host.ports_above(address).unwrap_or_default();
        let concerned = self.watched.concerned(fault, ports);
        let effects = concerned
            .into_iter()
            .flat_map(|(address, relation)| self.handle_error_for(address, relation, fault, context));
        effects.collect()
    }

    /// Decides what an error means for one of the functions that it concerns.
    fn handle_error_for(
        &mut self,
        address: Sbdf,
        relation: Relation,
        fault: &Fault,
        context: &Context<'_>,
    ) -> Vec<Effect> {
        let guest = context.functions.records().guest(address);
        let owned = guest.filter(|_| self.watched.position(address).is_some());
        let policy = owned.map_or_else(ErrorPolicy::default, |domain| error_policy(address, domain, context));
        let mut decision = self.decide(address, owned, relation, fault, &policy, context);
        let wanted = decision.response.action;
        let joined = match wanted {
            Action::TellGuest | Action::Reset => {
                self.responses.join(address, wanted, responses::link_state(fault), relation)
            }
            _ => None,
        };
        if let Some(text) = joined {
            decision.reason = format!("{}; {text}", decision.reason);
        } else if let Some(doing) = self.under_way(address, context)
            && wanted > Action::Log
            && wanted <= doing
        {
            decision.response.action = Action::Log;
            decision.reason = format!("{doing} is under way");
        }
        let action = decision.response.action;
        let mask = decision.response.mask && !self.masks.contains(address);
        let event = EventView::error(address, owned, fault, action, decision.reason);
        if fault.severity == Severity::Correctable && !mask {
            info!("{event}");
        } else {
            warn!("{event}");
        }
        let mut effects = vec![Effect::Note(event)];
        if relation == Relation::Own && (fault.severity != Severity::Correctable || mask) {
            self.read_registers(address, context);
        }
        if mask {
            self.mask(address, Duration::from_secs(u64::from(policy.mask_seconds)), context);
        }
        if let Some(domain) = owned.filter(|_| joined.is_none()) {
            effects
                .extend(self.responses.begin(address, Response { domain, action, fault, relation, policy }));
        }
        effects
    }

    /// The guest with the PF of a VF has started again, and so has the PF's driver. The VF's own guest is notified if its policy has it
    /// notified of resets of the link, which take the VF's state just so.
    pub(super) fn pf_started_again(&mut self, address: Sbdf, context: &Context<'_>) -> Vec<Effect> {
        let record = context.functions.records().get(address);
        let attached = record.filter(|record| record.state == FunctionState::Attached);
        let Some(place) = attached.and_then(|record| record.guest) else { return Vec::new() };
        let (domain, is_busy) = (place.domain, context.functions.is_busy(address));
        let policy = error_policy(address, domain, context);
        if is_busy || policy.link_reset != Action::TellGuest || !context.guests.is_connected(domain) {
            return Vec::new();
        }
        let text = "the driver of its PF has started again";
        let report = |what: &str| {
            info!("{address}: {text}; {what}");
            Effect::Report(address, Ok(format!("{text}; {what}")))
        };
        let (action, state) = (Action::TellGuest, ChannelState::Frozen);
        if let Some(joined) = self.responses.join(address, action, state, Relation::Above) {
            return vec![report(joined)];
        }
        if !self.responses.begin_lost_state(address, domain, policy) {
            return Vec::new();
        }
        [report("its guest is notified")].into_iter().chain(self.responses.notify(address)).collect()
    }

    /// Goes on with a conversation of an earlier run; `None`: its guest is not there to go on with it.
    pub(super) fn resume_conversation(
        &mut self,
        address: Sbdf,
        conversation: Conversation,
        is_reset: bool,
        context: &Context<'_>,
    ) -> Option<Vec<Effect>> {
        let given = [FunctionState::Attached, FunctionState::Resetting];
        let record = context.functions.records().get(address);
        let record = record.filter(|record| given.contains(&record.state) && record.quarantine.is_none())?;
        let domain = record.guest?.domain;
        if context.functions.is_busy(address) || !context.guests.has_same_frontend(domain) {
            return None;
        }
        info!("{address}: going on with what the guest was notified of by the previous xpcid");
        let policy = error_policy(address, domain, context);
        Some(self.responses.resume(address, domain, conversation, policy, is_reset))
    }

    fn decide(
        &mut self,
        address: Sbdf,
        owned: Option<DomId>,
        relation: Relation,
        fault: &Fault,
        policy: &ErrorPolicy,
        context: &Context<'_>,
    ) -> Decision {
        let owner = match owned {
            Some(domain) => Owner::Guest { domain, can_be_notified: context.guests.is_connected(domain) },
            None if context.functions.records().get(address).is_some() => Owner::Neither,
            None => Owner::Host,
        };
        let now = Instant::now();
        if relation == Relation::Own {
            self.watched.note(fault, owned, now);
        }
        let storms = self.watched.storms(address, owned, policy, now);
        fault::decide(fault, relation, owner, policy, storms)
    }

    /// The response that is under way for a function, or that its detachment amounts to.
    fn under_way(&self, address: Sbdf, context: &Context<'_>) -> Option<Action> {
        if let Some(action) = self.responses.action(address) {
            return Some(action);
        }
        let record = context.functions.records().get(address)?;
        let taken = record.state == FunctionState::Detaching;
        taken.then_some(if record.quarantine.is_some() { Action::Quarantine } else { Action::Unplug })
    }
}

/// The error policy for a function of a guest.
fn error_policy(address: Sbdf, domain: DomId, context: &Context<'_>) -> ErrorPolicy {
    let (platform, policies) = (context.platform, context.policies);
    let name = domains::name(platform.store.as_ref(), domain).ok().flatten();
    if let Some(filter) = context.functions.filter(address) {
        return policies.merge(&Subject::of(&filter.spec, name.as_deref())).errors;
    }
    let Ok(function) = platform.host.function(address) else { return ErrorPolicy::default() };
    let kind =
        if function.physical_function.is_some() { policy::Kind::Virtual } else { policy::Kind::Physical };
    let subject = Subject { address, identity: Identity::of(&function), kind, domain: name };
    policies.merge(&subject).errors
}
