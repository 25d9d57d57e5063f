//! The steps of the handshake that change nodes.

use super::super::nodes::{
    Change, MAX_FUNCTIONS, Owner, ROOT, XenbusState, backend_key, frontend_key, virtual_address,
};
use super::{Action, Function, Handshake, HandshakeReport, Phase, Progress, Ring};

impl Handshake {
    fn write(&self, key: &str, value: impl ToString) -> Change {
        Change::Write { path: self.nodes.backend_node(key), value: value.to_string(), owner: Owner::Backend }
    }

    pub(super) fn write_state(&self, state: XenbusState) -> Change {
        self.write(backend_key::STATE, state.0)
    }

    fn write_count(&self) -> Change {
        let highest = self.functions.values().filter_map(|function| function.index).max();
        self.write(backend_key::NUM_DEVS, highest.map_or(0, |index| index + 1))
    }

    /// The nodes of one function, with its own state.
    fn function_nodes(&self, devfn: u8, state: XenbusState) -> Vec<Change> {
        let Some(function) = self.functions.get(&devfn) else { return Vec::new() };
        let Some(index) = function.index else { return Vec::new() };
        vec![
            self.write(&backend_key::dev(index), function.address),
            self.write(&backend_key::vdev(index), virtual_address(devfn)),
            self.write(&backend_key::opts(index), &function.options),
            self.write(&backend_key::state(index), state.0),
        ]
    }

    pub(super) fn remove_function_nodes(&self, index: u16) -> Vec<Change> {
        [
            backend_key::dev(index),
            backend_key::vdev(index),
            backend_key::opts(index),
            backend_key::state(index),
        ]
        .iter()
        .map(|key| Change::Remove { path: self.nodes.backend_node(key) })
        .collect()
    }

    /// Frontends watch for their own directory, not for the one above it: both are removed by name.
    pub(super) fn remove_directories(&self) -> Vec<Change> {
        [
            self.nodes.frontend(),
            self.nodes.frontend_parent(),
            self.nodes.backend(),
            self.nodes.backend_parent(),
        ]
        .into_iter()
        .map(|path| Change::Remove { path })
        .collect()
    }

    /// Gives a function the lowest index that is free.
    fn number(&mut self, devfn: u8) {
        let taken: Vec<u16> = self.functions.values().filter_map(|function| function.index).collect();
        let free = (0..MAX_FUNCTIONS).find(|index| !taken.contains(index));
        if let Some(function) = self.functions.get_mut(&devfn)
            && function.index.is_none()
        {
            function.index = free;
        }
    }

    /// Everything a frontend wants to find, for the functions that it is to find.
    pub(super) fn publish_all(&mut self, actions: &mut Vec<Action>) {
        let coming: Vec<u8> = self
            .functions
            .iter()
            .filter(|(_, function)| !function.leaves())
            .map(|(devfn, _)| *devfn)
            .collect();
        for devfn in &coming {
            self.number(*devfn);
        }
        let frontend_node = |key: &str, value: String| Change::Write {
            path: self.nodes.frontend_node(key),
            value,
            owner: Owner::Frontend,
        };
        let mut changes = vec![
            Change::Write { path: self.nodes.backend(), value: String::new(), owner: Owner::Backend },
            self.write(backend_key::FRONTEND, self.nodes.frontend()),
            self.write(backend_key::FRONTEND_ID, self.domain()),
            self.write(backend_key::ONLINE, 1),
            self.write(backend_key::ROOT_NUM, 1),
            self.write(backend_key::ROOT_0, ROOT),
        ];
        for devfn in &coming {
            changes.extend(self.function_nodes(*devfn, XenbusState::INITIALISED));
        }
        changes.extend([
            self.write_count(),
            self.write_state(XenbusState::INITIALISED),
            Change::Write { path: self.nodes.frontend(), value: String::new(), owner: Owner::Frontend },
            frontend_node(frontend_key::BACKEND, self.nodes.backend()),
            frontend_node(frontend_key::BACKEND_ID, "0".to_owned()),
            frontend_node(frontend_key::STATE, XenbusState::INITIALISING.0.to_string()),
        ]);
        actions.push(Action::Store(changes));
        for devfn in coming {
            self.set(devfn, Progress::Exposed { reported: false });
        }
        self.phase = Phase::Waiting;
        if self.attempt.is_some() && !self.limiting {
            self.start_timer(self.limits.notice, actions);
        }
    }

    fn set(&mut self, devfn: u8, progress: Progress) {
        if let Some(function) = self.functions.get_mut(&devfn) {
            function.progress = progress;
        }
    }

    fn with(&self, wanted: impl Fn(&Function) -> bool) -> Vec<u8> {
        self.functions.iter().filter(|(_, function)| wanted(function)).map(|(devfn, _)| *devfn).collect()
    }

    /// The nodes that say that we wait for a frontend, with all functions that it will find.
    pub(super) fn waiting_nodes(&self) -> Vec<Change> {
        let mut changes: Vec<Change> = self
            .functions
            .values()
            .filter(|function| !function.leaves())
            .filter_map(|function| function.index)
            .map(|index| self.write(&backend_key::state(index), XenbusState::INITIALISED.0))
            .collect();
        changes.push(self.write_state(XenbusState::INITIALISED));
        changes
    }

    pub(super) fn step_waiting(&mut self, state: XenbusState, actions: &mut Vec<Action>) -> bool {
        // Nobody uses the ring: functions come and go without asking.
        let coming = self.with(|function| function.progress == Progress::New);
        if !coming.is_empty() {
            let mut changes = Vec::new();
            for devfn in coming {
                self.number(devfn);
                changes.extend(self.function_nodes(devfn, XenbusState::INITIALISED));
                self.set(devfn, Progress::Exposed { reported: false });
            }
            changes.push(self.write_count());
            actions.push(Action::Store(changes));
            return true;
        }
        if self.hide_leaving(actions) || self.drop_hidden(actions) {
            return true;
        }
        if state != XenbusState::INITIALISED && state != XenbusState::CONNECTED
            || self.rejected.is_some()
            || self.any(Progress::Hiding)
        {
            return false;
        }
        match self.frontend.offer() {
            Ok(offer) => {
                self.phase = Phase::Connecting;
                self.attempt = self.attempt.map(|_| 0);
                self.connect(offer, actions);
            }
            Err(error) => {
                actions.push(Action::Report(HandshakeReport::BadFrontend(error)));
                self.reject(actions);
            }
        }
        true
    }

    /// The frontend has scanned the bus.
    pub(super) fn scanned(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Connected;
        for (devfn, function) in &mut self.functions {
            if function.progress == (Progress::Exposed { reported: false }) {
                function.progress = Progress::Exposed { reported: true };
                actions.push(Action::Report(HandshakeReport::Attached { devfn: *devfn }));
            }
        }
    }

    /// Begins an exchange of functions, if there are any to exchange.
    pub(super) fn step_connected(&mut self, actions: &mut Vec<Action>) -> bool {
        let coming = self.with(|function| matches!(function.progress, Progress::New | Progress::Announced));
        let leaving =
            self.with(|function| matches!(function.progress, Progress::Leaving | Progress::Dropping));
        if coming.is_empty() && leaving.is_empty() {
            return false;
        }
        let mut changes = Vec::new();
        for devfn in &leaving {
            if let Some(index) = self.functions.get(devfn).and_then(|function| function.index) {
                changes.push(self.write(&backend_key::state(index), XenbusState::CLOSING.0));
            }
            self.set(*devfn, Progress::Dropping);
        }
        for devfn in coming {
            self.number(devfn);
            changes.extend(self.function_nodes(devfn, XenbusState::INITIALISING));
            self.set(devfn, Progress::Announced);
        }
        changes.push(self.write_count());
        if self.functions.values().all(Function::leaves) {
            // The last ones: the whole device goes.
            changes.push(self.write_state(XenbusState::CLOSING));
            self.phase = Phase::Closing;
            self.closing_for_good = true;
        } else {
            changes.push(self.write_state(XenbusState::RECONFIGURING));
            self.phase = Phase::Reconfiguring;
        }
        actions.push(Action::Store(changes));
        true
    }

    /// The frontend has dropped what it was to drop. It scans for functions once we are 8, so those that go must be silent
    /// before.
    pub(super) fn exchange(&mut self, actions: &mut Vec<Action>) {
        for devfn in self.with(|function| function.progress == Progress::Dropping) {
            self.set(devfn, Progress::Hiding);
            actions.push(Action::Hide { devfn });
        }
        for devfn in self.with(|function| function.progress == Progress::Announced) {
            actions.push(Action::Expose { devfn });
        }
        self.phase = Phase::Hiding;
    }

    /// The functions that go are silent.
    pub(super) fn exchanged(&mut self, actions: &mut Vec<Action>) {
        let mut changes = Vec::new();
        for devfn in self.with(|function| function.progress == Progress::Announced) {
            if let Some(index) = self.functions.get(&devfn).and_then(|function| function.index) {
                changes.push(self.write(&backend_key::state(index), XenbusState::INITIALISED.0));
            }
            self.set(devfn, Progress::Exposed { reported: false });
        }
        let mut reports = Vec::new();
        changes.extend(self.take_hidden(&mut reports));
        changes.push(self.write_state(XenbusState::RECONFIGURED));
        actions.push(Action::Store(changes));
        actions.extend(reports);
        self.phase = Phase::Reconfigured;
    }

    /// Forgets the functions that are silent; the result removes their nodes.
    fn take_hidden(&mut self, reports: &mut Vec<Action>) -> Vec<Change> {
        let hidden = self.with(|function| function.progress == Progress::Hidden);
        let mut changes = Vec::new();
        for devfn in &hidden {
            let Some(function) = self.functions.remove(devfn) else { continue };
            changes.extend(function.index.iter().flat_map(|index| self.remove_function_nodes(*index)));
            let Function { address, forced, .. } = function;
            reports.push(Action::Report(HandshakeReport::Detached { devfn: *devfn, address, forced }));
            if let Some((address, options)) = function.next {
                self.functions.insert(*devfn, Function::new(address, options));
            }
        }
        if !hidden.is_empty() {
            changes.push(self.write_count());
        }
        if !self.functions.values().any(Function::leaves) {
            self.limiting = false;
        }
        changes
    }

    /// Removes what is left of functions that were hidden outside of an exchange, and of the device when they were the last.
    pub(super) fn drop_hidden(&mut self, actions: &mut Vec<Action>) -> bool {
        if !self.any(Progress::Hidden) {
            return false;
        }
        if self.functions.values().all(|function| function.progress == Progress::Hidden) {
            self.phase = Phase::Removing;
            return true;
        }
        let mut reports = Vec::new();
        let changes = self.take_hidden(&mut reports);
        actions.push(Action::Store(changes));
        actions.extend(reports);
        true
    }

    /// The frontend has let go of everything, or never had anything.
    pub(super) fn closed(&mut self, actions: &mut Vec<Action>) {
        if self.closing_for_good {
            self.hide_leaving(actions);
            self.phase = Phase::Removing;
        } else {
            self.frontend_lost(actions);
        }
    }

    /// The last functions are silent: the device goes.
    pub(super) fn remove_all(&mut self, actions: &mut Vec<Action>) {
        if self.ring != Ring::Down {
            self.ring = Ring::Down;
            actions.push(Action::Disconnect);
        }
        let mut reports = Vec::new();
        let _each = self.take_hidden(&mut reports);
        actions.push(Action::Store(self.remove_directories()));
        actions.extend(reports);
        // A function that came in the meantime was never announced, or is to be announced again.
        for function in self.functions.values_mut() {
            function.progress = Progress::New;
            function.index = None;
        }
        actions.push(Action::Report(HandshakeReport::Removed));
        self.attempt = Some(0);
        self.enter_pause(actions);
    }

    /// Functions that go before the directories are made again.
    pub(super) fn forget_unpublished(&mut self, actions: &mut Vec<Action>) -> bool {
        let hiding = self.hide_leaving(actions);
        let mut reports = Vec::new();
        let _no_nodes = self.take_hidden(&mut reports);
        let forgotten = !reports.is_empty();
        actions.extend(reports);
        hiding || forgotten
    }

    /// Silences the functions that go, without waiting for a frontend; `false` when there are none.
    pub(super) fn hide_leaving(&mut self, actions: &mut Vec<Action>) -> bool {
        let leaving =
            self.with(|function| matches!(function.progress, Progress::Leaving | Progress::Dropping));
        for devfn in &leaving {
            self.set(*devfn, Progress::Hiding);
            actions.push(Action::Hide { devfn: *devfn });
        }
        !leaving.is_empty()
    }

    /// The guest is gone: nothing is left but to hear that its functions are silent.
    pub(super) fn forget_gone(&mut self, actions: &mut Vec<Action>) -> bool {
        if !self.any(Progress::Hidden) {
            return false;
        }
        let mut reports = Vec::new();
        let _removed_already = self.take_hidden(&mut reports);
        actions.extend(reports);
        if self.functions.is_empty() {
            actions.push(Action::Report(HandshakeReport::Removed));
        }
        true
    }
}
