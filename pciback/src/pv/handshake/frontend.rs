//! What the frontend does, and what follows for the ring.

use super::super::nodes::{FrontendSnapshot, Offer, XenbusState};
use super::{Action, Function, Handshake, HandshakeReport, Phase, Progress, Ring};

impl Handshake {
    pub(super) fn frontend_changed(&mut self, snapshot: FrontendSnapshot, actions: &mut Vec<Action>) {
        let before = self.frontend.state();
        self.frontend = snapshot;
        let now = self.frontend.state();
        if self.rejected.as_ref().is_some_and(|rejected| *rejected != self.frontend) {
            self.rejected = None;
        }
        let Some(current) = self.ring.offer() else { return };
        let restarted = now == XenbusState::INITIALISED && before != now;
        let moved = matches!(now, XenbusState::INITIALISED | XenbusState::CONNECTED)
            && self.frontend.offer().is_ok_and(|offer| offer != current);
        if restarted || moved {
            // A new frontend, perhaps one that was unloaded and loaded while we did not look.
            self.frontend_lost(actions);
        } else if !self.frontend_up() {
            if now == XenbusState::CLOSING {
                // Its guest shuts down, and waits for us to agree before it goes on.
                if self.phase != Phase::Closing && self.phase != Phase::Removing {
                    self.phase = Phase::Closing;
                    actions.push(Action::Store(vec![self.write_state(XenbusState::CLOSING)]));
                }
            } else if self.phase != Phase::Closing && self.phase != Phase::Removing {
                self.frontend_lost(actions);
            }
        }
    }

    /// Whether the frontend is in a state in which it may use the ring.
    pub(super) fn frontend_up(&self) -> bool {
        matches!(
            self.frontend.state(),
            XenbusState::INITIALISED
                | XenbusState::CONNECTED
                | XenbusState::RECONFIGURING
                | XenbusState::RECONFIGURED
        )
    }

    /// The ring goes down, and we wait for a frontend.
    pub(super) fn frontend_lost(&mut self, actions: &mut Vec<Action>) {
        if self.ring != Ring::Down {
            actions.push(Action::Disconnect);
            if matches!(self.ring, Ring::Up(_)) {
                actions.push(Action::Report(HandshakeReport::Disconnected));
            }
            self.ring = Ring::Down;
        }
        for function in self.functions.values_mut() {
            match function.progress {
                // The next frontend will find it when it scans.
                Progress::Announced => function.progress = Progress::Exposed { reported: false },
                Progress::Exposed { .. } => function.progress = Progress::Exposed { reported: false },
                Progress::Dropping => function.progress = Progress::Leaving,
                _ => {}
            }
        }
        if self.phase != Phase::Gone {
            self.phase = Phase::Waiting;
            self.closing_for_good = false;
            actions.push(Action::Store(self.waiting_nodes()));
        }
    }

    pub(super) fn ring_failed(&mut self, actions: &mut Vec<Action>) {
        if self.ring == Ring::Down {
            return;
        }
        actions.push(Action::Report(HandshakeReport::RingFailed));
        self.frontend_lost(actions);
        self.reject(actions);
    }

    /// Closes towards a frontend with which nothing can be done, until it says something else.
    pub(super) fn reject(&mut self, actions: &mut Vec<Action>) {
        self.rejected = Some(self.frontend.clone());
        self.phase = Phase::Closing;
        actions.push(Action::Store(vec![self.write_state(XenbusState::CLOSING)]));
    }

    pub(super) fn connect(&mut self, offer: Offer, actions: &mut Vec<Action>) {
        self.ring = Ring::Connecting(offer);
        let visible = |function: &Function| {
            matches!(function.progress, Progress::Exposed { .. } | Progress::Leaving | Progress::Dropping)
        };
        let functions = self
            .functions
            .iter()
            .filter(|(_, function)| visible(function))
            .map(|(devfn, _)| *devfn)
            .collect();
        actions.push(Action::Connect { offer, functions });
    }
}
