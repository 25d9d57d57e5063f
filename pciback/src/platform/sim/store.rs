//! A connection to the simulated xenstore.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::failures::{Failures, Subject};
use super::tree::{Caller, Tree};
use super::{Answer, locked};
use crate::DomId;
use crate::platform::{Cause, Permissions, PlatformError, Result, Store, StoreOps, WatchEvent};

/// How often a transaction is tried.
const ATTEMPTS: usize = 100;

/// A connection, with the rights of its domain.
pub struct SimStore {
    tree: Arc<Mutex<Tree>>,
    failures: Failures,
    domain: DomId,
    connection: u32,
    wake: Arc<EventFd>,
}

impl SimStore {
    pub(super) fn connect(tree: &Arc<Mutex<Tree>>, domain: DomId, failures: &Failures) -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| PlatformError::new("connect to", "the simulated xenstore", errno))?;
        let wake = Arc::new(wake);
        let connection = locked(tree).connect(domain, &wake);
        Ok(Self { tree: Arc::clone(tree), failures: failures.clone(), domain, connection, wake })
    }

    fn within(&self, transaction: Option<u32>) -> Within<'_> {
        Within { store: self, caller: Caller { connection: self.connection, transaction } }
    }
}

impl Drop for SimStore {
    fn drop(&mut self) {
        locked(&self.tree).disconnect(self.connection);
    }
}

/// The nodes as a transaction sees them, or outside of any.
struct Within<'a> {
    store: &'a SimStore,
    caller: Caller,
}

impl Within<'_> {
    fn ask<T>(
        &self,
        (operation, action): (&str, &'static str),
        path: &str,
        body: impl FnOnce(&mut Tree, Caller) -> Answer<T>,
    ) -> Result<T> {
        let subject = Subject { path: Some(path), ..Subject::from(self.store.domain) };
        let failed = self.store.failures.check(operation, subject);
        let call = || Ok(body(&mut locked(&self.store.tree), self.caller)?);
        // What a transaction does is done when it is committed.
        let changes = matches!(operation, "write" | "remove" | "set_permissions");
        let answer = failed.and_then(|()| match self.caller.transaction {
            None if changes => self.store.failures.fuse.change(call),
            _ => call(),
        });
        answer.map_err(|cause| PlatformError::new(action, path, cause))
    }
}

impl StoreOps for Within<'_> {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        self.ask(("read", "read xenstore node"), path, |tree, caller| tree.read(caller, path))
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        self.ask(("list", "list xenstore node"), path, |tree, caller| tree.list(caller, path))
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<()> {
        self.ask(("write", "write xenstore node"), path, |tree, caller| tree.write(caller, path, value))
    }

    fn remove(&self, path: &str) -> Result<()> {
        self.ask(("remove", "remove xenstore node"), path, |tree, caller| tree.remove(caller, path))
    }

    fn set_permissions(&self, path: &str, permissions: &Permissions) -> Result<()> {
        let operation = ("set_permissions", "set the permissions of xenstore node");
        self.ask(operation, path, |tree, caller| tree.set_permissions(caller, path, permissions))
    }

    fn permissions(&self, path: &str) -> Result<Option<Permissions>> {
        let operation = ("permissions", "read the permissions of xenstore node");
        self.ask(operation, path, |tree, caller| tree.permissions(caller, path))
    }
}

impl StoreOps for SimStore {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        self.within(None).read(path)
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        self.within(None).list(path)
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<()> {
        self.within(None).write(path, value)
    }

    fn remove(&self, path: &str) -> Result<()> {
        self.within(None).remove(path)
    }

    fn set_permissions(&self, path: &str, permissions: &Permissions) -> Result<()> {
        self.within(None).set_permissions(path, permissions)
    }

    fn permissions(&self, path: &str) -> Result<Option<Permissions>> {
        self.within(None).permissions(path)
    }
}

impl Store for SimStore {
    fn transaction(&self, body: &mut dyn FnMut(&dyn StoreOps) -> Result<()>) -> Result<()> {
        let error = |cause| PlatformError::new("commit", "a xenstore transaction", cause);
        for _ in 0..ATTEMPTS {
            let id = locked(&self.tree).begin(self.connection);
            let done = body(&self.within(Some(id)));
            let failed = self.failures.check("transaction", self.domain.into());
            let ended =
                self.failures.fuse.change(|| locked(&self.tree).end(id, done.is_ok() && failed.is_ok()));
            done?;
            match failed.and(ended.map_err(Cause::from)) {
                Ok(()) => return Ok(()),
                Err(Cause::Os(Errno::EAGAIN)) => {}
                Err(cause) => return Err(error(cause)),
            }
        }
        let subject = format!("a xenstore transaction, {ATTEMPTS} times");
        Err(PlatformError::new("commit", subject, Errno::EAGAIN))
    }

    fn domain_exists(&self, domain: DomId) -> Result<bool> {
        Ok(locked(&self.tree).is_introduced(domain))
    }

    fn watch(&self, path: &str, token: &str) -> Result<()> {
        self.within(None).ask(("watch", "watch xenstore node"), path, |tree, caller| {
            tree.watch(caller.connection, path, token)
        })
    }

    fn unwatch(&self, path: &str, token: &str) -> Result<()> {
        self.within(None).ask(("unwatch", "stop watching xenstore node"), path, |tree, caller| {
            tree.unwatch(caller.connection, path, token)
        })
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn next_event(&self) -> Result<Option<WatchEvent>> {
        self.failures.fuse.look();
        Ok(locked(&self.tree).next_event(self.connection))
    }
}
