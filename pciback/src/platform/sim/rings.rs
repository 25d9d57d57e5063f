//! Pages and event channels that simulated guests share.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::failures::Failures;
use super::fuse::{Fuse, Process};
use super::locked;
use crate::DomId;
use crate::platform::{GuestRings, PlatformError, Result, Ring, SharedMemory};

/// What guests have offered, and what of it is in use.
#[derive(Default)]
struct Offers {
    pages: BTreeMap<(DomId, u32), Arc<SharedMemory>>,
    channels: BTreeMap<(DomId, u32), Arc<Channel>>,
    /// Ports that the backend has bound, and in which of its runs: a second time is refused.
    bound: BTreeMap<(DomId, u32), Process>,
}

impl Offers {
    /// Binds a port, unless it is bound: by a process that has not ended, since the kernel unbinds what a process leaves.
    fn bind(&mut self, domain: DomId, port: u32, process: &Fuse) -> bool {
        let free = self.bound.get(&(domain, port)).is_none_or(Process::has_ended);
        if free {
            self.bound.insert((domain, port), process.process());
        }
        free
    }
}

/// The two directions of an event channel.
pub(super) struct Channel {
    to_host: EventFd,
    to_guest: EventFd,
}

/// All that guests have offered.
#[derive(Clone)]
pub(super) struct SimRings {
    offers: Arc<Mutex<Offers>>,
    failures: Failures,
}

/// A page and an event channel as their guest sees them.
pub(super) struct Shared {
    pub page: Arc<SharedMemory>,
    pub channel: Arc<Channel>,
}

impl SimRings {
    pub fn new(failures: &Failures) -> Self {
        Self { offers: Arc::default(), failures: failures.clone() }
    }

    /// The same offers, for one run of the service.
    pub fn of_a_run(&self, failures: &Failures) -> Self {
        Self { offers: Arc::clone(&self.offers), failures: failures.clone() }
    }

    /// A guest grants a page and allocates an event channel.
    pub fn offer(&self, domain: DomId, grant: u32, port: u32) -> Result<Shared> {
        let failed = |errno: Errno| PlatformError::new("offer a page of domain", domain, errno);
        let event = || {
            EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(failed)
        };
        let page = SharedMemory::anonymous(4096)
            .map_err(|error| PlatformError::new("map a page of", domain, error))?;
        let page = Arc::new(page);
        let channel = Arc::new(Channel { to_host: event()?, to_guest: event()? });
        let mut offers = locked(&self.offers);
        offers.pages.insert((domain, grant), Arc::clone(&page));
        offers.channels.insert((domain, port), Arc::clone(&channel));
        Ok(Shared { page, channel })
    }

    /// A guest takes back what it offered; what is mapped stays mapped.
    pub fn revoke(&self, domain: DomId, grant: u32, port: u32) {
        let mut offers = locked(&self.offers);
        offers.pages.remove(&(domain, grant));
        offers.channels.remove(&(domain, port));
    }

    pub fn drop_domain(&self, domain: DomId) {
        let mut offers = locked(&self.offers);
        offers.pages.retain(|(owner, _), _| *owner != domain);
        offers.channels.retain(|(owner, _), _| *owner != domain);
    }

    /// How many of a domain's channels are bound.
    pub fn connected(&self, domain: DomId) -> usize {
        locked(&self.offers)
            .bound
            .iter()
            .filter(|((owner, _), process)| *owner == domain && !process.has_ended())
            .count()
    }
}

impl GuestRings for SimRings {
    fn connect(&self, domain: DomId, grant: u32, port: u32) -> Result<Box<dyn Ring>> {
        let (text_page, text_port) =
            (format!("domain {domain}, grant {grant}"), format!("domain {domain}, port {port}"));
        let (mapping, binding) = ("map the shared page of", "bind the event channel of");
        self.failures
            .check("connect", domain.into())
            .map_err(|cause| PlatformError::new(mapping, &text_page, cause))?;
        let mut offers = locked(&self.offers);
        let page = offers.pages.get(&(domain, grant)).cloned();
        let page = page.ok_or_else(|| PlatformError::new(mapping, text_page, Errno::EINVAL))?;
        let channel = offers.channels.get(&(domain, port)).cloned();
        let channel = channel.filter(|_| offers.bind(domain, port, &self.failures.fuse));
        let channel = channel.ok_or_else(|| PlatformError::new(binding, text_port, Errno::EINVAL))?;
        // A channel that becomes bound has an event pending for the side that binds it.
        channel.send(true).map_err(|errno| PlatformError::new(binding, domain, errno))?;
        let woken = Arc::clone(&channel);
        self.failures.fuse.on_end(move || {
            let _ = woken.send(true);
        });
        Ok(Box::new(SimRing {
            page,
            channel,
            domain,
            port,
            offers: Arc::clone(&self.offers),
            fuse: self.failures.fuse.clone(),
        }))
    }
}

struct SimRing {
    page: Arc<SharedMemory>,
    channel: Arc<Channel>,
    domain: DomId,
    port: u32,
    offers: Arc<Mutex<Offers>>,
    fuse: Fuse,
}

impl Ring for SimRing {
    fn page(&self) -> &SharedMemory {
        &self.page
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.channel.to_host.as_fd()
    }

    fn take_event(&self) -> Result<bool> {
        self.fuse.look();
        match self.channel.to_host.read() {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(PlatformError::new("take an event of domain", self.domain, errno)),
        }
    }

    fn notify(&self) -> Result<()> {
        let sent = self.fuse.change(|| self.channel.send(false));
        sent.map_err(|errno| PlatformError::new("notify domain", self.domain, errno))
    }
}

impl Drop for SimRing {
    fn drop(&mut self) {
        let mut offers = locked(&self.offers);
        // A later run may have it by now.
        if offers.bound.get(&(self.domain, self.port)).is_some_and(|holder| holder.is_of(&self.fuse)) {
            offers.bound.remove(&(self.domain, self.port));
        }
    }
}

impl Channel {
    /// Sends an event to one side.
    pub fn send(&self, to_host: bool) -> std::result::Result<(), Errno> {
        let event = if to_host { &self.to_host } else { &self.to_guest };
        match event.write(1) {
            // Full is as pending as can be.
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Readable when the host has sent an event.
    pub fn host_event(&self) -> BorrowedFd<'_> {
        self.to_guest.as_fd()
    }

    pub fn take_host_event(&self) {
        // Empty is as good as taken.
        let _ = self.to_guest.read();
    }
}
