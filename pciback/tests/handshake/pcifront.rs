//! A model of Linux's xen-pcifront and of the xenbus core below it, as far as a backend can notice them.
//!
//! It follows what the driver of Linux 6.1 does: a watch says only that something changed, and the value is read when the watch
//! is handled, so several changes can be seen as one. The test decides when each watch is handled.

use std::collections::{BTreeMap, BTreeSet};

use pciback::serve::pv::nodes::{End, FrontendView, NodeChange, PublishedFunction, RingPlace, XenbusState};
use pciback::serve::pv::{Action, Handshake};
use pciback::{Devfn, DomId, Sbdf};

type Nodes = BTreeMap<String, String>;

/// A guest with the module, its xenbus device and the PCI devices it has found.
#[derive(Default)]
struct Guest {
    loaded: bool,
    /// The xenbus core has a device; it keeps it until it sees that its directory is gone.
    device: bool,
    /// The driver's page and port; `None` while it is not bound.
    ring: Option<RingPlace>,
    state: u32,
    next_ring: u32,
    /// The PCI devices it has, each with the attachment that it was found in. A scan skips what is known already.
    found: BTreeMap<Devfn, u32>,
    /// It drops functions, one after the other: the next index and how many there were when it began.
    dropping: Option<(u32, u32)>,
    directory_event: bool,
    state_event: bool,
}

/// A guest, xenstore, and an engine that does at once what the handshake says.
pub struct World {
    pub handshake: Handshake,
    backend: Nodes,
    frontend: Nodes,
    guest: Guest,
    /// What the engine serves, connected or not, each with the number of its attachment.
    served: BTreeMap<Devfn, u32>,
    attachments: u32,
    connected: Option<RingPlace>,
    pub added: BTreeSet<Devfn>,
    /// Functions whose removal was ordered and not yet confirmed.
    pub leaving: BTreeSet<Devfn>,
    pub wanted: BTreeSet<Devfn>,
    pub paused: bool,
    pub reports: Vec<String>,
    /// It wrote into its nodes what no driver would: what it says of itself means nothing.
    hostile: bool,
    /// Accesses that met no ring, that is, that the guest waited two seconds for.
    pub timeouts: u32,
}

pub fn address(devfn: Devfn) -> Sbdf {
    Sbdf::from_devfn(0, 1, devfn.0)
}

impl World {
    pub fn new() -> Self {
        Self {
            handshake: Handshake::new(DomId(5)),
            backend: Nodes::new(),
            frontend: Nodes::new(),
            guest: Guest { loaded: true, next_ring: 8, ..Guest::default() },
            served: BTreeMap::new(),
            attachments: 0,
            connected: None,
            added: BTreeSet::new(),
            leaving: BTreeSet::new(),
            wanted: BTreeSet::new(),
            paused: false,
            reports: Vec::new(),
            hostile: false,
            timeouts: 0,
        }
    }

    // The engine.

    pub fn add(&mut self, devfn: Devfn) {
        if self.wanted.contains(&devfn) || self.leaving.contains(&devfn) {
            return;
        }
        self.wanted.insert(devfn);
        self.attachments += 1;
        self.served.insert(devfn, self.attachments);
        let actions = self.handshake.add(devfn, address(devfn));
        self.act(actions);
    }

    pub fn remove(&mut self, devfn: Devfn) {
        if self.wanted.remove(&devfn) {
            self.leaving.insert(devfn);
            let actions = self.handshake.remove(devfn);
            self.act(actions);
        }
    }

    pub fn withdraw_unasked(&mut self, devfn: Devfn) {
        if self.leaving.contains(&devfn) {
            let actions = self.handshake.withdraw_unasked(devfn);
            self.act(actions);
        }
    }

    /// The function is taken from the guest at once.
    pub fn remove_unasked(&mut self, devfn: Devfn) {
        if self.wanted.remove(&devfn) {
            self.leaving.insert(devfn);
            self.withdraw_unasked(devfn);
        }
    }

    pub fn pause_over(&mut self) {
        if std::mem::take(&mut self.paused) {
            let actions = self.handshake.pause_over();
            self.act(actions);
        }
    }

    /// The guest has had its time to drop the device.
    pub fn closing_over(&mut self) {
        let actions = self.handshake.closing_over();
        self.act(actions);
    }

    /// The guest has had its time to look at its device.
    pub fn notify_again(&mut self) {
        if self.handshake.awaits_frontend() {
            let actions = self.handshake.notify_again();
            self.act(actions);
        }
    }

    /// The service is killed and started again.
    pub fn restart(&mut self) {
        let published = |index: u32| {
            Some(PublishedFunction {
                index,
                devfn: self.virtual_devfn(index)?,
                state: XenbusState(self.number(&format!("state-{index}"))),
                address: self.backend.get(&format!("dev-{index}")).and_then(|text| text.parse().ok()),
            })
        };
        let left: Vec<PublishedFunction> = (0..self.number("num_devs")).filter_map(published).collect();
        self.connected = None;
        self.paused = false;
        // The process that waited for them was killed too.
        self.served.retain(|devfn, _| self.wanted.contains(devfn) || self.leaving.contains(devfn));
        self.added.extend(self.found());
        if self.served.is_empty() && self.backend.get("state").is_none_or(|state| state != "5") {
            // There is no guest to take over. What is left of its nodes is removed, and the service needs longer to start than a guest to see that.
            self.handshake = Handshake::new(DomId(5));
            self.change(&NodeChange::RemoveAll);
            self.guest_sees_directory();
            return;
        }
        let functions: Vec<(Devfn, Sbdf)> =
            self.served.keys().map(|devfn| (*devfn, address(*devfn))).collect();
        let state = self.backend.get("state").map(|state| XenbusState(state.parse().unwrap()));
        let view = self.view();
        let (handshake, actions) = Handshake::resume(DomId(5), state, &left, &functions, view);
        self.handshake = handshake;
        let usable = self.view().ring == self.guest.ring.map(Ok);
        if usable
            && !self.guest.found.is_empty()
            && self.frontend.get("state").is_some_and(|state| state == "4")
        {
            assert!(matches!(actions.first(), Some(Action::Connect(_))), "the guest waits: {actions:?}");
        }
        self.act(actions);
        // The engine undoes or completes what the journal says.
        for devfn in self.leaving.clone() {
            self.withdraw_unasked(devfn);
        }
    }

    fn act(&mut self, actions: Vec<Action>) {
        let mut queue = std::collections::VecDeque::from(actions);
        while let Some(action) = queue.pop_front() {
            match action {
                Action::Nodes(changes) => {
                    changes.iter().for_each(|change| self.change(change));
                    let nodes: BTreeSet<Devfn> =
                        (0..self.number("num_devs")).filter_map(|index| self.virtual_devfn(index)).collect();
                    let loud = |devfn: &&Devfn| self.served.contains_key(devfn) && !nodes.contains(devfn);
                    let loud: Vec<_> = self.leaving.iter().filter(loud).collect();
                    assert!(self.connected.is_none() || loud.is_empty(), "{loud:?} would be found again");
                }
                Action::Connect(ring) => {
                    assert_eq!(self.connected, None, "connects twice");
                    let good = self.guest.ring == Some(ring);
                    self.connected = good.then_some(ring);
                    let outcome = if good { Ok(()) } else { Err("no such grant".to_owned()) };
                    queue.extend(self.handshake.ring_connected(outcome));
                }
                Action::Disconnect => self.connected = None,
                Action::Added(devfn) => {
                    // It may have unloaded its module since the engine last looked.
                    let current =
                        !self.hostile && self.frontend.get("state").is_some_and(|state| state == "4");
                    assert!(!current || self.found().contains(&devfn), "{devfn} was not found");
                    self.added.insert(devfn);
                }
                Action::Waiting(_) => {}
                Action::Removed(devfn) => {
                    self.leaving.remove(&devfn);
                    self.served.remove(&devfn);
                    self.added.remove(&devfn);
                }
                Action::Report(text) => self.reports.push(text),
                Action::Pause => self.paused = true,
                Action::AwaitClosed => {}
                Action::NotifyAgain => self.guest.directory_event = true,
            }
        }
    }

    fn change(&mut self, change: &NodeChange) {
        match change {
            NodeChange::Write(End::Backend, key, value) => {
                self.backend.insert(key.clone(), value.clone());
                self.guest.state_event |= key == "state";
            }
            NodeChange::Write(End::Frontend, key, value) => {
                self.frontend.insert(key.clone(), value.clone());
                self.guest.directory_event = true;
            }
            NodeChange::Remove(End::Backend, key) => {
                self.backend.remove(key);
            }
            NodeChange::Remove(End::Frontend, key) => {
                self.frontend.remove(key);
            }
            NodeChange::RemoveAll => {
                self.backend.clear();
                self.frontend.clear();
                (self.guest.directory_event, self.guest.state_event) = (true, true);
            }
        }
    }

    fn view(&self) -> FrontendView {
        let number = |key: &str| self.frontend.get(key).and_then(|text| text.parse().ok());
        let ring = number("pci-op-ref")
            .zip(number("event-channel"))
            .map(|(grant, port)| RingPlace { grant, port })
            .filter(|ring| ring.grant != 0)
            .ok_or_else(|| "nonsense".to_owned());
        let ring = self.frontend.contains_key("pci-op-ref").then_some(ring);
        FrontendView { state: number("state").map(XenbusState), ring }
    }

    /// The engine is notified of the frontend's nodes.
    pub fn look(&mut self) {
        let actions = self.handshake.frontend_changed(self.view());
        self.act(actions);
    }

    // The guest.

    fn number(&self, key: &str) -> u32 {
        self.backend.get(key).and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    fn virtual_devfn(&self, index: u32) -> Option<Devfn> {
        let text = self.backend.get(&format!("vdev-{index}"))?;
        let (slot, function) = text.strip_prefix("0000:00:").unwrap().split_once('.').unwrap();
        assert_eq!((slot.len(), function.len()), (2, 2), "xen-pcifront parses two digits each: {text}");
        let hex = |text| u8::from_str_radix(text, 16).unwrap();
        Some(Devfn(hex(slot) << 3 | hex(function)))
    }

    fn set_frontend_state(&mut self, state: u32) {
        self.guest.state = state;
        // xenbus_switch_state does not make a node again that is gone.
        if self.frontend.contains_key("state") {
            self.frontend.insert("state".into(), state.to_string());
        }
    }

    /// Scans the bus: what answers is found.
    fn scan(&mut self) {
        assert_eq!(self.backend["root_num"], "1");
        assert_eq!(self.backend["root-0"], "0000:00");
        if self.connected != self.guest.ring {
            // Its first access waits on the page for up to two seconds: long enough for the engine to be notified of the nodes.
            self.look();
        }
        if self.guest.ring.is_some() && self.connected == self.guest.ring {
            for (devfn, attachment) in &self.served {
                self.guest.found.entry(*devfn).or_insert(*attachment);
            }
        } else {
            self.timeouts += 1;
        }
    }

    fn probe(&mut self) {
        if self.frontend.is_empty() {
            // A guest cannot make its directory itself: the driver's probe fails.
            return;
        }
        let place = RingPlace { grant: self.guest.next_ring, port: self.guest.next_ring + 100 };
        self.guest.next_ring += 1;
        self.guest.ring = Some(place);
        self.frontend.insert("pci-op-ref".into(), place.grant.to_string());
        self.frontend.insert("event-channel".into(), place.port.to_string());
        self.frontend.insert("magic".into(), "7".into());
        self.set_frontend_state(3);
        // A watch fires once when it is set.
        self.guest.state_event = true;
    }

    fn unbind(&mut self) {
        self.guest.found.clear();
        self.guest.dropping = None;
        self.guest.ring = None;
        self.guest.state_event = false;
        self.set_frontend_state(6);
    }

    /// The xenbus core handles the watch of the device directories.
    pub fn guest_sees_directory(&mut self) {
        self.guest_finishes_dropping();
        if !std::mem::take(&mut self.guest.directory_event) {
            return;
        }
        if self.frontend.is_empty() {
            if std::mem::take(&mut self.guest.device) && self.guest.ring.is_some() {
                self.unbind();
            }
        } else if !self.guest.device && self.frontend.get("state").is_some_and(|state| state == "1") {
            self.guest.device = true;
            self.guest.state = 1;
            if self.guest.loaded {
                self.probe();
            }
        }
    }

    /// xen-pcifront handles the watch of our state.
    pub fn guest_sees_state(&mut self) {
        self.guest_begins();
        self.guest_finishes_dropping();
    }

    /// What had begun when our end was Connected comes to its end, whatever our end says by now.
    pub fn guest_has_scanned(&mut self) {
        if self.guest.ring.is_some() && self.guest.state == 3 {
            self.scan();
            self.set_frontend_state(4);
        }
    }

    /// As [`World::guest_sees_state`], but where it is to drop functions it has only begun: their drivers take their time.
    pub fn guest_begins(&mut self) {
        self.guest_finishes_dropping();
        if !std::mem::take(&mut self.guest.state_event) || self.guest.ring.is_none() {
            return;
        }
        match (self.number("state"), self.guest.state) {
            (4, 3) => {
                self.scan();
                self.set_frontend_state(4);
            }
            (5 | 6, state) if state < 5 => {
                self.guest.found.clear();
                self.set_frontend_state(6);
            }
            (7, 4) => self.guest.dropping = Some((0, self.number("num_devs"))),
            (8, 7) => {
                self.scan();
                self.set_frontend_state(4);
            }
            _ => {}
        }
    }

    /// It looks at the next function, and drops it if it shall; after the last one it says so.
    pub fn guest_looks_at_one(&mut self) {
        let Some((index, count)) = self.guest.dropping else { return };
        if index == count {
            self.guest.dropping = None;
            self.set_frontend_state(7);
            return;
        }
        if self.number(&format!("state-{index}")) == 5 {
            let devfn = self.virtual_devfn(index).expect("a function to drop has its vdev");
            self.guest.found.remove(&devfn);
        }
        self.guest.dropping = Some((index + 1, count));
    }

    fn guest_finishes_dropping(&mut self) {
        while self.guest.dropping.is_some() {
            self.guest_looks_at_one();
        }
    }

    pub fn unload(&mut self) {
        self.guest_finishes_dropping();
        if std::mem::take(&mut self.guest.loaded) && self.guest.ring.is_some() {
            self.unbind();
        }
    }

    pub fn load(&mut self) {
        if !std::mem::replace(&mut self.guest.loaded, true) && self.guest.device {
            self.probe();
        }
    }

    /// The guest writes into its nodes what no driver would.
    pub fn scribble(&mut self, key: &str, value: &str) {
        if !self.frontend.is_empty() {
            self.hostile = true;
            self.frontend.insert(key.into(), value.into());
        }
    }

    /// Everybody does everything that there is to do, until nothing is, and once more after the guest was notified again.
    pub fn run(&mut self) {
        self.run_until_still();
        self.notify_again();
        self.run_until_still();
    }

    fn run_until_still(&mut self) {
        for _ in 0..25 {
            self.look();
            self.guest_sees_directory();
            self.guest_sees_state();
            // Long after the guest has seen that its directory is gone.
            self.pause_over();
        }
        assert!(!self.guest.directory_event && !self.guest.state_event && !self.paused, "it never settles");
    }

    /// What the guest has found of what it has now: a device that it kept of an earlier attachment is none of it.
    pub fn found(&self) -> BTreeSet<Devfn> {
        let current = |(devfn, attachment): &(&Devfn, &u32)| self.served.get(devfn) == Some(attachment);
        self.guest.found.iter().filter(current).map(|(devfn, _)| *devfn).collect()
    }

    /// Devices in the guest of functions that it no longer has.
    pub fn stale(&self) -> BTreeSet<Devfn> {
        let found = self.found();
        self.guest.found.keys().filter(|devfn| !found.contains(devfn)).copied().collect()
    }

    pub fn is_connected(&self) -> bool {
        self.connected.is_some()
    }

    pub fn backend(&self, key: &str) -> Option<&str> {
        self.backend.get(key).map(String::as_str)
    }

    pub fn nothing_left(&self) -> bool {
        self.backend.is_empty() && self.frontend.is_empty() && self.connected.is_none()
    }
}
