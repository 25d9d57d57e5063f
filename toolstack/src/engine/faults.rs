//! Errors that functions report: heard of, cross-checked with the kernel's counters, and decided about.
//!
//! Errors of one function and severity that come within a second are dealt with as one, so that no number of them costs more than a
//! line of the audit log a second. What touches hardware or may wait runs on threads of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use log::{error, warn};
use nix::errno::Errno;
use pciback::config::Identity;
use pciback::fault::{
    self, Action, CrossCheck, Detection, ErrorCounters, ErrorPolicy, Fault, History, Owner, Relation,
    Severity,
};
use pciback::live::errors::{self as registers, Layout};
use pciback::platform::{ErrorEvent, ErrorEvents, Host};
use pciback::policy::{self, Subject};
use pciback::{DomId, FunctionState, Sbdf};

use super::responses::Underway;
use super::{Engine, Event};
use crate::domains;
use crate::outcome::Failure;
use crate::protocol::{EventView, Happening, RegisterValue};

/// How often the counters are looked at, and how long errors of one kind are gathered.
const SECOND: Duration = Duration::from_secs(1);
/// So many functions are looked at each second; more take longer in turn.
const EACH_SECOND: usize = 64;
/// So many events are taken at once before the engine looks at other things.
const BURST: usize = 256;

/// Where a guest's function hangs.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// Its PF, for a VF.
    pub physical_function: Option<Sbdf>,
    /// The ports above it, the nearest first.
    pub ports: Vec<Sbdf>,
}

/// Errors of one kind that are gathered.
struct Gathered {
    fault: Option<Fault>,
    due: Instant,
}

/// What a look at the counters and ports found.
pub struct Look {
    counters: Vec<(Sbdf, Option<ErrorCounters>)>,
    contained: Vec<(Sbdf, registers::Contained)>,
    /// Where the capabilities of those that were looked at are.
    layouts: BTreeMap<Sbdf, Layout>,
}

/// All that is known of errors.
#[derive(Default)]
pub(super) struct Faults {
    /// The functions that guests have.
    pub places: BTreeMap<Sbdf, Place>,
    /// Those, their PFs and the ports above them.
    checks: BTreeMap<Sbdf, Option<CrossCheck>>,
    gathered: BTreeMap<(Sbdf, Severity), Gathered>,
    histories: BTreeMap<Sbdf, History>,
    guests: BTreeMap<DomId, History>,
    /// What is being done about functions.
    pub underway: BTreeMap<Sbdf, Underway>,
    /// Functions whose correctable errors are masked.
    pub masked: BTreeMap<Sbdf, super::responses::Mask>,
    /// Where the capabilities of the watched ones are.
    layouts: BTreeMap<Sbdf, Layout>,
    /// Ports that have cut off what is below them, which was dealt with.
    contained: BTreeSet<Sbdf>,
    /// Functions whose registers are being read.
    reading: BTreeSet<Sbdf>,
    looking: bool,
    next_look: Option<Instant>,
    last_look: Option<Instant>,
}

/// The layout of a function, looked for once.
fn known(host: &dyn Host, address: Sbdf, layouts: &mut BTreeMap<Sbdf, Layout>) -> io::Result<Layout> {
    if let Some(layout) = layouts.get(&address) {
        return Ok(*layout);
    }
    let layout = Layout::find(host, address)?;
    layouts.insert(address, layout);
    Ok(layout)
}

impl Engine {
    /// Subscribes to errors; where that is not possible the counters have to do.
    pub(super) fn hear_errors(&mut self) -> Option<Box<dyn ErrorEvents>> {
        match self.platform.errors.events() {
            Ok(events) => Some(events),
            Err(problem) => {
                let text = format!("{problem}; errors of functions are found by the kernel's counters only");
                warn!("{text}");
                self.problems.push(text);
                None
            }
        }
    }

    /// Takes what has come; `true`: there may be more.
    pub(super) fn take_errors(&mut self, events: &dyn ErrorEvents) -> bool {
        for _ in 0..BURST {
            match events.next_event() {
                None => return false,
                Some(ErrorEvent::Lost) => {
                    warn!("events about errors were lost; the kernel's counters are looked at");
                    self.look_at_errors_soon();
                }
                Some(ErrorEvent::Error(fault)) => {
                    if let Some(Some(check)) = self.faults.checks.get_mut(&fault.address) {
                        check.event(fault.severity);
                    }
                    self.gather(fault);
                }
            }
        }
        true
    }

    /// The counters are looked at as soon as they may be.
    pub(super) fn look_at_errors_soon(&mut self) {
        if let Some(next) = &mut self.faults.next_look {
            let now = Instant::now();
            *next = self.faults.last_look.map_or(now, |last| last + SECOND).max(now).min(*next);
        }
    }

    /// Whether anybody but dom0 is concerned with a function.
    fn concerns(&self, address: Sbdf) -> bool {
        self.faults.checks.contains_key(&address) || self.records.contains_key(&address) || {
            // A function of dom0's, below a port that a guest's function hangs below, too.
            let ports = self.platform.host.ports_above(address).unwrap_or_default();
            ports.iter().any(|port| self.faults.checks.contains_key(port))
        }
    }

    fn gather(&mut self, fault: Fault) {
        let key = (fault.address, fault.severity);
        let now = Instant::now();
        if let Some(gathered) = self.faults.gathered.get_mut(&key)
            && gathered.due > now
        {
            let sum = gathered.fault.get_or_insert(Fault { count: 0, ..fault });
            sum.count = sum.count.saturating_add(fault.count);
            sum.status |= fault.status;
            return;
        }
        if self.concerns(fault.address) {
            self.faults.gathered.insert(key, Gathered { fault: None, due: now + SECOND });
            self.deal_with(&fault);
        }
    }

    /// When something about errors is to be done next.
    pub(super) fn next_error_deadline(&self) -> Option<Instant> {
        let faults = &self.faults;
        let gathered = faults.gathered.values().map(|gathered| gathered.due);
        let masked = faults.masked.values().map(|mask| mask.until);
        gathered.chain(masked).chain(faults.next_look.filter(|_| !faults.looking)).min()
    }

    /// Does what is due.
    pub(super) fn check_error_deadlines(&mut self, now: Instant) {
        let due = self.faults.gathered.iter().filter(|(_, gathered)| gathered.due <= now);
        for key in due.map(|(key, _)| *key).collect::<Vec<_>>() {
            if let Some(fault) = self.faults.gathered.remove(&key).and_then(|gathered| gathered.fault) {
                self.faults.gathered.insert(key, Gathered { fault: None, due: now + SECOND });
                self.deal_with(&fault);
            }
        }
        self.unmask_due(now);
        if self.faults.next_look.is_some_and(|next| next <= now) && !self.faults.looking {
            self.look_at_errors(now);
        }
    }

    fn look_at_errors(&mut self, now: Instant) {
        let addresses: Vec<Sbdf> = self.faults.checks.keys().copied().collect();
        let ports: BTreeSet<Sbdf> =
            self.faults.places.values().flat_map(|place| place.ports.iter().copied()).collect();
        let functions: Vec<Sbdf> = self.faults.places.keys().copied().collect();
        let turns = u32::try_from(addresses.len().div_ceil(EACH_SECOND)).unwrap_or(u32::MAX).max(1);
        self.faults.last_look = Some(now);
        self.faults.next_look = Some(now + SECOND * turns);
        self.faults.looking = true;
        let workshop = self.workshop();
        let mut layouts = self.faults.layouts.clone();
        let task = move || {
            let mut counters = Vec::new();
            layouts.retain(|address, _| addresses.contains(address));
            for address in addresses {
                match workshop.platform.errors.counters(address) {
                    Ok(found) => counters.push((address, found)),
                    Err(problem) => warn!("{problem}"),
                }
            }
            let mut contained = Vec::new();
            let host = workshop.platform.host.as_ref();
            for function in functions {
                // So that nothing has to be looked for when it reports an error.
                if let Err(problem) = known(host, function, &mut layouts) {
                    warn!("{function}: look for its capabilities: {problem}");
                }
            }
            for port in ports {
                let found = known(host, port, &mut layouts)
                    .and_then(|layout| registers::containment(host, port, layout));
                match found {
                    Ok(found) => contained.extend(found.map(|found| (port, found))),
                    Err(problem) => warn!("{port}: look for Downstream Port Containment: {problem}"),
                }
            }
            workshop.inbox.send(Event::LookedAtErrors(Box::new(Look { counters, contained, layouts })));
        };
        if let Err(problem) = thread::Builder::new().name("errors".into()).spawn(task) {
            error!("look at the error counters: start a thread: {problem}");
            self.faults.looking = false;
        }
    }

    pub(super) fn looked_at_errors(&mut self, look: Look) {
        self.faults.looking = false;
        self.faults.layouts = look.layouts;
        for (address, counters) in look.counters {
            let Some(check) = self.faults.checks.get_mut(&address) else { continue };
            let Some(counters) = counters else { continue };
            let missed = match check {
                Some(check) => check.look(&counters),
                None => {
                    *check = Some(CrossCheck::begin(&counters));
                    Vec::new()
                }
            };
            for (severity, count) in missed {
                self.gather(Fault { address, severity, status: 0, detection: Detection::Counters, count });
            }
        }
        let now: BTreeSet<Sbdf> = look.contained.iter().map(|(port, _)| *port).collect();
        self.faults.contained.retain(|port| now.contains(port));
        for (port, contained) in look.contained {
            if self.faults.contained.insert(port) {
                let address = contained.source.unwrap_or(port);
                let (severity, detection) = (Severity::Fatal, Detection::Containment);
                self.gather(Fault { address, severity, status: 0, detection, count: 1 });
            }
        }
    }

    /// A guest is given a function, a transaction has ended, or an earlier life's guest is served on: who has what is looked at anew.
    pub(super) fn watch_errors_of(&mut self, address: Sbdf) -> Result<(), Failure> {
        let record = self.records.get(&address);
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
                // It has left the host, which is seen to elsewhere.
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
        self.faults.checks.retain(|address, _| watched.contains(address));
        for address in &watched {
            // Counted from now on.
            if !self.faults.checks.contains_key(address) {
                let counters = self.platform.errors.counters(*address).ok().flatten();
                self.faults.checks.insert(*address, counters.as_ref().map(CrossCheck::begin));
            }
        }
        let living: BTreeSet<DomId> =
            self.records.values().filter_map(|record| record.guest).map(|place| place.domain).collect();
        self.faults.guests.retain(|domain, _| living.contains(domain));
        match (watched.is_empty(), self.faults.next_look) {
            (true, _) => self.faults.next_look = None,
            (false, None) => self.faults.next_look = Some(Instant::now() + SECOND),
            _ => {}
        }
        Ok(())
    }

    /// The same, where nobody can be told that it fails.
    pub(super) fn keep_watching_errors_of(&mut self, address: Sbdf) {
        if let Err(failure) = self.watch_errors_of(address) {
            let text = format!("{address}: its errors are not heard: {failure}");
            error!("{text}");
            self.problems.push(text);
        }
    }

    /// The guests' functions that an error concerns, and how.
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

    fn deal_with(&mut self, fault: &Fault) {
        let now = Instant::now();
        let mut concerned = self.concerned(fault);
        if concerned.iter().all(|(address, _)| *address != fault.address) {
            // Noted all the same: what is held, the PF, a port.
            concerned.push((fault.address, Relation::Own));
        }
        for (address, relation) in concerned {
            let record = self.records.get(&address).cloned();
            let guest = record.as_ref().and_then(|record| record.guest).map(|place| place.domain);
            let owned = guest.filter(|_| self.faults.places.contains_key(&address));
            let owner = match (owned, &record) {
                (Some(domain), _) => Owner::Guest { domain, can_be_told: self.can_be_told(domain) },
                (None, Some(_)) => Owner::Nobody,
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
            if let Some(doing) = self.is_dealt_with(address)
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

    /// What the policies say about errors of a guest's function.
    fn error_policy(&self, address: Sbdf, domain: DomId) -> ErrorPolicy {
        let name = domains::name(self.platform.store.as_ref(), domain).ok().flatten();
        if let Some(filter) = self.in_use.get(&address) {
            return self.policies.merge(&Subject::of(&filter.spec, name.as_deref())).errors;
        }
        let Ok(function) = self.platform.host.function(address) else { return ErrorPolicy::default() };
        let kind =
            if function.physical_function.is_some() { policy::Kind::Virtual } else { policy::Kind::Physical };
        let subject = Subject { address, identity: Identity::of(&function), kind, domain: name };
        self.policies.merge(&subject).errors
    }

    /// Reads the registers that tell of an error, on a thread: a function that the kernel resets may keep it waiting.
    fn note_registers(&mut self, address: Sbdf) {
        if !self.faults.reading.insert(address) {
            return;
        }
        let port = self.faults.places.get(&address).and_then(|place| place.ports.first().copied());
        let read: Vec<(Sbdf, Option<Layout>)> = [address]
            .into_iter()
            .chain(port)
            .map(|address| (address, self.faults.layouts.get(&address).copied()))
            .collect();
        let workshop = self.workshop();
        let task = move || {
            let host = workshop.platform.host.as_ref();
            let of = |(address, layout): (Sbdf, Option<Layout>)| {
                let found = registers::of_errors(host, address, layout).into_iter();
                found.map(move |(name, value)| RegisterValue { address, name: name.to_owned(), value })
            };
            let found = read.into_iter().flat_map(of).collect();
            workshop.inbox.send(Event::ErrorRegisters(address, found));
        };
        if let Err(problem) = thread::Builder::new().name(format!("registers {address}")).spawn(task) {
            error!("{address}: read its error registers: start a thread: {problem}");
            self.faults.reading.remove(&address);
        }
    }

    pub(super) fn error_registers(&mut self, address: Sbdf, registers: Vec<RegisterValue>) {
        self.faults.reading.remove(&address);
        let domain = self.records.get(&address).and_then(|record| record.guest).map(|place| place.domain);
        self.note_event(EventView::now(address, domain, Happening::Registers { registers }));
    }
}
