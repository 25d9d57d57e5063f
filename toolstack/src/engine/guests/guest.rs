//! The state of one guest: its handshake, its serving thread, and the work that is under way for it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{Level, log};
use pciback::config::{Filter, MaskedWrite};
use pciback::serve::pv::{Action, Handshake, NodeChange};
use pciback::serve::{Counters, GuestFunction, Notification, Server, TIME_BOUNDS};
use pciback::{Devfn, DomId};

use super::hvm::Hvm;
use super::log_limit::LogLimit;
use crate::engine::{Answer, Engine};
use crate::protocol::{RequestTimes, TimeBucket};
use crate::settings::Settings;

/// A guest that has functions.
pub(in crate::engine) struct Guest {
    pub handshake: Handshake,
    /// Set for an HVM guest, which has no handshake.
    pub(super) hvm: Option<Hvm>,
    pub(super) server: Option<Arc<Server>>,
    /// Its functions while no thread serves them, by device and function number.
    pub(super) parked: BTreeMap<Devfn, Box<GuestFunction>>,
    pub(super) counters: Arc<Counters>,
    /// Transactions that wait for the guest, by device and function number.
    pub(super) waiting: BTreeMap<Devfn, Waiting>,
    /// Actions of its handshake that are not carried out yet, in order.
    pub(super) actions: VecDeque<Action>,
    /// The number of background tasks for the guest; its handshake actions wait until it is 0.
    pub(super) working: usize,
    /// Actions to run when its functions are back from a background task.
    pub(super) later: Vec<Later>,
    /// Changes of its nodes that could not be written yet, and when they are retried.
    pub(super) unwritten: Vec<NodeChange>,
    pub(super) write_again: Option<Instant>,
    /// When the handshake may continue after the guest's nodes were removed.
    pub(super) pause: Option<Instant>,
    /// When a guest that has lost its last function must have dropped its device.
    pub(super) closed_by: Option<Instant>,
    /// When the guest is next notified again of its device, and the interval after that.
    pub(super) notify_again: Option<(Instant, Duration)>,
    log: LogLimit,
}

/// An action that the engine runs later.
pub(in crate::engine) type Later = Box<dyn FnOnce(&mut Engine) + Send>;

/// A transaction that waits for the guest.
pub(in crate::engine) struct Waiting {
    pub answer: Answer,
    pub for_what: Awaited,
    /// When the guest counts as late, unless it has made requests since `requests` was noted.
    pub deadline: Instant,
    /// When the guest counts as late in any case.
    at_latest: Instant,
    /// The guest's number of requests when this was last checked.
    requests: u64,
}

impl Waiting {
    pub fn new(answer: Answer, for_what: Awaited, settings: &Settings, counters: &Counters) -> Self {
        let now = Instant::now();
        let (deadline, at_latest) = (now + settings.guest_limit(), now + settings.longest_guest_limit());
        Self { answer, for_what, deadline, at_latest, requests: counters.requests() }
    }

    /// Whether the guest is late. A guest that is still reading registers of the function, on a busy host, gets more time, up to
    /// `at_latest`.
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
pub(in crate::engine) enum Awaited {
    /// The guest reads config space of the function.
    Look,
    /// As `Look`, but the guest may have no frontend yet; a timeout is no failure.
    FirstLook,
    /// The guest releases the function.
    Release,
    /// The guest did not release the function in time; it is being withdrawn without the guest.
    Withdrawing,
}

impl Guest {
    pub(in crate::engine) fn new(handshake: Handshake) -> Self {
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
            closed_by: None,
            notify_again: None,
            log: LogLimit::new(),
        }
    }

    /// The times at which something is due for the guest.
    pub(in crate::engine) fn due(&self) -> impl Iterator<Item = Instant> {
        let again = self.notify_again.map(|(when, _)| when);
        self.pause.into_iter().chain(self.closed_by).chain(self.write_again).chain(again)
    }

    /// Logs an action of the guest, within its log limit.
    pub(in crate::engine) fn log_line(&mut self, level: Level, text: &str) {
        match self.log.may_log(Instant::now()) {
            Some(0) => log!(level, "{text}"),
            Some(suppressed) => log!(level, "{text} ({suppressed} earlier lines about it were left out)"),
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

    /// Replaces the filter of one of its functions.
    pub fn replace_filter(&mut self, devfn: Devfn, filter: Arc<Filter>) -> Result<(), String> {
        let replaced = match (&self.server, self.parked.get_mut(&devfn)) {
            (_, Some(function)) => Some(function.replace_filter(filter)),
            (Some(server), None) => {
                server.replace_filter(devfn, filter).map_err(|stuck| stuck.to_string())?
            }
            (None, None) => None,
        };
        replaced.ok_or_else(|| "its thread does not have it".to_owned())?.map_err(|error| error.to_string())
    }

    /// Whether its frontend is connected.
    pub fn is_connected(&self) -> bool {
        self.server.is_some()
    }

    /// Notifies the guest's frontend of an error; `false` where it is not connected. The serving thread reports the answer.
    pub fn notify(&self, notification: Notification) -> bool {
        if let Some(server) = &self.server {
            server.tell(notification);
        }
        self.server.is_some()
    }

    /// Has a later run not go on with a conversation about an error of one of its functions.
    pub fn end_conversation(&mut self, devfn: Devfn) {
        match (&self.server, self.parked.get_mut(&devfn)) {
            (_, Some(function)) => function.note_conversation(None),
            (Some(server), None) => server.end_conversation(devfn),
            // What has its functions switches them off, which ends it too.
            (None, None) => {}
        }
    }

    /// Whether its frontend is still the one that an earlier run was connected to. An HVM guest has none.
    pub fn has_same_frontend(&self) -> bool {
        self.is_connected() && (self.hvm.is_some() || self.handshake.is_joined())
    }

    /// Prepares a reset that the guest did not request, of one of its functions. If a thread serves the function, it is returned, and
    /// must get the order before the reset. An error: the guest may still reach the function.
    pub fn begin_reset(&mut self, devfn: Devfn) -> Result<Option<(Arc<Server>, Devfn)>, String> {
        match (&self.server, self.parked.get_mut(&devfn)) {
            (_, Some(function)) => function.begin_reset().map(|()| None).map_err(|error| error.to_string()),
            (Some(server), None) => Ok(Some((Arc::clone(server), devfn))),
            (None, None) => Ok(None),
        }
    }

    /// Called when the host has read and cleared the error registers of one of its functions.
    pub fn events_cleared(&mut self, devfn: Devfn) {
        match (&self.server, self.parked.get_mut(&devfn)) {
            (_, Some(function)) => function.events_cleared(),
            (Some(server), None) => server.events_cleared(devfn),
            // Its functions are held by a background task. The guest sees the next error of a type that it has cleared only once the
            // hardware bit is 0.
            (None, None) => {}
        }
    }

    /// Marks one of its functions as removed from the host.
    pub fn set_gone(&mut self, domain: DomId, devfn: Devfn) {
        match (&self.server, self.parked.get_mut(&devfn)) {
            (_, Some(function)) => function.set_gone(),
            (Some(server), None) => server.set_gone(devfn),
            (None, None) => self.when_back(move |engine| {
                if let Some(guest) = engine.guests.get_mut(domain) {
                    guest.set_gone(domain, devfn);
                }
            }),
        }
    }

    /// Runs an action when the functions are back from a background task; drops it where no task has them.
    fn when_back(&mut self, what: impl FnOnce(&mut Engine) + Send + 'static) {
        if self.working > 0 {
            self.later.push(Box::new(what));
        }
    }

    /// Where to find the blocked writes of the guest to one of its functions.
    pub fn masked_writes(&self, devfn: Devfn) -> MaskedWrites {
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

    pub(in crate::engine) fn place(&mut self, devfn: Devfn, function: Box<GuestFunction>) {
        match &self.server {
            Some(server) => server.add(devfn, function),
            None => {
                self.parked.insert(devfn, function);
            }
        }
    }
}

/// The guest's blocked writes, or where to ask for them.
pub(in crate::engine) enum MaskedWrites {
    /// The writes.
    Known(Vec<MaskedWrite>),
    /// The serving thread has them.
    Ask(Arc<Server>, Devfn),
}

impl MaskedWrites {
    /// Returns the writes; may wait for the serving thread.
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
