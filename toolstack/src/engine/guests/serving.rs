//! Serving functions of guests and withdrawing them, for transactions, after a restart of the service, and when a guest ends.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use pciback::platform::PlatformError;
use pciback::serve::GuestFunction;
use pciback::serve::pv::nodes::XenbusState;
use pciback::serve::pv::{Handshake, NodeChange, nodes};
use pciback::{Devfn, DomId, FunctionState, Sbdf};

use super::deadlines::NOTIFY_AGAIN;
use super::guest::{Awaited, Guest, Waiting};
use crate::engine::tasks::Opened;
use crate::engine::{Answer, Engine};
use crate::journal::{GuestPlace, Record};
use crate::outcome::Failure;
use crate::transaction::{Withdrawal, place_of};

/// How long a guest without a connected frontend has to look at its first function before the attachment ends with a note instead.
const FIRST_LOOK: Duration = Duration::from_secs(2);

impl Engine {
    /// Serves a function, for a transaction.
    pub(in crate::engine) fn serve(&mut self, record: &Record, opened: Opened, answer: Answer) {
        let Opened { function, filter, memory, .. } = opened;
        let outdated = !Arc::ptr_eq(&filter.policies, &self.policies);
        self.note_vf_requests(&function);
        self.settle_mailboxes(record.address);
        self.functions.serve(function.attachment(), filter);
        // From now on the guest can use the function, and its errors concern the guest.
        let watched = self.watch_errors_of(record.address);
        if outdated {
            // The policies were changed after the transaction compiled the filter.
            self.recompile(vec![record.address]);
        }
        if let Some(memory) = memory {
            let served = watched
                .and_then(|()| place_of(record))
                .and_then(|place| self.serve_hvm(place, function, memory));
            answer.send(served.map(|()| None));
            return;
        }
        let place = watched
            .and_then(|()| place_of(record))
            .and_then(|place| self.watch_guest(place.domain).map(|()| place));
        let place = match place {
            Ok(place) => place,
            Err(failure) => {
                answer.send(Err(failure));
                return;
            }
        };
        self.functions.handover().reachable.add(record.address);
        let guest = self.guests.get_or_new(place.domain);
        guest.place(place.devfn, function);
        let waiting = Waiting::new(answer, Awaited::Look, &self.settings, &guest.counters);
        guest.waiting.insert(place.devfn, waiting);
        let actions = guest.handshake.add(place.devfn, record.address);
        self.act(place.domain, actions);
    }

    /// Stops serving a function, for a transaction.
    pub(in crate::engine) fn withdraw(&mut self, record: &Record, withdrawal: Withdrawal, answer: Answer) {
        let place = match place_of(record) {
            Ok(place) => place,
            Err(failure) => {
                answer.send(Err(failure));
                return;
            }
        };
        let Some(guest) = self.guests.get_mut(place.domain) else {
            // The function is not served: the transaction had not come that far, or this run could not take the guest over.
            answer.send(self.remove_unserved_nodes(place.domain));
            return;
        };
        if guest.hvm.is_some() {
            // An HVM guest was asked before, on the thread of the transaction.
            self.functions.withdraw(record.address);
            if let Err(Some(answer)) = self.switch_off(place.domain, place.devfn, Some(answer)) {
                self.forget_if_idle(place.domain);
                answer.send(Ok(None));
            }
            return;
        }
        let waiting = Waiting::new(answer, Awaited::Release, &self.settings, &guest.counters);
        guest.waiting.insert(place.devfn, waiting);
        let actions = match withdrawal {
            Withdrawal::Ask => guest.handshake.remove(place.devfn),
            Withdrawal::Force => guest.handshake.withdraw_unasked(place.devfn),
            Withdrawal::GuestEnded => guest.handshake.guest_ended(place.devfn),
        };
        self.act(place.domain, actions);
    }

    fn remove_unserved_nodes(&self, domain: DomId) -> Result<Option<String>, Failure> {
        let store = self.platform.store.as_ref();
        if nodes::read_backend_state(store, domain)?.is_some() {
            nodes::apply(store, domain, &[NodeChange::RemoveAll])?;
        }
        Ok(None)
    }

    /// The function is published, but the frontend of the guest is not connected: the transaction waits for a frontend to appear, not for
    /// the answer of one.
    pub(in crate::engine) fn published(&mut self, domain: DomId, devfn: Devfn) {
        if let Some(guest) = self.guests.get_mut(domain)
            && let Some(waiting) = guest.waiting.get_mut(&devfn)
            && waiting.for_what == Awaited::Look
        {
            waiting.for_what = Awaited::FirstLook;
            // A paused guest cannot answer.
            let paused = self.platform.hypervisor.domain(domain).is_ok_and(|info| info.paused);
            let limit = if paused { Duration::ZERO } else { FIRST_LOOK };
            waiting.deadline = waiting.deadline.min(Instant::now() + limit);
            // The guest may be one that is being restored, whose watches are not set yet.
            let may_miss = self.persistent.is_returning(domain) || guest.handshake.may_have_missed_removal();
            if paused || may_miss {
                guest.notify_again.get_or_insert((Instant::now() + NOTIFY_AGAIN, NOTIFY_AGAIN));
            }
        }
    }

    /// The guest cannot be notified of new functions: transactions that wait for it to look at them fail, and are undone.
    pub(super) fn give_up_adding(&mut self, domain: DomId, failure: &Failure) {
        let waiting = self.guests.get(domain).map(|guest| guest.waiting.keys().copied().collect::<Vec<_>>());
        for devfn in waiting.unwrap_or_default() {
            self.answer(domain, devfn, |awaited| {
                matches!(awaited, Awaited::Look | Awaited::FirstLook).then(|| Err(failure.clone()))
            });
        }
    }

    pub(in crate::engine) fn answer(
        &mut self,
        domain: DomId,
        devfn: Devfn,
        with: impl FnOnce(Awaited) -> Option<Result<Option<String>, Failure>>,
    ) {
        let Some(guest) = self.guests.get_mut(domain) else { return };
        if let Some(waiting) = guest.waiting.get(&devfn)
            && let Some(outcome) = with(waiting.for_what)
        {
            waiting.answer.send(outcome);
            guest.waiting.remove(&devfn);
        }
    }

    /// The guest released the function, or its time limit expired.
    pub(in crate::engine) fn removed(&mut self, domain: DomId, devfn: Devfn) {
        if let Some(address) = self.functions.records().at(GuestPlace { domain, devfn }) {
            self.functions.withdraw(address);
        }
        if let Err(error) = nodes::remove_doorbell(self.platform.store.as_ref(), domain, devfn) {
            warn!("domain {domain}: {error}");
        }
        if self.switch_off(domain, devfn, None).is_err() {
            self.answer_removed(domain, devfn, Ok(None));
        }
    }

    pub(super) fn forget_if_idle(&mut self, domain: DomId) {
        if self.guests.get(domain).is_some_and(|guest| {
            guest.working == 0
                && guest.actions.is_empty()
                && guest.handshake.is_empty()
                && guest.waiting.is_empty()
                && !guest.has_functions()
        }) {
            self.disconnect(domain);
            if let Some(hvm) = self.guests.remove(domain).and_then(|guest| guest.hvm) {
                return self.end_server(domain, &hvm);
            }
            let directory = nodes::frontend_directory(domain);
            if let Err(error) = self.platform.store.unwatch(&directory, &directory) {
                warn!("domain {domain}: {error}");
            }
        }
    }

    /// A domain ended: its functions are detached.
    pub(in crate::engine) fn find_ended_guests(&mut self) {
        let users =
            self.functions.records().all().filter_map(|record| record.guest.map(|guest| guest.domain));
        let mut dead: BTreeSet<DomId> = users.collect();
        dead.retain(|domain| matches!(self.platform.store.domain_exists(*domain), Ok(false)));
        let is_dead = |record: &&Record| record.guest.is_some_and(|guest| dead.contains(&guest.domain));
        let affected: Vec<Record> = self.functions.records().all().filter(is_dead).cloned().collect();
        for record in affected {
            if self.functions.is_busy(record.address) {
                self.functions.orphan(record.address);
                // The transaction need not wait for the guest any longer.
                if let Some(place) = record.guest
                    && let Some(guest) = self.guests.get_mut(place.domain)
                {
                    let actions = guest.handshake.guest_ended(place.devfn);
                    self.act(place.domain, actions);
                }
            } else if matches!(
                record.state,
                FunctionState::Attached | FunctionState::Resetting | FunctionState::Quarantined
            ) {
                info!("{}: its guest has ended", record.address);
                self.detach_from_ended(record);
            }
        }
        self.end_dropping();
        self.return_managed_again();
    }

    /// Guests that had lost their functions, and have ended before they dropped the device.
    fn end_dropping(&mut self) {
        let dropping = self.guests.by_domain.iter().filter(|(_, guest)| guest.handshake.is_dropping());
        let mut dead: Vec<DomId> = dropping.map(|(domain, _)| *domain).collect();
        dead.retain(|domain| matches!(self.platform.store.domain_exists(*domain), Ok(false)));
        for domain in dead {
            if let Some(guest) = self.guests.get_mut(domain) {
                let actions = guest.handshake.closing_over();
                self.act(domain, actions);
            }
        }
    }

    /// Takes over guests without functions for which an earlier run waited to drop their device, and removes the nodes of the others.
    pub(in crate::engine) fn take_over_dropping(&mut self) -> Result<(), PlatformError> {
        let store = Arc::clone(&self.platform.store);
        for domain in store.list(nodes::BACKENDS)?.iter().filter_map(|name| name.parse().ok().map(DomId)) {
            let functions = nodes::read_backend_functions(store.as_ref(), domain)?;
            if self.guests.contains(domain) || functions.iter().any(|function| function.address.is_some()) {
                continue;
            }
            if nodes::read_backend_state(store.as_ref(), domain)? == Some(XenbusState::CLOSING) {
                match self.resume_guest(domain, Vec::new()) {
                    Ok(()) => continue,
                    Err(failure) => warn!("domain {domain}: {failure}"),
                }
            }
            nodes::apply(store.as_ref(), domain, &[NodeChange::RemoveAll])?;
        }
        Ok(())
    }

    /// Stops the serving threads at the end of the service. Guests keep their functions.
    pub(in crate::engine) fn stop_servers(&mut self) {
        let domains: Vec<DomId> = self.guests.by_domain.keys().copied().collect();
        for domain in domains {
            self.disconnect(domain);
        }
    }

    /// Takes over a guest that an earlier run of the service served.
    pub(in crate::engine) fn resume_guest(
        &mut self,
        domain: DomId,
        functions: Vec<(Devfn, Sbdf, Box<GuestFunction>)>,
    ) -> Result<(), Failure> {
        let store = Arc::clone(&self.platform.store);
        self.watch_guest(domain)?;
        let state = nodes::read_backend_state(store.as_ref(), domain)?;
        let left = nodes::read_backend_functions(store.as_ref(), domain)?;
        let frontend = nodes::read_frontend(store.as_ref(), domain)?;
        let places: Vec<(Devfn, Sbdf)> =
            functions.iter().map(|(devfn, address, _)| (*devfn, *address)).collect();
        let (handshake, actions) = Handshake::resume(domain, state, &left, &places, frontend);
        let mut guest = Guest::new(handshake);
        guest.parked = functions.into_iter().map(|(devfn, _, function)| (devfn, function)).collect();
        if guest.handshake.awaits_frontend() {
            guest.notify_again = Some((Instant::now() + NOTIFY_AGAIN, NOTIFY_AGAIN));
        }
        self.guests.add(domain, guest);
        self.act(domain, actions);
        Ok(())
    }
}
