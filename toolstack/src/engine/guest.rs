//! One guest: its handshake, the thread that serves it, and what is under way for it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{Level, log};
use pciback::DomId;
use pciback::config::{MaskedWrite, Planes};
use pciback::serve::pv::{Action, Handshake, NodeChange};
use pciback::serve::{Counters, GuestFunction, Server, TIME_BOUNDS, Telling};

use super::hvm::Hvm;
use super::log_limit::LogLimit;
use super::{Answer, Engine};
use crate::protocol::{RequestTimes, TimeBucket};
use crate::settings::Settings;

/// One guest that has functions.
pub(super) struct Guest {
    pub handshake: Handshake,
    /// Set for an HVM guest, which has no handshake.
    pub(super) hvm: Option<Hvm>,
    pub(super) server: Option<Arc<Server>>,
    /// The functions while no thread serves them.
    pub(super) parked: BTreeMap<u8, Box<GuestFunction>>,
    pub(super) counters: Arc<Counters>,
    /// Transactions that wait for the guest.
    pub(super) waiting: BTreeMap<u8, Waiting>,
    /// What its handshake wants done, in its order.
    pub(super) actions: VecDeque<Action>,
    /// How many things are being done for it; those wait until none is.
    pub(super) working: usize,
    /// What waits for its functions to be back.
    pub(super) later: Vec<Later>,
    /// Changes of its nodes that could not be made yet, and when they are tried again.
    pub(super) unwritten: Vec<NodeChange>,
    pub(super) write_again: Option<Instant>,
    /// When the handshake may go on after its nodes were removed.
    pub(super) pause: Option<Instant>,
    /// When it is told of its device once more, and how long it is waited after that.
    pub(super) tell_again: Option<(Instant, Duration)>,
    log: LogLimit,
}

/// Something that the engine does later.
pub(super) type Later = Box<dyn FnOnce(&mut Engine) + Send>;

/// A transaction that waits for its guest.
pub(super) struct Waiting {
    pub answer: Answer,
    pub for_what: Awaited,
    /// When the guest has taken too long, unless it has asked for something meanwhile.
    pub deadline: Instant,
    /// When it has, whatever it asks for.
    at_latest: Instant,
    /// How many requests it had made when this was last looked at.
    requests: u64,
}

impl Waiting {
    pub fn new(answer: Answer, for_what: Awaited, settings: &Settings, counters: &Counters) -> Self {
        let now = Instant::now();
        let (deadline, at_latest) = (now + settings.guest_limit(), now + settings.longest_guest_limit());
        Self { answer, for_what, deadline, at_latest, requests: counters.requests() }
    }

    /// Whether a guest is late. One that works its way through a function's registers, on a host that is busy, gets its time again.
    pub fn is_late(&mut self, now: Instant, limit: Duration, counters: &Counters) -> bool {
        if self.deadline > now {
            return false;
        }
        let requests = counters.requests();
        if self.for_what == Awaited::FirstLook || requests == self.requests || self.at_latest <= now {
            return true;
        }
        self.requests = requests;
        self.deadline = self.at_latest.min(now + limit);
        false
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Awaited {
    /// The guest looks at the function.
    Look,
    /// Nobody in the guest may be there to look; that is no failure.
    FirstLook,
    /// The guest lets go.
    Release,
    /// It did not in time, and the function is withdrawn without it.
    Overruled,
}

impl Guest {
    pub(super) fn new(handshake: Handshake) -> Self {
        let counters = Arc::new(Counters::default());
        Self {
            handshake,
            hvm: None,
            server: None,
            parked: BTreeMap::new(),
            counters,
            waiting: BTreeMap::new(),
            actions: VecDeque::new(),
            working: 0,
            later: Vec::new(),
            unwritten: Vec::new(),
            write_again: None,
            pause: None,
            tell_again: None,
            log: LogLimit::new(),
        }
    }

    /// When something is to be done for it.
    pub(super) fn due(&self) -> impl Iterator<Item = Instant> {
        let told = self.tell_again.map(|(when, _)| when);
        self.pause.into_iter().chain(self.write_again).chain(told)
    }

    /// Notes in the log what the guest did, as far as its share goes.
    pub(super) fn say(&mut self, level: Level, text: &str) {
        match self.log.may_say(Instant::now()) {
            Some(0) => log!(level, "{text}"),
            Some(unsaid) => log!(level, "{text} ({unsaid} earlier lines about it were left out)"),
            None => {}
        }
    }

    pub fn describe(&self) -> String {
        match &self.hvm {
            Some(hvm) => hvm.describe(),
            None => self.handshake.describe().to_owned(),
        }
    }

    pub fn has_functions(&self) -> bool {
        self.handshake.has_functions() || self.hvm.as_ref().is_some_and(|hvm| !hvm.devices.is_empty())
    }

    /// Puts another filter of one of its functions in force.
    pub fn replace_filter(&mut self, devfn: u8, planes: Arc<Planes>) -> Result<(), String> {
        let replaced = match (&self.server, self.parked.get_mut(&devfn)) {
            (_, Some(function)) => Some(function.replace_filter(planes)),
            (Some(server), None) => {
                server.replace_filter(devfn, planes).map_err(|stuck| stuck.to_string())?
            }
            (None, None) => None,
        };
        replaced.ok_or_else(|| "its thread does not have it".to_owned())?.map_err(|error| error.to_string())
    }

    /// Whether its frontend is connected.
    pub fn is_connected(&self) -> bool {
        self.server.is_some()
    }

    /// Tells it something about an error; `false` where its frontend is not connected. What it answers its thread reports.
    pub fn tell(&self, telling: Telling) -> bool {
        if let Some(server) = &self.server {
            server.tell(telling);
        }
        self.server.is_some()
    }

    /// One of its functions is about to be reset, which it did not ask for. A thread that serves it gets an order before the reset. An error:
    /// the guest may still reach it.
    pub fn begin_reset(&mut self, devfn: u8) -> Result<Option<(Arc<Server>, u8)>, String> {
        match (&self.server, self.parked.get_mut(&devfn)) {
            (_, Some(function)) => function.begin_reset().map(|()| None).map_err(|error| error.to_string()),
            (Some(server), None) => Ok(Some((Arc::clone(server), devfn))),
            (None, None) => Ok(None),
        }
    }

    /// The host has read and cleared the error registers of one of its functions.
    pub fn events_cleared(&mut self, devfn: u8) {
        match (&self.server, self.parked.get_mut(&devfn)) {
            (_, Some(function)) => function.events_cleared(),
            (Some(server), None) => server.events_cleared(devfn),
            // Its functions are between two threads: it sees the next error of a kind that it has cleared once hardware shows none.
            (None, None) => {}
        }
    }

    /// One of its functions has left the host.
    pub fn set_gone(&mut self, domain: DomId, devfn: u8) {
        match (&self.server, self.parked.get_mut(&devfn)) {
            (_, Some(function)) => function.set_gone(),
            (Some(server), None) => server.set_gone(devfn),
            (None, None) => self.when_back(move |engine| {
                if let Some(guest) = engine.guests.get_mut(&domain) {
                    guest.set_gone(domain, devfn);
                }
            }),
        }
    }

    /// Does something when its functions are back; nothing where none are on their way.
    fn when_back(&mut self, what: impl FnOnce(&mut Engine) + Send + 'static) {
        if self.working > 0 {
            self.later.push(Box::new(what));
        }
    }

    /// Where what of its writes to one of its functions did not reach hardware is found.
    pub fn masked_writes(&self, devfn: u8) -> MaskedWrites {
        match (&self.server, self.parked.get(&devfn)) {
            (_, Some(function)) => MaskedWrites::Known(function.masked_writes()),
            (Some(server), None) => MaskedWrites::Ask(Arc::clone(server), devfn),
            (None, None) => MaskedWrites::Known(Vec::new()),
        }
    }

    pub fn requests(&self) -> u64 {
        self.counters.requests()
    }

    pub fn errors(&self) -> u64 {
        self.counters.errors()
    }

    pub fn times(&self) -> RequestTimes {
        let bounds = TIME_BOUNDS.iter().map(|bound| Some(bound.as_micros() as u64)).chain([None]);
        let counted = bounds.zip(self.counters.timed());
        let buckets =
            counted.map(|(up_to_microseconds, requests)| TimeBucket { up_to_microseconds, requests });
        RequestTimes {
            buckets: buckets.collect(),
            total_nanoseconds: self.counters.total_time().as_nanos() as u64,
        }
    }

    pub(super) fn place(&mut self, devfn: u8, function: Box<GuestFunction>) {
        match &self.server {
            Some(server) => server.add(devfn, function),
            None => {
                self.parked.insert(devfn, function);
            }
        }
    }
}

/// What of a guest's writes did not reach hardware.
pub(super) enum MaskedWrites {
    /// These.
    Known(Vec<MaskedWrite>),
    /// Its thread knows.
    Ask(Arc<Server>, u8),
}

impl MaskedWrites {
    /// These; may wait for the thread.
    pub fn take(self) -> Result<Vec<MaskedWrite>, String> {
        match self {
            Self::Known(writes) => Ok(writes),
            Self::Ask(server, devfn) => {
                let writes = server.masked_writes(devfn).map_err(|stuck| stuck.to_string())?;
                Ok(writes.unwrap_or_default())
            }
        }
    }
}
