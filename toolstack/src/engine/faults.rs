//! Errors that functions report: receiving them, accounting, and deciding about a response.
//!
//! Each report is entered into the account of its function, whatever its source. The account tells when a decision is due, and for how
//! many errors. Work that accesses hardware or may wait runs on background threads.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use log::{error, warn};
use nix::errno::Errno;
use pciback::config::Identity;
use pciback::fault::{self, Account, Action, ErrorPolicy, Fault, History, Owner, Relation, Severity};
use pciback::live::errors::{self as registers, Layout};
use pciback::platform::{ErrorEvent, ErrorEvents};
use pciback::policy::{self, Subject};
use pciback::{DomId, FunctionState, Sbdf};

use super::polls::{Polls, PortPolls};
use super::problems::Problem;
use super::responses::Underway;
use super::{Engine, Event};
use crate::domains;
use crate::outcome::Failure;
use crate::protocol::{Cause, EventView, Happening, RegisterValue};

/// The largest number of error events that are handled before the engine polls its other sources.
const BURST: usize = 256;

/// The position of a guest's function in the PCI topology.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// Its PF, for a VF.
    pub physical_function: Option<Sbdf>,
    /// The ports above it, the nearest first.
    pub ports: Vec<Sbdf>,
}

/// The state of error handling.
#[derive(Default)]
pub(super) struct Faults {
    /// The functions that guests have.
    pub places: BTreeMap<Sbdf, Place>,
    /// Those functions, their PFs and the ports above them.
    pub watched: BTreeSet<Sbdf>,
    /// The accounts of the watched functions, and of others that reported an error.
    pub accounts: BTreeMap<Sbdf, Account>,
    /// Scheduled reads of the error counters.
    pub polls: Polls,
    histories: BTreeMap<Sbdf, History>,
    guests: BTreeMap<DomId, History>,
    /// Responses to errors that are under way.
    pub underway: BTreeMap<Sbdf, Underway>,
    /// Functions whose correctable errors are masked.
    pub masked: BTreeMap<Sbdf, super::responses::Mask>,
    /// Scheduled reads of the ports.
    pub ports: PortPolls,
    /// Functions whose error registers are being read.
    reading: BTreeSet<Sbdf>,
}

impl Engine {
    /// Subscribes to error events; where that is impossible, errors are found by the kernel's counters only.
    pub(super) fn subscribe_to_errors(&mut self) -> Option<Box<dyn ErrorEvents>> {
        match self.platform.errors.events() {
            Ok(events) => Some(events),
            Err(problem) => {
                let text = format!("{problem}; errors of functions are found by the kernel's counters only");
                warn!("{text}");
                self.problems.push(Problem::new(Cause::ErrorReporting, text));
                None
            }
        }
    }

    /// Handles pending error events; `true`: there may be more.
    pub(super) fn take_errors(&mut self, events: &dyn ErrorEvents) -> bool {
        self.faults.polls.set_events_wait(true);
        for _ in 0..BURST {
            match events.next_event() {
                None => {
                    self.faults.polls.set_events_wait(false);
                    return false;
                }
                Some(ErrorEvent::Lost) => {
                    warn!("events about errors were lost; the kernel's counters are read");
                    self.poll_counters_soon();
                }
                Some(ErrorEvent::Error(fault)) => self.account(&fault),
            }
        }
        true
    }

    /// Whether an error of this function concerns a guest or the service, and not dom0 alone.
    fn concerns(&self, address: Sbdf) -> bool {
        self.faults.watched.contains(&address) || self.functions.records().get(address).is_some() || {
            // A function of dom0 below a port that is also above a guest's function.
            let ports = self.platform.host.ports_above(address).unwrap_or_default();
            ports.iter().any(|port| self.faults.watched.contains(port))
        }
    }

    /// Enters a report into the account of the function, and handles the errors that become due by it.
    pub(super) fn account(&mut self, fault: &Fault) {
        if !self.faults.accounts.contains_key(&fault.address) {
            if !self.concerns(fault.address) {
                return;
            }
            let account = Account::begin(fault.address, None, self.faults.polls.begun());
            self.faults.accounts.insert(fault.address, account);
        }
        let begun = self.faults.polls.begun();
        let account = self.faults.accounts.get_mut(&fault.address);
        let due = account.and_then(|account| account.heard(fault, begun));
        if let Some(due) = due {
            // Further errors are found by reading the counters.
            self.poll_open_accounts_soon();
            self.handle_error(&due);
        }
    }

    /// The next time at which error handling has something to do.
    pub(super) fn next_error_deadline(&self) -> Option<Instant> {
        let masked = self.faults.masked.values().map(|mask| mask.until);
        masked.chain(self.faults.polls.next()).min()
    }

    /// Does what is due by now.
    pub(super) fn check_error_deadlines(&mut self, now: Instant) {
        self.unmask_due(now);
        self.poll_counters(now);
    }

    /// Updates which functions are watched. Called when a guest gets a function, when a transaction ends, and when a guest of an earlier
    /// run is taken over.
    pub(super) fn watch_errors_of(&mut self, address: Sbdf) -> Result<(), Failure> {
        let record = self.functions.records().get(address);
        let given = [FunctionState::Attaching, FunctionState::Attached, FunctionState::Resetting];
        let attached = record.is_some_and(|record| record.guest.is_some() && given.contains(&record.state));
        if !attached {
            self.faults.underway.remove(&address);
            self.faults.histories.remove(&address);
            self.unmask(address);
            if self.faults.places.remove(&address).is_none() {
                return Ok(());
            }
        } else if !self.faults.places.contains_key(&address) {
            let host = self.platform.host.as_ref();
            let function = match host.function(address) {
                // The function has left the host, which `watch` handles.
                Err(error) if error.errno() == Some(Errno::ENOENT) => return Ok(()),
                other => other?,
            };
            let (physical_function, ports) = (function.physical_function, host.ports_above(address)?);
            self.faults.places.insert(address, Place { physical_function, ports });
        }
        let mut watched = BTreeSet::new();
        for (address, place) in &self.faults.places {
            watched.extend(
                [*address].into_iter().chain(place.physical_function).chain(place.ports.iter().copied()),
            );
        }
        for address in &watched {
            // Counted from now on. An account that already exists is kept: an error in it that has been handled may still be reported by
            // another source.
            if !self.faults.accounts.contains_key(address) {
                let counters = self.platform.errors.counters(*address).ok().flatten();
                let account = Account::begin(*address, counters.as_ref(), self.faults.polls.begun());
                self.faults.accounts.insert(*address, account);
            }
        }
        self.faults.watched = watched;
        self.schedule_polls();
        let living: BTreeSet<DomId> = self
            .functions
            .records()
            .all()
            .filter_map(|record| record.guest)
            .map(|place| place.domain)
            .collect();
        self.faults.guests.retain(|domain, _| living.contains(domain));
        Ok(())
    }

    /// [`Self::watch_errors_of`] for callers that cannot return a failure.
    pub(super) fn keep_watching_errors_of(&mut self, address: Sbdf) {
        if let Err(failure) = self.watch_errors_of(address) {
            let text = format!("{address}: its errors are not noticed: {failure}");
            error!("{text}");
            self.problems.push(Problem::new(Cause::ErrorReporting, text).on(address));
        }
    }

    /// The functions of guests that an error concerns, and their relation to the function that reports it.
    fn concerned(&self, fault: &Fault) -> Vec<(Sbdf, Relation)> {
        let mut concerned = Vec::new();
        let mut nearest = None;
        if fault.severity == Severity::Fatal {
            let known = self.faults.places.get(&fault.address).map(|place| place.ports.clone());
            let ports =
                known.unwrap_or_else(|| self.platform.host.ports_above(fault.address).unwrap_or_default());
            nearest = ports.first().copied();
        }
        for (address, place) in &self.faults.places {
            let relation = if *address == fault.address {
                Relation::Own
            } else if place.physical_function == Some(fault.address) || place.ports.contains(&fault.address) {
                Relation::Above
            } else if nearest.is_some_and(|port| place.ports.contains(&port)) {
                Relation::Beside
            } else {
                continue;
            };
            concerned.push((*address, relation));
        }
        concerned
    }

    pub(super) fn handle_error(&mut self, fault: &Fault) {
        let now = Instant::now();
        let mut concerned = self.concerned(fault);
        if concerned.iter().all(|(address, _)| *address != fault.address) {
            // An error of a function without a guest (held, a PF, a port) is recorded as well.
            concerned.push((fault.address, Relation::Own));
        }
        for (address, relation) in concerned {
            let record = self.functions.records().get(address).cloned();
            let guest = record.as_ref().and_then(|record| record.guest).map(|place| place.domain);
            let owned = guest.filter(|_| self.faults.places.contains_key(&address));
            let owner = match (owned, &record) {
                (Some(domain), _) => Owner::Guest { domain, can_be_notified: self.can_be_notified(domain) },
                (None, Some(_)) => Owner::Neither,
                (None, None) => Owner::Host,
            };
            let policy = owned.map_or_else(ErrorPolicy::default, |domain| self.error_policy(address, domain));
            let history = self.faults.histories.entry(address).or_default();
            if relation == Relation::Own {
                history.note(fault, now);
                if let Some(domain) = owned {
                    self.faults.guests.entry(domain).or_default().note(fault, now);
                }
            }
            let history = self.faults.histories.entry(address).or_default();
            let of_guest =
                owned.and_then(|domain| self.faults.guests.get(&domain)).cloned().unwrap_or_default();
            let storms = history.storms(&of_guest, &policy, now);
            if owned.is_none() {
                self.faults.histories.remove(&address);
            }
            let mut decision = fault::decide(fault, relation, owner, &policy, storms);
            if let Some(doing) = self.response_under_way(address)
                && decision.response.action > Action::Log
                && decision.response.action <= doing
            {
                decision.response.action = Action::Log;
                decision.reason = format!("{doing} is under way");
            }
            let action = decision.response.action;
            let mask = decision.response.mask && !self.faults.masked.contains_key(&address);
            let event = EventView::error(address, owned, fault, action, decision.reason);
            if fault.severity == Severity::Correctable && !mask {
                log::info!("{event}");
            } else {
                warn!("{event}");
            }
            self.note_event(event);
            if relation == Relation::Own && (fault.severity != Severity::Correctable || mask) {
                self.note_registers(address);
            }
            if mask {
                self.mask(address, Duration::from_secs(u64::from(policy.mask_seconds)));
                if let Some(history) = self.faults.histories.get_mut(&address) {
                    history.forget_correctable();
                }
            }
            if let Some(domain) = owned {
                self.respond(address, domain, action, fault, relation, policy);
            }
        }
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

    /// Reads the registers that describe an error, and clears those of a guest's function. This runs on a thread, because config accesses
    /// wait while the kernel resets the function. The registers are not cleared where the platform firmware handles errors.
    fn note_registers(&mut self, address: Sbdf) {
        if !self.faults.reading.insert(address) {
            return;
        }
        let place = self.faults.places.get(&address);
        let port = place.and_then(|place| place.ports.first().copied());
        let root = place.and_then(|place| place.ports.last().copied());
        let read: Vec<(Sbdf, Option<Layout>)> = [address]
            .into_iter()
            .chain(port)
            .map(|address| (address, self.faults.ports.layout(address)))
            .collect();
        let (workshop, inbox) = (self.workshop(), self.inbox.clone());
        let work = move || {
            let host = workshop.platform.host.as_ref();
            let handled = |root| workshop.platform.errors.handled(root).unwrap_or(false);
            let cleared = root.filter(|root| handled(*root)).map(|_| address);
            let of = |(address, layout): (Sbdf, Option<Layout>)| {
                let found = registers::of_errors(host, address, layout);
                if cleared == Some(address)
                    && let Err(problem) = registers::clear_errors(host, address, layout, &found)
                {
                    warn!("{address}: clear its error registers: {problem}");
                }
                let value =
                    move |(name, value): (&str, u32)| RegisterValue { address, name: name.to_owned(), value };
                found.into_iter().map(value)
            };
            read.into_iter().flat_map(of).collect()
        };
        self.inbox.background(&format!("registers {address}"), work, move |found| {
            let found = found.unwrap_or_else(|failure| {
                error!("{address}: read its error registers: {failure}");
                Vec::new()
            });
            inbox.send(Event::ErrorRegisters(address, found));
        });
    }

    pub(super) fn error_registers(&mut self, address: Sbdf, registers: Vec<RegisterValue>) {
        self.faults.reading.remove(&address);
        let place = self.functions.records().place(address);
        if let Some(place) = place
            && let Some(guest) = self.guests.get_mut(&place.domain)
        {
            guest.events_cleared(place.devfn);
        }
        let domain = place.map(|place| place.domain);
        self.note_event(EventView::now(address, domain, Happening::Registers { registers }));
    }
}
