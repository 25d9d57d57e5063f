//! Looks at what tells of errors beside events: the kernel's counters, and ports that contained something.
//!
//! The counters and the ports are looked at on threads of their own: a register of a port may keep its reader waiting, and the accounts
//! must not wait for it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

use log::{error, warn};
use pciback::Sbdf;
use pciback::fault::{Detection, ErrorCounters, Fault, Severity};
use pciback::live::errors::{self as registers, Contained, Layout};
use pciback::platform::Host;

use super::{Engine, Event};
use crate::outcome::Failure;

/// The least time between the end of a look and the begin of the next one.
const INTERVAL: Duration = Duration::from_secs(1);
/// So many functions are looked at in an interval; more take longer in turn.
const EACH_INTERVAL: usize = 64;
/// How long a look waits at most for the events that came before it to be taken.
const PATIENCE: Duration = Duration::from_secs(4);

/// When the counters are looked at.
#[derive(Debug, Default)]
pub(super) struct Looks {
    /// How many looks have begun.
    begun: u64,
    running: bool,
    /// When the last one ended.
    ended: Option<Instant>,
    /// When the next one begins.
    next: Option<Instant>,
    /// When the next one begins that looks at all accounts, not only at open ones.
    all: Option<Instant>,
    /// Whether events wait to be taken.
    events_wait: bool,
}

impl Looks {
    /// How many looks have begun.
    pub fn begun(&self) -> u64 {
        self.begun
    }

    /// A look begins after the events that came before.
    pub fn set_events_wait(&mut self, wait: bool) {
        self.events_wait = wait;
    }

    /// When there is something to do.
    pub fn next(&self) -> Option<Instant> {
        self.next.filter(|_| !self.running)
    }

    fn earliest(&self, now: Instant) -> Instant {
        self.ended.map_or(now, |ended| ended + INTERVAL).max(now)
    }

    /// The next look begins as soon as it may.
    fn soon(&mut self, now: Instant) {
        let earliest = self.earliest(now);
        self.next = Some(self.next.map_or(earliest, |next| next.min(earliest)));
    }

    fn is_due(&self, now: Instant) -> bool {
        self.next().is_some_and(|next| next <= now && (!self.events_wait || next + PATIENCE <= now))
    }

    fn begin(&mut self, now: Instant) -> bool {
        self.begun += 1;
        self.running = true;
        self.next = None;
        let all = self.all.is_none_or(|all| all <= now);
        if all {
            self.all = None;
        }
        all
    }
}

/// What a look at the counters found.
pub struct Counted {
    /// Its number.
    look: u64,
    counters: Vec<(Sbdf, Option<ErrorCounters>)>,
}

/// What is known of the ports above guests' functions.
#[derive(Debug, Default)]
pub(super) struct PortLooks {
    running: bool,
    /// Where the capabilities of watched functions are.
    layouts: BTreeMap<Sbdf, Layout>,
    /// Ports that have cut off what is below them, which was dealt with.
    contained: BTreeSet<Sbdf>,
}

impl PortLooks {
    /// Where a function's capabilities are, if that is known.
    pub fn layout(&self, address: Sbdf) -> Option<Layout> {
        self.layouts.get(&address).copied()
    }
}

/// What a look at the ports found.
pub struct PortsSeen {
    contained: Vec<(Sbdf, Contained)>,
    /// Where the capabilities of those that were looked at are.
    layouts: BTreeMap<Sbdf, Layout>,
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
    /// All counters are looked at as soon as they may be.
    pub(super) fn look_at_errors_soon(&mut self) {
        if !self.faults.watched.is_empty() {
            self.faults.looks.all = None;
            self.faults.looks.soon(Instant::now());
        }
    }

    /// Those of open accounts are looked at as soon as they may be.
    pub(super) fn look_at_open_accounts_soon(&mut self) {
        self.faults.looks.soon(Instant::now());
    }

    /// Decides when the next look begins, after one has ended or other functions are watched.
    pub(super) fn schedule_looks(&mut self) {
        let faults = &mut self.faults;
        faults.accounts.retain(|address, account| faults.watched.contains(address) || account.is_open());
        let now = Instant::now();
        if faults.accounts.values().any(pciback::fault::Account::is_open) {
            faults.looks.soon(now);
        } else if faults.watched.is_empty() {
            faults.looks.next = None;
        } else {
            let all = *faults.looks.all.get_or_insert(now + INTERVAL);
            faults.looks.next = Some(faults.looks.next.map_or(all, |next| next.min(all)));
        }
    }

    /// Looks at what is due.
    pub(super) fn look_at_errors(&mut self, now: Instant) {
        if !self.faults.looks.is_due(now) {
            return;
        }
        let all = self.faults.looks.begin(now);
        let accounts = self.faults.accounts.iter().filter(|(_, account)| all || account.is_open());
        let addresses: Vec<Sbdf> = accounts.map(|(address, _)| *address).collect();
        if all {
            let turns = u32::try_from(addresses.len().div_ceil(EACH_INTERVAL)).unwrap_or(u32::MAX).max(1);
            self.faults.looks.all = Some(now + INTERVAL * turns);
            self.look_at_ports();
        }
        let look = self.faults.looks.begun;
        let (workshop, inbox) = (self.workshop(), self.inbox.clone());
        let work = move || {
            let read = |address| {
                let counters = workshop.platform.errors.counters(address);
                let counters = counters.unwrap_or_else(|problem| {
                    warn!("{problem}");
                    None
                });
                (address, counters)
            };
            addresses.into_iter().map(read).collect()
        };
        self.inbox.background("error counters", work, move |counters| {
            let counters = counters.unwrap_or_else(|failure| {
                error!("look at the error counters: {failure}");
                Vec::new()
            });
            inbox.send(Event::LookedAtErrors(Box::new(Counted { look, counters })));
        });
    }

    /// A look at the counters has ended.
    pub(super) fn errors_looked_at(&mut self, counted: Counted) {
        let looks = &mut self.faults.looks;
        // What was wanted soon meanwhile may be no sooner after this one.
        (looks.running, looks.ended, looks.next) = (false, Some(Instant::now()), None);
        for (address, counters) in counted.counters {
            let Some(account) = self.faults.accounts.get_mut(&address) else { continue };
            for due in account.looked(counted.look, counters.as_ref()) {
                self.deal_with(&due);
            }
        }
        self.schedule_looks();
    }

    fn look_at_ports(&mut self) {
        if std::mem::replace(&mut self.faults.ports.running, true) {
            return;
        }
        let places = &self.faults.places;
        let ports: BTreeSet<Sbdf> = places.values().flat_map(|place| place.ports.iter().copied()).collect();
        let functions: Vec<Sbdf> = places.keys().copied().collect();
        let mut layouts = self.faults.ports.layouts.clone();
        layouts.retain(|address, _| self.faults.watched.contains(address));
        let workshop = self.workshop();
        let inbox = self.inbox.clone();
        let work = move || {
            let host = workshop.platform.host.as_ref();
            let mut contained = Vec::new();
            for port in ports {
                let found = known(host, port, &mut layouts)
                    .and_then(|layout| registers::containment(host, port, layout));
                match found {
                    Ok(found) => contained.extend(found.map(|found| (port, found))),
                    Err(problem) => warn!("{port}: look for Downstream Port Containment: {problem}"),
                }
            }
            for function in functions {
                // So that nothing has to be looked for when it reports an error.
                if let Err(problem) = known(host, function, &mut layouts) {
                    warn!("{function}: look for its capabilities: {problem}");
                }
            }
            PortsSeen { contained, layouts }
        };
        self.inbox
            .background("ports", work, move |seen| inbox.send(Event::LookedAtPorts(seen.map(Box::new))));
    }

    /// A look at the ports has ended.
    pub(super) fn ports_looked_at(&mut self, seen: Result<Box<PortsSeen>, Failure>) {
        let ports = &mut self.faults.ports;
        ports.running = false;
        let seen = match seen {
            Ok(seen) => *seen,
            Err(failure) => return error!("look for Downstream Port Containment: {failure}"),
        };
        ports.layouts = seen.layouts;
        let now: BTreeSet<Sbdf> = seen.contained.iter().map(|(port, _)| *port).collect();
        ports.contained.retain(|port| now.contains(port));
        for (port, contained) in seen.contained {
            if self.faults.ports.contained.insert(port) {
                let address = contained.source.unwrap_or(port);
                let (severity, detection) = (Severity::Fatal, Detection::Containment);
                self.account(&Fault { address, severity, status: 0, detection, count: 1 });
            }
        }
    }
}
