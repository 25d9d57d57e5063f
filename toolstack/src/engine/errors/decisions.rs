//! Which functions are watched, and what is decided about an error that one of them reports.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use log::{error, info, warn};
use nix::errno::Errno;
use pciback::config::Identity;
use pciback::fault::{self, Action, Decision, ErrorPolicy, Fault, Owner, Relation, Severity};
use pciback::policy::{self, Subject};
use pciback::{DomId, FunctionState, Sbdf};

use super::Engine;
use super::watched::Position;
use crate::domains;
use crate::engine::problems::Problem;
use crate::outcome::Failure;
use crate::protocol::{Cause, EventView};

impl Engine {
    /// Updates which functions are watched. Called when a guest gets a function, when a transaction ends, and when a guest of an earlier
    /// run is taken over.
    pub(in crate::engine) fn watch_errors_of(&mut self, address: Sbdf) -> Result<(), Failure> {
        let record = self.functions.records().get(address);
        let given = [FunctionState::Attaching, FunctionState::Attached, FunctionState::Resetting];
        let attached = record.is_some_and(|record| record.guest.is_some() && given.contains(&record.state));
        if !attached {
            self.errors.responses.end(address);
            self.unmask(address);
            if !self.errors.watched.remove(address) {
                return Ok(());
            }
        } else if self.errors.watched.position(address).is_none() {
            let host = self.platform.host.as_ref();
            let function = match host.function(address) {
                // The function has left the host, which `watch` handles.
                Err(error) if error.errno() == Some(Errno::ENOENT) => return Ok(()),
                other => other?,
            };
            let (physical_function, ports) = (function.physical_function, host.ports_above(address)?);
            self.errors.watched.add(address, Position { physical_function, ports });
        }
        let counters = |address| self.platform.errors.counters(address).ok().flatten();
        let records = self.functions.records().all();
        let guests: BTreeSet<DomId> =
            records.filter_map(|record| record.guest).map(|place| place.domain).collect();
        self.errors.watched.update(self.errors.polls.begun(), counters, &guests);
        self.schedule_polls();
        Ok(())
    }

    /// [`Self::watch_errors_of`] for callers that cannot return a failure.
    pub(in crate::engine) fn keep_watching_errors_of(&mut self, address: Sbdf) {
        if let Err(failure) = self.watch_errors_of(address) {
            let text = format!("{address}: its errors are not noticed: {failure}");
            error!("{text}");
            self.problems.push(Problem::new(Cause::ErrorReporting, text).on(address));
        }
    }

    /// Whether an error of this function concerns a guest or the service, and not dom0 alone.
    fn concerns(&self, address: Sbdf) -> bool {
        let watched = &self.errors.watched;
        watched.contains(address) || self.functions.records().get(address).is_some() || {
            // A function of dom0 below a port that is also above a guest's function.
            let ports = self.platform.host.ports_above(address).unwrap_or_default();
            ports.iter().any(|port| watched.contains(*port))
        }
    }

    /// Enters a report into the account of the function, and handles the errors that become due by it.
    pub(super) fn account(&mut self, fault: &Fault) {
        if !self.errors.watched.has_account(fault.address) && !self.concerns(fault.address) {
            return;
        }
        if let Some(due) = self.errors.watched.heard(fault, self.errors.polls.begun()) {
            // Further errors are found by reading the counters.
            self.errors.polls.soon(Instant::now());
            self.handle_error(&due);
        }
    }

    pub(super) fn handle_error(&mut self, fault: &Fault) {
        let ports = |address| self.platform.host.ports_above(address).unwrap_or_default();
        for (address, relation) in self.errors.watched.concerned(fault, ports) {
            self.handle_error_for(address, relation, fault);
        }
    }

    /// Decides what an error means for one of the functions that it concerns.
    fn handle_error_for(&mut self, address: Sbdf, relation: Relation, fault: &Fault) {
        let guest = self.functions.records().guest(address);
        let owned = guest.filter(|_| self.errors.watched.position(address).is_some());
        let policy = owned.map_or_else(ErrorPolicy::default, |domain| self.error_policy(address, domain));
        let mut decision = self.decide(address, owned, relation, fault, &policy);
        if let Some(doing) = self.response_under_way(address)
            && decision.response.action > Action::Log
            && decision.response.action <= doing
        {
            decision.response.action = Action::Log;
            decision.reason = format!("{doing} is under way");
        }
        let action = decision.response.action;
        let mask = decision.response.mask && !self.errors.masks.contains(address);
        let event = EventView::error(address, owned, fault, action, decision.reason);
        if fault.severity == Severity::Correctable && !mask {
            info!("{event}");
        } else {
            warn!("{event}");
        }
        self.note_event(event);
        if relation == Relation::Own && (fault.severity != Severity::Correctable || mask) {
            self.read_registers(address);
        }
        if mask {
            self.mask(address, Duration::from_secs(u64::from(policy.mask_seconds)));
        }
        if let Some(domain) = owned {
            self.respond(address, domain, action, fault, relation, policy);
        }
    }

    fn decide(
        &mut self,
        address: Sbdf,
        owned: Option<DomId>,
        relation: Relation,
        fault: &Fault,
        policy: &ErrorPolicy,
    ) -> Decision {
        let owner = match owned {
            Some(domain) => Owner::Guest { domain, can_be_notified: self.can_be_notified(domain) },
            None if self.functions.records().get(address).is_some() => Owner::Neither,
            None => Owner::Host,
        };
        let now = Instant::now();
        if relation == Relation::Own {
            self.errors.watched.note(fault, owned, now);
        }
        let storms = self.errors.watched.storms(address, owned, policy, now);
        fault::decide(fault, relation, owner, policy, storms)
    }

    /// The error policy for a function of a guest.
    fn error_policy(&self, address: Sbdf, domain: DomId) -> ErrorPolicy {
        let name = domains::name(self.platform.store.as_ref(), domain).ok().flatten();
        if let Some(filter) = self.functions.filter(address) {
            return self.policies.merge(&Subject::of(&filter.spec, name.as_deref())).errors;
        }
        let Ok(function) = self.platform.host.function(address) else { return ErrorPolicy::default() };
        let kind =
            if function.physical_function.is_some() { policy::Kind::Virtual } else { policy::Kind::Physical };
        let subject = Subject { address, identity: Identity::of(&function), kind, domain: name };
        self.policies.merge(&subject).errors
    }
}
