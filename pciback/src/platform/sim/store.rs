//! A connection to the simulated xenstore.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, Weak};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::fuse::Fuse;
use super::locked;
use super::tree::{Caller, Tree};
use super::world::World;
use crate::DomId;
use crate::platform::{Permissions, PlatformError, Result, Store, StoreOps, WatchEvent};

/// How often a transaction is tried.
const ATTEMPTS: usize = 100;

/// A connection, with the rights of its domain.
pub struct SimStore {
    tree: Arc<Mutex<Tree>>,
    connection: u32,
    wake: Arc<EventFd>,
    fuse: Fuse,
    /// Where failures come from, for the service's own connection.
    world: Option<Arc<Mutex<World>>>,
}

/// Who is woken when nodes change: all connections of one tree.
static LISTENERS: Mutex<Vec<Listener>> = Mutex::new(Vec::new());

struct Listener {
    tree: Weak<Mutex<Tree>>,
    connection: u32,
    wake: Weak<EventFd>,
}

impl SimStore {
    pub(super) fn connect(tree: &Arc<Mutex<Tree>>, domain: DomId) -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| PlatformError::new("connect to", "the simulated xenstore", errno))?;
        let wake = Arc::new(wake);
        let connection = locked(tree).connect(domain);
        let listener = Listener { tree: Arc::downgrade(tree), connection, wake: Arc::downgrade(&wake) };
        locked(&LISTENERS).push(listener);
        Ok(Self { tree: Arc::clone(tree), connection, wake, fuse: Fuse::default(), world: None })
    }

    /// The same connection, of a service that dies when the fuse says so and whose calls may be made to fail.
    pub(super) fn of_a_life(mut self, world: &Arc<Mutex<World>>, fuse: &Fuse) -> Self {
        self.fuse = fuse.clone();
        self.world = Some(Arc::clone(world));
        self
    }

    fn injected(&self, operation: &str, action: &'static str, subject: &str) -> Result<()> {
        let answer = self.world.as_ref().map_or(Ok(()), |world| locked(world).injected(operation, None));
        answer.map_err(|errno| PlatformError::new(action, subject, errno))
    }

    fn caller(&self) -> Caller {
        Caller { connection: self.connection, transaction: None }
    }

    fn direct(&self) -> Within<'_> {
        Within { store: self, caller: self.caller() }
    }
}

/// Wakes every connection of a tree that has events.
pub(super) fn wake_listeners(tree: &Arc<Mutex<Tree>>) {
    let mut listeners = locked(&LISTENERS);
    listeners.retain(|listener| listener.wake.strong_count() > 0);
    for listener in listeners.iter().filter(|listener| listener.tree.as_ptr() == Arc::as_ptr(tree)) {
        if locked(tree).has_events(listener.connection)
            && let Some(wake) = listener.wake.upgrade()
        {
            // Full is as awake as can be.
            let _ = wake.write(1);
        }
    }
}

impl Drop for SimStore {
    fn drop(&mut self) {
        locked(&self.tree).disconnect(self.connection);
    }
}

struct Within<'a> {
    store: &'a SimStore,
    caller: Caller,
}

impl Within<'_> {
    fn ask<T>(
        &self,
        action: &'static str,
        path: &str,
        body: impl FnOnce(&mut Tree, Caller) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        let answer = body(&mut locked(&self.store.tree), self.caller);
        if self.caller.transaction.is_none() {
            wake_listeners(&self.store.tree);
        }
        answer.map_err(|errno| PlatformError::new(action, path, errno))
    }
}

impl StoreOps for Within<'_> {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        self.ask("read xenstore node", path, |tree, caller| tree.read(caller, path))
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        self.ask("list xenstore node", path, |tree, caller| tree.list(caller, path))
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<()> {
        self.ask("write xenstore node", path, |tree, caller| tree.write(caller, path, value))
    }

    fn remove(&self, path: &str) -> Result<()> {
        self.ask("remove xenstore node", path, |tree, caller| tree.remove(caller, path))
    }

    fn set_permissions(&self, path: &str, permissions: &Permissions) -> Result<()> {
        let set = |tree: &mut Tree, caller: Caller| tree.set_permissions(caller, path, permissions);
        self.ask("set the permissions of xenstore node", path, set)
    }

    fn permissions(&self, path: &str) -> Result<Option<Permissions>> {
        self.ask("read the permissions of xenstore node", path, |tree, caller| tree.permissions(caller, path))
    }
}

impl StoreOps for SimStore {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        self.injected("read", "read xenstore node", path)?;
        self.direct().read(path)
    }

    fn list(&self, path: &str) -> Result<Vec<String>> {
        self.direct().list(path)
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<()> {
        self.fuse.change(|| self.direct().write(path, value))
    }

    fn remove(&self, path: &str) -> Result<()> {
        self.fuse.change(|| self.direct().remove(path))
    }

    fn set_permissions(&self, path: &str, permissions: &Permissions) -> Result<()> {
        self.fuse.change(|| self.direct().set_permissions(path, permissions))
    }

    fn permissions(&self, path: &str) -> Result<Option<Permissions>> {
        self.direct().permissions(path)
    }
}

impl Store for SimStore {
    fn transaction(&self, body: &mut dyn FnMut(&dyn StoreOps) -> Result<()>) -> Result<()> {
        let subject = "a xenstore transaction";
        self.injected("transaction", "commit", subject)?;
        for _ in 0..ATTEMPTS {
            let id = locked(&self.tree).begin(self.connection);
            let caller = Caller { transaction: Some(id), ..self.caller() };
            let done = body(&Within { store: self, caller });
            let ended = self.fuse.change(|| locked(&self.tree).end(id, done.is_ok()));
            done?;
            wake_listeners(&self.tree);
            match ended {
                Ok(()) => return Ok(()),
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(PlatformError::new("commit", subject, errno)),
            }
        }
        Err(PlatformError::new("commit", subject, Errno::EAGAIN))
    }

    fn domain_exists(&self, domain: DomId) -> Result<bool> {
        Ok(locked(&self.tree).is_introduced(domain))
    }

    fn watch(&self, path: &str, token: &str) -> Result<()> {
        self.injected("watch", "watch xenstore node", path)?;
        self.direct()
            .ask("watch xenstore node", path, |tree, caller| tree.watch(caller.connection, path, token))
    }

    fn unwatch(&self, path: &str, token: &str) -> Result<()> {
        self.injected("unwatch", "stop watching xenstore node", path)?;
        let unwatch = |tree: &mut Tree, caller: Caller| tree.unwatch(caller.connection, path, token);
        self.direct().ask("stop watching xenstore node", path, unwatch)
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn next_event(&self) -> Result<Option<WatchEvent>> {
        self.fuse.look();
        let mut tree = locked(&self.tree);
        let event = tree.next_event(self.connection);
        if !tree.has_events(self.connection) {
            // Empty is as good as read.
            let _ = self.wake.read();
        }
        Ok(event)
    }
}
