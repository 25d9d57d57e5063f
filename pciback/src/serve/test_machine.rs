//! A function, a hypervisor and a ring made of bytes, for tests: they outlive a service that is killed, and can kill it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::function::GuestFunction;
use crate::abi::pciif::{self as wire, MSIX_ENTRIES, MsixEntry, Op};
use crate::config::{
    Access, ByGuest, ConfigSpace, Filter, FunctionImage, FunctionKind, FunctionSpec, Identity, ImageOwner,
    Policy, Rule, VirtualConfigSpace,
};
use crate::platform::hypervisor::DeviceReport;
use crate::platform::{
    DomainInfo, Edit, Hypervisor, MsiSource, Pirq, PlatformError, ResetReach, Resource, Result, Ring,
    SharedMemory,
};
use crate::policy::RdmPolicy;
use crate::spec::sriov;
use crate::{DomId, Sbdf};

pub(super) const DOMAIN: DomId = DomId(5);
pub(super) const MSI: u16 = 0x40;
pub(super) const MSIX: u16 = 0x50;
pub(super) const DEVICE_CONTROL: u16 = 0x68;
pub(super) const SRIOV: u16 = 0x100;
pub(super) const TABLE_SIZE: u16 = 10;
const TABLE_BAR: u64 = 0xfe00_0000;
/// Where the host has a BAR of gigabytes.
const LARGE_BAR: u64 = 1 << 40;
/// Numbers of a guest's physical interrupts: lines, then those that can be had for messages.
const LINES: u32 = 24;
const PIRQS: u32 = LINES + 12;

/// What a test's service is thrown out with.
pub(super) struct Killed;

#[derive(Default)]
struct State {
    config: BTreeMap<Sbdf, Vec<u8>>,
    writes: Vec<(Sbdf, u16, u32)>,
    pirqs: BTreeMap<u32, (Sbdf, Option<u16>)>,
    /// Steps until the service is killed.
    left: Option<u32>,
    /// What config accesses answer.
    broken: Option<Errno>,
    /// The functions of all config accesses that were begun, in order.
    accesses: Vec<Sbdf>,
}

/// Everything outside of the service.
#[derive(Clone)]
pub(super) struct Machine {
    state: Arc<Mutex<State>>,
    page: Arc<SharedMemory>,
    event: Arc<EventFd>,
    /// Whether the guest sends the next event before one is taken.
    endless: Arc<AtomicBool>,
    images: Arc<Mutex<BTreeMap<Sbdf, File>>>,
    /// Held: config accesses hang.
    hang: Arc<Mutex<()>>,
}

fn config_bytes() -> Vec<u8> {
    let mut bytes = vec![0; 256];
    for (at, value) in [
        (0x00, 0x10ca_8086u32),
        (0x04, 0x0010_0002),
        (0x08, 0x0200_0001),
        (0x10, TABLE_BAR as u32),
        (0x34, u32::from(MSI)),
        (0x3c, 0x0100),
        (0x40, 0x0080_5005),
        (0x50, u32::from(TABLE_SIZE - 1) << 16 | 0x6011),
        (0x54, 0x2000),
        (0x58, 0x3000),
        (0x60, 0x0002_0010),
        (0x64, 1 << 28),
    ] {
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

impl Machine {
    pub fn new() -> Self {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
        Self {
            state: Arc::default(),
            page: Arc::new(SharedMemory::anonymous(4096).unwrap()),
            event: Arc::new(event),
            endless: Arc::default(),
            images: Arc::default(),
            hang: Arc::default(),
        }
    }

    /// Config accesses hang until what is returned is dropped.
    pub fn hang(&self) -> MutexGuard<'_, ()> {
        self.hang.lock().unwrap()
    }

    /// The functions of all config accesses that were begun, in order.
    pub fn accesses(&self) -> Vec<Sbdf> {
        self.with(|state| state.accesses.clone())
    }

    fn begin_access(&self, address: Sbdf) {
        self.step();
        self.with(|state| state.accesses.push(address));
        drop(self.hang.lock());
    }

    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Kills the service after so many steps, or lets it live.
    pub fn kill_after(&self, steps: Option<u32>) {
        self.with(|state| state.left = steps);
    }

    fn step(&self) {
        let dies = self.with(|state| match &mut state.left {
            Some(0) => {
                state.left = None;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        });
        if dies {
            std::panic::resume_unwind(Box::new(Killed));
        }
    }

    pub fn break_config(&self, errno: Option<Errno>) {
        self.with(|state| state.broken = errno);
    }

    pub fn page(&self) -> &SharedMemory {
        &self.page
    }

    pub fn ring(&self) -> Box<dyn Ring> {
        Box::new(self.clone())
    }

    /// The interrupts that Xen has mapped.
    pub fn pirqs(&self) -> BTreeMap<u32, (Sbdf, Option<u16>)> {
        self.with(|state| state.pirqs.clone())
    }

    pub fn occupy_pirqs(&self, free: u32) {
        self.with(|state| {
            for pirq in LINES..PIRQS - free {
                state.pirqs.insert(pirq, (Sbdf::from_devfn(9, 9, 9), None));
            }
        });
    }

    pub fn writes(&self) -> usize {
        self.with(|state| state.writes.len())
    }

    pub fn word(&self, address: Sbdf, at: u16) -> u16 {
        self.with(|state| {
            let bytes = &state.config[&address];
            u16::from_le_bytes([bytes[usize::from(at)], bytes[usize::from(at) + 1]])
        })
    }

    pub fn set_word(&self, address: Sbdf, at: u16, value: u16) {
        let at = usize::from(at);
        self.with(|state| {
            state.config.get_mut(&address).unwrap()[at..at + 2].copy_from_slice(&value.to_le_bytes());
        });
    }

    /// The function as a service opens it: the first time created, later resumed.
    pub fn open(&self, address: Sbdf) -> Box<GuestFunction> {
        self.open_with_line(address, 0)
    }

    /// The same with an interrupt line.
    pub fn open_with_line(&self, address: Sbdf, line: u32) -> Box<GuestFunction> {
        let bar = Resource { start: TABLE_BAR, size: 0x4000, flags: Resource::MEMORY };
        self.open_as(address, line, config_bytes(), bar, FunctionImage::BYTES, &Policy::default())
    }

    /// One with a BAR of gigabytes, for an HVM guest.
    pub fn open_large(&self, address: Sbdf, size: u64) -> Box<GuestFunction> {
        let mut bytes = config_bytes();
        bytes[0x10..0x18].copy_from_slice(&(LARGE_BAR | 4).to_le_bytes());
        let bar = Resource { start: LARGE_BAR, size, flags: Resource::MEMORY | Resource::MEMORY_64 };
        self.open_as(address, 0, bytes, bar, FunctionImage::HVM_BYTES, &Policy::default())
    }

    /// A PF whose VFs its HVM guest creates: seven.
    pub fn open_pf(&self, address: Sbdf) -> Box<GuestFunction> {
        let mut bytes = config_bytes();
        bytes.resize(4096, 0);
        for (at, value) in [(0, 0x0001_0010u32), (sriov::INITIAL_VFS, 7 << 16 | 7)] {
            let at = usize::from(SRIOV + at);
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        let by_guest = ByGuest { count: 7, rule: Rule::built_in("tested", "xpci") };
        let policy = Policy { virtual_functions: Some(by_guest), ..Policy::default() };
        let bar = Resource { start: TABLE_BAR, size: 0x4000, flags: Resource::MEMORY };
        self.open_as(address, 0, bytes, bar, FunctionImage::HVM_BYTES, &policy)
    }

    fn open_as(
        &self,
        address: Sbdf,
        line: u32,
        bytes: Vec<u8>,
        bar: Resource,
        image: usize,
        policy: &Policy,
    ) -> Box<GuestFunction> {
        self.with(|state| {
            state.config.entry(address).or_insert_with(|| bytes.clone());
        });
        let mut resources = [Resource::default(); 13];
        resources[0] = bar;
        let identity = Identity { vendor: 0x8086, device: 0x10ca, class: 0x02_0000, ..Identity::default() };
        let kind = FunctionKind::Physical;
        let spec = FunctionSpec { address, bytes, resources, identity, kind, gsi: line, rom: None };
        let filter = Arc::new(Filter::compile(&spec, policy).unwrap());
        let owner = ImageOwner { boot: 1, domain: DOMAIN };
        let mut images = self.images.lock().unwrap();
        let known = images.contains_key(&address);
        let file = images.entry(address).or_insert_with(|| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(image as u64).unwrap();
            file
        });
        let image = FunctionImage::new(SharedMemory::map_file(file, image).unwrap(), owner);
        let hardware = Box::new(Hardware { machine: self.clone(), address });
        let space = if known {
            VirtualConfigSpace::resume(&spec, filter, image, hardware.as_ref()).unwrap()
        } else {
            VirtualConfigSpace::create(&spec, filter, image).unwrap()
        };
        Box::new(GuestFunction::new(DOMAIN, address, space, hardware, Arc::new(self.clone()), line))
    }

    /// The guest asks.
    pub fn ask(&self, op: &Op) {
        wire::frontend::put_request(&self.page, op);
        self.send_event();
    }

    /// From now on the guest sends events faster than they are taken.
    pub fn send_events_without_end(&self) {
        self.endless.store(true, Ordering::Relaxed);
        self.send_event();
    }

    /// The guest sends an event.
    pub fn send_event(&self) {
        self.event.write(1).unwrap();
    }

    /// The guest's answer.
    pub fn answer(&self, count: usize) -> Option<(i32, u32, Vec<MsixEntry>)> {
        wire::frontend::take_answer(&self.page, count)
    }
}

/// A request for the function at 00:00.0.
pub(super) fn op(command: u32, offset: u16, size: u32, value: u32) -> Op {
    Op {
        command: wire::Command(command),
        domain: 0,
        bus: 0,
        devfn: 0,
        offset: u32::from(offset),
        size,
        value,
        info: 0,
        entries: [MsixEntry::default(); MSIX_ENTRIES],
    }
}

/// A request for MSI-X.
pub(super) fn msix(entries: &[u16]) -> Op {
    let mut op = op(wire::Command::ENABLE_MSIX.0, 0, 0, entries.len() as u32);
    for (place, entry) in op.entries.iter_mut().zip(entries) {
        *place = MsixEntry { vector: 0xffff, entry: *entry };
    }
    op
}

struct Hardware {
    machine: Machine,
    address: Sbdf,
}

impl ConfigSpace for Hardware {
    fn size(&self) -> u16 {
        self.machine.with(|state| state.config[&self.address].len() as u16)
    }

    fn read(&self, access: Access) -> io::Result<u32> {
        self.machine.begin_access(self.address);
        self.machine.with(|state| {
            if let Some(errno) = state.broken {
                return Err(errno.into());
            }
            let at = usize::from(access.offset());
            let bytes = state.config[&self.address].get(at..at + usize::from(access.width().bytes()));
            let bytes = bytes.unwrap_or(&[0xff; 4]);
            Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
                & access.width().mask())
        })
    }

    fn write(&self, access: Access, value: u32) -> io::Result<()> {
        self.machine.begin_access(self.address);
        self.machine.with(|state| {
            if let Some(errno) = state.broken {
                return Err(io::Error::from(errno));
            }
            state.writes.push((self.address, access.offset(), value));
            let writable =
                |at: u16| matches!(at, 0x04 | 0x05 | 0x10..0x14 | 0x42 | 0x44..0x4f | 0x53 | 0x68 | 0x69 | 0x80..);
            let bytes = state.config.get_mut(&self.address).unwrap();
            let message = bytes[usize::from(MSI) + 4..usize::from(MSI) + 8].iter().any(|byte| *byte != 0);
            assert!(
                access.offset() != MSI + 2 || value & 1 == 0 || message,
                "MSI is enabled before it has a message"
            );
            for (at, byte) in (access.offset()..).zip(value.to_le_bytes()).take(access.width().bytes().into())
            {
                if let Some(place) = bytes.get_mut(usize::from(at)).filter(|_| writable(at)) {
                    *place = byte;
                }
            }
            Ok(())
        })?;
        self.machine.step();
        Ok(())
    }
}

fn refuse<T>(address: impl std::fmt::Display) -> Result<T> {
    Err(PlatformError::new("do what no test needs with", address, Errno::ENOSYS))
}

impl Hypervisor for Machine {
    fn version(&self) -> (u32, u32) {
        (4, 17)
    }
    fn device_known(&self, address: Sbdf) -> Result<bool> {
        refuse(address)
    }
    fn device_add(&self, address: Sbdf, _: DeviceReport) -> Result<()> {
        refuse(address)
    }
    fn device_remove(&self, address: Sbdf) -> Result<()> {
        refuse(address)
    }
    fn assign(&self, _: DomId, address: Sbdf, _: RdmPolicy) -> Result<()> {
        refuse(address)
    }
    fn deassign(&self, _: DomId, address: Sbdf) -> Result<()> {
        refuse(address)
    }
    fn assignable(&self, address: Sbdf) -> Result<bool> {
        refuse(address)
    }
    fn prepare_msix(&self, address: Sbdf) -> Result<bool> {
        refuse(address)
    }
    fn release_msix(&self, address: Sbdf) -> Result<()> {
        refuse(address)
    }
    fn note_reset(&self, address: Sbdf, _: ResetReach) -> Result<bool> {
        refuse(address)
    }
    fn restore_msi(&self, address: Sbdf) -> Result<()> {
        self.step();
        // As Xen: MSI is enabled by the call itself, and not before its message is written.
        let control = self.word(address, MSI + 2);
        let message = self.word(address, MSI + 4);
        if control & 1 != 0 && message == 0 {
            return Err(PlatformError::new("see messages to address 0 from", address, Errno::EFAULT));
        }
        if self.with(|state| state.pirqs.values().any(|(owner, entry)| *owner == address && entry.is_none()))
        {
            self.set_word(address, MSI + 4, 0xfee0);
            self.set_word(address, MSI + 2, control | 1);
        }
        Ok(())
    }
    fn iomem_permission(&self, domain: DomId, _: u64, _: u64, _: Edit) -> Result<()> {
        refuse(domain)
    }
    fn ioport_permission(&self, domain: DomId, _: u32, _: u32, _: Edit) -> Result<()> {
        refuse(domain)
    }
    fn map_msi_as(&self, _: DomId, address: Sbdf, _: MsiSource, _: Pirq) -> Result<()> {
        refuse(address)
    }
    /// The highest number that is free, and never an objection to an entry that is mapped already.
    fn map_msi(&self, _: DomId, address: Sbdf, source: MsiSource) -> Result<Pirq> {
        self.step();
        let entry = match source {
            MsiSource::Msi => None,
            MsiSource::MsiX { entry, table } => {
                assert!(table == TABLE_BAR && entry < TABLE_SIZE);
                Some(entry)
            }
        };
        let pirq = self.with(|state| {
            let pirq = (LINES..PIRQS).rev().find(|pirq| !state.pirqs.contains_key(pirq))?;
            state.pirqs.insert(pirq, (address, entry));
            Some(Pirq(pirq))
        });
        if entry.is_none() && pirq.is_some() {
            // As Xen, which leaves enabling to dom0.
            self.set_word(address, MSI + 4, 0xfee0);
        }
        self.step();
        pirq.ok_or_else(|| PlatformError::new("map an interrupt of", address, Errno::ENOSPC))
    }
    fn map_gsi(&self, domain: DomId, _: u32) -> Result<Pirq> {
        refuse(domain)
    }
    fn unmap_gsi(&self, domain: DomId, _: u32, _: Pirq) -> Result<()> {
        refuse(domain)
    }
    fn unmap_pirq(&self, domain: DomId, pirq: Pirq) -> Result<()> {
        self.step();
        let known = self.with(|state| state.pirqs.remove(&pirq.0));
        self.step();
        known.map(drop).ok_or_else(|| PlatformError::new("unmap an interrupt of", domain, Errno::EINVAL))
    }
    fn domain(&self, domain: DomId) -> Result<DomainInfo> {
        refuse(domain)
    }
    fn pause(&self, domain: DomId) -> Result<()> {
        refuse(domain)
    }
    fn unpause(&self, domain: DomId) -> Result<()> {
        refuse(domain)
    }
    fn destroy(&self, domain: DomId) -> Result<()> {
        refuse(domain)
    }
}

impl Ring for Machine {
    fn page(&self) -> &SharedMemory {
        self.step();
        &self.page
    }
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
    fn take_event(&self) -> Result<bool> {
        Ok(self.endless.load(Ordering::Relaxed) || self.event.read().is_ok())
    }
    fn notify(&self) -> Result<()> {
        self.step();
        Ok(())
    }
}
