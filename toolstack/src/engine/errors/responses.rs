//! Responses to errors: notifying guests, resetting or withdrawing functions, pausing or destroying guests.
//!
//! [`Responses`] decides what comes next and has no access to anything else.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use pciback::fault::{
    Action, AerAnswer, AerRequest, ChannelState, Conversation, ErrorPolicy, Fault, Heard, Next, Recovery,
    Relation, Severity,
};
use pciback::platform::Platform;
use pciback::serve::NotNotified;
use pciback::{DomId, Sbdf};

use super::{Effect, Event};
use crate::engine;
use crate::engine::functions::Containment;
use crate::engine::inbox::Inbox;
use crate::outcome::Failure;

/// A response that was decided for a function of a guest.
pub(super) struct Response<'a> {
    pub domain: DomId,
    pub action: Action,
    /// The error.
    pub fault: &'a Fault,
    /// How the function is related to the one that reports the error.
    pub relation: Relation,
    pub policy: ErrorPolicy,
}

/// A response that is under way.
struct Underway {
    action: Action,
    /// The state of the recovery protocol with the guest, if it is notified.
    recovery: Option<Recovery>,
    policy: ErrorPolicy,
    domain: DomId,
    /// Whether the error is the function's own. For an error elsewhere on its path the guest is only notified.
    own: bool,
    /// Whether the end of a reset is awaited. Another one is the guest's own, in the middle of what it is asked.
    resetting: bool,
    /// Another error, of which the guest is notified when it has recovered from this one: the state of the link.
    next: Option<ChannelState>,
    begun: Instant,
}

/// What the guest of a function is asked.
#[derive(Debug)]
pub(in crate::engine) struct Question {
    pub conversation: Conversation,
    /// How long the answer is waited for.
    pub limit: Duration,
    /// Whether an earlier run may have asked already.
    pub resumed: bool,
}

/// The responses that are under way, by function.
#[derive(Default)]
pub(super) struct Responses(BTreeMap<Sbdf, Underway>);

impl Responses {
    /// Ends the response for a function, whatever its state.
    pub fn end(&mut self, address: Sbdf) {
        self.0.remove(&address);
    }

    /// The guest of a function has left its ring: what it was asked has no answer any more, and its driver begins anew.
    pub fn guest_left(&mut self, address: Sbdf) -> Option<Effect> {
        self.0.get(&address).filter(|underway| underway.recovery.is_some())?;
        self.end(address);
        let text = "its guest was notified, and has disconnected its frontend before \
                    it had recovered; its driver begins anew";
        Some(Effect::Report(address, Err(text.to_owned())))
    }

    pub fn action(&self, address: Sbdf) -> Option<Action> {
        self.0.get(&address).map(|underway| underway.action)
    }

    /// Begins a response to an error.
    pub fn begin(&mut self, address: Sbdf, response: Response<'_>) -> Option<Effect> {
        let Response { domain, action, fault, relation, policy } = response;
        let own = relation == Relation::Own;
        let (resetting, begun) = (action == Action::Reset, Instant::now());
        let underway = Underway { action, recovery: None, policy, domain, own, resetting, next: None, begun };
        if action == Action::TellGuest {
            let recovery = Recovery::begin(link_state(fault), underway.policy.mmio_enabled);
            self.0.insert(address, Underway { recovery: Some(recovery), ..underway });
            return self.notify(address);
        }
        self.act(address, underway, &fault.to_string())
    }

    /// Has a conversation that is under way cover another error for which the guest is to be notified, or the function reset. Returns
    /// what that means; `None`: there is no conversation, or it covers this error as it is.
    pub fn join(
        &mut self,
        address: Sbdf,
        action: Action,
        state: ChannelState,
        relation: Relation,
    ) -> Option<&'static str> {
        let underway = self.0.get_mut(&address).filter(|_| action <= Action::Reset)?;
        let recovery = underway.recovery.as_mut()?;
        let loses_state = action == Action::Reset || state == ChannelState::Frozen;
        let text = match recovery.asks() {
            _ if underway.resetting => loses_state.then_some("a reset is under way")?,
            AerRequest::Detected | AerRequest::MmioEnabled if loses_state => {
                recovery.freeze();
                "its guest is being notified of another error, and it is reset in the course of that"
            }
            AerRequest::Detected | AerRequest::MmioEnabled => return None,
            // The driver begins to use the function again: it has to stop once more.
            AerRequest::SlotReset | AerRequest::Resume => {
                let state = if loses_state { ChannelState::Frozen } else { state };
                underway.next = underway.next.filter(|next| *next == ChannelState::Frozen).or(Some(state));
                "its guest is notified of it when it has recovered from another error"
            }
        };
        underway.action = underway.action.max(action);
        underway.own |= relation == Relation::Own;
        Some(text)
    }

    /// Begins to notify the guest of a VF that has lost its state because its PF started again; `false`: a response is under way already.
    pub fn begin_lost_state(&mut self, address: Sbdf, domain: DomId, policy: ErrorPolicy) -> bool {
        if self.0.contains_key(&address) {
            return false;
        }
        // As for a link that was reset: what the driver had set is gone, whatever it answers, so the VF is reset in any case.
        let recovery = Some(Recovery::begin(ChannelState::Frozen, policy.mmio_enabled));
        let (action, begun) = (Action::TellGuest, Instant::now());
        let underway =
            Underway { action, recovery, policy, domain, own: false, resetting: false, next: None, begun };
        self.0.insert(address, underway);
        true
    }

    /// What an action other than a notification means.
    fn act(&mut self, address: Sbdf, underway: Underway, why: &str) -> Option<Effect> {
        match underway.action {
            Action::Log | Action::TellGuest => None,
            Action::Reset => {
                self.0.insert(address, underway);
                Some(Effect::Reset(address))
            }
            Action::Unplug => Some(Effect::Contain(address, Containment::Unplug, why.to_owned())),
            Action::Quarantine => Some(Effect::Contain(address, Containment::Quarantine, why.to_owned())),
            action @ (Action::PauseGuest | Action::DestroyGuest) => {
                Some(Effect::Stop(address, underway.domain, action))
            }
        }
    }

    /// What its guest is asked next.
    pub fn notify(&self, address: Sbdf) -> Option<Effect> {
        let underway = self.0.get(&address)?;
        let conversation =
            Conversation { recovery: underway.recovery?, own: underway.own, heard: Heard::Nothing };
        let limit = underway.policy.answer_limit();
        Some(Effect::Notify(address, Question { conversation, limit, resumed: false }))
    }

    /// Goes on with a conversation of an earlier run. `is_reset`: its reset was begun, and is done again already.
    pub fn resume(
        &mut self,
        address: Sbdf,
        domain: DomId,
        conversation: Conversation,
        policy: ErrorPolicy,
        is_reset: bool,
    ) -> Vec<Effect> {
        let Conversation { recovery, own, heard } = conversation;
        let (action, begun) = (Action::TellGuest, Instant::now());
        let resetting = is_reset && matches!(heard, Heard::Answer(_));
        let recovery = Some(recovery);
        let next = None;
        self.0.insert(address, Underway { action, recovery, policy, domain, own, resetting, next, begun });
        match heard {
            Heard::Nothing => {
                let limit = policy.answer_limit();
                vec![Effect::Notify(address, Question { conversation, limit, resumed: true })]
            }
            // Its end continues the conversation.
            Heard::Answer(_) if resetting => Vec::new(),
            Heard::Answer(answer) => self.answered(address, Ok(answer)),
            Heard::Silence => self.answered(address, Err(NotNotified::Silent)),
        }
    }

    /// Takes the guest's answer, or the lack of one.
    pub fn answered(
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
    pub fn reset_ended(&mut self, address: Sbdf, done: bool) -> Vec<Effect> {
        let Some(underway) = self.0.get_mut(&address) else { return Vec::new() };
        let outcome = match (&mut underway.recovery, done) {
            (Some(_), true) if !underway.resetting => return Vec::new(),
            (Some(recovery), true) => {
                underway.resetting = false;
                let next = recovery.was_reset();
                return self.go_on(address, next);
            }
            (None, true) => Ok("it was reset; its guest keeps it".to_owned()),
            (_, false) => Err("its reset failed; quarantine".to_owned()),
        };
        self.end(address);
        vec![Effect::Report(address, outcome)]
    }

    fn go_on(&mut self, address: Sbdf, next: Next) -> Vec<Effect> {
        match next {
            Next::Ask(_) => self.notify(address).into_iter().collect(),
            Next::Reset => {
                if let Some(underway) = self.0.get_mut(&address) {
                    underway.resetting = true;
                }
                vec![Effect::Reset(address)]
            }
            Next::Done => {
                let Some(underway) = self.0.remove(&address) else { return Vec::new() };
                let took = underway.begun.elapsed().as_millis();
                info!("{address}: domain {} has recovered, {took} ms", underway.domain);
                let text = format!("its guest was notified and has recovered, {took} ms");
                let report = Effect::Report(address, Ok(text));
                let Some(state) = underway.next else { return vec![report, Effect::Ended(address)] };
                let recovery = Some(Recovery::begin(state, underway.policy.mmio_enabled));
                self.0.insert(address, Underway { recovery, next: None, begun: Instant::now(), ..underway });
                [report].into_iter().chain(self.notify(address)).collect()
            }
            Next::Failed(why) => {
                let Some(failed) = self.0.remove(&address) else { return Vec::new() };
                // For an error that is not the function's own, a failed notification has no consequences for the guest.
                let action = if failed.own { failed.policy.unanswered } else { Action::Log };
                // Also a function that was to be reset for another error.
                let action = if failed.action == Action::Reset { action.max(Action::Reset) } else { action };
                let text = format!("its guest was notified: {why}; {action}");
                warn!("{address}: {text}");
                let (resetting, begun) = (action == Action::Reset, Instant::now());
                let underway =
                    Underway { action, recovery: None, own: true, resetting, next: None, begun, ..failed };
                let why = format!("an error that its guest did not recover from: {why}");
                let effect = self.act(address, underway, &why);
                // A function that is taken from its guest takes the note with it: until that has begun, a later run does it.
                let ended = !matches!(effect, Some(Effect::Contain(..)));
                let ended = ended.then_some(Effect::Ended(address));
                [Effect::Report(address, Err(text))].into_iter().chain(effect).chain(ended).collect()
            }
        }
    }
}

/// In which state an error leaves the link.
pub(super) fn link_state(fault: &Fault) -> ChannelState {
    match fault.severity {
        Severity::Fatal => ChannelState::Frozen,
        _ => ChannelState::Normal,
    }
}

/// Pauses or destroys a guest, on a thread because the hypercall may take some time.
pub(super) fn stop_guest(platform: &Platform, inbox: &Inbox, address: Sbdf, domain: DomId, action: Action) {
    let (hypervisor, reports) = (Arc::clone(&platform.hypervisor), inbox.clone());
    let work = move || {
        let outcome = match action {
            Action::PauseGuest => hypervisor.pause(domain),
            _ => hypervisor.destroy(domain),
        };
        outcome.map_err(Failure::from)
    };
    inbox.background(&format!("stop {domain}"), work, move |outcome| {
        let event = Event::GuestStopped(address, domain, action, outcome.and_then(|outcome| outcome));
        reports.send(engine::Event::Errors(event));
    });
}

pub(super) fn guest_stopped(
    address: Sbdf,
    domain: DomId,
    action: Action,
    outcome: Result<(), Failure>,
) -> Vec<Effect> {
    match outcome {
        Ok(()) => {
            let done = if action == Action::PauseGuest { "paused" } else { "destroyed" };
            vec![Effect::Report(address, Ok(format!("domain {domain} is {done}")))]
        }
        Err(problem) => {
            let why = problem.to_string();
            // The guest still runs, so the function is taken from it.
            let contain = Effect::Contain(address, Containment::Quarantine, why.clone());
            vec![Effect::Report(address, Err(why)), contain]
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
        let (domain, fault, policy) = (DOMAIN, &fatal(), ErrorPolicy::default());
        responses.begin(address(), Response { domain, action, fault, relation, policy })
    }

    #[test]
    fn a_guest_that_cannot_be_notified_loses_the_function_as_its_policy_says() {
        let mut responses = Responses::default();
        let effect = begin(&mut responses, Action::TellGuest, Relation::Own);
        assert!(matches!(effect, Some(Effect::Notify(..))), "{effect:?}");
        let effects = responses.answered(address(), Err(NotNotified::Unreachable));
        let unanswered = ErrorPolicy::default().unanswered;
        assert!(
            matches!(&effects[0], Effect::Report(_, Err(text)) if text.ends_with(&unanswered.to_string()))
        );
        assert!(matches!(effects[1..], [Effect::Contain(..)]), "{effects:?}");
        assert_eq!(responses.action(address()), None);
    }

    #[test]
    fn an_error_elsewhere_on_the_path_has_no_consequence_for_a_guest_that_does_not_answer() {
        let mut responses = Responses::default();
        begin(&mut responses, Action::TellGuest, Relation::Above);
        let effects = responses.answered(address(), Err(NotNotified::Unreachable));
        assert!(matches!(effects[..], [Effect::Report(_, Err(_)), Effect::Ended(_)]), "{effects:?}");
    }

    #[test]
    fn a_function_that_is_to_be_reset_for_another_error_is_whatever_its_guest_answers() {
        let policy = ErrorPolicy { unanswered: Action::Log, ..ErrorPolicy::default() };
        let mut responses = Responses::default();
        let fault = Fault { severity: Severity::NonFatal, ..fatal() };
        let (domain, action, relation) = (DOMAIN, Action::TellGuest, Relation::Own);
        responses.begin(address(), Response { domain, action, fault: &fault, relation, policy });
        let joined = responses.join(address(), Action::Reset, ChannelState::Normal, relation);
        assert!(joined.is_some());
        let effects = responses.answered(address(), Err(NotNotified::Silent));
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Reset(_))), "{effects:?}");
        let effects = responses.reset_ended(address(), true);
        assert!(matches!(effects[..], [Effect::Report(_, Ok(_))]), "{effects:?}");
    }

    #[test]
    fn a_reset_that_failed_ends_the_response() {
        let mut responses = Responses::default();
        assert!(matches!(begin(&mut responses, Action::Reset, Relation::Own), Some(Effect::Reset(_))));
        assert_eq!(responses.action(address()), Some(Action::Reset));
        assert!(matches!(responses.reset_ended(address(), false)[..], [Effect::Report(_, Err(_))]));
        assert!(responses.reset_ended(address(), true).is_empty());
    }
}
