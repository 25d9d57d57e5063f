//! What the engine does for error handling in its other parts.

use std::time::Instant;

use log::{error, warn};
use pciback::fault::{AerAnswer, Conversation};
use pciback::platform::ErrorEvents;
use pciback::serve::{NotNotified, Notification};
use pciback::{DomId, FunctionState, Sbdf};

use super::responses::{self, Question};
use super::{Context, Effect, Errors, Event};
use crate::engine::Engine;
use crate::engine::functions::Containment;
use crate::engine::problems::Problem;
use crate::outcome::Failure;
use crate::protocol::Cause;

/// The largest number of error events that are handled before the engine polls its other sources.
const BURST: usize = 256;

impl Engine {
    fn errors_in_context(&mut self) -> (&mut Errors, Context<'_>) {
        let Self { errors, platform, functions, guests, policies, inbox, .. } = self;
        (errors, Context { platform, functions, guests, policies, inbox })
    }

    pub(in crate::engine) fn handle_errors(&mut self, event: Event) {
        let (errors, context) = self.errors_in_context();
        let effects = errors.handle(event, &context);
        self.carry_out_for_errors(effects);
    }

    fn carry_out_for_errors(&mut self, effects: impl IntoIterator<Item = Effect>) {
        for effect in effects {
            match effect {
                Effect::Handle(fault) => {
                    let (errors, context) = self.errors_in_context();
                    let effects = errors.handle_error(&fault, &context);
                    self.carry_out_for_errors(effects);
                }
                Effect::Note(event) => self.note_event(event),
                Effect::Report(address, outcome) => self.note_outcome(address, outcome),
                Effect::Problem(problem) => self.problems.push(problem),
                Effect::Resolved(address) => self.problems.resolve_of(address, &[Cause::ErrorReporting]),
                Effect::Notify(address, question) => self.notify_guest(address, question),
                Effect::Ended(address) => self.end_conversation(address),
                Effect::Reset(address) => self.reset_for_error(address),
                Effect::Contain(address, containment, why) => self.contain(address, containment, &why),
                Effect::Stop(address, domain, action) => {
                    responses::stop_guest(&self.platform, &self.inbox, address, domain, action);
                }
                Effect::RegistersCleared(address) => self.registers_cleared(address),
            }
        }
    }

    /// Subscribes to error events; where that is impossible, errors are found by the kernel's counters only.
    pub(in crate::engine) fn subscribe_to_errors(&mut self) -> Option<Box<dyn ErrorEvents>> {
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
    pub(in crate::engine) fn take_errors(&mut self, events: &dyn ErrorEvents) -> bool {
        self.errors.polls.set_events_wait(true);
        for _ in 0..BURST {
            let Some(event) = events.next_event() else {
                self.errors.polls.set_events_wait(false);
                return false;
            };
            let (errors, context) = self.errors_in_context();
            let effect = errors.reported(&event, &context);
            self.carry_out_for_errors(effect);
        }
        true
    }

    /// Does what is due by now.
    pub(in crate::engine) fn check_error_deadlines(&mut self, now: Instant) {
        let (errors, context) = self.errors_in_context();
        errors.check_deadlines(now, &context);
    }

    /// The driver of a VF's PF has started again.
    pub(in crate::engine) fn pf_started_again(&mut self, vf: Sbdf) {
        let (errors, context) = self.errors_in_context();
        let effects = errors.pf_started_again(vf, &context);
        self.carry_out_for_errors(effects);
    }

    /// Updates which functions are watched. Called when a guest gets a function, when a transaction ends, and when a guest of an earlier
    /// run is taken over.
    pub(in crate::engine) fn watch_errors_of(&mut self, address: Sbdf) -> Result<(), Failure> {
        let (errors, context) = self.errors_in_context();
        errors.watch(address, &context)
    }

    /// [`Self::watch_errors_of`] for callers that cannot return a failure.
    pub(in crate::engine) fn keep_watching_errors_of(&mut self, address: Sbdf) {
        if let Err(failure) = self.watch_errors_of(address) {
            let text = format!("{address}: its errors are not noticed: {failure}");
            error!("{text}");
            self.problems.push(Problem::new(Cause::ErrorReporting, text).on(address));
        }
    }

    /// Handles the guest's answer to a notification, or the lack of one.
    pub(in crate::engine) fn guest_answered(
        &mut self,
        address: Sbdf,
        answer: Result<Result<AerAnswer, u32>, NotNotified>,
    ) {
        let effects = self.errors.responses.answered(address, answer);
        self.carry_out_for_errors(effects);
    }

    /// A guest has left its ring, and its functions are being switched off.
    pub(in crate::engine) fn guest_left_ring(&mut self, domain: DomId) {
        let functions: Vec<Sbdf> =
            self.functions.records().of(domain).map(|(record, _)| record.address).collect();
        for address in functions {
            let effect = self.errors.responses.guest_left(address);
            self.carry_out_for_errors(effect);
        }
    }

    /// Continues the response after a reset. The caller has quarantined the function if it failed.
    pub(in crate::engine) fn reset_for_error_ended(&mut self, address: Sbdf, done: bool) {
        let effects = self.errors.responses.reset_ended(address, done);
        self.carry_out_for_errors(effects);
    }

    /// Goes on with a conversation that an earlier run had with the guest of a function, where that is still so. `is_reset`: the function is being
    /// reset again.
    pub(in crate::engine) fn resume_conversation(
        &mut self,
        address: Sbdf,
        conversation: Conversation,
        is_reset: bool,
    ) {
        let (errors, context) = self.errors_in_context();
        let effects = errors.resume_conversation(address, conversation, is_reset, &context);
        match effects {
            Some(effects) => self.carry_out_for_errors(effects),
            None => self.end_conversation(address),
        }
    }

    fn notify_guest(&mut self, address: Sbdf, question: Question) {
        let place = self.functions.records().place(address);
        let Some((place, attachment)) = place.zip(self.functions.attachment(address)) else { return };
        let Question { conversation, limit, resumed } = question;
        let notification = Notification { devfn: place.devfn, attachment, conversation, limit, resumed };
        let notified = self.guests.get(place.domain).is_some_and(|guest| guest.notify(notification));
        if !notified {
            self.guest_answered(address, Err(NotNotified::Unreachable));
        }
    }

    fn end_conversation(&mut self, address: Sbdf) {
        if let Some(place) = self.functions.records().place(address)
            && let Some(guest) = self.guests.get_mut(place.domain)
        {
            guest.end_conversation(place.devfn);
        }
    }

    /// Resets a function while its guest keeps it; its interrupts are restored afterwards.
    fn reset_for_error(&mut self, address: Sbdf) {
        let state = self.functions.records().state(address);
        if state == FunctionState::Attaching {
            self.errors.responses.end(address);
            self.contain(address, Containment::Quarantine, "an error while it was being attached");
            return;
        }
        let is_busy = self.functions.is_busy(address);
        if state == FunctionState::Resetting && !is_busy {
            // The guest has requested a reset itself, whose end serves as well.
            return;
        }
        if is_busy || state != FunctionState::Attached {
            // The function is being withdrawn.
            self.errors.responses.end(address);
            self.end_conversation(address);
            return;
        }
        let place = self.functions.records().place(address);
        let guest = place.and_then(|place| Some((place, self.guests.get_mut(place.domain)?)));
        match guest.map_or(Ok(None), |(place, guest)| guest.begin_reset(place.devfn)) {
            Ok(server) => self.reset_under_guest(address, server),
            Err(error) => {
                self.errors.responses.end(address);
                let why = format!("take it from its guest before a reset: {error}");
                self.contain(address, Containment::Quarantine, &why);
            }
        }
    }

    /// Tells the serving thread of a guest that the error registers of its function are clear.
    fn registers_cleared(&mut self, address: Sbdf) {
        if let Some(place) = self.functions.records().place(address)
            && let Some(guest) = self.guests.get_mut(place.domain)
        {
            guest.events_cleared(place.devfn);
        }
    }
}
