//! Polling for errors, in addition to events: the kernel's error counters, and ports in Downstream Port Containment (DPC).
//!
//! Counters and ports are read on separate threads: an access to a register of a port may block, and the counters must not wait for it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

use log::{error, warn};
use pciback::Sbdf;
use pciback::fault::{Detection, ErrorCounters, Fault, Severity};
use pciback::live::errors::{self as registers, Contained, Layout};
use pciback::platform::Host;

use super::{Context, Effect, Errors, Event};
use crate::engine;
use crate::outcome::Failure;

/// The least time between the end of a poll and the begin of the next one.
const INTERVAL: Duration = Duration::from_secs(1);
/// The number of functions polled per interval; with more functions, polls of all of them are rarer.
const PER_INTERVAL: usize = 64;
/// The longest time that a poll is delayed until events that arrived before it are handled.
const MAX_DELAY: Duration = Duration::from_secs(4);

/// The schedule of polls of the counters.
#[derive(Debug, Default)]
pub(super) struct Polls {
    /// The number of polls begun.
    begun: u64,
    running: bool,
    /// When the last poll ended.
    ended: Option<Instant>,
    /// When the next poll begins.
    next: Option<Instant>,
    /// When the next poll begins that reads the counters of all accounts, not only of open ones.
    all: Option<Instant>,
    /// Whether there are unhandled events.
    events_wait: bool,
}

impl Polls {
    /// The number of polls begun.
    pub fn begun(&self) -> u64 {
        self.begun
    }

    /// Notes whether there are unhandled events; a poll waits for them.
    pub fn set_events_wait(&mut self, wait: bool) {
        self.events_wait = wait;
    }

    /// When the next poll is due, if none runs.
    pub fn next(&self) -> Option<Instant> {
        self.next.filter(|_| !self.running)
    }

    fn earliest(&self, now: Instant) -> Instant {
        self.ended.map_or(now, |ended| ended + INTERVAL).max(now)
    }

    /// Schedules the next poll as early as the interval allows.
    pub fn soon(&mut self, now: Instant) {
        let earliest = self.earliest(now);
        self.next = Some(self.next.map_or(earliest, |next| next.min(earliest)));
    }

    fn is_due(&self, now: Instant) -> bool {
        self.next().is_some_and(|next| next <= now && (!self.events_wait || next + MAX_DELAY <= now))
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

/// The result of a poll of the counters.
pub struct Counted {
    /// The number of the poll.
    look: u64,
    counters: Vec<(Sbdf, Option<ErrorCounters>)>,
}

/// What is known about the ports above guests' functions.
#[derive(Debug, Default)]
pub(super) struct PortPolls {
    running: bool,
    /// The offsets of the capabilities of watched functions.
    layouts: BTreeMap<Sbdf, Layout>,
    /// Ports whose containment was handled already.
    contained: BTreeSet<Sbdf>,
}

impl PortPolls {
    /// The offsets of a function's capabilities, if they are known.
    pub fn layout(&self, address: Sbdf) -> Option<Layout> {
        self.layouts.get(&address).copied()
    }
}

/// The result of a poll of the ports.
pub struct PortsSeen {
    contained: Vec<(Sbdf, Contained)>,
    /// The offsets of the capabilities of the polled functions.
    layouts: BTreeMap<Sbdf, Layout>,
}

/// The offsets of a function's capabilities, read at most once.
fn known(host: &dyn Host, address: Sbdf, layouts: &mut BTreeMap<Sbdf, Layout>) -> io::Result<Layout> {
    if let Some(layout) = layouts.get(&address) {
        return Ok(*layout);
    }
    let layout = Layout::find(host, address)?;
    layouts.insert(address, layout);
    Ok(layout)
}

impl Errors {
    /// Schedules a poll of all counters as early as allowed.
    pub(in crate::engine) fn poll_counters_soon(&mut self) {
        if !self.watched.is_empty() {
            self.polls.all = None;
            self.polls.soon(Instant::now());
        }
    }

    /// Schedules the next poll, after one has ended or the set of watched functions has changed.
    pub(super) fn schedule_polls(&mut self) {
        let Self { watched, polls, .. } = self;
        watched.drop_closed_accounts();
        let now = Instant::now();
        if watched.has_open_accounts() {
            polls.soon(now);
        } else if watched.is_empty() {
            polls.next = None;
        } else {
            let all = *polls.all.get_or_insert(now + INTERVAL);
            polls.next = Some(polls.next.map_or(all, |next| next.min(all)));
        }
    }

    /// Starts a poll if one is due.
    pub(super) fn poll_counters(&mut self, now: Instant, context: &Context<'_>) {
        if !self.polls.is_due(now) {
            return;
        }
        let all = self.polls.begin(now);
        let addresses = if all { self.watched.accounts() } else { self.watched.open_accounts() };
        if all {
            let turns = u32::try_from(addresses.len().div_ceil(PER_INTERVAL)).unwrap_or(u32::MAX).max(1);
            self.polls.all = Some(now + INTERVAL * turns);
            self.poll_ports(context);
        }
        let look = self.polls.begun;
        let (platform, inbox) = (context.platform.clone(), context.inbox.clone());
        let work = move || {
            let read = |address| {
                let counters = platform.errors.counters(address);
                let counters = counters.unwrap_or_else(|problem| {
                    warn!("{problem}");
                    None
                });
                (address, counters)
            };
            addresses.into_iter().map(read).collect()
        };
        context.inbox.background("error counters", work, move |counters| {
            let counters = counters.unwrap_or_else(|failure| {
                error!("look at the error counters: {failure}");
                Vec::new()
            });
            inbox.send(engine::Event::Errors(Event::CountersPolled(Counted { look, counters })));
        });
    }

    /// Takes the result of a poll of the counters. Returns the errors that become due by it, to be handled.
    pub(super) fn counters_polled(&mut self, counted: Counted) -> Vec<Effect> {
        let polls = &mut self.polls;
        // A poll that was requested during this one also has to keep the interval.
        (polls.running, polls.ended, polls.next) = (false, Some(Instant::now()), None);
        let mut effects = Vec::new();
        for (address, counters) in counted.counters {
            let due = self.watched.looked(address, counted.look, counters.as_ref());
            effects.extend(due.into_iter().map(Effect::Handle));
        }
        self.schedule_polls();
        effects
    }

    fn poll_ports(&mut self, context: &Context<'_>) {
        if std::mem::replace(&mut self.ports.running, true) {
            return;
        }
        let watched = &self.watched;
        let (ports, functions) = (watched.ports(), watched.functions().collect::<Vec<_>>());
        let mut layouts = self.ports.layouts.clone();
        layouts.retain(|address, _| watched.contains(*address));
        let (platform, inbox) = (context.platform.clone(), context.inbox.clone());
        let work = move || {
            let host = platform.host.as_ref();
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
                // In advance, so that capabilities need not be searched when the function reports an error.
                if let Err(problem) = known(host, function, &mut layouts) {
                    warn!("{function}: look for its capabilities: {problem}");
                }
            }
            PortsSeen { contained, layouts }
        };
        context.inbox.background("ports", work, move |seen| {
            inbox.send(engine::Event::Errors(Event::PortsPolled(seen)));
        });
    }

    /// Takes the result of a poll of the ports. Returns the errors that become due by it, to be handled.
    pub(super) fn ports_polled(
        &mut self,
        seen: Result<PortsSeen, Failure>,
        context: &Context<'_>,
    ) -> Vec<Effect> {
        let ports = &mut self.ports;
        ports.running = false;
        let seen = match seen {
            Ok(seen) => seen,
            Err(failure) => {
                error!("look for Downstream Port Containment: {failure}");
                return Vec::new();
            }
        };
        ports.layouts = seen.layouts;
        let now: BTreeSet<Sbdf> = seen.contained.iter().map(|(port, _)| *port).collect();
        ports.contained.retain(|port| now.contains(port));
        let mut effects = Vec::new();
        for (port, contained) in seen.contained {
            if self.ports.contained.insert(port) {
                let address = contained.source.unwrap_or(port);
                let (severity, detection) = (Severity::Fatal, Detection::Containment);
                let fault = Fault { address, severity, status: 0, detection, count: 1 };
                effects.extend(self.account(&fault, context));
            }
        }
        effects
    }
}
