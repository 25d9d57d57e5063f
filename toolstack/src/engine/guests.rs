//! Guests: serves and withdraws functions, handles timeouts and the reports of serving threads.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{Level, error, info, warn};
use pciback::platform::Host;
use pciback::serve::pv::{Handshake, NodeChange, nodes};
use pciback::serve::{Attachment, GuestFunction, Server, ServerReport};
use pciback::{DomId, FunctionState, Sbdf};

use super::guest::{Awaited, Guest, Waiting};
use super::open::Opened;
use super::{Answer, Engine, Event};
use crate::journal::{GuestPlace, Record};
use crate::outcome::{ErrorCode, Failure};
use crate::reset_plan::ResetPlan;
use crate::transaction::{Withdrawal, place_of, plan_for, reapply_network, renew_path, reset_and_verify};

/// How long a guest without a connected frontend has to look at its first function before the attachment ends with a note instead.
const FIRST_LOOK: Duration = Duration::from_secs(2);
/// After this time, a guest that may have been suspended is notified again of its device; the interval doubles each time.
const NOTIFY_AGAIN: Duration = Duration::from_millis(500);
/// The longest interval.
const NOTIFY_AGAIN_AT_MOST: Duration = Duration::from_secs(60);

impl Engine {
    /// Serves a function, for a transaction.
    pub(super) fn serve(&mut self, record: &Record, opened: Opened, answer: Answer) {
        let Opened { function, filter, memory, .. } = opened;
        let outdated = !Arc::ptr_eq(&filter.policies, &self.policies);
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
        self.reachable.add(record.address);
        let guest =
            self.guests.entry(place.domain).or_insert_with(|| Guest::new(Handshake::new(place.domain)));
        guest.place(place.devfn, function);
        let waiting = Waiting::new(answer, Awaited::Look, &self.settings, &guest.counters);
        guest.waiting.insert(place.devfn, waiting);
        let actions = guest.handshake.add(place.devfn, record.address);
        self.act(place.domain, actions);
    }

    /// Stops serving a function, for a transaction.
    pub(super) fn withdraw(&mut self, record: &Record, withdrawal: Withdrawal, answer: Answer) {
        let place = match place_of(record) {
            Ok(place) => place,
            Err(failure) => {
                answer.send(Err(failure));
                return;
            }
        };
        let Some(guest) = self.guests.get_mut(&place.domain) else {
            // The function is not served: the transaction had not come that far, or this run could not take the guest over.
            answer.send(self.remove_unserved_nodes(place.domain));
            return;
        };
        if guest.hvm.is_some() {
            // An HVM guest is not asked, because it has no hotplug.
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
            Withdrawal::Force | Withdrawal::GuestEnded => guest.handshake.withdraw_unasked(place.devfn),
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
    pub(super) fn published(&mut self, domain: DomId, devfn: u8) {
        if let Some(guest) = self.guests.get_mut(&domain)
            && let Some(waiting) = guest.waiting.get_mut(&devfn)
            && waiting.for_what == Awaited::Look
        {
            waiting.for_what = Awaited::FirstLook;
            // A paused guest cannot answer.
            let paused = self.platform.hypervisor.domain(domain).is_ok_and(|info| info.paused);
            let limit = if paused { Duration::ZERO } else { FIRST_LOOK };
            waiting.deadline = waiting.deadline.min(Instant::now() + limit);
            // The guest may be one that is being restored, whose watches are not set yet.
            if paused || self.returning.is_returning(domain) {
                guest.notify_again = Some((Instant::now() + NOTIFY_AGAIN, NOTIFY_AGAIN));
            }
        }
    }

    /// The guest cannot be notified of new functions: transactions that wait for it to look at them fail, and are undone.
    pub(super) fn give_up_adding(&mut self, domain: DomId, failure: &Failure) {
        let waiting = self.guests.get(&domain).map(|guest| guest.waiting.keys().copied().collect::<Vec<_>>());
        for devfn in waiting.unwrap_or_default() {
            self.answer(domain, devfn, |awaited| {
                matches!(awaited, Awaited::Look | Awaited::FirstLook).then(|| Err(failure.clone()))
            });
        }
    }

    pub(super) fn answer(
        &mut self,
        domain: DomId,
        devfn: u8,
        with: impl FnOnce(Awaited) -> Option<Result<Option<String>, Failure>>,
    ) {
        let Some(guest) = self.guests.get_mut(&domain) else { return };
        if let Some(waiting) = guest.waiting.get(&devfn)
            && let Some(outcome) = with(waiting.for_what)
        {
            waiting.answer.send(outcome);
            guest.waiting.remove(&devfn);
        }
    }

    /// The guest released the function, or its time limit expired.
    pub(super) fn removed(&mut self, domain: DomId, devfn: u8) {
        if let Some(address) = self.functions.records().at(GuestPlace { domain, devfn }) {
            self.functions.withdraw(address);
        }
        if self.switch_off(domain, devfn, None).is_err() {
            self.answer_removed(domain, devfn, Ok(None));
        }
    }

    pub(super) fn forget_if_idle(&mut self, domain: DomId) {
        if self.guests.get(&domain).is_some_and(|guest| {
            guest.working == 0
                && guest.actions.is_empty()
                && guest.handshake.is_empty()
                && guest.waiting.is_empty()
                && !guest.has_functions()
        }) {
            self.disconnect(domain);
            self.is_idle(domain);
            if let Some(hvm) = self.guests.remove(&domain).and_then(|guest| guest.hvm) {
                return self.end_server(domain, &hvm);
            }
            let directory = nodes::frontend_directory(domain);
            if let Err(error) = self.platform.store.unwatch(&directory, &directory) {
                warn!("domain {domain}: {error}");
            }
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let waiting =
            self.guests.values().flat_map(|guest| guest.waiting.values()).map(|waiting| waiting.deadline);
        let due = self.guests.values().flat_map(|guest| guest.due());
        waiting.chain(due).min()
    }

    /// Notifies guests again of devices that they have not looked at.
    fn notify_again(&mut self, now: Instant) {
        for (domain, guest) in &mut self.guests {
            let Some((_, wait)) = guest.notify_again.filter(|(when, _)| *when <= now) else { continue };
            if !guest.handshake.awaits_frontend() {
                guest.notify_again = None;
                continue;
            }
            // A paused guest receives no watch event.
            let paused = self.platform.hypervisor.domain(*domain).is_ok_and(|info| info.paused);
            let wait = if paused { NOTIFY_AGAIN } else { (wait * 2).min(NOTIFY_AGAIN_AT_MOST) };
            if !paused && let Err(error) = nodes::tell_again(self.platform.store.as_ref(), *domain) {
                warn!("domain {domain}: {error}");
            }
            guest.notify_again = Some((now + wait, wait));
        }
    }

    /// Withdraws functions from guests that exceeded a time limit.
    pub(super) fn check_deadlines(&mut self, now: Instant) {
        self.write_again(now);
        self.notify_again(now);
        let paused = self.guests.iter().filter(|(_, guest)| guest.pause.is_some_and(|over| over <= now));
        for domain in paused.map(|(domain, _)| *domain).collect::<Vec<_>>() {
            if let Some(guest) = self.guests.get_mut(&domain) {
                guest.pause = None;
                let actions = guest.handshake.pause_over();
                self.act(domain, actions);
            }
        }
        let limit = self.settings.guest_limit();
        let mut late = Vec::new();
        for (domain, Guest { waiting, counters, .. }) in &mut self.guests {
            let of_this = waiting.iter_mut().filter_map(|(devfn, waiting)| {
                waiting.is_late(now, limit, counters).then_some((*domain, *devfn, waiting.for_what))
            });
            late.extend(of_this);
        }
        for (domain, devfn, awaited) in late {
            if awaited == Awaited::FirstLook {
                let text =
                    format!("domain {domain} has not connected yet; it will when its xen-pcifront is loaded");
                self.answer(domain, devfn, |_| Some(Ok(Some(text))));
                continue;
            }
            warn!("domain {domain} did not answer in time; the function is withdrawn without it");
            if let Some(guest) = self.guests.get_mut(&domain) {
                if let Some(waiting) = guest.waiting.get_mut(&devfn) {
                    // Extended once, because the withdrawal may take some time.
                    waiting.deadline = now + limit;
                    if waiting.for_what == Awaited::Release {
                        waiting.for_what = Awaited::Withdrawing;
                    }
                }
                let actions = guest.handshake.withdraw_unasked(devfn);
                self.act(domain, actions);
            }
        }
    }

    /// A domain ended: its functions are detached.
    pub(super) fn find_ended_guests(&mut self) {
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
                    && let Some(guest) = self.guests.get_mut(&place.domain)
                {
                    let actions = guest.handshake.withdraw_unasked(place.devfn);
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
        self.return_managed_again();
    }

    /// Stops the serving threads at the end of the service. Guests keep their functions.
    pub(super) fn stop_servers(&mut self) {
        let domains: Vec<DomId> = self.guests.keys().copied().collect();
        for domain in domains {
            self.disconnect(domain);
        }
    }

    pub(super) fn server_reported(&mut self, domain: DomId, report: ServerReport) {
        if let Some(attachment) = report.attachment()
            && !self.functions.is_current(attachment)
        {
            info!(
                "{}: a report about an attachment that has ended is ignored: {report:?}",
                attachment.address()
            );
            return;
        }
        match report {
            ServerReport::ResetWanted(attachment) => self.reset_for_guest(attachment.address()),
            ServerReport::Vanished(attachment) => {
                let address = attachment.address();
                // The function may have left the host: sysfs is read before a decision.
                self.inventory.examine_silent(address);
            }
            ServerReport::DriverStarted(attachment) => self.driver_started(attachment.address()),
            ServerReport::RestoreFailed(attachment, why) => {
                self.quarantine(
                    attachment.address(),
                    &format!("its interrupts could not be restored after a reset: {why}"),
                );
            }
            ServerReport::Notified(attachment, answer) => self.guest_answered(attachment.address(), answer),
            ServerReport::RestartWanted => {
                if let Some(guest) = self.guests.get_mut(&domain) {
                    guest.log_line(Level::Info, &format!("domain {domain}: it resets itself"));
                }
                if let Err(error) = self.platform.hvm.restart(domain) {
                    error!("{error}");
                }
            }
            ServerReport::Failed(why) => {
                // Limited, because a guest can cause this again and again by reconnecting.
                if let Some(guest) = self.guests.get_mut(&domain) {
                    guest.log_line(Level::Error, &format!("domain {domain}: {why}"));
                }
                self.problems.push_of(domain, format!("domain {domain} is not served any more: {why}"));
            }
        }
    }

    /// Resets a function at the request of its guest, on a background thread.
    pub(super) fn reset_for_guest(&mut self, address: Sbdf) {
        self.reset_under_guest(address, None);
    }

    /// Resets a function while its guest has it. `server` is the serving thread that gets an order first, if the guest did not request
    /// the reset.
    pub(super) fn reset_under_guest(&mut self, address: Sbdf, server: Option<(Arc<Server>, u8)>) {
        let Some(attachment) = self.functions.attachment(address) else {
            warn!("{address}: not reset, because no guest has it any more");
            return;
        };
        // A reset that already runs serves this request as well.
        if !self.resets.begin(address) {
            return;
        }
        let Some(record) = self.functions.begin_reset(address) else { return self.resets.end(address) };
        let (network, incarnation) = (record.network, record.incarnation);
        let workshop = self.workshop();
        let (inbox, resets) = (self.inbox.clone(), self.resets.clone());
        let work = move || {
            is_same_device(workshop.platform.host.as_ref(), address, incarnation)?;
            take_before_reset(server)?;
            let function = workshop.platform.host.function(address)?;
            // The guest asked for a reset of this function: one that reaches other functions, or none, must not count as one.
            let plan = ResetPlan {
                together: false,
                permit_none: false,
                ..plan_for(&workshop.settings.reset, &workshop.policies, &function)
            };
            reset_and_verify(&workshop.platform, &plan, &function)
                .and_then(|_| renew_path(&workshop.platform, &workshop.ledger, address))
                .and_then(|()| reapply_network(&workshop.platform, address, network.as_ref()))
        };
        self.inbox.background(&format!("reset {address}"), work, move |outcome| {
            resets.end(address);
            inbox.send(Event::ResetEnded(attachment, outcome.and_then(|outcome| outcome)));
        });
    }

    pub(super) fn reset_ended(&mut self, attachment: Attachment, outcome: Result<(), Failure>) {
        let address = attachment.address();
        if !self.functions.is_current(attachment) {
            info!("{address}: the reset for a guest that no longer has it has ended");
            return;
        }
        let Some(record) = self.functions.end_reset(address) else { return };
        if let Some(place) = record.guest
            && let Some(guest) = self.guests.get_mut(&place.domain)
        {
            if outcome.is_ok() {
                guest.log_line(Level::Info, &format!("{address}: reset for its guest"));
            }
            match &guest.server {
                Some(server) => server.reset_ended(place.devfn, outcome.is_ok()),
                None if outcome.is_ok() => self.restore_parked(place.domain, place.devfn),
                None => {}
            }
        }
        let done = outcome.is_ok();
        if let Err(failure) = outcome {
            self.quarantine(address, &format!("its reset under its guest failed: {failure}"));
        }
        self.reset_for_error_ended(address, done);
    }

    /// Takes over a guest that an earlier run of the service served.
    pub(super) fn resume_guest(
        &mut self,
        domain: DomId,
        functions: Vec<(u8, Sbdf, Box<GuestFunction>)>,
    ) -> Result<(), Failure> {
        let store = Arc::clone(&self.platform.store);
        self.watch_guest(domain)?;
        let state = nodes::read_backend_state(store.as_ref(), domain)?;
        let left = nodes::read_backend_functions(store.as_ref(), domain)?;
        let frontend = nodes::read_frontend(store.as_ref(), domain)?;
        let places: Vec<(u8, Sbdf)> =
            functions.iter().map(|(devfn, address, _)| (*devfn, *address)).collect();
        let resetting: Vec<Sbdf> = functions
            .iter()
            .filter(|(_, _, function)| function.resetting())
            .map(|(_, address, _)| *address)
            .collect();
        let (handshake, actions) = Handshake::resume(domain, state, &left, &places, frontend);
        let mut guest = Guest::new(handshake);
        guest.parked = functions.into_iter().map(|(devfn, _, function)| (devfn, function)).collect();
        if guest.handshake.awaits_frontend() {
            guest.notify_again = Some((Instant::now() + NOTIFY_AGAIN, NOTIFY_AGAIN));
        }
        self.guests.insert(domain, guest);
        self.act(domain, actions);
        for address in resetting {
            // The earlier run may have been killed before, during or after the reset.
            self.reset_for_guest(address);
        }
        Ok(())
    }
}

/// Takes a function from a guest whose thread serves it, until its reset has ended.
fn take_before_reset(server: Option<(Arc<Server>, u8)>) -> Result<(), Failure> {
    let Some((server, devfn)) = server else { return Ok(()) };
    let begun = server.begin_reset(devfn).map_err(|stuck| stuck.to_string());
    begun.and_then(|begun| begun.unwrap_or(Ok(())).map_err(|error| error.to_string())).map_err(|why| {
        Failure::new(ErrorCode::Failed, format!("take it from its guest before a reset: {why}"))
    })
}

/// Refuses the reset if another device has taken the function's address.
fn is_same_device(host: &dyn Host, address: Sbdf, incarnation: u64) -> Result<(), Failure> {
    if incarnation != 0 && host.function(address)?.incarnation != incarnation {
        let text = format!("{address} was replaced by another function before it was reset");
        return Err(Failure::new(ErrorCode::Failed, text).on(address));
    }
    Ok(())
}
