//! HVM guests of the simulated host: their ioreq servers, and what is mapped into them and bound.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::failures::Failures;
use super::fuse::Fuse;
use super::guest::wait;
use super::locked;
use super::world::World;
use crate::abi::ioreq as wire;
use crate::platform::{
    Cause, Edit, HvmDomains, IoreqServer, MsiMessage, Pirq, PlatformError, Result, ServerId, SharedMemory,
};
use crate::{Devfn, DeviceNumber, DomId};

/// The server of every guest's device model.
const DEVICE_MODEL: u16 = 0;
const SERVERS: u16 = 8;

/// One server as Xen keeps it.
struct Server {
    page: Arc<SharedMemory>,
    to_server: Arc<EventFd>,
    to_guest: Arc<EventFd>,
    enabled: bool,
    functions: BTreeSet<Devfn>,
    memory: BTreeSet<(u64, u64)>,
    ports: BTreeSet<(u16, u16)>,
    /// What was written of the guest's memory.
    written: Arc<Mutex<BTreeMap<u64, u8>>>,
}

/// One domain.
#[derive(Default)]
struct Domain {
    servers: BTreeMap<u16, Server>,
    reached: Reached,
    restarts: usize,
}

/// What an HVM guest reaches of the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reached {
    /// Host's page frame by guest's.
    pub frames: BTreeMap<u64, u64>,
    /// Host's port by guest's.
    pub ports: BTreeMap<u32, u32>,
    /// How it is delivered, by physical interrupt.
    pub messages: BTreeMap<u32, Delivery>,
    /// Lines with the guest's device and pin.
    pub lines: BTreeSet<(u32, DeviceNumber, u8)>,
}

/// How Xen delivers a message-signalled interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    /// What the guest wrote.
    pub message: MsiMessage,
    /// The guest's address of its MSI-X table.
    pub table: u64,
    /// Whether it was bound without being unmasked.
    pub masked: bool,
}

type Domains = Arc<Mutex<BTreeMap<DomId, Domain>>>;

#[derive(Clone)]
pub(super) struct SimHvmDomains {
    domains: Domains,
    world: Arc<Mutex<World>>,
    failures: Failures,
}

fn event() -> std::result::Result<Arc<EventFd>, Errno> {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map(Arc::new)
}

impl SimHvmDomains {
    pub fn new(world: &Arc<Mutex<World>>, failures: &Failures) -> Self {
        Self { domains: Arc::default(), world: Arc::clone(world), failures: failures.clone() }
    }

    /// The same domains, for one run of the service.
    pub fn of_a_run(&self, failures: &Failures) -> Self {
        Self { failures: failures.clone(), ..self.clone() }
    }

    pub fn guest(&self, domain: DomId) -> SimHvmGuest {
        SimHvmGuest { domain, domains: Arc::clone(&self.domains) }
    }

    pub fn drop_domain(&self, domain: DomId) {
        locked(&self.domains).remove(&domain);
    }

    fn call<T>(
        &self,
        (operation, action): (&str, &'static str),
        domain: DomId,
        body: impl FnOnce(&mut Domain) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        let run = || {
            let known = locked(&self.world).xen.domains.get(&domain).map(|domain| domain.kind.clone());
            if known.ok_or(Errno::ESRCH)? != "hvm" {
                return Err(Errno::EINVAL);
            }
            body(locked(&self.domains).entry(domain).or_default())
        };
        let answer = self
            .failures
            .check(operation, domain.into())
            .and_then(|()| self.failures.fuse.change(run).map_err(Cause::from));
        answer.map_err(|cause| PlatformError::new(action, format!("domain {domain}"), cause))
    }

    fn server<T>(
        &self,
        what: (&str, &'static str),
        domain: DomId,
        server: ServerId,
        body: impl FnOnce(&mut Server) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        self.call(what, domain, |domain| body(domain.servers.get_mut(&server.0).ok_or(Errno::ENOENT)?))
    }
}

/// Takes something over or gives it up; the same twice is as good as once.
fn claimed<T: Ord>(set: &mut BTreeSet<T>, value: T, edit: Edit) {
    match edit {
        Edit::Add => set.insert(value),
        Edit::Remove => set.remove(&value),
    };
}

impl HvmDomains for SimHvmDomains {
    fn servers(&self, domain: DomId) -> Result<Vec<ServerId>> {
        self.call(("servers", "list the ioreq servers of"), domain, |domain| {
            let ours = domain.servers.keys().copied();
            Ok([DEVICE_MODEL].into_iter().chain(ours).map(ServerId).collect())
        })
    }

    fn create_server(&self, domain: DomId) -> Result<ServerId> {
        self.call(("create_server", "create an ioreq server of"), domain, |domain| {
            let free = (DEVICE_MODEL + 1..SERVERS).find(|id| !domain.servers.contains_key(id));
            let id = free.ok_or(Errno::ENOSPC)?;
            let page = SharedMemory::anonymous(wire::PAGE_BYTES).map_err(|_| Errno::ENOMEM)?;
            page[wire::port_word(0)].store(1, Ordering::Relaxed);
            let server = Server {
                page: Arc::new(page),
                to_server: event()?,
                to_guest: event()?,
                enabled: false,
                functions: BTreeSet::new(),
                memory: BTreeSet::new(),
                ports: BTreeSet::new(),
                written: Arc::default(),
            };
            domain.servers.insert(id, server);
            Ok(ServerId(id))
        })
    }

    fn destroy_server(&self, domain: DomId, server: ServerId) -> Result<()> {
        self.call(("destroy_server", "end an ioreq server of"), domain, |domain| {
            domain.servers.remove(&server.0).map(drop).ok_or(Errno::ENOENT)
        })
    }

    fn connect(&self, domain: DomId, server: ServerId) -> Result<Box<dyn IoreqServer>> {
        let fuse = self.failures.fuse.clone();
        self.server(("connect_server", "connect to an ioreq server of"), domain, server, |server| {
            server.enabled = true;
            let (page, event) = (Arc::clone(&server.page), Arc::clone(&server.to_server));
            // A channel that becomes bound has an event pending.
            event.write(1)?;
            let woken = Arc::clone(&event);
            fuse.on_end(move || {
                let _ = woken.write(1);
            });
            let (to_guest, written) = (Arc::clone(&server.to_guest), Arc::clone(&server.written));
            Ok(Box::new(SimIoreqServer { page, event, to_guest, written, fuse }) as Box<dyn IoreqServer>)
        })
    }

    fn claim_function(&self, domain: DomId, server: ServerId, function: Devfn, edit: Edit) -> Result<()> {
        self.server(("claim_function", "take over config space of"), domain, server, |server| {
            claimed(&mut server.functions, function, edit);
            Ok(())
        })
    }

    fn claim_memory(
        &self,
        domain: DomId,
        server: ServerId,
        start: u64,
        bytes: u64,
        edit: Edit,
    ) -> Result<()> {
        self.server(("claim_memory", "take over memory of"), domain, server, |server| {
            claimed(&mut server.memory, (start, bytes), edit);
            Ok(())
        })
    }

    fn claim_ports(&self, domain: DomId, server: ServerId, first: u16, count: u16, edit: Edit) -> Result<()> {
        self.server(("claim_ports", "take over ports of"), domain, server, |server| {
            claimed(&mut server.ports, (first, count), edit);
            Ok(())
        })
    }

    fn restart(&self, domain: DomId) -> Result<()> {
        self.call(("restart", "restart"), domain, |domain| {
            domain.restarts += 1;
            Ok(())
        })
    }

    fn map_memory(&self, domain: DomId, guest: u64, host: u64, frames: u64, edit: Edit) -> Result<()> {
        let world = Arc::clone(&self.world);
        self.call(("map_memory", "map memory into"), domain, |found| {
            let world = locked(&world);
            let granted = |frame: u64| {
                let domain = world.xen.domains.get(&domain);
                domain.is_some_and(|domain| {
                    domain.frames.iter().any(|(first, end)| (first..end).contains(&frame))
                })
            };
            for index in 0..frames {
                if edit == Edit::Remove {
                    found.reached.frames.remove(&(guest + index)).ok_or(Errno::EINVAL)?;
                } else if found
                    .reached
                    .frames
                    .get(&(guest + index))
                    .is_some_and(|known| *known != host + index)
                {
                    // Xen crashes the domain.
                    return Err(Errno::EPERM);
                } else if granted(host + index) {
                    found.reached.frames.insert(guest + index, host + index);
                } else {
                    return Err(Errno::EPERM);
                }
            }
            Ok(())
        })
    }

    fn map_ports(&self, domain: DomId, guest: u32, host: u32, count: u32, edit: Edit) -> Result<()> {
        self.call(("map_ports", "map ports into"), domain, |domain| {
            for index in 0..count {
                if edit == Edit::Add {
                    domain.reached.ports.insert(guest + index, host + index);
                } else {
                    domain.reached.ports.remove(&(guest + index));
                }
            }
            Ok(())
        })
    }

    fn bind_msi(
        &self,
        domain: DomId,
        pirq: Pirq,
        message: MsiMessage,
        table: u64,
        masked: bool,
    ) -> Result<()> {
        let mapped = locked(&self.world)
            .xen
            .domains
            .get(&domain)
            .is_some_and(|domain| domain.vectors.contains_key(&pirq.0));
        self.call(("bind_msi", "bind an interrupt of"), domain, |domain| {
            if !mapped {
                return Err(Errno::EINVAL);
            }
            // Xen unmasks at this call, and never masks.
            let masked = masked && domain.reached.messages.get(&pirq.0).is_none_or(|known| known.masked);
            domain.reached.messages.insert(pirq.0, Delivery { message, table, masked });
            Ok(())
        })
    }

    fn unbind_msi(&self, domain: DomId, pirq: Pirq) -> Result<()> {
        self.call(("unbind_msi", "unbind an interrupt of"), domain, |domain| {
            domain.reached.messages.remove(&pirq.0).map(drop).ok_or(Errno::EINVAL)
        })
    }

    fn is_mapped(&self, domain: DomId, pirq: Pirq) -> Result<bool> {
        let world = Arc::clone(&self.world);
        self.call(("is_mapped", "ask for an interrupt of"), domain, |_| {
            let world = locked(&world);
            let known = world.xen.domains.get(&domain);
            Ok(known
                .is_some_and(|known| known.vectors.contains_key(&pirq.0) || known.lines.contains(&pirq.0)))
        })
    }

    fn bind_line(&self, domain: DomId, pirq: Pirq, slot: DeviceNumber, pin: u8, edit: Edit) -> Result<()> {
        self.call(("bind_line", "bind an interrupt line of"), domain, |domain| {
            claimed(&mut domain.reached.lines, (pirq.0, slot, pin), edit);
            Ok(())
        })
    }
}

struct SimIoreqServer {
    page: Arc<SharedMemory>,
    event: Arc<EventFd>,
    to_guest: Arc<EventFd>,
    written: Arc<Mutex<BTreeMap<u64, u8>>>,
    fuse: Fuse,
}

impl IoreqServer for SimIoreqServer {
    fn page(&self) -> &SharedMemory {
        &self.page
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn take_event(&self) -> Result<Option<u16>> {
        self.fuse.look();
        Ok(self.event.read().ok().map(|_| 0))
    }

    fn write_memory(&self, address: u64, bytes: &[u8]) -> Result<()> {
        locked(&self.written).extend((address..).zip(bytes.iter().copied()));
        Ok(())
    }

    fn bind_vcpus(&mut self) -> Result<()> {
        Ok(())
    }

    fn notify(&self, vcpu: u16) -> Result<()> {
        self.to_guest.write(1).map(drop).map_err(|errno| PlatformError::new("notify vCPU", vcpu, errno))
    }
}

/// A simulated HVM guest with one vCPU, and what Xen does for it. No logic of firmware or drivers.
pub struct SimHvmGuest {
    domain: DomId,
    domains: Domains,
}

impl SimHvmGuest {
    /// What it reaches of the host.
    pub fn reached(&self) -> Reached {
        locked(&self.domains).get(&self.domain).map(|domain| domain.reached.clone()).unwrap_or_default()
    }

    /// How many ioreq servers it has besides its device model's.
    pub fn servers(&self) -> usize {
        locked(&self.domains).get(&self.domain).map_or(0, |domain| domain.servers.len())
    }

    /// How many times a restart was requested.
    pub fn restarts(&self) -> usize {
        locked(&self.domains).get(&self.domain).map_or(0, |domain| domain.restarts)
    }

    /// What was written to its memory from an address on: so many bytes, 0 where nothing was.
    pub fn memory(&self, address: u64, bytes: u64) -> Vec<u8> {
        let domains = locked(&self.domains);
        let servers = domains.get(&self.domain).map(|domain| domain.servers.values());
        let written: BTreeMap<u64, u8> =
            servers.into_iter().flatten().flat_map(|server| locked(&server.written).clone()).collect();
        (address..address + bytes).map(|at| written.get(&at).copied().unwrap_or(0)).collect()
    }

    /// Sends a request to the server that has claimed what it is about; `None`: no server has.
    pub fn begin(&self, access: &wire::xen::Access) -> Option<SimRequest> {
        let domains = locked(&self.domains);
        let mut servers = domains.get(&self.domain)?.servers.values().rev().filter(|server| server.enabled);
        let within = |start: u64, bytes: u64| {
            access.address >= start && access.address + u64::from(access.size) <= start + bytes
        };
        let server = servers.find(|server| match access.kind {
            wire::TYPE_CONFIG => {
                let number = u8::try_from(access.address >> 32).ok();
                number.is_some_and(|number| server.functions.contains(&Devfn(number)))
            }
            wire::TYPE_PORT => {
                server.ports.iter().any(|(first, count)| within((*first).into(), (*count).into()))
            }
            _ => server.memory.iter().any(|(start, bytes)| within(*start, *bytes)),
        })?;
        wire::xen::put_request(&server.page, 0, access);
        let request = SimRequest { page: Arc::clone(&server.page), to_guest: Arc::clone(&server.to_guest) };
        server.to_server.write(1).ok()?;
        Some(request)
    }
}

/// A request that waits for its answer.
pub struct SimRequest {
    page: Arc<SharedMemory>,
    to_guest: Arc<EventFd>,
}

impl SimRequest {
    /// Waits for the answer.
    pub fn answer(&self, limit: Duration) -> Result<u64> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(value) = wire::xen::take_answer(&self.page, 0) {
                return Ok(value);
            }
            wait(self.to_guest.as_fd(), deadline).map_err(|_| {
                PlatformError::new("await an answer", "of an ioreq server", Cause::TimedOut(limit))
            })?;
            // Empty is as good as taken.
            let _ = self.to_guest.read();
        }
    }
}
