//! How the handshake continues from the states of the two ends, as far as the frontend permits.

use std::collections::BTreeSet;

use super::{Action, Function, Handshake, Link, Phase, state};
use crate::Devfn;
use crate::serve::pv::nodes::{NodeChange, RingPlace, XenbusState, key};

impl Handshake {
    /// Goes as far as the frontend lets us.
    pub(super) fn advance(&mut self, actions: &mut Vec<Action>) {
        // Each turn moves the link or stops; an exchange has four links, so this many turns are more than enough.
        for _ in 0..16 {
            let before = self.link;
            match self.link {
                Link::Absent => self.publish(actions),
                Link::Published => self.published(actions),
                Link::Connecting(_) | Link::Pausing => {}
                Link::Connected { ring, scanned } => self.connected(ring, scanned, actions),
                Link::Reconfiguring(ring) => self.reconfiguring(ring, actions),
                Link::Reconfigured(ring) => self.reconfigured(ring, actions),
                Link::Closing(ring) => self.closing(ring, actions),
            }
            if self.link == before {
                return;
            }
        }
    }

    fn publish(&mut self, actions: &mut Vec<Action>) {
        if self.functions.is_empty() {
            return;
        }
        let mut changes = NodeChange::device(self.domain);
        for (devfn, function) in &mut self.functions {
            function.phase = Phase::Published;
            let published =
                NodeChange::function(function.index, function.address, *devfn, XenbusState::INITIALISED);
            changes.extend(published);
        }
        changes.push(self.count());
        changes.push(NodeChange::backend(key::STATE, XenbusState::INITIALISED.0));
        actions.push(Action::Nodes(changes));
        actions.extend(self.functions.keys().map(|devfn| Action::Waiting(*devfn)));
        self.link = Link::Published;
    }

    /// The frontend is not connected: functions come and go by their nodes alone.
    fn published(&mut self, actions: &mut Vec<Action>) {
        let mut changes = Vec::new();
        let (mut added, mut removed) = (Vec::new(), Vec::new());
        for (devfn, function) in &mut self.functions {
            match function.phase {
                Phase::Wanted | Phase::Adding => {
                    function.phase = Phase::Published;
                    let state = XenbusState::INITIALISED;
                    changes.extend(NodeChange::function(function.index, function.address, *devfn, state));
                    added.push(Action::Waiting(*devfn));
                }
                Phase::Unwanted | Phase::Removing => {
                    changes.extend(NodeChange::no_function(function.index));
                    removed.push(*devfn);
                }
                Phase::Present => function.phase = Phase::Published,
                Phase::Published => {}
            }
        }
        self.functions.retain(|devfn, _| !removed.contains(devfn));
        if self.functions.is_empty() {
            self.close(actions);
        } else if !changes.is_empty() {
            changes.push(self.count());
            actions.push(Action::Nodes(changes));
        }
        actions.extend(added);
        actions.extend(removed.into_iter().map(Action::Removed));
        if self.link == Link::Published {
            self.connect(actions);
        }
    }

    fn connect(&mut self, actions: &mut Vec<Action>) {
        let ready = matches!(self.frontend.state, Some(XenbusState::INITIALISED | XenbusState::CONNECTED));
        let Some(ring) = self.frontend.ring.clone().filter(|_| ready) else { return };
        if self.refused.as_ref() == Some(&ring) {
            return;
        }
        match ring {
            Ok(ring) => {
                self.link = Link::Connecting(ring);
                self.unseen = false;
                actions.push(Action::Connect(ring));
            }
            Err(why) => {
                actions.push(Action::Report(format!("it published an invalid value: {why}")));
                self.refused = Some(Err(why));
            }
        }
    }

    /// Whether the frontend left the ring: its module was removed, or it failed. Then we wait for it to come back.
    fn frontend_left(&mut self, ring: RingPlace, was_connected: bool, actions: &mut Vec<Action>) -> bool {
        let left = match self.frontend.state {
            None | Some(XenbusState::CLOSING | XenbusState::CLOSED) => true,
            Some(XenbusState::INITIALISING | XenbusState::INIT_WAIT | XenbusState::UNKNOWN) => true,
            Some(XenbusState::INITIALISED) => was_connected || self.frontend.ring != Some(Ok(ring)),
            Some(_) => self.frontend.ring != Some(Ok(ring)),
        };
        if left {
            self.back_to_published(actions);
        }
        left
    }

    pub(super) fn back_to_published(&mut self, actions: &mut Vec<Action>) {
        if self.ring().is_some() {
            actions.push(Action::Disconnect);
        }
        // A guest that comes back scans its whole bus.
        let undropped = std::mem::take(&mut self.undropped);
        let mut changes: Vec<NodeChange> =
            undropped.values().flat_map(|function| NodeChange::no_function(function.index)).collect();
        changes.push(NodeChange::backend(key::STATE, XenbusState::INITIALISED.0));
        actions.push(Action::Nodes(changes));
        self.link = Link::Published;
    }

    fn connected(&mut self, ring: RingPlace, scanned: bool, actions: &mut Vec<Action>) {
        if self.frontend_left(ring, scanned, actions) {
            return;
        }
        if self.frontend.state == Some(XenbusState::RECONFIGURING) {
            // It has come along after all with an exchange that was called off, and waits for its end.
            actions.push(state(XenbusState::RECONFIGURED));
            self.link = Link::Reconfigured(ring);
            return;
        }
        if self.frontend.state != Some(XenbusState::CONNECTED) {
            return;
        }
        self.link = Link::Connected { ring, scanned: true };
        self.settle(Phase::Published, actions);
        let undropped: BTreeSet<Devfn> = self.undropped.keys().copied().collect();
        // Where the guest still has a device, it has to drop that first.
        let pending = |(devfn, function): (&Devfn, &Function)| match function.phase {
            Phase::Wanted => !undropped.contains(devfn),
            phase => phase == Phase::Unwanted,
        };
        let to_drop = self.undropped.values().any(|function| !function.asked);
        if !to_drop && !self.functions.iter().any(pending) {
            return;
        }
        if self.functions.values().all(|function| function.phase == Phase::Unwanted) {
            actions.push(state(XenbusState::CLOSING));
            self.link = Link::Closing(ring);
            return;
        }
        let mut changes = Vec::new();
        for (devfn, function) in &mut self.functions {
            match function.phase {
                Phase::Wanted if !undropped.contains(devfn) => {
                    function.phase = Phase::Adding;
                    let state = XenbusState::INITIALISING;
                    changes.extend(NodeChange::function(function.index, function.address, *devfn, state));
                }
                Phase::Unwanted => {
                    function.phase = Phase::Removing;
                    changes.push(NodeChange::function_state(function.index, XenbusState::CLOSING));
                }
                _ => {}
            }
        }
        for function in self.undropped.values_mut() {
            function.asked = true;
            changes.push(NodeChange::function_state(function.index, XenbusState::CLOSING));
        }
        changes.push(self.count());
        changes.push(NodeChange::backend(key::STATE, XenbusState::RECONFIGURING.0));
        actions.push(Action::Nodes(changes));
        self.link = Link::Reconfiguring(ring);
    }

    fn reconfiguring(&mut self, ring: RingPlace, actions: &mut Vec<Action>) {
        if self.frontend_left(ring, true, actions) || self.frontend.state != Some(XenbusState::RECONFIGURING)
        {
            return;
        }
        let mut changes = Vec::new();
        let mut removed = Vec::new();
        for (devfn, function) in &self.functions {
            match function.phase {
                Phase::Removing => {
                    changes.extend(NodeChange::no_function(function.index));
                    removed.push(*devfn);
                }
                Phase::Adding => {
                    changes.push(NodeChange::function_state(function.index, XenbusState::INITIALISED))
                }
                _ => {}
            }
        }
        self.functions.retain(|devfn, _| !removed.contains(devfn));
        self.undropped.retain(|_, function| {
            if function.asked {
                changes.extend(NodeChange::no_function(function.index));
            }
            !function.asked
        });
        // The guest looks at its bus again once we are Reconfigured: what still answered would be found.
        actions.extend(removed.into_iter().map(Action::Removed));
        if self.functions.is_empty() {
            // The function to be added was withdrawn in between.
            self.close(actions);
            return;
        }
        changes.push(self.count());
        changes.push(NodeChange::backend(key::STATE, XenbusState::RECONFIGURED.0));
        actions.push(Action::Nodes(changes));
        self.link = Link::Reconfigured(ring);
    }

    fn reconfigured(&mut self, ring: RingPlace, actions: &mut Vec<Action>) {
        // It left Reconfiguring only when it has scanned.
        if self.frontend_left(ring, true, actions) || self.frontend.state != Some(XenbusState::CONNECTED) {
            return;
        }
        actions.push(state(XenbusState::CONNECTED));
        self.link = Link::Connected { ring, scanned: true };
        self.settle(Phase::Adding, actions);
    }

    fn settle(&mut self, phase: Phase, actions: &mut Vec<Action>) {
        for (devfn, function) in &mut self.functions {
            if function.phase == phase {
                function.phase = Phase::Present;
                actions.push(Action::Added(*devfn));
            }
        }
    }

    fn closing(&mut self, ring: RingPlace, actions: &mut Vec<Action>) {
        if self.may_be_connected(ring) || self.frontend.state == Some(XenbusState::CLOSING) {
            return;
        }
        let gone = |function: &Function| matches!(function.phase, Phase::Unwanted | Phase::Removing);
        let removed: Vec<Devfn> =
            self.functions.iter().filter(|(_, function)| gone(function)).map(|(devfn, _)| *devfn).collect();
        self.functions.retain(|devfn, _| !removed.contains(devfn));
        self.close(actions);
        actions.extend(removed.into_iter().map(Action::Removed));
    }
}
