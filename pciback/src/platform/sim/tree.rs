//! xenstore's nodes, watches and permissions, in memory, as the C xenstored treats them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::Answer;
use super::transaction::{Change, Transaction};
use crate::DomId;
use crate::platform::{Permissions, WatchEvent};

/// Longest absolute path, and most bytes of one request: a path, its end and a value.
const PATH_LIMIT: usize = 3072;
const REQUEST_LIMIT: usize = 4096;

#[derive(Debug, Clone)]
pub(super) struct Node {
    pub value: Vec<u8>,
    pub permissions: Permissions,
    /// Names of the nodes right below. They are part of the node: making one changes it.
    pub children: BTreeSet<String>,
    /// Counts all changes of the tree; a transaction notices by it that a node is not what it was.
    pub generation: u64,
}

struct Connection {
    domain: DomId,
    events: VecDeque<WatchEvent>,
    wake: Arc<EventFd>,
}

/// Who asks, and within which transaction.
#[derive(Clone, Copy)]
pub(super) struct Caller {
    pub connection: u32,
    pub transaction: Option<u32>,
}

pub(super) struct Tree {
    pub(super) nodes: BTreeMap<String, Arc<Node>>,
    pub(super) transactions: BTreeMap<u32, Transaction>,
    generation: u64,
    introduced: BTreeSet<DomId>,
    connections: BTreeMap<u32, Connection>,
    /// Connection and token by watched path.
    watches: BTreeMap<String, Vec<(u32, String)>>,
    next_id: u32,
}

pub(super) fn check_path(path: &str) -> Answer<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte);
    let well_formed = path.starts_with('/')
        && path.len() < PATH_LIMIT
        && path.bytes().all(plain)
        && (path == "/" || !path.ends_with('/'))
        && !path.contains("//");
    well_formed.then_some(()).ok_or(Errno::EINVAL)
}

/// The path above, and the name below it.
pub(super) fn split(path: &str) -> Option<(&str, &str)> {
    let (above, name) = path.rsplit_once('/').filter(|(_, name)| !name.is_empty())?;
    Some((if above.is_empty() { "/" } else { above }, name))
}

pub(super) fn below(path: &str, name: &str) -> String {
    if path == "/" { format!("/{name}") } else { format!("{path}/{name}") }
}

fn may_read(node: &Node, domain: DomId) -> bool {
    domain == DomId::DOM0 || node.permissions.owner == domain || node.permissions.readers.contains(&domain)
}

impl Tree {
    pub fn new() -> Self {
        let permissions = Permissions { owner: DomId::DOM0, readers: Vec::new() };
        let root = Node { value: Vec::new(), permissions, children: BTreeSet::new(), generation: 0 };
        let mut tree = Self {
            nodes: BTreeMap::from([("/".to_owned(), Arc::new(root))]),
            transactions: BTreeMap::new(),
            generation: 0,
            introduced: BTreeSet::from([DomId::DOM0]),
            connections: BTreeMap::new(),
            watches: BTreeMap::new(),
            next_id: 1,
        };
        tree.furnish();
        tree
    }

    fn new_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id
    }

    pub fn connect(&mut self, domain: DomId, wake: &Arc<EventFd>) -> u32 {
        let id = self.new_id();
        let connection = Connection { domain, events: VecDeque::new(), wake: Arc::clone(wake) };
        self.connections.insert(id, connection);
        id
    }

    pub fn disconnect(&mut self, connection: u32) {
        self.connections.remove(&connection);
        self.transactions.retain(|_, transaction| transaction.connection != connection);
        for watches in self.watches.values_mut() {
            watches.retain(|(watcher, _)| *watcher != connection);
        }
        self.watches.retain(|_, watches| !watches.is_empty());
    }

    pub fn is_introduced(&self, domain: DomId) -> bool {
        self.introduced.contains(&domain)
    }

    pub(super) fn set_introduced(&mut self, domain: DomId, alive: bool) {
        if alive {
            self.introduced.insert(domain);
        } else {
            self.introduced.remove(&domain);
        }
        self.fire(if alive { "@introduceDomain" } else { "@releaseDomain" }, false);
    }

    /// A domain has shut down and is still there.
    pub(super) fn domain_stopped(&mut self) {
        self.fire("@releaseDomain", false);
    }

    fn domain(&self, caller: Caller) -> DomId {
        self.connections.get(&caller.connection).map_or(DomId::DOM0, |connection| connection.domain)
    }

    /// A node as the caller sees it, without a check of its rights; a transaction records the read.
    fn get(&mut self, caller: Caller, path: &str) -> Answer<Option<Arc<Node>>> {
        let common = self.nodes.get(path).cloned();
        let Some(id) = caller.transaction else { return Ok(common) };
        let transaction = self.transactions.get_mut(&id).ok_or(Errno::ENOENT)?;
        Ok(transaction.see(path, common))
    }

    /// Sets or deletes a node where the caller sees it.
    fn put(&mut self, caller: Caller, path: &str, node: Option<Node>) -> Answer<()> {
        self.generation += 1;
        let generation = self.generation;
        let node = node.map(|node| Arc::new(Node { generation, ..node }));
        match caller.transaction {
            Some(id) => {
                let transaction = self.transactions.get_mut(&id).ok_or(Errno::ENOENT)?;
                transaction.nodes.insert(path.to_owned(), node);
            }
            None => self.store(path.to_owned(), node),
        }
        Ok(())
    }

    pub(super) fn store(&mut self, path: String, node: Option<Arc<Node>>) {
        match node {
            Some(node) => self.nodes.insert(path, node),
            None => self.nodes.remove(&path),
        };
    }

    /// Notifies the watchers, at once or when the transaction is committed.
    fn changed(&mut self, caller: Caller, path: &str, exact: bool) -> Answer<()> {
        match caller.transaction {
            Some(id) => {
                let transaction = self.transactions.get_mut(&id).ok_or(Errno::ENOENT)?;
                transaction.changed(Change { path: path.to_owned(), exact });
            }
            None => self.fire(path, exact),
        }
        Ok(())
    }

    /// Write permission includes read permission. A guest without it cannot find out whether a node exists.
    fn look(&mut self, caller: Caller, path: &str, write: bool) -> Answer<Option<Arc<Node>>> {
        check_path(path)?;
        let domain = self.domain(caller);
        let found = self.get(caller, path)?;
        let (mut governing, mut at) = (found.clone(), path);
        while governing.is_none() {
            let Some((above, _)) = split(at) else { break };
            governing = self.get(caller, above)?;
            at = above;
        }
        let allowed = governing.is_some_and(|node| {
            domain == DomId::DOM0 || node.permissions.owner == domain || !write && may_read(&node, domain)
        });
        if allowed { Ok(found) } else { Err(Errno::EACCES) }
    }

    pub fn read(&mut self, caller: Caller, path: &str) -> Answer<Option<Vec<u8>>> {
        Ok(self.look(caller, path, false)?.map(|node| node.value.clone()))
    }

    pub fn list(&mut self, caller: Caller, path: &str) -> Answer<Vec<String>> {
        let node = self.look(caller, path, false)?;
        Ok(node.map(|node| node.children.iter().cloned().collect()).unwrap_or_default())
    }

    pub fn permissions(&mut self, caller: Caller, path: &str) -> Answer<Option<Permissions>> {
        Ok(self.look(caller, path, false)?.map(|node| node.permissions.clone()))
    }

    pub fn write(&mut self, caller: Caller, path: &str, value: &[u8]) -> Answer<()> {
        if path.len() + 1 + value.len() > REQUEST_LIMIT {
            return Err(Errno::E2BIG);
        }
        let node = match self.look(caller, path, true)? {
            Some(node) => Node { value: value.to_vec(), ..Node::clone(&node) },
            None => Node { value: value.to_vec(), ..self.create(caller, path)? },
        };
        self.put(caller, path, Some(node))?;
        self.changed(caller, path, false)
    }

    /// A new node and, where they are missing, those above it. It takes its parent's permissions; what a guest makes is
    /// the guest's own.
    fn create(&mut self, caller: Caller, path: &str) -> Answer<Node> {
        let (above, name) = split(path).ok_or(Errno::EINVAL)?;
        let mut parent = match self.get(caller, above)? {
            Some(parent) => Node::clone(&parent),
            None => self.create(caller, above)?,
        };
        let domain = self.domain(caller);
        let mut permissions = parent.permissions.clone();
        if domain != DomId::DOM0 {
            permissions.owner = domain;
        }
        parent.children.insert(name.to_owned());
        self.put(caller, above, Some(parent))?;
        Ok(Node { value: Vec::new(), permissions, children: BTreeSet::new(), generation: 0 })
    }

    pub fn set_permissions(&mut self, caller: Caller, path: &str, permissions: &Permissions) -> Answer<()> {
        let node = self.look(caller, path, true)?.ok_or(Errno::ENOENT)?;
        if self.domain(caller) != DomId::DOM0 && permissions.owner != node.permissions.owner {
            return Err(Errno::EPERM);
        }
        if !self.introduced.contains(&permissions.owner) {
            return Err(Errno::ENOENT);
        }
        let node = Node { permissions: permissions.clone(), ..Node::clone(&node) };
        self.put(caller, path, Some(node))?;
        self.changed(caller, path, false)
    }

    pub fn remove(&mut self, caller: Caller, path: &str) -> Answer<()> {
        if path == "/" {
            return Err(Errno::EINVAL);
        }
        let Some(node) = self.look(caller, path, true)? else { return Ok(()) };
        if let Some((above, name)) = split(path)
            && let Some(parent) = self.get(caller, above)?
        {
            let mut parent = Node::clone(&parent);
            parent.children.remove(name);
            self.put(caller, above, Some(parent))?;
        }
        self.delete(caller, path, &node, false)
    }

    /// Watches above fire for the top node only, watches below for their own node.
    fn delete(&mut self, caller: Caller, path: &str, node: &Node, exact: bool) -> Answer<()> {
        for name in &node.children {
            let child = below(path, name);
            if let Some(node) = self.get(caller, &child)? {
                self.delete(caller, &child, &node, true)?;
            }
        }
        self.put(caller, path, None)?;
        self.changed(caller, path, exact)
    }

    pub fn begin(&mut self, connection: u32) -> u32 {
        let id = self.new_id();
        self.transactions.insert(id, Transaction::of(connection));
        id
    }

    pub fn watch(&mut self, connection: u32, path: &str, token: &str) -> Answer<()> {
        if !path.starts_with('@') {
            check_path(path)?;
        }
        let watches = self.watches.entry(path.to_owned()).or_default();
        if watches.iter().any(|(watcher, other)| *watcher == connection && other == token) {
            return Err(Errno::EEXIST);
        }
        watches.push((connection, token.to_owned()));
        // A watch says once that it is there.
        self.send(connection, path, token);
        Ok(())
    }

    /// Events that are waiting already stay.
    pub fn unwatch(&mut self, connection: u32, path: &str, token: &str) -> Answer<()> {
        let watches = self.watches.get_mut(path).ok_or(Errno::ENOENT)?;
        let before = watches.len();
        watches.retain(|(watcher, other)| *watcher != connection || other != token);
        (watches.len() < before).then_some(()).ok_or(Errno::ENOENT)
    }

    pub fn next_event(&mut self, connection: u32) -> Option<WatchEvent> {
        let connection = self.connections.get_mut(&connection)?;
        let event = connection.events.pop_front();
        if connection.events.is_empty() {
            // Empty is as good as read.
            let _ = connection.wake.read();
        }
        event
    }

    fn send(&mut self, connection: u32, path: &str, token: &str) {
        let Some(connection) = self.connections.get_mut(&connection) else { return };
        connection.events.push_back(WatchEvent { path: path.to_owned(), token: token.to_owned() });
        // Full is as awake as can be.
        let _ = connection.wake.write(1);
    }

    /// Fires the watches on the path or, unless `exact`, on one above, whose owners may read it.
    pub(super) fn fire(&mut self, path: &str, exact: bool) {
        let mut told = Vec::new();
        let mut at = Some(path);
        while let Some(watched) = at {
            let watches = self.watches.get(watched);
            told.extend(watches.into_iter().flatten().filter(|(id, _)| self.hears(*id, path)).cloned());
            at = split(watched).map(|(above, _)| above).filter(|_| !exact);
        }
        for (connection, token) in told {
            self.send(connection, path, &token);
        }
    }

    fn hears(&self, connection: u32, path: &str) -> bool {
        let Some(domain) = self.connections.get(&connection).map(|connection| connection.domain) else {
            return false;
        };
        let (mut at, mut node) = (path, self.nodes.get(path));
        while let (None, Some((above, _))) = (node, split(at)) {
            (at, node) = (above, self.nodes.get(above));
        }
        domain == DomId::DOM0 || node.is_some_and(|node| may_read(node, domain))
    }
}
