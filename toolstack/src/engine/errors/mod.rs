//! Errors that functions report: receiving them, accounting, deciding about a response, and carrying it out.
//!
//! Each report is entered into the account of its function, whatever its source (`watched`). The account tells when a decision is due,
//! and for how many errors (`decisions`). What a response does next is decided in `responses`. All of this stands on [`Errors`], which
//! looks at other parts through a [`Context`] and changes them by [`Effect`]s that the engine carries out (`effects`). Work that accesses
//! hardware or may wait runs on background threads.

mod contain;
mod decisions;
mod effects;
mod masks;
mod polls;
mod registers;
mod responses;
mod watched;

use std::time::Instant;

use log::warn;
use pciback::fault::{Action, Fault};
use pciback::live::errors::Masked;
use pciback::platform::{ErrorEvent, Platform};
use pciback::policy::PolicySet;
use pciback::{DomId, Sbdf};

use self::masks::Masks;
use self::polls::{Polls, PortPolls};
use self::registers::Reading;
use self::responses::{Question, Responses};
use self::watched::Watched;
use super::functions::{Containment, Functions};
use super::inbox::Inbox;
use super::problems::Problem;
use crate::outcome::Failure;
use crate::protocol::{EventView, RegisterValue};

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

/// What error handling looks at outside of its own state, and how it starts background work.
pub(super) struct Context<'a> {
    pub platform: &'a Platform,
    pub functions: &'a Functions,
    pub guests: &'a dyn Connected,
    pub policies: &'a PolicySet,
    pub inbox: &'a Inbox,
}

/// What error handling asks of the guests.
pub(super) trait Connected {
    /// Whether the guest's frontend is connected, so that it can be notified of errors. Whether it handles them is in a flag on its
    /// shared page.
    fn is_connected(&self, domain: DomId) -> bool;

    /// Whether it is, and is the one that an earlier run notified, when that is taken over.
    fn has_same_frontend(&self, domain: DomId) -> bool;
}

/// What error handling has the engine do, in this order.
#[derive(Debug)]
pub(super) enum Effect {
    /// An error is handled, after the effects of those before it.
    Handle(Fault),
    /// An event for the event log.
    Note(EventView),
    /// The outcome of an action on a function, for the event log.
    Report(Sbdf, Result<String, String>),
    /// A problem for the status.
    Problem(Problem),
    /// Earlier problems with the errors of a function are resolved.
    Resolved(Sbdf),
    /// The next request of the recovery protocol goes to the guest of a function.
    Notify(Sbdf, Question),
    /// The conversation with the guest of a function has ended: a later run does not go on with it.
    Ended(Sbdf),
    /// A function is reset while its guest keeps it.
    Reset(Sbdf),
    /// A function is taken from its guest.
    Contain(Sbdf, Containment, String),
    /// The guest of a function is paused or destroyed.
    Stop(Sbdf, DomId, Action),
    /// The error registers of a function were read and cleared.
    RegistersCleared(Sbdf),
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

impl Errors {
    /// The next time at which error handling has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.masks.next().into_iter().chain(self.polls.next()).min()
    }

    fn handle(&mut self, event: Event, context: &Context<'_>) -> Vec<Effect> {
        match event {
            Event::Contain(address, containment, why) => vec![Effect::Contain(address, containment, why)],
            Event::CountersPolled(counted) => self.counters_polled(counted),
            Event::PortsPolled(seen) => self.ports_polled(seen, context),
            Event::Registers(address, registers) => self.registers_read(address, registers, context),
            Event::GuestStopped(address, domain, action, outcome) => {
                responses::guest_stopped(address, domain, action, outcome)
            }
            Event::Masked(address, outcome) => self.masked(address, outcome, context),
            Event::Unmasked(address, outcome) => masks::unmasked(address, outcome),
        }
    }

    /// Handles a report of the kernel.
    fn reported(&mut self, event: &ErrorEvent, context: &Context<'_>) -> Option<Effect> {
        match event {
            ErrorEvent::Error(fault) => self.account(fault, context),
            ErrorEvent::Lost => {
                warn!("events about errors were lost; the kernel's counters are read");
                self.poll_counters_soon();
                None
            }
        }
    }

    /// Does what is due by now.
    fn check_deadlines(&mut self, now: Instant, context: &Context<'_>) {
        for address in self.masks.due(now) {
            self.unmask(address, context);
        }
        self.poll_counters(now, context);
    }
}
