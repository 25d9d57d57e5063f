//! A connected ioreq server: its page through libxenforeignmemory, its event channels through libxenevtchn.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::bindings::{
    Libraries, XENMEM_resource_ioreq_server, xenevtchn_handle, xenforeignmemory_handle,
    xenforeignmemory_resource_handle,
};
use super::hypervisor::check;
use crate::DomId;
use crate::abi::ioreq as wire;
use crate::platform::{Cause, IoreqServer, PAGE, PlatformError, Result, ServerId, SharedMemory};

/// `PROT_READ | PROT_WRITE` of mmap.
const READ_WRITE: i32 = 3;
/// The most pages of a guest's memory that are mapped together.
const MAPPED: usize = 3;
/// The frame of a server's resource that holds the requests; frame 0 would be that of buffered requests.
const REQUESTS: u64 = 1;

/// A server's page, mapped until dropped.
pub struct RequestPage {
    libraries: Arc<Libraries>,
    handle: NonNull<xenforeignmemory_handle>,
    resource: NonNull<xenforeignmemory_resource_handle>,
    address: NonNull<u8>,
}

// SAFETY: the handle and the mapping belong to the process; only dropping uses them, once.
unsafe impl Send for RequestPage {}

impl RequestPage {
    /// Maps it.
    pub fn map(libraries: &Arc<Libraries>, domain: DomId, server: ServerId) -> Result<Self> {
        let memory = &libraries.foreignmemory;
        // SAFETY: the logger is a static, and 0 are valid flags.
        let opened = unsafe { memory.xenforeignmemory_open(libraries.logger, 0) };
        let handle = NonNull::new(opened)
            .ok_or_else(|| PlatformError::new("open", "/dev/xen/privcmd", Errno::last()))?;
        let mut address: *mut c_void = ptr::null_mut();
        // SAFETY: the handle is open, and `address` is valid during the call.
        let mapped = unsafe {
            memory.xenforeignmemory_map_resource(
                handle.as_ptr(),
                domain.0,
                XENMEM_resource_ioreq_server,
                server.0.into(),
                REQUESTS,
                1,
                &raw mut address,
                READ_WRITE,
                0,
            )
        };
        let (Some(resource), Some(address)) = (NonNull::new(mapped), NonNull::new(address.cast())) else {
            let errno = Errno::last();
            // SAFETY: the handle is open and nothing is mapped by it.
            unsafe { memory.xenforeignmemory_close(handle.as_ptr()) };
            let subject = format!("the page of ioreq server {} of domain {domain}", server.0);
            return Err(PlatformError::new("map", subject, errno));
        };
        Ok(Self { libraries: Arc::clone(libraries), handle, resource, address })
    }

    /// Writes into the memory of a domain, mapped as long as that takes.
    fn write_memory(&self, domain: DomId, address: u64, bytes: &[u8]) -> std::result::Result<(), Errno> {
        let memory = &self.libraries.foreignmemory;
        let within = (address % PAGE) as usize;
        let frames = (address / PAGE..).take((within + bytes.len()).div_ceil(PAGE as usize));
        let frames: Vec<u64> = frames.collect();
        if bytes.is_empty() || frames.len() > MAPPED {
            return Err(Errno::EINVAL);
        }
        // SAFETY: the handle is open, `frames` has as many elements as passed to the call, and no array of errors is given: then all of
        // the pages are mapped or none is.
        let mapped = unsafe {
            memory.xenforeignmemory_map(
                self.handle.as_ptr(),
                domain.0.into(),
                READ_WRITE,
                frames.len(),
                frames.as_ptr(),
                ptr::null_mut(),
            )
        };
        if mapped.is_null() {
            return Err(Errno::last());
        }
        // SAFETY: `within` is less than a page.
        let place = unsafe { mapped.cast::<u8>().add(within) };
        // SAFETY: the pages are mapped for writing, `within` + `bytes` ends in the last of them, and nothing refers to them.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) };
        // SAFETY: they are mapped by this handle, and nothing refers to them any more.
        check(unsafe { memory.xenforeignmemory_unmap(self.handle.as_ptr(), mapped, frames.len()) }).map(drop)
    }
}

impl Drop for RequestPage {
    fn drop(&mut self) {
        let memory = &self.libraries.foreignmemory;
        // SAFETY: the resource is mapped by this handle, and nothing refers to its page any more.
        let unmapped =
            unsafe { memory.xenforeignmemory_unmap_resource(self.handle.as_ptr(), self.resource.as_ptr()) };
        // SAFETY: the handle is open, and nothing uses it any more.
        let closed = unsafe { memory.xenforeignmemory_close(self.handle.as_ptr()) };
        for answer in [unmapped, closed] {
            if let Err(errno) = check(answer) {
                log::error!("unmap the page of an ioreq server: {errno}");
            }
        }
    }
}

/// The event channels of a guest's vCPUs, bound until dropped. Closing the handle unbinds them all.
struct Channels {
    libraries: Arc<Libraries>,
    handle: NonNull<xenevtchn_handle>,
    fd: RawFd,
    domain: DomId,
    /// By our port.
    vcpus: BTreeMap<u32, u16>,
}

// SAFETY: libxenevtchn's handle is a descriptor that any thread may use, one at a time.
unsafe impl Send for Channels {}

impl Channels {
    fn open(libraries: &Arc<Libraries>, domain: DomId) -> Result<Self> {
        let error = |errno| PlatformError::new("open", "/dev/xen/evtchn (module xen-evtchn)", errno);
        let evtchn = &libraries.evtchn;
        // SAFETY: the logger is a static, and 0 are valid flags (close on exec is set).
        let opened = unsafe { evtchn.xenevtchn_open(libraries.logger, 0) };
        let handle = NonNull::new(opened).ok_or_else(|| error(Errno::last()))?;
        // SAFETY: the handle is open.
        let fd = unsafe { evtchn.xenevtchn_fd(handle.as_ptr()) };
        let channels = Self { libraries: Arc::clone(libraries), handle, fd, domain, vcpus: BTreeMap::new() };
        fcntl(channels.fd(), FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK)).map_err(error)?;
        Ok(channels)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor stays open as long as the handle, which `self` owns.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }

    fn bind(&mut self, vcpu: u16, remote: u32) -> Result<()> {
        // SAFETY: the handle is open; Xen checks the numbers.
        let answer = unsafe {
            self.libraries.evtchn.xenevtchn_bind_interdomain(
                self.handle.as_ptr(),
                u32::from(self.domain.0),
                remote,
            )
        };
        let port = check(answer).map_err(|errno| {
            let subject = format!("event channel port {remote} of vCPU {vcpu} of domain {}", self.domain);
            PlatformError::new("bind", subject, errno)
        })?;
        self.vcpus.insert(port.cast_unsigned(), vcpu);
        Ok(())
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nothing uses it any more.
        let answer = unsafe { self.libraries.evtchn.xenevtchn_close(self.handle.as_ptr()) };
        if let Err(errno) = check(answer) {
            log::error!("close the event channel handle of domain {}: {errno}", self.domain);
        }
    }
}

/// A connected ioreq server. Dropped in this order: nothing refers to the page when it is unmapped.
pub struct XenIoreqServer {
    memory: SharedMemory,
    channels: Channels,
    page: RequestPage,
}

impl XenIoreqServer {
    /// Over the page of a server that is enabled.
    pub fn open(libraries: &Arc<Libraries>, domain: DomId, page: RequestPage) -> Result<Self> {
        // SAFETY: the page is mapped for reading and writing, and `memory` is dropped before `page`.
        let memory = unsafe { SharedMemory::borrowed(page.address, wire::PAGE_BYTES) };
        let channels = Channels::open(libraries, domain)?;
        let mut server = Self { memory, channels, page };
        server.bind_vcpus()?;
        Ok(server)
    }
}

impl IoreqServer for XenIoreqServer {
    fn page(&self) -> &SharedMemory {
        &self.memory
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.channels.fd()
    }

    fn take_event(&self) -> Result<Option<u16>> {
        let channels = &self.channels;
        let evtchn = &channels.libraries.evtchn;
        let error = |errno| PlatformError::new("take an event of domain", channels.domain, errno);
        // SAFETY: the handle is open; its descriptor does not block.
        let port = match check(unsafe { evtchn.xenevtchn_pending(channels.handle.as_ptr()) }) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            other => other.map_err(error)?.cast_unsigned(),
        };
        // SAFETY: the handle is open and the port one of its.
        check(unsafe { evtchn.xenevtchn_unmask(channels.handle.as_ptr(), port) }).map_err(error)?;
        Ok(channels.vcpus.get(&port).copied())
    }

    fn write_memory(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let domain = self.channels.domain;
        let subject = || format!("{} bytes of memory of domain {domain} at {address:#x}", bytes.len());
        self.page
            .write_memory(domain, address, bytes)
            .map_err(|errno| PlatformError::new("write", subject(), errno))
    }

    fn bind_vcpus(&mut self) -> Result<()> {
        for vcpu in 0..wire::VCPUS {
            let remote = self.memory[wire::port_word(vcpu)].load(Ordering::Relaxed);
            if remote != 0 && !self.channels.vcpus.values().any(|bound| *bound == vcpu) {
                self.channels.bind(vcpu, remote)?;
            }
        }
        Ok(())
    }

    fn notify(&self, vcpu: u16) -> Result<()> {
        let channels = &self.channels;
        let subject = || format!("vCPU {vcpu} of domain {}", channels.domain);
        let port = channels.vcpus.iter().find(|(_, bound)| **bound == vcpu).map(|(port, _)| *port);
        let port = port.ok_or_else(|| PlatformError::new("send an event to", subject(), Cause::Missing))?;
        // SAFETY: the handle is open and the port bound.
        let answer = unsafe { channels.libraries.evtchn.xenevtchn_notify(channels.handle.as_ptr(), port) };
        check(answer).map(drop).map_err(|errno| PlatformError::new("send an event to", subject(), errno))
    }
}
