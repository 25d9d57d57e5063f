//! Errors that functions report: receiving them, accounting, deciding about a response, and carrying it out.
//!
//! Each report is entered into the account of its function, whatever its source (`watched`). The account tells when a decision is due,
//! and for how many errors (`decisions`). What a response does next is decided in `responses`, without access to anything else, and comes
//! back as effects. Work that accesses hardware or may wait runs on background threads.

mod contain;
mod decisions;
mod masks;
mod polls;
mod registers;
mod responses;
mod watched;

use std::time::Instant;

use log::warn;
use pciback::fault::Action;
use pciback::live::errors::Masked;
use pciback::platform::{ErrorEvent, ErrorEvents};
use pciback::{DomId, Sbdf};

use self::masks::Masks;
use self::polls::{Polls, PortPolls};
use self::registers::Reading;
use self::responses::Responses;
use self::watched::Watched;
use super::Engine;
use super::functions::Containment;
use super::problems::Problem;
use crate::outcome::Failure;
use crate::protocol::{Cause, RegisterValue};

/// The largest number of error events that are handled before the engine polls its other sources.
const BURST: usize = 256;

/// The state of error handling.
#[derive(Default)]
pub(super) struct Errors {
    watched: Watched,
    /// Scheduled reads of the error counters.
    polls: Polls,
    /// Scheduled reads of the ports.
    ports: PortPolls,
    /// Responses to errors that are under way.
    responses: Responses,
    /// Functions whose correctable errors are masked.
    masks: Masks,
    /// Functions whose error registers are being read.
    reading: Reading,
}

impl Errors {
    /// The next time at which error handling has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.masks.next().into_iter().chain(self.polls.next()).min()
    }
}

/// Results of background work on errors.
pub enum Event {
    /// A function is to be contained, for the given reason.
    Contain(Sbdf, Containment, String),
    /// The kernel's error counters were read.
    CountersPolled(polls::Counted),
    /// The ports above the functions of guests were read.
    PortsPolled(Result<polls::PortsSeen, Failure>),
    /// The contents of error registers, for the event log.
    Registers(Sbdf, Vec<RegisterValue>),
    /// A guest was paused or destroyed, or could not be.
    GuestStopped(Sbdf, DomId, Action, Result<(), Failure>),
    /// The correctable errors of a function were masked, or could not be.
    Masked(Sbdf, Result<Masked, String>),
    /// They were unmasked, or could not be.
    Unmasked(Sbdf, Result<(), String>),
}

impl Engine {
    pub(super) fn handle_errors(&mut self, event: Event) {
        match event {
            Event::Contain(address, containment, why) => self.contain(address, containment, &why),
            Event::CountersPolled(counted) => self.counters_polled(counted),
            Event::PortsPolled(seen) => self.ports_polled(seen),
            Event::Registers(address, registers) => self.registers_read(address, registers),
            Event::GuestStopped(address, domain, action, outcome) => {
                self.guest_stopped(address, domain, action, outcome);
            }
            Event::Masked(address, outcome) => self.masked(address, outcome),
            Event::Unmasked(address, outcome) => self.unmasked(address, outcome),
        }
    }

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
        self.errors.polls.set_events_wait(true);
        for _ in 0..BURST {
            match events.next_event() {
                None => {
                    self.errors.polls.set_events_wait(false);
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

    /// Does what is due by now.
    pub(super) fn check_error_deadlines(&mut self, now: Instant) {
        for address in self.errors.masks.due(now) {
            self.unmask(address);
        }
        self.poll_counters(now);
    }
}
