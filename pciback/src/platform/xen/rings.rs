//! Shared pages and event channels of PV guests, through libxengnttab and libxenevtchn.
//!
//! Each ring has handles of its own: an event descriptor then belongs to one guest only, and closing them undoes
//! everything even where an unmap or unbind failed. A guest that dies leaves its page mapped and readable; Xen keeps the
//! dead domain until the ring is dropped.

use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::bindings::{Libraries, evtchn_port_t, xenevtchn_handle, xengnttab_handle};
use super::hypervisor::check;
use crate::DomId;
use crate::platform::{Cause, GuestRings, PlatformError, Result, Ring, SharedMemory};

const PAGE_BYTES: usize = 4096;
/// `PROT_READ | PROT_WRITE` of mmap.
const READ_WRITE: i32 = 3;

/// Connects to the rings of this host's guests.
pub struct XenRings {
    libraries: Arc<Libraries>,
}

impl XenRings {
    /// Opens nothing yet: a missing driver shows when the first guest connects.
    pub fn new(libraries: &Arc<Libraries>) -> Self {
        Self { libraries: Arc::clone(libraries) }
    }
}

impl GuestRings for XenRings {
    fn connect(&self, domain: DomId, grant: u32, port: u32) -> Result<Box<dyn Ring>> {
        let mapping = Mapping::new(&self.libraries, domain, grant)?;
        let channel = Channel::bind(&self.libraries, domain, port)?;
        // SAFETY: the page is mapped for reading and writing, and `XenRing` drops `page` before `mapping`.
        let page = unsafe { SharedMemory::borrowed(mapping.page, PAGE_BYTES) };
        Ok(Box::new(XenRing { page, channel, _mapping: mapping }))
    }
}

/// Dropped in this order: nothing refers to the page when it is unmapped.
struct XenRing {
    page: SharedMemory,
    channel: Channel,
    _mapping: Mapping,
}

impl Ring for XenRing {
    fn page(&self) -> &SharedMemory {
        &self.page
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor stays open as long as the channel, which `self` owns.
        unsafe { BorrowedFd::borrow_raw(self.channel.fd) }
    }

    fn take_event(&self) -> Result<bool> {
        self.channel
            .take()
            .map_err(|cause| PlatformError::new("take an event of", self.channel.subject(), cause))
    }

    fn notify(&self) -> Result<()> {
        let channel = &self.channel;
        // SAFETY: the handle is open and the port bound.
        let answer =
            unsafe { channel.libraries.evtchn.xenevtchn_notify(channel.handle.as_ptr(), channel.port) };
        check(answer)
            .map(drop)
            .map_err(|errno| PlatformError::new("send an event to", channel.subject(), errno))
    }
}

/// A guest's page, mapped until dropped.
struct Mapping {
    libraries: Arc<Libraries>,
    handle: NonNull<xengnttab_handle>,
    page: NonNull<u8>,
    domain: DomId,
}

// SAFETY: libxengnttab's handle and the mapping belong to the process; only dropping uses them, once.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(libraries: &Arc<Libraries>, domain: DomId, grant: u32) -> Result<Self> {
        let error = |errno| {
            PlatformError::new("map", format!("the page that domain {domain} grants as {grant}"), errno)
        };
        let gnttab = &libraries.gnttab;
        // SAFETY: the logger is a static, and 0 are valid flags.
        let opened = unsafe { gnttab.xengnttab_open(libraries.logger, 0) };
        let handle = NonNull::new(opened).ok_or_else(|| {
            PlatformError::new("open", "/dev/xen/gntdev (module xen-gntdev)", Errno::last())
        })?;
        // SAFETY: the handle is open; Xen checks the numbers.
        let mapped = unsafe {
            gnttab.xengnttab_map_grant_ref(handle.as_ptr(), u32::from(domain.0), grant, READ_WRITE)
        };
        let Some(page) = NonNull::new(mapped.cast()) else {
            let errno = Errno::last();
            // SAFETY: the handle is open and nothing is mapped by it.
            unsafe { gnttab.xengnttab_close(handle.as_ptr()) };
            return Err(error(errno));
        };
        Ok(Self { libraries: Arc::clone(libraries), handle, page, domain })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let gnttab = &self.libraries.gnttab;
        // SAFETY: the page is mapped by this handle, and nothing refers to it any more.
        let answer = unsafe { gnttab.xengnttab_unmap(self.handle.as_ptr(), self.page.as_ptr().cast(), 1) };
        if let Err(errno) = check(answer) {
            log::error!("unmap the shared page of domain {}: {errno}", self.domain);
        }
        // SAFETY: the handle is open, and nothing uses it any more.
        let answer = unsafe { gnttab.xengnttab_close(self.handle.as_ptr()) };
        if let Err(errno) = check(answer) {
            log::error!("close the grant handle of domain {}: {errno}", self.domain);
        }
    }
}

/// A guest's event channel, bound until dropped.
struct Channel {
    libraries: Arc<Libraries>,
    handle: NonNull<xenevtchn_handle>,
    fd: RawFd,
    port: evtchn_port_t,
    domain: DomId,
}

// SAFETY: libxenevtchn's handle is a descriptor that any thread may use, one at a time.
unsafe impl Send for Channel {}

impl Channel {
    fn bind(libraries: &Arc<Libraries>, domain: DomId, remote: u32) -> Result<Self> {
        let error = |errno| {
            PlatformError::new("bind", format!("event channel port {remote} of domain {domain}"), errno)
        };
        let evtchn = &libraries.evtchn;
        // SAFETY: the logger is a static, and 0 are valid flags (close on exec is set).
        let opened = unsafe { evtchn.xenevtchn_open(libraries.logger, 0) };
        let handle = NonNull::new(opened).ok_or_else(|| {
            PlatformError::new("open", "/dev/xen/evtchn (module xen-evtchn)", Errno::last())
        })?;
        let close = |errno| {
            // SAFETY: the handle is open; closing it unbinds what it may have bound.
            unsafe { evtchn.xenevtchn_close(handle.as_ptr()) };
            error(errno)
        };
        // SAFETY: the handle is open.
        let fd = unsafe { evtchn.xenevtchn_fd(handle.as_ptr()) };
        // SAFETY: the descriptor stays open for the call.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        fcntl(borrowed, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK)).map_err(close)?;
        // SAFETY: the handle is open; Xen checks the numbers.
        let answer =
            unsafe { evtchn.xenevtchn_bind_interdomain(handle.as_ptr(), u32::from(domain.0), remote) };
        let port = check(answer).map_err(close)?;
        Ok(Self { libraries: Arc::clone(libraries), handle, fd, port: port.cast_unsigned(), domain })
    }

    fn subject(&self) -> String {
        format!("domain {}", self.domain)
    }

    fn take(&self) -> std::result::Result<bool, Cause> {
        let evtchn = &self.libraries.evtchn;
        // SAFETY: the handle is open; its descriptor does not block.
        let pending = match check(unsafe { evtchn.xenevtchn_pending(self.handle.as_ptr()) }) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(false),
            other => other?,
        };
        if pending.cast_unsigned() != self.port {
            return Err(Cause::Malformed(format!("event on port {pending}, bound is {}", self.port)));
        }
        // SAFETY: the handle is open and the port bound.
        check(unsafe { evtchn.xenevtchn_unmask(self.handle.as_ptr(), self.port) })?;
        Ok(true)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let evtchn = &self.libraries.evtchn;
        // SAFETY: the handle is open and the port bound.
        let answer = unsafe { evtchn.xenevtchn_unbind(self.handle.as_ptr(), self.port) };
        if let Err(errno) = check(answer) {
            log::error!("unbind the event channel of domain {}: {errno}", self.domain);
        }
        // SAFETY: the handle is open, and nothing uses it any more.
        let answer = unsafe { evtchn.xenevtchn_close(self.handle.as_ptr()) };
        if let Err(errno) = check(answer) {
            log::error!("close the event channel handle of domain {}: {errno}", self.domain);
        }
    }
}
