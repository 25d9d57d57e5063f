//! xenstore's nodes, transactions, watches and permissions, in memory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use nix::errno::Errno;

use super::world::SimDomain;
use crate::DomId;
use crate::platform::{Permissions, WatchEvent};

type Answer<T> = Result<T, Errno>;

/// Longest path and value that xenstored takes.
const PATH_LIMIT: usize = 3072;
const VALUE_LIMIT: usize = 4096;

#[derive(Debug, Clone)]
pub(super) struct Node {
    value: Vec<u8>,
    permissions: Permissions,
    /// Counts all changes of the tree; a transaction notices by it that a node is not what it was.
    generation: u64,
}

struct Watch {
    path: String,
    token: String,
}

struct Connection {
    domain: DomId,
    watches: Vec<Watch>,
    events: VecDeque<WatchEvent>,
}

/// What a transaction has seen and done.
#[derive(Default)]
struct Transaction {
    connection: u32,
    /// Generation of each path it looked at; `None`: there was nothing.
    seen: BTreeMap<String, Option<u64>>,
    changes: Vec<Change>,
    nodes: BTreeMap<String, Node>,
}

enum Change {
    Write(String),
    Remove(String),
    Permissions(String),
}

pub(super) struct Tree {
    nodes: BTreeMap<String, Node>,
    generation: u64,
    introduced: BTreeSet<DomId>,
    connections: BTreeMap<u32, Connection>,
    transactions: BTreeMap<u32, Transaction>,
    next_id: u32,
}

/// Who asks, and within which transaction.
#[derive(Clone, Copy)]
pub(super) struct Caller {
    pub connection: u32,
    pub transaction: Option<u32>,
}

fn check_path(path: &str) -> Answer<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte);
    let well_formed = path.starts_with('/')
        && path.len() <= PATH_LIMIT
        && path.bytes().all(plain)
        && (path == "/" || !path.ends_with('/'))
        && !path.contains("//");
    well_formed.then_some(()).ok_or(Errno::EINVAL)
}

fn parent(path: &str) -> Option<&str> {
    let (parent, _) = path.rsplit_once('/')?;
    Some(if parent.is_empty() { "/" } else { parent })
}

fn is_below(path: &str, top: &str) -> bool {
    path == top || top == "/" || path.strip_prefix(top).is_some_and(|rest| rest.starts_with('/'))
}

impl Tree {
    pub fn new() -> Self {
        let permissions = Permissions { owner: DomId::DOM0, readers: Vec::new() };
        let root = Node { value: Vec::new(), permissions: permissions.clone(), generation: 0 };
        let mut tree = Self {
            nodes: BTreeMap::from([("/".to_owned(), root)]),
            generation: 0,
            introduced: BTreeSet::from([DomId::DOM0]),
            connections: BTreeMap::new(),
            transactions: BTreeMap::new(),
            next_id: 1,
        };
        tree.force("/local/domain/0/domid", b"0", &permissions);
        tree.force("/local/domain/0/name", b"Domain-0", &permissions);
        tree
    }

    pub fn connect(&mut self, domain: DomId) -> u32 {
        let id = self.next_id;
        self.next_id += 1;
        self.connections.insert(id, Connection { domain, watches: Vec::new(), events: VecDeque::new() });
        id
    }

    pub fn disconnect(&mut self, connection: u32) {
        self.connections.remove(&connection);
        self.transactions.retain(|_, transaction| transaction.connection != connection);
    }

    /// The nodes that xl makes for a domain.
    pub fn introduce(&mut self, domain: &SimDomain) {
        let id = domain.id;
        let home = format!("/local/domain/{id}");
        let readable = Permissions { owner: DomId::DOM0, readers: vec![id] };
        for (path, value) in [
            (home.clone(), String::new()),
            (format!("{home}/name"), domain.name.clone()),
            (format!("{home}/domid"), id.to_string()),
            (format!("{home}/device"), String::new()),
            (format!("/libxl/{id}/type"), domain.kind.clone()),
        ] {
            self.force(&path, value.as_bytes(), &readable);
        }
        // A guest's own corner, as xl gives it.
        self.force(&format!("{home}/data"), b"", &Permissions { owner: id, readers: Vec::new() });
        self.introduced.insert(id);
        self.fire("@introduceDomain");
    }

    /// A domain is gone, and its nodes with it.
    pub fn release(&mut self, domain: DomId) {
        self.introduced.remove(&domain);
        self.take_out(&format!("/local/domain/{domain}"));
        self.take_out(&format!("/libxl/{domain}"));
        self.fire("@releaseDomain");
    }

    pub fn is_introduced(&self, domain: DomId) -> bool {
        self.introduced.contains(&domain)
    }

    fn force(&mut self, path: &str, value: &[u8], permissions: &Permissions) {
        self.generation += 1;
        let mut above = parent(path);
        while let Some(missing) = above.filter(|missing| !self.nodes.contains_key(*missing)) {
            let node =
                Node { value: Vec::new(), permissions: permissions.clone(), generation: self.generation };
            self.nodes.insert(missing.to_owned(), node);
            above = parent(missing);
        }
        let node =
            Node { value: value.to_vec(), permissions: permissions.clone(), generation: self.generation };
        self.nodes.insert(path.to_owned(), node);
        self.fire(path);
    }

    fn take_out(&mut self, top: &str) {
        self.generation += 1;
        self.nodes.retain(|path, _| !is_below(path, top));
        self.fire(top);
    }

    fn domain(&self, caller: Caller) -> DomId {
        self.connections.get(&caller.connection).map_or(DomId::DOM0, |connection| connection.domain)
    }

    /// A node as the caller sees it; a transaction remembers that it looked.
    fn look(&mut self, caller: Caller, path: &str) -> Answer<Option<Node>> {
        check_path(path)?;
        let node = self.nodes.get(path).cloned();
        let Some(id) = caller.transaction else { return Ok(node) };
        let transaction = self.transactions.get_mut(&id).ok_or(Errno::ENOENT)?;
        let own = transaction.nodes.get(path).cloned();
        if own.is_some() || transaction.removed(path) {
            return Ok(own);
        }
        transaction.seen.entry(path.to_owned()).or_insert(node.as_ref().map(|node| node.generation));
        Ok(node)
    }

    fn may(&mut self, caller: Caller, path: &str, write: bool) -> Answer<()> {
        let domain = self.domain(caller);
        if domain == DomId::DOM0 {
            return Ok(());
        }
        // What does not exist belongs to whoever owns the node above.
        let mut at = Some(path);
        while let Some(here) = at {
            if let Some(node) = self.look(caller, here)? {
                let owns = node.permissions.owner == domain;
                let reads = !write && node.permissions.readers.contains(&domain);
                return (owns || reads).then_some(()).ok_or(Errno::EACCES);
            }
            at = parent(here);
        }
        Err(Errno::EACCES)
    }

    pub fn read(&mut self, caller: Caller, path: &str) -> Answer<Option<Vec<u8>>> {
        let Some(node) = self.look(caller, path)? else { return Ok(None) };
        self.may(caller, path, false)?;
        Ok(Some(node.value))
    }

    pub fn list(&mut self, caller: Caller, path: &str) -> Answer<Vec<String>> {
        if self.look(caller, path)?.is_none() {
            return Ok(Vec::new());
        }
        self.may(caller, path, false)?;
        let transaction = caller.transaction.and_then(|id| self.transactions.get(&id));
        let own = transaction.map(|transaction| transaction.nodes.keys()).into_iter().flatten();
        let common = self.nodes.keys().filter(|path| !transaction.is_some_and(|found| found.removed(path)));
        let children: BTreeSet<String> = own
            .chain(common)
            .filter(|candidate| candidate.as_str() != "/" && parent(candidate) == Some(path))
            .filter_map(|child| Some(child.rsplit_once('/')?.1.to_owned()))
            .collect();
        Ok(children.into_iter().collect())
    }

    pub fn permissions(&mut self, caller: Caller, path: &str) -> Answer<Option<Permissions>> {
        let Some(node) = self.look(caller, path)? else { return Ok(None) };
        self.may(caller, path, false)?;
        Ok(Some(node.permissions))
    }

    pub fn write(&mut self, caller: Caller, path: &str, value: &[u8]) -> Answer<()> {
        check_path(path)?;
        if value.len() > VALUE_LIMIT {
            return Err(Errno::E2BIG);
        }
        self.may(caller, path, true)?;
        let domain = self.domain(caller);
        let permissions = match self.look(caller, path)? {
            Some(node) => node.permissions,
            None => {
                let above = parent(path).unwrap_or("/");
                if self.look(caller, above)?.is_none() {
                    self.write(caller, above, b"")?;
                }
                // New nodes inherit; what a guest makes is its own.
                let above = self.look(caller, above)?.map(|node| node.permissions);
                let inherited = above.unwrap_or(Permissions { owner: domain, readers: Vec::new() });
                if domain == DomId::DOM0 { inherited } else { Permissions { owner: domain, ..inherited } }
            }
        };
        self.generation += 1;
        let node = Node { value: value.to_vec(), permissions, generation: self.generation };
        self.put(caller, path, node, Change::Write(path.to_owned()))
    }

    pub fn set_permissions(&mut self, caller: Caller, path: &str, permissions: &Permissions) -> Answer<()> {
        let node = self.look(caller, path)?.ok_or(Errno::ENOENT)?;
        self.may(caller, path, true)?;
        self.generation += 1;
        let node = Node { permissions: permissions.clone(), generation: self.generation, ..node };
        self.put(caller, path, node, Change::Permissions(path.to_owned()))
    }

    fn put(&mut self, caller: Caller, path: &str, node: Node, change: Change) -> Answer<()> {
        if let Some(id) = caller.transaction {
            let transaction = self.transactions.get_mut(&id).ok_or(Errno::ENOENT)?;
            transaction.nodes.insert(path.to_owned(), node);
            transaction.changes.push(change);
        } else {
            self.nodes.insert(path.to_owned(), node);
            self.fire(path);
        }
        Ok(())
    }

    pub fn remove(&mut self, caller: Caller, path: &str) -> Answer<()> {
        if path == "/" {
            return Err(Errno::EINVAL);
        }
        if self.look(caller, path)?.is_none() {
            return Ok(());
        }
        self.may(caller, path, true)?;
        match caller.transaction {
            None => self.take_out(path),
            Some(id) => {
                let transaction = self.transactions.get_mut(&id).ok_or(Errno::ENOENT)?;
                transaction.nodes.retain(|below, _| !is_below(below, path));
                transaction.changes.push(Change::Remove(path.to_owned()));
            }
        }
        Ok(())
    }

    pub fn begin(&mut self, connection: u32) -> u32 {
        let id = self.next_id;
        self.next_id += 1;
        self.transactions.insert(id, Transaction { connection, ..Transaction::default() });
        id
    }

    /// Ends a transaction; `EAGAIN` when somebody changed what it looked at.
    pub fn end(&mut self, id: u32, commit: bool) -> Answer<()> {
        let transaction = self.transactions.remove(&id).ok_or(Errno::ENOENT)?;
        if !commit {
            return Ok(());
        }
        let now = |path: &String| self.nodes.get(path).map(|node| node.generation);
        if transaction.seen.iter().any(|(path, before)| now(path) != *before) {
            return Err(Errno::EAGAIN);
        }
        for change in &transaction.changes {
            if let Change::Remove(path) = change {
                self.nodes.retain(|below, _| !is_below(below, path));
            }
        }
        self.nodes.extend(transaction.nodes);
        for change in transaction.changes {
            match change {
                Change::Write(path) | Change::Remove(path) | Change::Permissions(path) => self.fire(&path),
            }
        }
        Ok(())
    }

    pub fn watch(&mut self, connection: u32, path: &str, token: &str) -> Answer<()> {
        if !path.starts_with('@') {
            check_path(path)?;
        }
        let connection = self.connections.get_mut(&connection).ok_or(Errno::EBADF)?;
        if connection.watches.iter().any(|watch| watch.path == path && watch.token == token) {
            return Err(Errno::EEXIST);
        }
        connection.watches.push(Watch { path: path.to_owned(), token: token.to_owned() });
        // A watch says once that it is there.
        connection.events.push_back(WatchEvent { path: path.to_owned(), token: token.to_owned() });
        Ok(())
    }

    pub fn unwatch(&mut self, connection: u32, path: &str, token: &str) -> Answer<()> {
        let connection = self.connections.get_mut(&connection).ok_or(Errno::EBADF)?;
        let before = connection.watches.len();
        connection.watches.retain(|watch| watch.path != path || watch.token != token);
        connection.events.retain(|event| event.token != token);
        (connection.watches.len() < before).then_some(()).ok_or(Errno::ENOENT)
    }

    pub fn next_event(&mut self, connection: u32) -> Option<WatchEvent> {
        self.connections.get_mut(&connection)?.events.pop_front()
    }

    /// Which connections have events.
    pub fn has_events(&self, connection: u32) -> bool {
        self.connections.get(&connection).is_some_and(|connection| !connection.events.is_empty())
    }

    fn fire(&mut self, path: &str) {
        for connection in self.connections.values_mut() {
            for watch in &connection.watches {
                let special = path.starts_with('@');
                // A removed node takes what is below with it: who watches there is told as well.
                let touched = if special {
                    watch.path == path
                } else {
                    is_below(path, &watch.path) || is_below(&watch.path, path)
                };
                if touched {
                    let event = WatchEvent { path: path.to_owned(), token: watch.token.clone() };
                    if connection.events.back() != Some(&event) {
                        connection.events.push_back(event);
                    }
                }
            }
        }
    }
}

impl Transaction {
    /// Whether this transaction removed a node and did not make it again.
    fn removed(&self, path: &str) -> bool {
        self.changes.iter().any(|change| matches!(change, Change::Remove(top) if is_below(path, top)))
    }
}
