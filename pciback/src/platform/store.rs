//! xenstore.

use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::Result;
use crate::DomId;

/// Who may read a node besides dom0 and its owner. Only the owner and dom0 may write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permissions {
    /// The owner: reads and writes.
    pub owner: DomId,
    /// Domains that may read.
    pub readers: Vec<DomId>,
}

impl Permissions {
    /// A node of dom0 that `guest` may read.
    pub fn backend(guest: DomId) -> Self {
        Self { owner: DomId::DOM0, readers: vec![guest] }
    }

    /// A node of `guest` that dom0 may read.
    pub fn frontend(guest: DomId) -> Self {
        Self { owner: guest, readers: vec![DomId::DOM0] }
    }
}

/// A node changed at or below a watched path; a watch also fires once when it is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    /// The node, or `@introduceDomain` and `@releaseDomain`.
    pub path: String,
    /// What was given to `watch`.
    pub token: String,
}

/// Reading and changing nodes, directly or within a transaction. Paths are absolute.
pub trait StoreOps {
    /// The value; `None` where there is no such node. At most 4,096 bytes, which a guest may have chosen.
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>>;
    /// The names of a node's children; empty where there is no such node.
    fn list(&self, path: &str) -> Result<Vec<String>>;
    /// Writes a node, and creates it and its parents where needed.
    fn write(&self, path: &str, value: &[u8]) -> Result<()>;
    /// Removes a node with all below it; nothing happens where there is none.
    fn remove(&self, path: &str) -> Result<()>;
    /// Sets who may do what with a node that exists.
    fn set_permissions(&self, path: &str, permissions: &Permissions) -> Result<()>;
    /// Reads who may do what; `None` where there is no such node.
    fn permissions(&self, path: &str) -> Result<Option<Permissions>>;
}

/// A connection to xenstore. Watches belong to the connection.
pub trait Store: StoreOps + Send + Sync {
    /// Runs `body` until it commits: again from the start when another client changed what it read (`EAGAIN`), 100 times at
    /// most. When `body` fails nothing is changed.
    fn transaction(&self, body: &mut dyn FnMut(&dyn StoreOps) -> Result<()>) -> Result<()>;
    /// Whether the domain is alive: introduced to xenstore and not dying.
    fn domain_exists(&self, domain: DomId) -> Result<bool>;
    /// Sets a watch.
    fn watch(&self, path: &str, token: &str) -> Result<()>;
    /// Removes a watch.
    fn unwatch(&self, path: &str, token: &str) -> Result<()>;
    /// Readable when `next_event` has something.
    fn event_fd(&self) -> BorrowedFd<'_>;
    /// The next event, without waiting.
    fn next_event(&self) -> Result<Option<WatchEvent>>;
}
