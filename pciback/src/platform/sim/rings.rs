//! Pages and event channels that simulated guests share.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::fuse::Fuse;
use super::locked;
use super::world::World;
use crate::DomId;
use crate::platform::{GuestRings, PlatformError, Result, Ring, SharedMemory};

/// A page and an event channel by the guest's own numbers.
type Place = (DomId, u32, u32);

/// All that guests have offered.
#[derive(Clone)]
pub(super) struct SimRings {
    offered: Arc<Mutex<BTreeMap<Place, Arc<Shared>>>>,
    fuse: Fuse,
    /// Where failures come from, for the service's side.
    world: Option<Arc<Mutex<World>>>,
}

/// One page with an event in each direction.
pub(super) struct Shared {
    page: Arc<SharedMemory>,
    to_host: EventFd,
    to_guest: EventFd,
}

impl SimRings {
    pub fn new() -> Self {
        Self { offered: Arc::default(), fuse: Fuse::default(), world: None }
    }

    /// The same offers, for a service that dies when the fuse says so.
    pub fn of_a_life(&self, world: &Arc<Mutex<World>>, fuse: &Fuse) -> Self {
        let offered = Arc::clone(&self.offered);
        Self { offered, fuse: fuse.clone(), world: Some(Arc::clone(world)) }
    }

    /// A guest grants a page and allocates an event channel.
    pub fn offer(&self, domain: DomId, grant: u32, port: u32) -> Result<Arc<Shared>> {
        let failed = |errno: Errno| PlatformError::new("offer a page of domain", domain, errno);
        let event = || {
            EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(failed)
        };
        let page = SharedMemory::anonymous(4096)
            .map_err(|error| PlatformError::new("map a page of", domain, error))?;
        let shared = Arc::new(Shared { page: Arc::new(page), to_host: event()?, to_guest: event()? });
        locked(&self.offered).insert((domain, grant, port), Arc::clone(&shared));
        Ok(shared)
    }

    /// A guest takes back what it offered.
    pub fn revoke(&self, domain: DomId, grant: u32, port: u32) {
        locked(&self.offered).remove(&(domain, grant, port));
    }

    pub fn drop_domain(&self, domain: DomId) {
        locked(&self.offered).retain(|(owner, ..), _| *owner != domain);
    }
}

impl GuestRings for SimRings {
    fn connect(&self, domain: DomId, grant: u32, port: u32) -> Result<Box<dyn Ring>> {
        self.fuse.look();
        let injected = self.world.as_ref().map_or(Ok(()), |world| locked(world).injected("connect", None));
        injected.map_err(|errno| PlatformError::new("map the shared page of domain", domain, errno))?;
        let offered = locked(&self.offered);
        let shared = offered.get(&(domain, grant, port)).ok_or_else(|| {
            PlatformError::new(
                "map the shared page of",
                format!("domain {domain}, grant {grant}"),
                Errno::EINVAL,
            )
        })?;
        Ok(Box::new(SimRing { shared: Arc::clone(shared), domain, fuse: self.fuse.clone() }))
    }
}

struct SimRing {
    shared: Arc<Shared>,
    domain: DomId,
    fuse: Fuse,
}

impl Ring for SimRing {
    fn page(&self) -> &SharedMemory {
        &self.shared.page
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.shared.to_host.as_fd()
    }

    fn take_event(&self) -> Result<bool> {
        self.fuse.look();
        match self.shared.to_host.read() {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(PlatformError::new("take an event of domain", self.domain, errno)),
        }
    }

    fn notify(&self) -> Result<()> {
        let sent = self.shared.to_guest.write(1);
        sent.map(drop).map_err(|errno| PlatformError::new("notify domain", self.domain, errno))
    }
}

impl Shared {
    pub fn page(&self) -> &SharedMemory {
        &self.page
    }

    pub fn notify_host(&self) -> std::result::Result<(), Errno> {
        self.to_host.write(1).map(drop)
    }

    pub fn host_event(&self) -> BorrowedFd<'_> {
        self.to_guest.as_fd()
    }

    pub fn take_host_event(&self) {
        // Empty is as good as taken.
        let _ = self.to_guest.read();
    }
}
