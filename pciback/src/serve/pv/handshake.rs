//! The xenstore handshake with one guest's frontend, as a pure state machine.
//!
//! It knows which functions the guest shall have and what the frontend says, and answers with what to do next. Linux's
//! xen-pcifront sets the pace: it publishes its ring and goes to Initialised; it scans its buses when we go to
//! Connected; while both are connected the set of functions changes only by the exchange Reconfiguring (it drops what is marked
//! Closing) and Reconfigured (it scans again); when we go to Closing it drops everything. Its module can be removed and
//! loaded again: then it comes back to Initialised with another ring.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::nodes::{FrontendView, NodeChange, PublishedFunction, RingPlace, XenbusState, key};
use crate::{Devfn, DomId, Sbdf};

mod progress;

/// How long the directories stay away once they were removed. A guest's xenbus notices only whether they are there when it
/// looks: made again before that, they would be those of the device that it knows and has closed, and it would not connect. A guest that
/// is paused or slow may look later than that: see [`Handshake::notify_again`].
pub const PAUSE: Duration = Duration::from_millis(250);

/// What to do next, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Change nodes, all in one transaction.
    Nodes(Vec<NodeChange>),
    /// Connect to the ring, then call [`Handshake::ring_connected`].
    Connect(RingPlace),
    /// Give the ring up.
    Disconnect,
    /// The guest was notified of the function and has scanned for it.
    Added(Devfn),
    /// The function is published, but the guest does not look for it yet.
    Waiting(Devfn),
    /// The guest has released the function, or its time is up: it must be silent before the next action, which may have the
    /// guest look at its bus again.
    Removed(Devfn),
    /// Something for the log: what the guest does wrong.
    Report(String),
    /// Call [`Handshake::pause_over`] after [`PAUSE`]. Until then nothing is published.
    Pause,
    /// Notify the guest of its device once more.
    NotifyAgain,
    /// Call [`Handshake::closing_over`] when the guest has had its time to drop the device.
    AwaitClosed,
}

/// How far the two ends are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// There are no nodes.
    Absent,
    /// There are no nodes since a moment ago.
    Pausing,
    /// Ours are published; the frontend is awaited.
    Published,
    /// Its ring is being connected to.
    Connecting(RingPlace),
    /// We are connected; `scanned`: so is the frontend.
    Connected { ring: RingPlace, scanned: bool },
    /// The frontend is asked to drop functions.
    Reconfiguring(RingPlace),
    /// The frontend is asked to look for functions.
    Reconfigured(RingPlace),
    /// The frontend is asked to release everything.
    Closing(RingPlace),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// To be published.
    Wanted,
    /// Published; the guest has not scanned since.
    Published,
    /// Part of the exchange in progress.
    Adding,
    /// It is attached to the guest.
    Present,
    /// To be withdrawn.
    Unwanted,
    /// Part of the exchange in progress.
    Removing,
}

impl Phase {
    /// The phase of a function that an earlier process left in this state, with the link as it left it.
    fn resumed(state: XenbusState, link: Link) -> Self {
        match (state, link) {
            (_, Link::Pausing) => Self::Wanted,
            // It closes only to lose all of them.
            (_, Link::Closing(_)) => Self::Unwanted,
            (XenbusState::INITIALISING, _) => Self::Adding,
            (XenbusState::CLOSING, _) => Self::Removing,
            (_, Link::Connected { scanned: true, .. }) => Self::Present,
            (_, Link::Reconfigured(_)) => Self::Adding,
            _ => Self::Published,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Function {
    address: Sbdf,
    index: u32,
    phase: Phase,
}

/// A function that was withdrawn without the guest, which still has a device for it. Linux would skip that place when it scans, so
/// the guest must drop it before it gets another function there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Undropped {
    index: u32,
    /// It was marked Closing before the exchange in progress began: the answer to that says that the guest has dropped it.
    asked: bool,
}

/// The handshake with one guest.
#[derive(Debug, Clone)]
pub struct Handshake {
    domain: DomId,
    link: Link,
    frontend: FrontendView,
    functions: BTreeMap<Devfn, Function>,
    undropped: BTreeMap<Devfn, Undropped>,
    /// The guest may not have seen that its directories were removed: then it keeps the device of before and does not look for another.
    unseen: bool,
    /// A ring that could not be connected to, or a complaint that was made: not repeated until the frontend says something else.
    refused: Option<Result<RingPlace, String>>,
}

impl Handshake {
    /// A guest without functions.
    pub fn new(domain: DomId) -> Self {
        let (link, frontend) = (Link::Absent, FrontendView::default());
        let (functions, undropped) = (BTreeMap::new(), BTreeMap::new());
        Self { domain, link, frontend, functions, undropped, unseen: false, refused: None }
    }

    /// A guest that a previous process of the service served. `left` is what our end's nodes say; functions they name but
    /// `functions` does not are withdrawn ones, which the guest has to drop if it has scanned. The first action is to connect to the
    /// ring again, where there was one.
    pub fn resume(
        domain: DomId,
        state: Option<XenbusState>,
        left: &[PublishedFunction],
        functions: &[(Devfn, Sbdf)],
        frontend: FrontendView,
    ) -> (Self, Vec<Action>) {
        let mut handshake = Self::new(domain);
        handshake.frontend = frontend;
        let ring = handshake.frontend.ring.clone().and_then(Result::ok);
        let scanned = handshake.frontend.state == Some(XenbusState::CONNECTED);
        handshake.link = match (state, ring) {
            // The directories may have been removed just before.
            (None, _) => Link::Pausing,
            (Some(XenbusState::CONNECTED), Some(ring)) => Link::Connected { ring, scanned },
            (Some(XenbusState::RECONFIGURING), Some(ring)) => Link::Reconfiguring(ring),
            (Some(XenbusState::RECONFIGURED), Some(ring)) => Link::Reconfigured(ring),
            (Some(XenbusState::CLOSING), Some(ring)) => Link::Closing(ring),
            (Some(_), _) => Link::Published,
        };
        handshake.unseen = handshake.ring().is_none();
        let is_of = |published: &PublishedFunction| {
            published.address.is_some() && functions.iter().any(|(devfn, _)| *devfn == published.devfn)
        };
        let (known, unknown): (Vec<_>, Vec<_>) = left.iter().copied().partition(is_of);
        if !functions.is_empty() && handshake.has_scanned() {
            let exchanging = matches!(handshake.link, Link::Reconfiguring(_));
            for PublishedFunction { index, devfn, state, .. } in &unknown {
                let asked = *state == XenbusState::CLOSING && exchanging;
                handshake.undropped.insert(*devfn, Undropped { index: *index, asked });
            }
        }
        let node_of = |devfn: Devfn| known.iter().find(|published| published.devfn == devfn);
        // Those with nodes keep their index; only then is it known which are free.
        let (published, new): (Vec<_>, Vec<_>) =
            functions.iter().partition(|(devfn, _)| node_of(*devfn).is_some());
        for &(devfn, address) in published.into_iter().chain(new) {
            let (index, phase) = match node_of(devfn) {
                None => (handshake.free_index(), Phase::Wanted),
                Some(node) => (node.index, Phase::resumed(node.state, handshake.link)),
            };
            handshake.functions.insert(devfn, Function { address, index, phase });
        }
        let mut actions = Vec::new();
        if let Some(ring) = handshake.ring() {
            // Before anything else: the guest may be waiting for an answer.
            actions.push(Action::Connect(ring));
        }
        if handshake.is_dropping() {
            actions.push(Action::AwaitClosed);
        }
        let mut changes = Vec::new();
        for PublishedFunction { index, devfn, .. } in unknown {
            match handshake.undropped.contains_key(&devfn) {
                true => changes.push(NodeChange::withdrawn_function(index)),
                false => changes.extend(NodeChange::no_function(index)),
            }
        }
        if handshake.link == Link::Published && state != Some(XenbusState::INITIALISED) {
            changes.push(NodeChange::backend(key::STATE, XenbusState::INITIALISED.0));
        }
        if !changes.is_empty() {
            actions.push(Action::Nodes(changes));
        }
        match handshake.link {
            Link::Pausing if handshake.functions.is_empty() => handshake.link = Link::Absent,
            Link::Pausing => actions.push(Action::Pause),
            _ if handshake.ring().is_none() => handshake.advance(&mut actions),
            _ => {}
        }
        (handshake, actions)
    }

    /// Whether the frontend is the one that our end is or was connected to, and not a later one that has begun anew.
    pub fn is_joined(&self) -> bool {
        let joined = [XenbusState::CONNECTED, XenbusState::RECONFIGURING];
        self.frontend.state.is_some_and(|state| joined.contains(&state))
    }

    /// Whether there is a function that the guest has, gets or loses.
    pub fn has_functions(&self) -> bool {
        !self.functions.is_empty()
    }

    /// Whether the guest has, gets or loses no function, and nothing is left to be done.
    pub fn is_empty(&self) -> bool {
        self.functions.is_empty() && self.link == Link::Absent
    }

    /// Whether the guest has not looked at its device yet.
    pub fn awaits_frontend(&self) -> bool {
        self.link == Link::Published || self.link == Link::Pausing && self.has_functions()
    }

    /// Whether the guest may still have the device of before, of which it has to be rid before it looks at this one.
    pub fn may_have_missed_removal(&self) -> bool {
        self.unseen
    }

    /// The guest has not looked at its device for some time.
    pub fn notify_again(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        match self.link {
            Link::Published if self.unseen => self.close(&mut actions),
            Link::Published => actions.push(Action::NotifyAgain),
            _ => {}
        }
        actions
    }

    /// How far it is, for people.
    pub fn describe(&self) -> &'static str {
        match self.link {
            Link::Absent | Link::Pausing => "no device",
            Link::Published => "waiting for the guest's xen-pcifront",
            Link::Connecting(_) => "connecting",
            Link::Connected { scanned: false, .. } => "the guest is scanning",
            Link::Connected { scanned: true, .. } => "connected",
            Link::Reconfiguring(_) | Link::Reconfigured(_) => "changing its functions",
            Link::Closing(_) => "closing",
        }
    }

    fn ring(&self) -> Option<RingPlace> {
        match self.link {
            Link::Absent | Link::Pausing | Link::Published => None,
            Link::Connecting(ring)
            | Link::Connected { ring, .. }
            | Link::Reconfiguring(ring)
            | Link::Reconfigured(ring)
            | Link::Closing(ring) => Some(ring),
        }
    }

    fn indices(&self) -> impl Iterator<Item = u32> {
        let functions = self.functions.values().map(|function| function.index);
        functions.chain(self.undropped.values().map(|function| function.index))
    }

    fn free_index(&self) -> u32 {
        let taken: BTreeSet<u32> = self.indices().collect();
        (0..=taken.len() as u32).find(|index| !taken.contains(index)).unwrap_or(0)
    }

    /// The guest shall have a function at this device and function number, which must be free.
    pub fn add(&mut self, devfn: Devfn, address: Sbdf) -> Vec<Action> {
        let index = self.free_index();
        self.functions.insert(devfn, Function { address, index, phase: Phase::Wanted });
        self.advanced()
    }

    /// The guest shall lose a function.
    pub fn remove(&mut self, devfn: Devfn) -> Vec<Action> {
        match self.functions.get_mut(&devfn).map(|function| &mut function.phase) {
            // It was not told of it: there is nothing to ask.
            None | Some(Phase::Wanted) => return self.withdraw_unasked(devfn),
            // In an exchange: it ends first.
            Some(Phase::Removing) => {}
            Some(phase) => *phase = Phase::Unwanted,
        }
        self.advanced()
    }

    /// The guest took too long, or is not asked: the function is withdrawn at once.
    pub fn withdraw_unasked(&mut self, devfn: Devfn) -> Vec<Action> {
        let mut actions = vec![Action::Removed(devfn)];
        if let Some(Function { index, phase, .. }) = self.functions.remove(&devfn) {
            if self.functions.is_empty() {
                self.drop_device(index, phase, &mut actions);
            } else if self.has_scanned() {
                self.leave_undropped(devfn, index, phase, &mut actions);
            } else if phase != Phase::Wanted && !matches!(self.link, Link::Absent | Link::Pausing) {
                let mut changes = NodeChange::no_function(index);
                changes.push(self.count());
                actions.push(Action::Nodes(changes));
            }
        }
        self.advance(&mut actions);
        actions
    }

    /// The guest has no function any more, and still has a device for the last one. Its accesses to that are answered until it has dropped it: each
    /// would take it two seconds otherwise.
    fn drop_device(&mut self, index: u32, phase: Phase, actions: &mut Vec<Action>) {
        match self.link {
            // One that scans drops it afterwards: `pcifront_backend_changed` runs in the thread that scans.
            Link::Connected { ring, .. } if self.may_be_connected(ring) => {
                let closing = NodeChange::backend(key::STATE, XenbusState::CLOSING.0);
                actions.push(Action::Nodes(vec![NodeChange::withdrawn_function(index), closing]));
                actions.push(Action::AwaitClosed);
                self.link = Link::Closing(ring);
            }
            // It is dropping the device already.
            Link::Closing(_) if phase == Phase::Wanted => {}
            _ => self.close(actions),
        }
    }

    /// Whether the frontend has a device on this ring, or scans for one.
    fn may_be_connected(&self, ring: RingPlace) -> bool {
        match self.frontend.state {
            Some(XenbusState::CONNECTED) => true,
            Some(XenbusState::INITIALISED) => self.frontend.ring == Some(Ok(ring)),
            _ => false,
        }
    }

    /// The guest has ended: the function is withdrawn at once, and nothing is left for the guest to do.
    pub fn guest_ended(&mut self, devfn: Devfn) -> Vec<Action> {
        let mut actions = self.withdraw_unasked(devfn);
        actions.extend(self.closing_over());
        actions
    }

    /// The guest has ended, or the time that [`Action::AwaitClosed`] gave it is over.
    pub fn closing_over(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.is_dropping() {
            self.close(&mut actions);
            self.advance(&mut actions);
        }
        actions
    }

    /// Whether the guest has lost its functions and drops its device.
    pub fn is_dropping(&self) -> bool {
        let asked = |function: &Function| matches!(function.phase, Phase::Unwanted | Phase::Removing);
        matches!(self.link, Link::Closing(_)) && !self.functions.values().any(asked)
    }

    fn leave_undropped(&mut self, devfn: Devfn, index: u32, phase: Phase, actions: &mut Vec<Action>) {
        let mut changes = vec![NodeChange::withdrawn_function(index)];
        if phase == Phase::Wanted {
            if self.undropped.contains_key(&devfn) {
                // While the guest has a device there, it finds no other.
                return;
            }
            changes.extend(NodeChange::function_to_drop(index, devfn, XenbusState::INITIALISED));
        }
        self.undropped.insert(devfn, Undropped { index, asked: phase == Phase::Removing });
        changes.push(self.count());
        actions.push(Action::Nodes(changes));
    }

    /// Whether the guest may have found what it has: functions answer before they are published, while it scans for others.
    fn has_scanned(&self) -> bool {
        match self.link {
            Link::Absent | Link::Pausing | Link::Published | Link::Connecting(_) | Link::Closing(_) => false,
            Link::Connected { .. } | Link::Reconfiguring(_) | Link::Reconfigured(_) => true,
        }
    }

    /// Gives up the ring and removes all nodes; what is still wanted is published again.
    fn close(&mut self, actions: &mut Vec<Action>) {
        if self.ring().is_some() {
            actions.push(Action::Disconnect);
        }
        if !matches!(self.link, Link::Absent | Link::Pausing) {
            actions.push(Action::Nodes(vec![NodeChange::RemoveAll]));
            actions.push(Action::Pause);
            self.link = Link::Pausing;
            self.unseen = true;
        }
        for function in self.functions.values_mut() {
            function.phase = Phase::Wanted;
        }
        self.undropped.clear();
        self.frontend = FrontendView::default();
        self.refused = None;
    }

    /// The frontend's nodes were read.
    pub fn frontend_changed(&mut self, view: FrontendView) -> Vec<Action> {
        if view == self.frontend {
            return Vec::new();
        }
        self.frontend = view;
        if !matches!(self.frontend.state, Some(XenbusState::INITIALISED | XenbusState::CONNECTED)) {
            // It starts again: the same numbers may be valid then.
            self.refused = None;
        }
        self.advanced()
    }

    /// The answer to [`Action::Connect`].
    pub fn ring_connected(&mut self, outcome: Result<(), String>) -> Vec<Action> {
        let mut actions = Vec::new();
        match (self.link, outcome) {
            (Link::Connecting(ring), Ok(())) => {
                self.link = Link::Connected { ring, scanned: false };
                actions.push(state(XenbusState::CONNECTED));
            }
            (_, Ok(())) => {}
            (_, Err(why)) => {
                // Without a ring there is none to give up: all nodes were removed while this one waited to be connected to.
                if let Some(ring) = self.ring() {
                    actions.push(Action::Report(format!("its ring cannot be used: {why}")));
                    self.refused = Some(Ok(ring));
                    self.back_to_published(&mut actions);
                }
            }
        }
        self.advance(&mut actions);
        actions
    }

    /// The time that [`Action::Pause`] asked for is over.
    pub fn pause_over(&mut self) -> Vec<Action> {
        if self.link == Link::Pausing {
            self.link = Link::Absent;
        }
        self.advanced()
    }

    fn advanced(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        self.advance(&mut actions);
        actions
    }

    /// How far frontends have to look for functions.
    fn count(&self) -> NodeChange {
        let count = self.indices().map(|index| index + 1).max().unwrap_or(0);
        NodeChange::backend(key::NUM_DEVS, count)
    }
}

fn state(state: XenbusState) -> Action {
    Action::Nodes(vec![NodeChange::backend(key::STATE, state.0)])
}
