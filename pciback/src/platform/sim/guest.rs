//! What a simulated guest can do: write its own nodes, share a page, send requests. No logic of a frontend's.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::rings::{Shared, SimRings};
use super::store::SimStore;
use crate::DomId;
use crate::platform::{Cause, PlatformError, Result, SharedMemory, Store, StoreOps};

/// The guest's side of a simulated host.
pub struct SimGuest {
    domain: DomId,
    store: SimStore,
    rings: SimRings,
    shared: Option<(u32, u32, Shared)>,
}

impl SimGuest {
    pub(super) fn new(domain: DomId, store: SimStore, rings: SimRings) -> Self {
        Self { domain, store, rings, shared: None }
    }

    /// Its connection to xenstore, with its rights.
    pub fn store(&self) -> &SimStore {
        &self.store
    }

    /// Grants a page and an event channel under these numbers.
    pub fn share(&mut self, grant: u32, port: u32) -> Result<()> {
        self.unshare();
        self.shared = Some((grant, port, self.rings.offer(self.domain, grant, port)?));
        Ok(())
    }

    /// Takes the page and the event channel back.
    pub fn unshare(&mut self) {
        if let Some((grant, port, _)) = self.shared.take() {
            self.rings.revoke(self.domain, grant, port);
        }
    }

    /// The page it shares.
    pub fn page(&self) -> Option<&SharedMemory> {
        self.shared.as_ref().map(|(_, _, shared)| &*shared.page)
    }

    /// Sends the host an event.
    pub fn notify(&self) -> Result<()> {
        let Some((_, _, shared)) = &self.shared else { return Ok(()) };
        shared
            .channel
            .send(true)
            .map_err(|errno| PlatformError::new("notify the host of", self.domain, errno))
    }

    /// Waits until `ready` says so, looking again at each event from the host.
    pub fn wait_for_answer<T>(
        &self,
        limit: Duration,
        mut ready: impl FnMut(&SharedMemory) -> Option<T>,
    ) -> Result<T> {
        let timed_out =
            || PlatformError::new("await an answer for domain", self.domain, Cause::TimedOut(limit));
        let Some((_, _, shared)) = &self.shared else { return Err(timed_out()) };
        let deadline = Instant::now() + limit;
        loop {
            if let Some(value) = ready(&shared.page) {
                return Ok(value);
            }
            wait(shared.channel.host_event(), deadline).map_err(|_| timed_out())?;
            shared.channel.take_host_event();
        }
    }

    /// Waits until a node that it may read has the value that `ready` wants.
    pub fn wait_for_node<T>(
        &self,
        path: &str,
        limit: Duration,
        mut ready: impl FnMut(Option<&str>) -> Option<T>,
    ) -> Result<T> {
        let token = format!("wait {path}");
        self.store.watch(path, &token)?;
        let deadline = Instant::now() + limit;
        let waited = loop {
            let value = self.store.read(path)?;
            let text = value.as_deref().and_then(|value| std::str::from_utf8(value).ok());
            if let Some(found) = ready(text) {
                break Ok(found);
            }
            if wait(self.store.event_fd(), deadline).is_err() {
                break Err(PlatformError::new("await xenstore node", path, Cause::TimedOut(limit)));
            }
            while self.store.next_event()?.is_some() {}
        };
        self.store.unwatch(path, &token)?;
        waited
    }
}

pub(super) fn wait(fd: std::os::fd::BorrowedFd<'_>, deadline: Instant) -> std::result::Result<(), Errno> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = PollTimeout::try_from(left).map_err(|_| Errno::EINVAL)?;
    match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], left)? {
        0 => Err(Errno::ETIMEDOUT),
        _ => Ok(()),
    }
}

impl Drop for SimGuest {
    fn drop(&mut self) {
        self.unshare();
    }
}
