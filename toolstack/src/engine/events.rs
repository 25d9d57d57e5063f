//! The event log: keeps events of functions in memory, writes them to the audit log, and sends them to clients that follow.

use std::collections::{BTreeMap, VecDeque};
use std::time::SystemTime;

use log::error;
use pciback::fault::{Action, Severity};
use pciback::{FunctionState, Sbdf};

use super::Engine;
use super::problems::Problem;
use crate::audit::AuditLog;
use crate::guest_names::GuestNames;
use crate::outcome::Failure;
use crate::protocol::{Cause, DeviceErrorsView, EventView, Happening, Success};
use crate::reply::Reply;
use crate::spec::existing;

/// The number of events kept per function.
const EVENTS_PER_FUNCTION: usize = 64;
/// The number of functions for which events are kept.
const MAX_FUNCTIONS: usize = 1024;
/// The number of events kept for all functions together.
const RECENT_EVENTS: usize = 256;

/// The event log and its followers.
pub(super) struct EventLog {
    audit: AuditLog,
    /// Whether the last write of the audit log failed, which is reported once.
    failed: bool,
    /// Errors and the responses to them, by function.
    histories: BTreeMap<Sbdf, VecDeque<EventView>>,
    recent: VecDeque<EventView>,
    /// The number of errors since the service started.
    errors: BTreeMap<(Severity, Action), u64>,
    followers: Vec<Reply>,
    /// The state of each function in the last state event, and its time.
    states: BTreeMap<Sbdf, (FunctionState, SystemTime)>,
    /// The number of VFs of each PF in the last event about them.
    vfs: BTreeMap<Sbdf, u16>,
}

impl EventLog {
    /// Creates the log with the events that earlier runs of the service wrote to the audit log.
    pub fn new(audit: AuditLog) -> Self {
        let mut news = Self {
            failed: false,
            histories: BTreeMap::new(),
            recent: VecDeque::new(),
            errors: BTreeMap::new(),
            followers: Vec::new(),
            states: BTreeMap::new(),
            vfs: BTreeMap::new(),
            audit,
        };
        for event in news.audit.read() {
            news.remember(event);
        }
        news
    }

    fn remember(&mut self, event: EventView) {
        if !self.histories.contains_key(&event.address) && self.histories.len() >= MAX_FUNCTIONS {
            // The function whose last event is the oldest.
            let oldest = self.histories.iter().min_by(|(_, a), (_, b)| {
                let last = |events: &VecDeque<EventView>| events.back().map(|event| event.at.clone());
                last(a).cmp(&last(b))
            });
            if let Some(address) = oldest.map(|(address, _)| *address) {
                self.histories.remove(&address);
            }
        }
        let history = self.histories.entry(event.address).or_default();
        if history.len() == EVENTS_PER_FUNCTION {
            history.pop_front();
        }
        history.push_back(event);
    }

    fn send(&mut self, event: EventView) {
        self.followers.retain(|follower| follower.event(&event));
        if self.recent.len() == RECENT_EVENTS {
            self.recent.pop_front();
        }
        self.recent.push_back(event);
    }
}

impl Engine {
    /// Records an error, a decision or an outcome.
    pub(super) fn note_event(&mut self, event: EventView) {
        let event = self.named(event);
        match self.event_log.audit.add(&event) {
            Err(problem) if !self.event_log.failed => {
                self.event_log.failed = true;
                let text = format!("cannot write the audit log: {problem}");
                error!("{text}");
                self.problems.push(Problem::new(Cause::AuditLog, text));
            }
            Ok(()) if self.event_log.failed => {
                self.event_log.failed = false;
                self.problems.resolve(Cause::AuditLog);
            }
            _ => {}
        }
        if let Happening::Error { severity, action, count, .. } = &event.what {
            let known = self.event_log.errors.entry((*severity, *action)).or_default();
            *known = known.saturating_add(*count);
        }
        self.event_log.remember(event.clone());
        self.event_log.send(event);
    }

    /// Adds the name of the guest now: when the event is shown, another guest may have its number.
    fn named(&self, mut event: EventView) -> EventView {
        GuestNames::new(&self.platform.store).lookup().name_event(&mut event);
        event
    }

    /// Records the outcome of an action.
    pub(super) fn note_outcome(&mut self, address: Sbdf, outcome: Result<String, String>) {
        let ok = outcome.is_ok();
        let (Ok(text) | Err(text)) = outcome;
        let domain = self.functions.records().guest(address);
        self.note_event(EventView::now(address, domain, Happening::Outcome { ok, text }));
    }

    /// Takes the states of the functions after a recovery as they are: they changed in an earlier run.
    pub(super) fn take_over_states(&mut self) {
        let now = SystemTime::now();
        self.event_log.states =
            self.functions.records().all().map(|record| (record.address, (record.state, now))).collect();
    }

    /// Sends events for functions whose state has changed since the last call.
    pub(super) fn send_state_events(&mut self) {
        let mut changed = Vec::new();
        for record in self.functions.records().all() {
            let address = &record.address;
            let before = self.event_log.states.get(address).map_or(FunctionState::Host, |(state, _)| *state);
            if before != record.state {
                let domain = record.guest.map(|place| place.domain);
                changed.push((*address, domain, before, record.state));
            }
        }
        for (address, (before, _)) in &self.event_log.states {
            if self.functions.records().get(*address).is_none() && *before != FunctionState::Host {
                changed.push((*address, None, *before, FunctionState::Host));
            }
        }
        for (address, domain, from, to) in changed {
            match to {
                FunctionState::Host => self.event_log.states.remove(&address),
                _ => self.event_log.states.insert(address, (to, SystemTime::now())),
            };
            let event = self.named(EventView::now(address, domain, Happening::State { from, to }));
            self.event_log.send(event);
        }
    }

    /// Sends an event if the number of a PF's VFs has changed.
    pub(super) fn send_vfs_event(&mut self, address: Sbdf, enabled: u16) {
        if self.event_log.vfs.insert(address, enabled).unwrap_or(0) != enabled {
            self.event_log.send(EventView::now(address, None, Happening::Vfs { enabled }));
        }
    }

    /// Sends an event for a function whose filter has changed by reloaded policies.
    pub(super) fn send_policy_event(&mut self, address: Sbdf, registers: Vec<String>) {
        let domain = self.functions.records().guest(address);
        let event = self.named(EventView::now(address, domain, Happening::Policy { registers }));
        self.event_log.send(event);
    }

    /// The number of errors since the service started.
    pub(super) fn device_errors(&self) -> Vec<DeviceErrorsView> {
        let view = |((severity, action), count): (&(Severity, Action), &u64)| DeviceErrorsView {
            severity: *severity,
            action: *action,
            count: *count,
        };
        self.event_log.errors.iter().map(view).collect()
    }

    /// Since when functions are quarantined.
    pub(super) fn quarantined_since(&self) -> BTreeMap<Sbdf, SystemTime> {
        let quarantined =
            self.event_log.states.iter().filter(|(_, (state, _))| *state == FunctionState::Quarantined);
        quarantined.map(|(address, (_, since))| (*address, *since)).collect()
    }

    /// The error history of a function.
    pub(super) fn error_history(&self, address: Sbdf) -> Result<Success, Failure> {
        let known = self.event_log.histories.get(&address);
        // A function that has left the host keeps its history.
        if known.is_none() {
            existing(self.platform.host.as_ref(), address)?;
        }
        Ok(Success::Events { events: known.into_iter().flatten().cloned().collect() })
    }

    /// Answers with the last events; with `follow`, the client gets new ones as well.
    pub(super) fn events(&mut self, follow: bool, reply: Reply) {
        if follow {
            if self.event_log.recent.iter().all(|event| reply.event(event)) {
                self.event_log.followers.push(reply);
            }
            return;
        }
        reply.done(Ok(Success::Events { events: self.event_log.recent.iter().cloned().collect() }));
    }
}
