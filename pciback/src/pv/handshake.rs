//! The xenstore handshake with one guest's frontend, as a pure state machine.
//!
//! Inputs are what the engine was told and saw, outputs are [`Action`]s for it to carry out in their order. Several changes
//! can be under way at once; whatever comes in, the machine then takes every step that is possible
//! and stops where it must wait for somebody. What it expects of the frontend is what Linux's xen-pcifront does:
//!
//! | we write | the frontend then |
//! | --- | --- |
//! | backend directory, frontend directory with state 1 | publishes its page and port, state 3 |
//! | 4 | scans the root bus, state 4 |
//! | functions with `state-N` 1 or 5, then 7 | removes those with 5, state 7 |
//! | 8 | scans for new functions, state 4 |
//! | 5 | removes everything, state 6 |
//!
//! A frontend that is unloaded goes to 6 without a word; loaded again it goes from 6 to 3 and, should it find us
//! closing or closed then, back to 6. So we never stay in 5 or 6 longer than it takes the frontend to follow, and
//! return to 3 as soon as it has.
//!
//! With the last function the whole device goes, directories included. A frontend notices new directories only if it
//! had noticed that the old ones were gone, and nothing tells us when it has: so they are not made again
//! before a short time has passed, and are taken away and made once more, a few times at most, if the
//! frontend does not react to them.

use std::collections::BTreeMap;
use std::time::Duration;

use super::nodes::{BackendSnapshot, Change, FrontendSnapshot, Nodes, Offer, OfferError, XenbusState};
use crate::{DomId, Sbdf};

mod frontend;
mod publish;
mod step;
#[cfg(test)]
mod tests;

/// How long the machine waits for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For the frontend to give up functions, before it is overruled.
    pub detach: Duration,
    /// Between removing the directories and making them again.
    pub pause: Duration,
    /// For the frontend to react to directories that were made again.
    pub notice: Duration,
    /// How often directories are made again because of that.
    pub attempts: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            detach: Duration::from_secs(10),
            pause: Duration::from_millis(200),
            notice: Duration::from_secs(3),
            attempts: 3,
        }
    }
}

/// Something happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Give the guest a function at this device and function number. Refused with [`HandshakeReport::Refused`] when the number
    /// is taken.
    Attach {
        /// In the guest.
        devfn: u8,
        /// On the host.
        address: Sbdf,
        /// What stands in `opts-N`.
        options: String,
    },
    /// Take a function from the guest; nothing happens when it has none there. Ends with [`HandshakeReport::Detached`].
    Detach {
        /// In the guest.
        devfn: u8,
    },
    /// The frontend's nodes, read after any of them changed.
    Frontend(FrontendSnapshot),
    /// [`Action::Connect`] succeeded.
    RingUp,
    /// [`Action::Connect`] failed, or the ring failed later.
    RingFailed,
    /// [`Action::Hide`] was carried out.
    Hidden {
        /// In the guest.
        devfn: u8,
    },
    /// The time that [`Action::Timer`] asked for is over.
    Timer {
        /// From the action.
        token: u32,
    },
    /// The guest does not exist any more.
    GuestGone,
}

/// Something to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Change nodes, in one transaction.
    Store(Vec<Change>),
    /// Connect to the frontend's page and port and serve these functions, then say [`Input::RingUp`] or `RingFailed`.
    Connect {
        /// What the frontend offers.
        offer: Offer,
        /// Device and function numbers.
        functions: Vec<u8>,
    },
    /// Stop serving and disconnect, or do not connect; nothing happens when neither is the case. The frontend is another one
    /// from here on: quiesce the functions, so that it finds them as after an attach.
    Disconnect,
    /// Serve one more function; it must be answering when the following actions are done.
    Expose {
        /// In the guest.
        devfn: u8,
    },
    /// Stop serving a function and quiesce it, then say [`Input::Hidden`]. Also asked for functions that are not being served.
    Hide {
        /// In the guest.
        devfn: u8,
    },
    /// Say [`Input::Timer`] after this time. A later timer replaces an earlier one.
    Timer {
        /// How long.
        after: Duration,
        /// To say then.
        token: u32,
    },
    /// Tell whoever is interested.
    Report(HandshakeReport),
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HandshakeReport {
    /// The frontend has scanned for this function.
    Attached {
        /// In the guest.
        devfn: u8,
    },
    /// The guest cannot reach this function any more and no node of it is left.
    Detached {
        /// In the guest.
        devfn: u8,
        /// On the host.
        address: Sbdf,
        /// The frontend did not agree in time.
        forced: bool,
    },
    /// The number is taken.
    Refused {
        /// In the guest.
        devfn: u8,
    },
    /// The frontend is connected.
    Connected,
    /// The frontend is gone: unloaded, or its guest is shutting down. Its functions stay attached.
    Disconnected,
    /// The frontend published what cannot be used; nothing happens until it publishes something else.
    BadFrontend(OfferError),
    /// The frontend's page or port could not be connected, or the connection failed.
    RingFailed,
    /// Nothing of the device is left in xenstore.
    Removed,
}

/// Where one function stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// Wanted; no nodes yet.
    New,
    /// Its nodes are there; the frontend was not told to look for it yet.
    Announced,
    /// Served; `reported` once the frontend has scanned.
    Exposed { reported: bool },
    /// To be taken away; the frontend was not told yet.
    Leaving,
    /// The frontend was told to drop it.
    Dropping,
    /// Waiting for [`Input::Hidden`].
    Hiding,
    /// Not served any more; its nodes may still be there.
    Hidden,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Function {
    index: Option<u16>,
    address: Sbdf,
    options: String,
    progress: Progress,
    forced: bool,
    /// Wanted again at the same place while it is still leaving.
    next: Option<(Sbdf, String)>,
}

impl Function {
    fn leaves(&self) -> bool {
        matches!(self.progress, Progress::Leaving | Progress::Dropping | Progress::Hiding | Progress::Hidden)
    }
}

/// Where the device stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No directories.
    Absent,
    /// No directories, and not to be made yet.
    Pause,
    /// We are 3 and wait for the frontend's offer.
    Waiting,
    /// Waiting for the ring.
    Connecting,
    /// We are 4 and wait for the frontend to be.
    Scanning,
    /// Both are 4.
    Connected,
    /// We are 7 and wait for the frontend to be.
    Reconfiguring,
    /// The frontend is 7; functions are being hidden before we go 8.
    Hiding,
    /// We are 8 and wait for the frontend to be 4.
    Reconfigured,
    /// We are 5 and wait for the frontend to be 6.
    Closing,
    /// The frontend is 6; the last functions are being hidden before the directories go.
    Removing,
    /// The guest is gone.
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ring {
    Down,
    Connecting(Offer),
    Up(Offer),
}

impl Ring {
    fn offer(self) -> Option<Offer> {
        match self {
            Self::Down => None,
            Self::Connecting(offer) | Self::Up(offer) => Some(offer),
        }
    }
}

/// The handshake with one guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    nodes: Nodes,
    limits: Limits,
    phase: Phase,
    ring: Ring,
    functions: BTreeMap<u8, Function>,
    frontend: FrontendSnapshot,
    /// What was tried and refused; not tried again before the frontend says something else.
    rejected: Option<FrontendSnapshot>,
    /// Times that directories were made again; `None` before they were removed for the first time.
    attempt: Option<u32>,
    timer: u32,
    /// The detach limit runs.
    limiting: bool,
    /// The device goes, even though functions may be waiting to come.
    closing_for_good: bool,
}

impl Handshake {
    /// The handshake with a guest that has nothing yet.
    pub fn new(domain: DomId, limits: Limits) -> Self {
        Self {
            nodes: Nodes::of(domain),
            limits,
            phase: Phase::Absent,
            ring: Ring::Down,
            functions: BTreeMap::new(),
            frontend: FrontendSnapshot::default(),
            rejected: None,
            attempt: None,
            timer: 0,
            limiting: false,
            closing_for_good: false,
        }
    }

    /// Goes on where an earlier life of the service stopped, from what it left in xenstore. Functions whose nodes are
    /// damaged are not part of it; their nodes are removed.
    pub fn resume(
        domain: DomId,
        limits: Limits,
        backend: &BackendSnapshot,
        frontend: FrontendSnapshot,
    ) -> (Self, Vec<Action>) {
        let mut handshake = Self::new(domain, limits);
        handshake.frontend = frontend;
        let mut actions = Vec::new();
        if !backend.exists {
            return (handshake, actions);
        }
        for stored in &backend.functions {
            let progress = match stored.state {
                XenbusState::INITIALISING => Progress::Announced,
                XenbusState::CLOSING => Progress::Dropping,
                _ => Progress::Exposed { reported: false },
            };
            handshake.functions.insert(
                stored.devfn,
                Function {
                    index: Some(stored.index),
                    address: stored.address,
                    options: stored.options.clone(),
                    progress,
                    forced: false,
                    next: None,
                },
            );
        }
        if !backend.damaged.is_empty() {
            let removed = backend.damaged.iter().flat_map(|index| handshake.remove_function_nodes(*index));
            actions.push(Action::Store(removed.collect()));
        }
        handshake.phase = match backend.state {
            Some(XenbusState::CONNECTED) => Phase::Scanning,
            Some(XenbusState::RECONFIGURING) => Phase::Reconfiguring,
            Some(XenbusState::RECONFIGURED) => Phase::Reconfigured,
            Some(XenbusState::CLOSING) => Phase::Closing,
            _ => Phase::Waiting,
        };
        handshake.closing_for_good =
            handshake.phase == Phase::Closing && handshake.functions.values().all(Function::leaves);
        match (handshake.phase, handshake.frontend.offer()) {
            (Phase::Waiting, _) => {
                let state = handshake.write_state(XenbusState::INITIALISED);
                actions.push(Action::Store(vec![state]));
            }
            // The frontend may have an access under way: nothing else comes before the ring.
            (_, Ok(offer)) if handshake.frontend_up() => handshake.connect(offer, &mut actions),
            // In these phases the frontend was connected: it is gone, or has made nonsense of its nodes.
            _ => handshake.frontend_lost(&mut actions),
        }
        if handshake.functions.values().any(Function::leaves) {
            handshake.start_limit(&mut actions);
        }
        handshake.settle(&mut actions);
        (handshake, actions)
    }

    /// The guest.
    pub fn domain(&self) -> DomId {
        self.nodes.domain()
    }

    /// Where its nodes are.
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// The functions that the guest has or is to have: where, and which.
    pub fn functions(&self) -> impl Iterator<Item = (u8, Sbdf)> {
        self.functions.iter().filter_map(|(devfn, function)| match &function.next {
            Some((address, _)) => Some((*devfn, *address)),
            None if function.leaves() => None,
            None => Some((*devfn, function.address)),
        })
    }

    /// Whether there is nothing to do and nothing left: the machine can be dropped.
    pub fn finished(&self) -> bool {
        self.functions.is_empty() && matches!(self.phase, Phase::Absent | Phase::Pause | Phase::Gone)
    }

    /// Takes something that happened, and says what to do.
    pub fn handle(&mut self, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.phase == Phase::Gone && !matches!(input, Input::Hidden { .. }) {
            if let Input::Attach { devfn, .. } = input {
                actions.push(Action::Report(HandshakeReport::Refused { devfn }));
            }
            return actions;
        }
        match input {
            Input::Attach { devfn, address, options } => self.attach(devfn, address, options, &mut actions),
            Input::Detach { devfn } => self.detach(devfn, &mut actions),
            Input::Frontend(snapshot) => self.frontend_changed(snapshot, &mut actions),
            Input::RingUp => match self.ring {
                Ring::Connecting(offer) => {
                    self.ring = Ring::Up(offer);
                    actions.push(Action::Report(HandshakeReport::Connected));
                }
                // Asked for before the frontend went away.
                Ring::Down => actions.push(Action::Disconnect),
                Ring::Up(_) => {}
            },
            Input::RingFailed => self.ring_failed(&mut actions),
            Input::Hidden { devfn } => {
                if let Some(function) = self.functions.get_mut(&devfn)
                    && function.progress == Progress::Hiding
                {
                    function.progress = Progress::Hidden;
                }
            }
            Input::Timer { token } if token == self.timer => self.timer_over(&mut actions),
            Input::Timer { .. } => {}
            Input::GuestGone => self.guest_gone(&mut actions),
        }
        self.settle(&mut actions);
        actions
    }

    fn attach(&mut self, devfn: u8, address: Sbdf, options: String, actions: &mut Vec<Action>) {
        match self.functions.get_mut(&devfn) {
            Some(function) if function.leaves() && function.next.is_none() => {
                function.next = Some((address, options));
            }
            None => {
                self.functions.insert(devfn, Function::new(address, options));
            }
            Some(_) => actions.push(Action::Report(HandshakeReport::Refused { devfn })),
        }
    }

    fn detach(&mut self, devfn: u8, actions: &mut Vec<Action>) {
        let Some(function) = self.functions.get_mut(&devfn) else { return };
        if let Some((address, _)) = function.next.take() {
            // It never came.
            actions.push(Action::Report(HandshakeReport::Detached { devfn, address, forced: false }));
            return;
        }
        match function.progress {
            Progress::New => {
                let address = function.address;
                self.functions.remove(&devfn);
                actions.push(Action::Report(HandshakeReport::Detached { devfn, address, forced: false }));
            }
            Progress::Announced | Progress::Exposed { .. } => {
                function.progress = Progress::Leaving;
                self.start_limit(actions);
            }
            Progress::Leaving | Progress::Dropping | Progress::Hiding | Progress::Hidden => {}
        }
    }

    pub(super) fn start_timer(&mut self, after: Duration, actions: &mut Vec<Action>) {
        self.timer = self.timer.wrapping_add(1);
        actions.push(Action::Timer { after, token: self.timer });
    }

    /// Starts the time after which the frontend is overruled, unless it runs.
    pub(super) fn start_limit(&mut self, actions: &mut Vec<Action>) {
        if !self.limiting {
            self.limiting = true;
            self.start_timer(self.limits.detach, actions);
        }
    }

    fn timer_over(&mut self, actions: &mut Vec<Action>) {
        if std::mem::take(&mut self.limiting) {
            for (devfn, function) in &mut self.functions {
                if matches!(function.progress, Progress::Leaving | Progress::Dropping) {
                    function.progress = Progress::Hiding;
                    function.forced = true;
                    actions.push(Action::Hide { devfn: *devfn });
                }
            }
            if self.phase == Phase::Closing && self.closing_for_good {
                self.phase = Phase::Removing;
            }
            return;
        }
        match self.phase {
            Phase::Pause => self.phase = Phase::Absent,
            Phase::Waiting if self.frontend.state() <= XenbusState::INITIALISING => {
                // Nobody looked at the directories. Either nobody is there, or the frontend missed that they are new.
                if let Some(attempt) = self.attempt
                    && attempt < self.limits.attempts
                {
                    self.attempt = Some(attempt + 1);
                    actions.push(Action::Store(self.remove_directories()));
                    for function in self.functions.values_mut() {
                        if !function.leaves() {
                            function.progress = Progress::New;
                            function.index = None;
                        }
                    }
                    self.enter_pause(actions);
                }
            }
            _ => {}
        }
    }

    pub(super) fn enter_pause(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Pause;
        self.frontend = FrontendSnapshot::default();
        self.rejected = None;
        self.closing_for_good = false;
        self.limiting = false;
        self.start_timer(self.limits.pause, actions);
    }

    fn guest_gone(&mut self, actions: &mut Vec<Action>) {
        if self.ring != Ring::Down {
            self.ring = Ring::Down;
            actions.push(Action::Disconnect);
        }
        self.phase = Phase::Gone;
        for (devfn, function) in &mut self.functions {
            if let Some((address, _)) = function.next.take() {
                let devfn = *devfn;
                actions.push(Action::Report(HandshakeReport::Detached { devfn, address, forced: false }));
            }
            if !matches!(function.progress, Progress::Hiding | Progress::Hidden) {
                function.progress = Progress::Hiding;
                actions.push(Action::Hide { devfn: *devfn });
            }
        }
        actions.push(Action::Store(self.remove_directories()));
        if self.functions.is_empty() {
            actions.push(Action::Report(HandshakeReport::Removed));
        }
    }
}

impl Function {
    fn new(address: Sbdf, options: String) -> Self {
        Self { index: None, address, options, progress: Progress::New, forced: false, next: None }
    }
}
