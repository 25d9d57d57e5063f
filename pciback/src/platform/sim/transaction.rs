//! Transactions of the simulated xenstore: what one has seen and done until it is committed.

use std::collections::BTreeMap;
use std::sync::Arc;

use nix::errno::Errno;

use super::Answer;
use super::tree::{Node, Tree};

/// A node whose watchers get an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub path: String,
    /// Only for who watches this very node.
    pub exact: bool,
}

pub(super) struct Transaction {
    pub connection: u32,
    /// Generation of each path it looked at in the common tree; `None`: there was nothing.
    seen: BTreeMap<String, Option<u64>>,
    /// Nodes as it made them; `None`: deleted.
    pub nodes: BTreeMap<String, Option<Arc<Node>>>,
    changes: Vec<Change>,
}

impl Transaction {
    pub fn of(connection: u32) -> Self {
        Self { connection, seen: BTreeMap::new(), nodes: BTreeMap::new(), changes: Vec::new() }
    }

    /// A node as the transaction sees it, given what the common tree has.
    pub fn see(&mut self, path: &str, common: Option<Arc<Node>>) -> Option<Arc<Node>> {
        if let Some(own) = self.nodes.get(path) {
            return own.clone();
        }
        self.seen.entry(path.to_owned()).or_insert(common.as_ref().map(|node| node.generation));
        common
    }

    /// Watchers are notified of a node once, however often it changed.
    pub fn changed(&mut self, change: Change) {
        if !self.changes.contains(&change) {
            self.changes.push(change);
        }
    }
}

impl Tree {
    /// Ends a transaction; `EAGAIN` when another connection changed a node that it read.
    pub fn end(&mut self, id: u32, commit: bool) -> Answer<()> {
        let transaction = self.transactions.remove(&id).ok_or(Errno::ENOENT)?;
        if !commit {
            return Ok(());
        }
        let now = |path: &String| self.nodes.get(path).map(|node| node.generation);
        if transaction.seen.iter().any(|(path, before)| now(path) != *before) {
            return Err(Errno::EAGAIN);
        }
        for (path, node) in transaction.nodes {
            self.store(path, node);
        }
        for change in transaction.changes {
            self.fire(&change.path, change.exact);
        }
        Ok(())
    }
}
