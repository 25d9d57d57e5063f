//! Any values in xenstore: a frontend that does what it likes, at any moment of the handshake, and what toolstacks say of domains.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pciback::platform::{Permissions, StoreOps};
use pciback::serve::pv::nodes::{self, BACKENDS, PCIBACK, backend_directory, frontend_directory};
use pciback::serve::pv::{Action, Handshake, RingPlace};
use pciback::{Devfn, DomId, Sbdf};
use toolstack::domains::{self, DomainName};

use crate::store::Nodes;

const DOMAIN: DomId = DomId(6);
/// The functions that a guest may have.
const DEVFNS: [Devfn; 4] = [Devfn(0), Devfn(8), Devfn(9), Devfn(0xf8)];
/// Keys of the guest's.
const KEYS: [&str; 6] = ["state", "pci-op-ref", "event-channel", "magic", "backend", "other"];
/// What a good frontend writes, and others.
const VALUES: [&str; 12] = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "23\0", "", "4294967296"];
/// What toolstacks write.
const OTHERS: [&str; 12] = [
    "/local/domain/6/name",
    "/local/domain/6/domid",
    "/local/domain/7/name",
    "/libxl/6/type",
    "/local/domain/0/device-model/6/state",
    "/local/domain/6/platform/acpi",
    "/local/domain/6/target",
    "/local/domain/6/backend/vif/7/0",
    "/tool/xenstored/domid",
    "/local/domain/0/backend/pci/6/0/dev-0",
    "/local/domain/0/backend/pci/x/0/dev-0",
    "/local/domain/+6/name",
];

fn address(devfn: Devfn) -> Sbdf {
    Sbdf::from_devfn(0, 1, devfn.0)
}

/// An engine with one guest.
struct Engine {
    nodes: Nodes,
    handshake: Handshake,
    /// What is still to be done: the engine does the next thing when background work for the guest has ended.
    actions: VecDeque<Action>,
    connected: Option<RingPlace>,
    /// Functions that the guest shall have, and those that it shall lose and has not lost yet.
    wanted: BTreeSet<Devfn>,
    leaving: BTreeSet<Devfn>,
    pauses: bool,
}

impl Engine {
    fn new() -> Self {
        Self {
            nodes: Nodes::default(),
            handshake: Handshake::new(DOMAIN),
            actions: VecDeque::new(),
            connected: None,
            wanted: BTreeSet::new(),
            leaving: BTreeSet::new(),
            pauses: false,
        }
    }

    fn follow(&mut self, actions: Vec<Action>) {
        assert!(actions.len() <= 100, "{} actions", actions.len());
        self.actions.extend(actions);
    }

    /// Another process of the service.
    fn restart(&mut self) {
        self.actions.clear();
        (self.connected, self.pauses) = (None, false);
        let functions: Vec<(Devfn, Sbdf)> =
            self.wanted.union(&self.leaving).map(|devfn| (*devfn, address(*devfn))).collect();
        if functions.is_empty() {
            self.handshake = Handshake::new(DOMAIN);
            nodes::apply(&self.nodes, DOMAIN, &[nodes::NodeChange::RemoveAll]).expect("nodes");
            return;
        }
        let state = nodes::read_backend_state(&self.nodes, DOMAIN).expect("nodes");
        let left = nodes::read_backend_functions(&self.nodes, DOMAIN).expect("nodes");
        let view = nodes::read_frontend(&self.nodes, DOMAIN).expect("nodes");
        let (handshake, actions) = Handshake::resume(DOMAIN, state, &left, &functions, view);
        self.handshake = handshake;
        self.follow(actions);
        for devfn in self.leaving.clone() {
            let actions = self.handshake.withdraw_unasked(devfn);
            self.follow(actions);
        }
    }

    /// Carries out the next action; `connects`: the guest's ring can be mapped.
    fn act(&mut self, connects: bool) {
        let Some(action) = self.actions.pop_front() else { return };
        match action {
            Action::Nodes(changes) => nodes::apply(&self.nodes, DOMAIN, &changes).expect("nodes"),
            Action::Connect(ring) => {
                assert!(ring.grant != 0 && ring.port != 0, "{ring:?}");
                assert_eq!(self.connected, None, "it connects twice");
                self.connected = connects.then_some(ring);
                let outcome = if connects { Ok(()) } else { Err("no such grant".to_owned()) };
                let actions = self.handshake.ring_connected(outcome);
                self.follow(actions);
            }
            Action::Disconnect => self.connected = None,
            Action::Added(devfn) => assert!(self.is_known(devfn), "{devfn} was never to be there"),
            Action::Waiting(devfn) => assert!(self.is_known(devfn), "{devfn} was never to be there"),
            Action::Removed(devfn) => {
                // Said twice of one that is late, it is not there any more.
                assert!(!self.wanted.contains(&devfn), "{devfn} was not to go");
                self.leaving.remove(&devfn);
            }
            Action::Report(text) => check_text(&text),
            Action::Pause => self.pauses = true,
            Action::NotifyAgain => nodes::tell_again(&self.nodes, DOMAIN).expect("nodes"),
            Action::AwaitClosed => {}
        }
        if self.actions.is_empty() {
            self.check();
        }
    }

    fn is_known(&self, devfn: Devfn) -> bool {
        self.wanted.contains(&devfn) || self.leaving.contains(&devfn)
    }

    /// Whether another function can have this place: the engine does all that is due of the last one before that.
    fn is_free(&self, devfn: Devfn) -> bool {
        !self.is_known(devfn) && !self.actions.contains(&Action::Removed(devfn))
    }

    /// What holds when everything is done: our end is there as a whole or not at all, and names nothing but the guest's functions.
    fn check(&self) {
        let ours = backend_directory(DOMAIN);
        let below = self.nodes.below(&ours);
        for (name, permissions) in &below {
            let expected = Permissions::backend(DOMAIN);
            assert_eq!(permissions.as_ref(), Some(&expected), "who may read {name}");
        }
        if self.handshake.describe() == "no device" {
            assert!(below.is_empty(), "left: {below:?}");
            assert_eq!(self.connected, None, "it serves a guest without a device");
            return;
        }
        for key in ["frontend", "frontend-id", "state", "num_devs", "root_num"] {
            assert!(self.nodes.text(&format!("{ours}/{key}")).is_some(), "no {key}: {below:?}");
        }
        let count = self.nodes.text(&format!("{ours}/num_devs"));
        let published = nodes::read_backend_functions(&self.nodes, DOMAIN).expect("nodes");
        let named = below.iter().filter(|(name, _)| name.contains("/vdev-")).count();
        assert_eq!(published.len(), named, "num_devs is {count:?}: {below:?}");
        let mut seen = BTreeMap::new();
        for function in published {
            if let Some(address) = function.address {
                assert_eq!(address, self::address(function.devfn));
                assert!(self.is_known(function.devfn), "{} is published", function.devfn);
                let twice = seen.insert(function.devfn, function.index);
                assert_eq!(twice, None, "{} is published twice", function.devfn);
            }
        }
    }
}

fn check_text(text: &str) {
    assert!(text.len() < 400 && !text.contains(char::is_control), "{text:?}");
}

/// Two bytes each are a step, with more where a value is written.
pub fn xenstore(data: &[u8]) {
    let mut engine = Engine::new();
    let mut rest = data;
    for _ in 0..300 {
        let [what, choice, after @ ..] = rest else { break };
        rest = step(&mut engine, *what, usize::from(*choice), after);
    }
    check_domains(&engine.nodes);
    // Whatever the guest has done: when it has ended, nothing is left of it.
    let all: Vec<Devfn> = engine.wanted.union(&engine.leaving).copied().collect();
    for devfn in all {
        if engine.wanted.remove(&devfn) {
            engine.leaving.insert(devfn);
        }
        let actions = engine.handshake.guest_ended(devfn);
        engine.follow(actions);
    }
    for _ in 0..4 {
        while !engine.actions.is_empty() {
            engine.act(true);
        }
        let actions = [engine.handshake.closing_over(), engine.handshake.pause_over()];
        actions.into_iter().for_each(|actions| engine.follow(actions));
    }
    assert!(engine.actions.is_empty() && engine.handshake.is_empty(), "{}", engine.handshake.describe());
    assert!(engine.leaving.is_empty(), "not released: {:?}", engine.leaving);
    assert_eq!(engine.connected, None);
    let left = engine.nodes.below(&format!("{BACKENDS}/{DOMAIN}"));
    assert!(left.is_empty(), "left: {left:?}");
}

fn step<'a>(engine: &mut Engine, what: u8, choice: usize, rest: &'a [u8]) -> &'a [u8] {
    let devfn = DEVFNS[choice % DEVFNS.len()];
    let theirs = frontend_directory(DOMAIN);
    let key = format!("{theirs}/{}", KEYS[choice % KEYS.len()]);
    let exists = engine.nodes.permissions(&theirs).expect("nodes").is_some();
    match what % 20 {
        // The guest, whose directory is there when the toolstack has made it.
        0..=2 if exists => {
            let value = VALUES[choice / KEYS.len() % VALUES.len()];
            engine.nodes.write(&key, value.as_bytes()).expect("nodes");
        }
        3 if exists => {
            // A state and a ring, as xen-pcifront writes them.
            for (key, value) in [("pci-op-ref", "8"), ("event-channel", "9"), ("magic", "7"), ("state", "3")]
            {
                engine.nodes.write(&format!("{theirs}/{key}"), value.as_bytes()).expect("nodes");
            }
        }
        4 if exists => {
            let (value, rest) = rest.split_at(rest.len().min(choice / KEYS.len()));
            engine.nodes.write(&key, value).expect("nodes");
            return rest;
        }
        5 => engine.nodes.remove(&key).expect("nodes"),
        6 if choice & 7 == 0 => engine.nodes.remove(&theirs).expect("nodes"),
        // The engine.
        6..=8 => {
            let view = nodes::read_frontend(&engine.nodes, DOMAIN).expect("nodes");
            let actions = engine.handshake.frontend_changed(view);
            engine.follow(actions);
        }
        9 | 10 => engine.act(choice & 3 != 0),
        11 | 12 => {
            // It ends: a handshake does not answer itself.
            for _ in 0..200 {
                engine.act(choice & 3 != 0);
            }
            assert!(engine.actions.is_empty(), "{:?}", engine.actions);
        }
        13 if engine.is_free(devfn) => {
            engine.wanted.insert(devfn);
            let actions = engine.handshake.add(devfn, address(devfn));
            engine.follow(actions);
        }
        14 if engine.wanted.remove(&devfn) => {
            engine.leaving.insert(devfn);
            let actions = engine.handshake.remove(devfn);
            engine.follow(actions);
        }
        15 if engine.wanted.remove(&devfn) => {
            engine.leaving.insert(devfn);
            let actions = engine.handshake.withdraw_unasked(devfn);
            engine.follow(actions);
        }
        16 if std::mem::take(&mut engine.pauses) => {
            let actions = engine.handshake.pause_over();
            engine.follow(actions);
        }
        17 => {
            let actions = engine.handshake.closing_over();
            engine.follow(actions);
        }
        18 if engine.handshake.awaits_frontend() => {
            let actions = engine.handshake.notify_again();
            engine.follow(actions);
        }
        19 if choice & 1 == 0 => engine.restart(),
        19 => {
            let (value, rest) = rest.split_at(rest.len().min(choice >> 5 << 1));
            engine.nodes.write(OTHERS[(choice >> 1) % OTHERS.len()], value).expect("nodes");
            return rest;
        }
        _ => {}
    }
    rest
}

/// What is read of domains is used as it is said, or not at all.
fn check_domains(nodes: &Nodes) {
    let present = domains::present(nodes).expect("nodes");
    assert!(!present.contains(&DomId::DOM0));
    for text in OTHERS.map(|path| nodes.text(path)).into_iter().flatten() {
        if let Ok(found) = domains::find(nodes, &DomainName(text)) {
            assert_ne!(found, DomId::DOM0);
        }
    }
    let _ = domains::called(nodes, DOMAIN);
    for read in [domains::device_model_runs, domains::has_acpi] {
        read(nodes, DOMAIN).expect("nodes");
    }
    domains::kind(nodes, DOMAIN).expect("nodes");
    domains::privilege(nodes, DOMAIN).expect("nodes");
    for (function, domain) in nodes::pciback_functions(nodes).expect("nodes") {
        let named = nodes.list(PCIBACK).expect("nodes");
        assert!(named.iter().any(|name| name.parse() == Ok(domain.0)), "{function}");
    }
    if let Some(backend) = nodes::foreign_backend(nodes, DOMAIN).expect("nodes") {
        check_text(&backend);
    }
}
