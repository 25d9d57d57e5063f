//! Responses to errors: notifying guests, resetting or withdrawing functions, pausing or destroying guests.
//!
//! [`Responses`] decides what comes next and has no access to anything else; the engine carries out the effects.

use std::collections::BTreeMap;
use std::time::Instant;

use log::{info, warn};
use pciback::fault::{
    Action, AerAnswer, ChannelState, ErrorPolicy, Fault, Next, Recovery, Relation, Severity,
};
use pciback::serve::{NotNotified, Notification};
use pciback::{DomId, FunctionState, Sbdf};

use super::{Engine, Event};
use crate::engine;
use crate::engine::functions::Containment;
use crate::outcome::Failure;

/// A response that is under way.
struct Underway {
    action: Action,
    /// The state of the recovery protocol with the guest, if it is notified.
    recovery: Option<Recovery>,
    policy: ErrorPolicy,
    domain: DomId,
    /// Whether the error is the function's own. For an error elsewhere on its path the guest is only notified.
    own: bool,
    begun: Instant,
}

/// What is to be done next about a function.
#[derive(Debug, PartialEq)]
enum Effect {
    /// The next request of the recovery protocol goes to the guest.
    Notify(Recovery, ErrorPolicy),
    /// The function is reset while its guest keeps it.
    Reset,
    /// The function is taken from its guest.
    Contain(Containment, String),
    /// The guest is paused or destroyed.
    Stop(DomId, Action),
    /// The outcome, for the event log.
    Report(Result<String, String>),
}

/// The responses that are under way, by function.
#[derive(Default)]
pub(super) struct Responses(BTreeMap<Sbdf, Underway>);

impl Responses {
    /// Ends the response for a function, whatever its state.
    pub fn end(&mut self, address: Sbdf) {
        self.0.remove(&address);
    }

    fn action(&self, address: Sbdf) -> Option<Action> {
        self.0.get(&address).map(|underway| underway.action)
    }

    /// Begins a response to an error.
    fn begin(
        &mut self,
        address: Sbdf,
        domain: DomId,
        action: Action,
        fault: &Fault,
        relation: Relation,
        policy: ErrorPolicy,
    ) -> Option<Effect> {
        let own = relation == Relation::Own;
        let underway = Underway { action, recovery: None, policy, domain, own, begun: Instant::now() };
        if action == Action::TellGuest {
            let state = match fault.severity {
                Severity::Fatal => ChannelState::Frozen,
                _ => ChannelState::Normal,
            };
            let recovery = Recovery::begin(state, underway.policy.mmio_enabled);
            self.0.insert(address, Underway { recovery: Some(recovery), ..underway });
            return self.notify(address);
        }
        self.act(address, underway, &fault.to_string())
    }

    /// What an action other than a notification means.
    fn act(&mut self, address: Sbdf, underway: Underway, why: &str) -> Option<Effect> {
        match underway.action {
            Action::Log | Action::TellGuest => None,
            Action::Reset => {
                self.0.insert(address, underway);
                Some(Effect::Reset)
            }
            Action::Unplug => Some(Effect::Contain(Containment::Unplug, why.to_owned())),
            Action::Quarantine => Some(Effect::Contain(Containment::Quarantine, why.to_owned())),
            action @ (Action::PauseGuest | Action::DestroyGuest) => {
                Some(Effect::Stop(underway.domain, action))
            }
        }
    }

    fn notify(&self, address: Sbdf) -> Option<Effect> {
        let underway = self.0.get(&address)?;
        Some(Effect::Notify(underway.recovery?, underway.policy))
    }

    /// Takes the guest's answer, or the lack of one.
    fn answered(
        &mut self,
        address: Sbdf,
        answer: Result<Result<AerAnswer, u32>, NotNotified>,
    ) -> Vec<Effect> {
        let underway = self.0.get_mut(&address);
        let Some(recovery) = underway.and_then(|underway| underway.recovery.as_mut()) else {
            return Vec::new();
        };
        let next = match answer {
            Ok(answer) => recovery.answered(answer),
            Err(why) => Next::Failed(why.to_string()),
        };
        self.go_on(address, next)
    }

    /// Takes the end of a reset. The caller quarantines the function if it failed.
    fn reset_ended(&mut self, address: Sbdf, done: bool) -> Vec<Effect> {
        let Some(underway) = self.0.get_mut(&address) else { return Vec::new() };
        let outcome = match (&mut underway.recovery, done) {
            (Some(recovery), true) => {
                let next = recovery.was_reset();
                return self.go_on(address, next);
            }
            (None, true) => Ok("it was reset; its guest keeps it".to_owned()),
            (_, false) => Err("its reset failed; quarantine".to_owned()),
        };
        self.end(address);
        vec![Effect::Report(outcome)]
    }

    fn go_on(&mut self, address: Sbdf, next: Next) -> Vec<Effect> {
        match next {
            Next::Ask(_) => self.notify(address).into_iter().collect(),
            Next::Reset => vec![Effect::Reset],
            Next::Done => {
                let Some(underway) = self.0.remove(&address) else { return Vec::new() };
                let took = underway.begun.elapsed().as_millis();
                info!("{address}: domain {} has recovered, {took} ms", underway.domain);
                let text = format!("its guest was notified and has recovered, {took} ms");
                vec![Effect::Report(Ok(text))]
            }
            Next::Failed(why) => {
                let Some(failed) = self.0.remove(&address) else { return Vec::new() };
                // For an error that is not the function's own, a failed notification has no consequences for the guest.
                let action = if failed.own { failed.policy.unanswered } else { Action::Log };
                let text = format!("its guest was notified: {why}; {action}");
                warn!("{address}: {text}");
                let underway =
                    Underway { action, recovery: None, own: true, begun: Instant::now(), ..failed };
                let why = format!("an error that its guest did not recover from: {why}");
                let effect = self.act(address, underway, &why);
                [Effect::Report(Err(text))].into_iter().chain(effect).collect()
            }
        }
    }
}

impl Engine {
    /// Whether the guest's frontend is connected, so that it can be notified of errors. Whether it handles them is in a flag on its
    /// shared page.
    pub(super) fn can_be_notified(&self, domain: DomId) -> bool {
        self.guests.get(domain).is_some_and(|guest| guest.is_connected())
    }

    /// The response that is under way for a function.
    pub(super) fn response_under_way(&self, address: Sbdf) -> Option<Action> {
        if let Some(action) = self.errors.responses.action(address) {
            return Some(action);
        }
        let record = self.functions.records().get(address)?;
        let taken = record.state == FunctionState::Detaching;
        taken.then_some(if record.quarantine.is_some() { Action::Quarantine } else { Action::Unplug })
    }

    /// Begins a response to an error.
    pub(super) fn respond(
        &mut self,
        address: Sbdf,
        domain: DomId,
        action: Action,
        fault: &Fault,
        relation: Relation,
        policy: ErrorPolicy,
    ) {
        let effect = self.errors.responses.begin(address, domain, action, fault, relation, policy);
        self.carry_out_response(address, effect);
    }

    /// Handles the guest's answer to a notification, or the lack of one.
    pub(in crate::engine) fn guest_answered(
        &mut self,
        address: Sbdf,
        answer: Result<Result<AerAnswer, u32>, NotNotified>,
    ) {
        let effects = self.errors.responses.answered(address, answer);
        self.carry_out_response(address, effects);
    }

    /// Continues the response after a reset. The caller has quarantined the function if it failed.
    pub(in crate::engine) fn reset_for_error_ended(&mut self, address: Sbdf, done: bool) {
        let effects = self.errors.responses.reset_ended(address, done);
        self.carry_out_response(address, effects);
    }

    fn carry_out_response(&mut self, address: Sbdf, effects: impl IntoIterator<Item = Effect>) {
        for effect in effects {
            match effect {
                Effect::Notify(recovery, policy) => self.notify_guest(address, recovery, &policy),
                Effect::Reset => self.reset_for_error(address),
                Effect::Contain(containment, why) => self.contain(address, containment, &why),
                Effect::Stop(domain, action) => self.stop_guest(address, domain, action),
                Effect::Report(outcome) => self.note_outcome(address, outcome),
            }
        }
    }

    fn notify_guest(&mut self, address: Sbdf, recovery: Recovery, policy: &ErrorPolicy) {
        let Some(place) = self.functions.records().place(address) else { return };
        let (request, state, limit) = (recovery.asks(), recovery.state(), policy.answer_limit());
        let notification = Notification { devfn: place.devfn, request, state, limit };
        let notified = self.guests.get(place.domain).is_some_and(|guest| guest.notify(notification));
        if !notified {
            self.guest_answered(address, Err(NotNotified::Unreachable));
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
        if self.functions.is_busy(address) || state != FunctionState::Attached {
            // The guest requested a reset itself, or the function is being withdrawn.
            self.errors.responses.end(address);
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

    /// Pauses or destroys a guest, on a thread because the hypercall may take some time.
    fn stop_guest(&mut self, address: Sbdf, domain: DomId, action: Action) {
        let (context, inbox) = (self.task_context(), self.inbox.clone());
        let work = move || {
            let hypervisor = &context.platform.hypervisor;
            let outcome = match action {
                Action::PauseGuest => hypervisor.pause(domain),
                _ => hypervisor.destroy(domain),
            };
            outcome.map_err(Failure::from)
        };
        self.inbox.background(&format!("stop {domain}"), work, move |outcome| {
            let event = Event::GuestStopped(address, domain, action, outcome.and_then(|outcome| outcome));
            inbox.send(engine::Event::Errors(event));
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
                self.note_outcome(address, Ok(format!("domain {domain} is {done}")));
            }
            Err(problem) => {
                // The guest still runs, so the function is taken from it.
                self.note_outcome(address, Err(problem.to_string()));
                self.contain(address, Containment::Quarantine, &problem.to_string());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pciback::fault::Detection;

    use super::*;

    const DOMAIN: DomId = DomId(3);

    fn address() -> Sbdf {
        Sbdf::from_devfn(0, 1, 0x80)
    }

    fn fatal() -> Fault {
        let (severity, detection) = (Severity::Fatal, Detection::Containment);
        Fault { address: address(), severity, status: 0, detection, count: 1 }
    }

    fn begin(responses: &mut Responses, action: Action, relation: Relation) -> Option<Effect> {
        responses.begin(address(), DOMAIN, action, &fatal(), relation, ErrorPolicy::default())
    }

    #[test]
    fn a_guest_that_cannot_be_notified_loses_the_function_as_its_policy_says() {
        let mut responses = Responses::default();
        let effect = begin(&mut responses, Action::TellGuest, Relation::Own);
        assert!(matches!(effect, Some(Effect::Notify(..))), "{effect:?}");
        let effects = responses.answered(address(), Err(NotNotified::Unreachable));
        let unanswered = ErrorPolicy::default().unanswered;
        assert!(matches!(&effects[0], Effect::Report(Err(text)) if text.ends_with(&unanswered.to_string())));
        assert!(matches!(effects[1..], [Effect::Contain(..)]), "{effects:?}");
        assert_eq!(responses.action(address()), None);
    }

    #[test]
    fn an_error_elsewhere_on_the_path_has_no_consequence_for_a_guest_that_does_not_answer() {
        let mut responses = Responses::default();
        begin(&mut responses, Action::TellGuest, Relation::Above);
        let effects = responses.answered(address(), Err(NotNotified::Unreachable));
        assert!(matches!(effects[..], [Effect::Report(Err(_))]), "{effects:?}");
    }

    #[test]
    fn a_reset_that_failed_ends_the_response() {
        let mut responses = Responses::default();
        assert_eq!(begin(&mut responses, Action::Reset, Relation::Own), Some(Effect::Reset));
        assert_eq!(responses.action(address()), Some(Action::Reset));
        assert!(matches!(responses.reset_ended(address(), false)[..], [Effect::Report(Err(_))]));
        assert_eq!(responses.reset_ended(address(), true), []);
    }
}
