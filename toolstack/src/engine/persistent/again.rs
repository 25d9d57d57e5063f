//! Attaching the functions that a guest has persistently to the domain that it runs as now.

use std::collections::BTreeSet;

use log::{error, info, warn};
use pciback::{DomId, FunctionState, Sbdf, Uuid};

use super::{Context, Effect, Persistent};
use crate::domains;
use crate::engine::problems::Problem;
use crate::outcome::Failure;
use crate::protocol::Cause;
use crate::transaction::Finished;

impl Persistent {
    /// Finds domains that have appeared, which are then examined, and forgets those that have ended.
    pub(super) fn new_domains(&mut self, context: &Context<'_>) -> Vec<DomId> {
        if context.files.reservations.is_empty() && context.settings.guests.is_empty() {
            self.known.clear();
            return Vec::new();
        }
        let present = match domains::present(context.platform.store.as_ref()) {
            Ok(present) => {
                self.effects.push(Effect::DomainsFound);
                present
            }
            Err(error) => {
                let text = format!("look for guests that start again: {error}");
                error!("{text}");
                self.effects.push(Effect::Problem(Problem::new(Cause::Starts, text)));
                return Vec::new();
            }
        };
        for domain in self.keep_those_of(&present) {
            context.pause_notes().remove(domain);
        }
        present.into_iter().filter(|domain| self.known.insert(*domain)).collect()
    }

    /// Forgets domains that have ended. Returns those that were kept paused.
    fn keep_those_of(&mut self, present: &BTreeSet<DomId>) -> Vec<DomId> {
        self.known.retain(|domain| present.contains(domain));
        self.unreserved.retain(|domain, _| present.contains(domain));
        self.missing.keep_those_of(present);
        self.starts.keep_those_of(present)
    }

    /// Examines a domain that has appeared.
    pub(super) fn examine_new(&mut self, domain: DomId, context: &Context<'_>) {
        if let Some(guest) = self.examine(domain, context) {
            self.effects.push(Effect::FindAssignments(domain, guest));
        }
    }

    /// Examines a running guest again, for which more functions are reserved now.
    pub(super) fn examine_again(&mut self, domain: DomId, context: &Context<'_>) {
        if self.known.contains(&domain) {
            self.examine(domain, context);
        }
    }

    /// The domains that a guest runs as, as far as they were examined.
    pub(super) fn domains_of(&self, guest: Uuid, context: &Context<'_>) -> Vec<DomId> {
        let hypervisor = &context.platform.hypervisor;
        let runs_as = |domain: &DomId| hypervisor.domain(*domain).is_ok_and(|info| info.uuid == guest);
        self.known.iter().copied().filter(runs_as).collect()
    }

    /// Finds functions that a domain has persistently and that must be attached. Returns the domain's UUID.
    fn examine(&mut self, domain: DomId, context: &Context<'_>) -> Option<Uuid> {
        let guest = match context.platform.hypervisor.domain(domain) {
            Ok(info) => info.uuid,
            Err(error) => {
                // The domain may have ended.
                warn!("{error}");
                self.known.remove(&domain);
                return None;
            }
        };
        if context.is_moving(guest, domain) {
            // It is examined when the move has ended.
            self.known.remove(&domain);
            return None;
        }
        let mut found = false;
        for reservation in context.files.reservations.of(guest) {
            let address = reservation.address;
            if reservation.was_given(context.boot, domain) {
                continue;
            }
            let records = context.functions.records();
            if records.state(address) == FunctionState::Attached && records.guest(address) == Some(domain) {
                let (reservations, boot) = (context.files.reservations.clone(), context.boot.to_owned());
                context.inbox.run("give", move || {
                    if let Err(failure) = reservations.give(reservation, &boot, domain) {
                        error!("{address}: {failure}");
                    }
                });
                continue;
            }
            if self.missing.add(address, domain) {
                info!("{address}: domain {domain} has it persistently");
                found = true;
            }
        }
        if found && self.keep_paused(domain, context) {
            self.try_waiting(domain, context);
        }
        Some(guest)
    }

    pub(super) fn try_waiting(&mut self, domain: DomId, context: &Context<'_>) {
        for address in self.missing.untried(domain) {
            self.attach_again(address, context);
        }
    }

    /// Has a function attached to the guest that has it persistently. A function in a transaction is tried after its end.
    fn attach_again(&mut self, address: Sbdf, context: &Context<'_>) {
        let Some(domain) = self.missing.try_again(address) else { return };
        if !context.functions.is_busy(address) && self.keep_paused(domain, context) {
            self.effects.push(Effect::Attach(address, domain));
        }
    }

    /// Notes that a function could not be attached.
    pub(super) fn not_attached(&mut self, address: Sbdf, failure: &Failure, context: &Context<'_>) {
        let Some(domain) = self.missing.failed(address, failure.to_string()) else { return };
        error!("{address}: not attached again to domain {domain}: {failure}");
        self.unpause_if_ready(domain, context);
    }

    /// Gives up on all functions that a domain waits for.
    pub(super) fn give_up(&mut self, domain: DomId, failure: &Failure, context: &Context<'_>) {
        for address in self.missing.untried(domain) {
            self.not_attached(address, failure, context);
        }
    }

    /// Stops waiting for a function.
    pub(super) fn stop_waiting_for(&mut self, address: Sbdf, context: &Context<'_>) {
        if let Some(domain) = self.missing.remove(address) {
            self.unpause_if_ready(domain, context);
        }
    }

    /// Handles the end of a transaction; `before`: the guest that the function had when it began.
    pub(super) fn finished(&mut self, finished: &Finished, before: Option<DomId>, context: &Context<'_>) {
        let record = &finished.record;
        let address = record.address;
        let under_way = self.missing.is_under_way(address);
        let domain = self.missing.domain(address);
        let attached = domain.is_some()
            && record.guest.map(|place| place.domain) == domain
            && record.state == FunctionState::Attached;
        match &finished.outcome {
            Err(failure) if under_way => self.not_attached(address, failure, context),
            _ if under_way || attached => self.stop_waiting_for(address, context),
            _ => {
                if record.state == FunctionState::Held {
                    self.attach_again(address, context);
                }
                // A device number in the guest may be free now.
                if let Some(domain) = before.filter(|_| record.guest.is_none()) {
                    self.try_again(Some(domain), context);
                }
            }
        }
    }

    /// Retries failed attachments.
    pub(super) fn try_again(&mut self, of: Option<DomId>, context: &Context<'_>) {
        for address in self.missing.all_failed(of) {
            self.attach_again(address, context);
        }
    }
}
