//! Which step comes next.

use super::super::nodes::XenbusState;
use super::{Action, Function, Handshake, Phase, Progress, Ring};

impl Handshake {
    /// Takes every step that is possible now.
    pub(super) fn settle(&mut self, actions: &mut Vec<Action>) {
        // Each step either waits for somebody afterwards or lowers the number of things to do; the bound only guards
        // against a mistake in that.
        for _ in 0..16 {
            if !self.step(actions) {
                return;
            }
        }
        debug_assert!(false, "the handshake does not settle in phase {:?}", self.phase);
        log::error!("guest {}: the handshake does not settle in phase {:?}", self.domain(), self.phase);
    }

    /// Takes one step; `false` when there is nothing to do but wait.
    pub(super) fn step(&mut self, actions: &mut Vec<Action>) -> bool {
        let state = self.frontend.state();
        match self.phase {
            Phase::Absent if !self.functions.values().all(Function::leaves) => {
                self.publish_all(actions);
                true
            }
            Phase::Absent | Phase::Pause => self.forget_unpublished(actions),
            Phase::Waiting => self.step_waiting(state, actions),
            Phase::Connecting | Phase::Scanning | Phase::Reconfiguring | Phase::Reconfigured
                if !matches!(self.ring, Ring::Up(_)) =>
            {
                self.drop_hidden(actions)
            }
            Phase::Connecting => {
                actions.push(Action::Store(vec![self.write_state(XenbusState::CONNECTED)]));
                self.phase = Phase::Scanning;
                true
            }
            Phase::Scanning if state == XenbusState::CONNECTED => {
                self.scanned(actions);
                true
            }
            Phase::Connected => self.step_connected(actions) || self.drop_hidden(actions),
            Phase::Reconfiguring if state == XenbusState::RECONFIGURING => {
                self.exchange(actions);
                true
            }
            Phase::Hiding if !self.any(Progress::Hiding) => {
                self.exchanged(actions);
                true
            }
            Phase::Reconfigured if state == XenbusState::CONNECTED => {
                actions.push(Action::Store(vec![self.write_state(XenbusState::CONNECTED)]));
                self.scanned(actions);
                true
            }
            Phase::Closing if matches!(state, XenbusState::CLOSED | XenbusState::UNKNOWN) => {
                self.closed(actions);
                true
            }
            // It was not even connected, or has published something else since.
            Phase::Closing if self.ring == Ring::Down && self.rejected.is_none() => {
                self.closed(actions);
                true
            }
            Phase::Removing if !self.any(Progress::Hiding) => {
                self.remove_all(actions);
                true
            }
            Phase::Gone => self.forget_gone(actions),
            Phase::Hiding | Phase::Removing => false,
            Phase::Closing if self.ring == Ring::Down => {
                self.hide_leaving(actions) || self.drop_hidden(actions)
            }
            Phase::Scanning | Phase::Reconfiguring | Phase::Reconfigured | Phase::Closing => {
                self.drop_hidden(actions)
            }
        }
    }

    pub(super) fn any(&self, progress: Progress) -> bool {
        self.functions.values().any(|function| function.progress == progress)
    }
}
