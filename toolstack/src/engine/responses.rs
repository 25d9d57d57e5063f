//! Responses to errors: notifying guests, resetting or withdrawing functions, pausing or destroying guests, masking correctable errors.

use std::time::{Duration, Instant};

use log::{info, warn};
use pciback::fault::{
    Action, AerAnswer, ChannelState, ErrorPolicy, Fault, Next, Recovery, Relation, Severity,
};
use pciback::live::errors::{self as registers, Masked};
use pciback::serve::{NotNotified, Notification};
use pciback::{DomId, FunctionState, Sbdf};

use super::contain::Containment;
use super::problems::Problem;
use super::{Engine, Event};
use crate::outcome::Failure;
use crate::protocol::Cause;

/// A response that is under way.
pub(super) struct Underway {
    action: Action,
    /// The state of the recovery protocol with the guest, if it is notified.
    recovery: Option<Recovery>,
    policy: ErrorPolicy,
    domain: DomId,
    /// Whether the error is the function's own. For an error elsewhere on its path the guest is only notified.
    own: bool,
    begun: Instant,
}

/// Masked correctable errors.
pub(super) struct Mask {
    /// What was masked; `None` while a thread does it.
    masked: Option<Masked>,
    /// When they are unmasked.
    pub until: Instant,
}

impl Engine {
    /// Whether the guest's frontend is connected, so that it can be notified of errors. Whether it handles them is in a flag on its
    /// shared page.
    pub(super) fn can_be_notified(&self, domain: DomId) -> bool {
        self.guests.get(&domain).is_some_and(super::guest::Guest::is_connected)
    }

    /// The response that is under way for a function.
    pub(super) fn response_under_way(&self, address: Sbdf) -> Option<Action> {
        if let Some(underway) = self.faults.underway.get(&address) {
            return Some(underway.action);
        }
        let record = self.functions.records().get(address)?;
        let taken = record.state == FunctionState::Detaching;
        taken.then_some(if record.quarantine.is_some() { Action::Quarantine } else { Action::Unplug })
    }

    /// Carries out an action.
    pub(super) fn respond(
        &mut self,
        address: Sbdf,
        domain: DomId,
        action: Action,
        fault: &Fault,
        relation: Relation,
        policy: ErrorPolicy,
    ) {
        let own = relation == Relation::Own;
        let mut underway = Underway { action, recovery: None, policy, domain, own, begun: Instant::now() };
        match action {
            Action::Log => {}
            Action::TellGuest => {
                let state = match fault.severity {
                    Severity::Fatal => ChannelState::Frozen,
                    _ => ChannelState::Normal,
                };
                underway.recovery = Some(Recovery::begin(state, policy.mmio_enabled));
                self.faults.underway.insert(address, underway);
                self.ask_guest(address);
            }
            Action::Reset => {
                self.faults.underway.insert(address, underway);
                self.reset_for_error(address);
            }
            Action::Unplug => self.contain(address, Containment::Unplug, &fault.to_string()),
            Action::Quarantine => self.contain(address, Containment::Quarantine, &fault.to_string()),
            Action::PauseGuest | Action::DestroyGuest => self.stop_guest(address, domain, action),
        }
    }

    /// Sends the next request of the recovery protocol to the guest.
    fn ask_guest(&mut self, address: Sbdf) {
        let place = self.functions.records().place(address);
        let Some(underway) = self.faults.underway.get(&address) else { return };
        let Some((recovery, place)) = underway.recovery.zip(place) else { return };
        let (request, state, limit) = (recovery.asks(), recovery.state(), underway.policy.answer_limit());
        let notification = Notification { devfn: place.devfn, request, state, limit };
        let notified = self.guests.get(&place.domain).is_some_and(|guest| guest.notify(notification));
        if !notified {
            self.guest_answered(address, Err(NotNotified::Unreachable));
        }
    }

    /// Handles the guest's answer, or the lack of one.
    pub(super) fn guest_answered(
        &mut self,
        address: Sbdf,
        answer: Result<Result<AerAnswer, u32>, NotNotified>,
    ) {
        let Some(underway) = self.faults.underway.get_mut(&address) else { return };
        let Some(recovery) = &mut underway.recovery else { return };
        let next = match answer {
            Ok(answer) => recovery.answered(answer),
            Err(why) => Next::Failed(why.to_string()),
        };
        self.go_on(address, next);
    }

    fn go_on(&mut self, address: Sbdf, next: Next) {
        match next {
            Next::Ask(_) => self.ask_guest(address),
            Next::Reset => self.reset_for_error(address),
            Next::Done => {
                if let Some(underway) = self.faults.underway.remove(&address) {
                    let took = underway.begun.elapsed().as_millis();
                    info!("{address}: domain {} has recovered, {took} ms", underway.domain);
                    let text = format!("its guest was notified and has recovered, {took} ms");
                    self.note_outcome(address, true, text);
                }
            }
            Next::Failed(why) => {
                let Some(underway) = self.faults.underway.remove(&address) else { return };
                let Underway { domain, policy, own, .. } = underway;
                // For an error that is not the function's own, a failed notification has no consequences for the guest.
                let action = if own { policy.unanswered } else { Action::Log };
                let text = format!("its guest was notified: {why}; {action}");
                warn!("{address}: {text}");
                self.note_outcome(address, false, text);
                self.respond_to_unrecovered(address, domain, action, &why, policy);
            }
        }
    }

    fn respond_to_unrecovered(
        &mut self,
        address: Sbdf,
        domain: DomId,
        action: Action,
        why: &str,
        policy: ErrorPolicy,
    ) {
        let why = format!("an error that its guest did not recover from: {why}");
        match action {
            Action::Log | Action::TellGuest => {}
            Action::Reset => {
                let begun = Instant::now();
                let underway = Underway { action, recovery: None, policy, domain, own: true, begun };
                self.faults.underway.insert(address, underway);
                self.reset_for_error(address);
            }
            Action::Unplug => self.contain(address, Containment::Unplug, &why),
            Action::Quarantine => self.contain(address, Containment::Quarantine, &why),
            Action::PauseGuest | Action::DestroyGuest => self.stop_guest(address, domain, action),
        }
    }

    /// Resets a function while its guest keeps it; its interrupts are restored afterwards.
    fn reset_for_error(&mut self, address: Sbdf) {
        let place = self.functions.records().place(address);
        if self.functions.records().state(address) == FunctionState::Attaching {
            self.faults.underway.remove(&address);
            let why = "an error while it was being attached";
            self.contain(address, Containment::Quarantine, why);
            return;
        }
        if self.functions.is_busy(address)
            || self.functions.records().state(address) != FunctionState::Attached
        {
            // The guest requested a reset itself, or the function is being withdrawn.
            self.faults.underway.remove(&address);
            return;
        }
        let guest = place.and_then(|place| Some((place, self.guests.get_mut(&place.domain)?)));
        match guest.map_or(Ok(None), |(place, guest)| guest.begin_reset(place.devfn)) {
            Ok(server) => self.reset_under_guest(address, server),
            Err(error) => {
                self.faults.underway.remove(&address);
                let why = format!("take it from its guest before a reset: {error}");
                self.contain(address, Containment::Quarantine, &why);
            }
        }
    }

    /// Continues the response after a reset. The caller has quarantined the function if it failed.
    pub(super) fn reset_for_error_ended(&mut self, address: Sbdf, done: bool) {
        let Some(underway) = self.faults.underway.get_mut(&address) else { return };
        match (&mut underway.recovery, done) {
            (Some(recovery), true) => {
                let next = recovery.was_reset();
                self.go_on(address, next);
            }
            (None, true) => {
                self.faults.underway.remove(&address);
                self.note_outcome(address, true, "it was reset; its guest keeps it".to_owned());
            }
            (_, false) => {
                self.faults.underway.remove(&address);
                self.note_outcome(address, false, "its reset failed; quarantine".to_owned());
            }
        }
    }

    /// Pauses or destroys a guest, on a thread because the hypercall may take some time.
    fn stop_guest(&mut self, address: Sbdf, domain: DomId, action: Action) {
        let (workshop, inbox) = (self.workshop(), self.inbox.clone());
        let work = move || {
            let hypervisor = &workshop.platform.hypervisor;
            let outcome = match action {
                Action::PauseGuest => hypervisor.pause(domain),
                _ => hypervisor.destroy(domain),
            };
            outcome.map_err(Failure::from)
        };
        self.inbox.background(&format!("stop {domain}"), work, move |outcome| {
            inbox.send(Event::GuestStopped(address, domain, action, outcome.and_then(|outcome| outcome)));
        });
    }

    pub(super) fn guest_stopped(
        &mut self,
        address: Sbdf,
        domain: DomId,
        action: Action,
        outcome: Result<(), Failure>,
    ) {
        match outcome {
            Ok(()) => {
                let done = if action == Action::PauseGuest { "paused" } else { "destroyed" };
                self.note_outcome(address, true, format!("domain {domain} is {done}"));
            }
            Err(problem) => {
                // The guest still runs, so the function is taken from it.
                self.note_outcome(address, false, problem.to_string());
                self.contain(address, Containment::Quarantine, &problem.to_string());
            }
        }
    }

    /// Masks a function's correctable errors for some time.
    pub(super) fn mask(&mut self, address: Sbdf, length: Duration) {
        let pf = self.faults.places.get(&address).and_then(|place| place.physical_function);
        self.faults.masked.insert(address, Mask { masked: None, until: Instant::now() + length });
        let (workshop, inbox) = (self.workshop(), self.inbox.clone());
        let work = move || registers::mask(workshop.platform.host.as_ref(), address, pf);
        self.inbox.background(&format!("mask {address}"), work, move |masked| {
            let masked = masked.map_err(|failure| failure.to_string()).and_then(|masked| masked);
            inbox.send(Event::Masked(address, masked));
        });
    }

    pub(super) fn masked(&mut self, address: Sbdf, outcome: Result<Masked, String>) {
        match outcome {
            Ok(masked) => {
                self.note_outcome(address, true, format!("correctable errors are masked at {}", masked.at));
                match self.faults.masked.get_mut(&address) {
                    Some(mask) => mask.masked = Some(masked),
                    // The guest lost the function meanwhile.
                    None => self.lift(address, masked),
                }
            }
            Err(why) => {
                // The entry stays in the list: repeated attempts would not help.
                self.note_outcome(address, false, format!("correctable errors cannot be masked: {why}"));
            }
        }
    }

    pub(super) fn unmask_due(&mut self, now: Instant) {
        let due = self.faults.masked.iter().filter(|(_, mask)| mask.until <= now);
        for address in due.map(|(address, _)| *address).collect::<Vec<_>>() {
            self.unmask(address);
        }
    }

    pub(super) fn unmask(&mut self, address: Sbdf) {
        if let Some(masked) = self.faults.masked.remove(&address).and_then(|mask| mask.masked) {
            self.lift(address, masked);
        }
    }

    fn lift(&mut self, address: Sbdf, masked: Masked) {
        // The same registers may still be masked for another function.
        let shared = self
            .faults
            .masked
            .values_mut()
            .filter_map(|mask| mask.masked.as_mut())
            .find(|other| other.at == masked.at);
        if let Some(other) = shared {
            other.inherit(masked);
            return;
        }
        let (workshop, inbox) = (self.workshop(), self.inbox.clone());
        let work = move || registers::unmask(workshop.platform.host.as_ref(), masked);
        self.inbox.background(&format!("unmask {address}"), work, move |outcome| {
            let outcome = outcome.map_err(|failure| failure.to_string()).and_then(|outcome| outcome);
            inbox.send(Event::Unmasked(address, outcome));
        });
    }

    pub(super) fn unmasked(&mut self, address: Sbdf, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => {
                self.problems.resolve_of(address, &[Cause::ErrorReporting]);
                self.note_outcome(address, true, "correctable errors are reported again".to_owned());
            }
            Err(why) => {
                self.note_outcome(address, false, format!("correctable errors stay masked: {why}"));
                let text = format!("{address}: correctable errors stay masked: {why}");
                self.problems.push(Problem::new(Cause::ErrorReporting, text).on(address));
            }
        }
    }

    /// Unmasks everything before the service stops; otherwise it would stay masked.
    pub(super) fn unmask_all(&mut self) {
        let masks = std::mem::take(&mut self.faults.masked);
        for masked in masks.into_values().rev().filter_map(|mask| mask.masked) {
            if let Err(why) = registers::unmask(self.platform.host.as_ref(), masked) {
                warn!("unmask correctable errors: {why}");
            }
        }
    }
}
