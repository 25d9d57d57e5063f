//! What Xen does for an HVM guest, by hand: it refuses what Xen refuses, and panics at what would harm the host or end the guest.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pciback::config::{Access, Bar, BarKind, CONVENTIONAL_SIZE, FunctionSpec, VirtualConfigSpace};
use pciback::platform::{
    BarMemory, DeviceModels, Edit, HvmDomains, IoreqServer, MsiMessage, PAGE, Pirq, Result, ServerId,
    SharedMemory,
};
use pciback::serve::hvm::{ECAM_BASE, ECAM_BYTES, wire};
use pciback::{Devfn, DeviceNumber, DomId};

use crate::hypervisor::{Counting, EEXIST, EINVAL, ENOENT, ENOSPC, refused};

/// No guest has an address from here on.
const GUEST_END: u64 = 1 << 39;
/// Interrupt controllers, and pages that are Xen's own.
const RESERVED: Range<u64> = 0xfec0_0000..0x1_0000_0000;

/// Xen, for one guest.
pub struct Xen {
    hypervisor: Arc<Counting>,
    /// What the host has given to the guest: page frames, and those among them with an MSI-X table.
    frames: Vec<Range<u64>>,
    guarded: Vec<Range<u64>>,
    ports: Vec<Range<u32>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Host's page frame by guest's.
    mapped: BTreeMap<u64, u64>,
    ports: BTreeMap<u32, u32>,
    /// What our server answers for: first address and bytes.
    claimed: BTreeMap<u64, u64>,
    functions: BTreeSet<Devfn>,
    lines: BTreeSet<(u32, DeviceNumber, u8)>,
    bound: BTreeMap<u32, MsiMessage>,
    refuses: bool,
    forgives: bool,
}

impl Xen {
    /// For a guest that is given these functions.
    pub fn new<'a>(
        hypervisor: &Arc<Counting>,
        functions: impl Iterator<Item = (&'a FunctionSpec, &'a VirtualConfigSpace)>,
    ) -> Self {
        let (mut frames, mut guarded, mut ports) = (Vec::new(), Vec::new(), Vec::new());
        for (_, space) in functions {
            for bar in space.bars() {
                match bar.kind {
                    BarKind::Io => ports.push(bar.start as u32..(bar.start + bar.size) as u32),
                    BarKind::Rom => {}
                    _ => frames.push(bar.start / PAGE..(bar.start + bar.size).div_ceil(PAGE)),
                }
            }
            guarded.extend(table_of(space).map(|(bar, table)| {
                let (start, end) = (bar.start + table.start, bar.start + table.end);
                start / PAGE..end.div_ceil(PAGE)
            }));
        }
        let state = State { claimed: BTreeMap::from([(ECAM_BASE, ECAM_BYTES)]), ..State::default() };
        Self { hypervisor: Arc::clone(hypervisor), frames, guarded, ports, state: Mutex::new(state) }
    }

    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.state.lock().expect("no panic holds it"))
    }

    /// Whether what is new is refused.
    pub fn refuse(&self, refuses: bool) {
        self.with(|state| state.refuses = refuses);
    }

    /// From now on what would harm the guest alone is only refused: the notes of what it has are damaged.
    pub fn forgive(&self) {
        self.with(|state| state.forgives = true);
    }

    /// That nothing of any function is left in the guest.
    pub fn check_nothing_left(&self) {
        self.with(|state| {
            assert!(state.mapped.is_empty(), "mapped: {:x?}", state.mapped);
            assert!(state.ports.is_empty(), "ports: {:x?}", state.ports);
            assert_eq!(state.claimed, BTreeMap::from([(ECAM_BASE, ECAM_BYTES)]));
            assert!(state.functions.is_empty(), "functions: {:x?}", state.functions);
            assert!(state.lines.is_empty(), "lines: {:x?}", state.lines);
            assert!(state.bound.is_empty(), "bound: {:x?}", state.bound);
        });
    }

    /// That what is bound is mapped: Xen loses an interrupt that is unmapped while it is bound.
    pub fn check_bound(&self) {
        let mapped = self.hypervisor.mapped();
        self.with(|state| {
            let lost: Vec<_> = state.bound.keys().filter(|pirq| !mapped.contains_key(pirq)).collect();
            assert!(lost.is_empty(), "bound and not mapped: {lost:?}");
        });
    }
}

/// The BAR with the MSI-X table, and where that is in it.
fn table_of(space: &VirtualConfigSpace) -> Option<(Bar, Range<u64>)> {
    let msix = space.msix()?;
    let bar = space.bars().iter().find(|bar| bar.index == msix.table_bar)?;
    let start = u64::from(msix.table_offset);
    Some((*bar, start..start + 16 * u64::from(msix.table_size)))
}

fn within<T: PartialOrd>(all: &[Range<T>], part: &Range<T>) -> bool {
    all.iter().any(|range| range.start <= part.start && part.end <= range.end)
}

fn meet<T: PartialOrd>(one: &Range<T>, other: &Range<T>) -> bool {
    one.start < other.end && other.start < one.end
}

impl HvmDomains for Xen {
    fn servers(&self, _: DomId) -> Result<Vec<ServerId>> {
        unreachable!("only the engine asks")
    }
    fn create_server(&self, _: DomId) -> Result<ServerId> {
        unreachable!("only the engine does")
    }
    fn destroy_server(&self, _: DomId, _: ServerId) -> Result<()> {
        unreachable!("only the engine does")
    }
    fn connect(&self, _: DomId, _: ServerId) -> Result<Box<dyn IoreqServer>> {
        unreachable!("only the engine does")
    }
    fn claim_ports(&self, _: DomId, _: ServerId, _: u16, _: u16, _: Edit) -> Result<()> {
        unreachable!("only the engine does")
    }
    fn restart(&self, _: DomId) -> Result<()> {
        unreachable!("only the engine does")
    }

    fn claim_function(&self, _: DomId, _: ServerId, function: Devfn, edit: Edit) -> Result<()> {
        self.with(|state| match edit {
            Edit::Add => drop(state.functions.insert(function)),
            Edit::Remove => drop(state.functions.remove(&function)),
        });
        Ok(())
    }

    fn claim_memory(&self, domain: DomId, _: ServerId, start: u64, bytes: u64, edit: Edit) -> Result<()> {
        let range = start..start + bytes;
        self.with(|state| {
            let meets = |(start, bytes): (&u64, &u64)| meet(&(*start..*start + *bytes), &range);
            let known = state.claimed.get(&start) == Some(&bytes);
            match edit {
                Edit::Add if state.refuses => refused("claim memory of", domain, ENOSPC),
                // A set of ranges: Xen takes none that meets another.
                Edit::Add if state.claimed.iter().any(meets) => {
                    if known {
                        Ok(())
                    } else {
                        refused("claim memory of", domain, EEXIST)
                    }
                }
                Edit::Add => {
                    state.claimed.insert(start, bytes);
                    Ok(())
                }
                Edit::Remove if known => {
                    state.claimed.remove(&start);
                    Ok(())
                }
                Edit::Remove => {
                    let other = state.claimed.iter().find(|claim| meets(*claim));
                    assert!(
                        other.is_none() || state.forgives,
                        "a part of {other:x?} was given up: {range:x?}"
                    );
                    refused("give up memory of", domain, ENOENT)
                }
            }
        })
    }

    fn map_memory(&self, domain: DomId, guest: u64, host: u64, frames: u64, edit: Edit) -> Result<()> {
        let (guests, hosts) = (guest..guest + frames, host..host + frames);
        if edit == Edit::Remove {
            return self.with(|state| {
                let mut missing = false;
                for (guest, host) in guests.zip(hosts) {
                    match state.mapped.remove(&guest) {
                        Some(known) if known != host => {
                            assert!(state.forgives, "another mapping was removed: {guest:#x}");
                            // Xen compares, too.
                            state.mapped.insert(guest, known);
                            missing = true;
                        }
                        Some(_) => {}
                        None => missing = true,
                    }
                }
                if missing { refused("unmap memory of", domain, EINVAL) } else { Ok(()) }
            });
        }
        let bytes = guests.start * PAGE..guests.end * PAGE;
        assert!(bytes.end <= GUEST_END && !meet(&bytes, &RESERVED), "mapped at {bytes:x?}");
        assert!(within(&self.frames, &hosts), "{hosts:x?} is not the function's");
        assert!(!self.guarded.iter().any(|table| meet(table, &hosts)), "{hosts:x?} has an MSI-X table");
        self.with(|state| {
            if state.refuses {
                return refused("map memory into", domain, ENOSPC);
            }
            for (guest, host) in guests.zip(hosts) {
                let before = state.mapped.insert(guest, host);
                let same = before.is_none_or(|before| before == host);
                assert!(same || state.forgives, "Xen crashes the guest: {guest:#x}");
            }
            Ok(())
        })
    }

    fn map_ports(&self, domain: DomId, guest: u32, host: u32, count: u32, edit: Edit) -> Result<()> {
        let (guests, hosts) = (guest..guest.saturating_add(count), host..host + count);
        assert!(within(&self.ports, &hosts), "{hosts:x?} is not the function's");
        self.with(|state| {
            if guests.end > 0x1_0000 {
                assert!(state.forgives, "ports {guests:x?}");
                return refused("map ports into", domain, EINVAL);
            }
            if edit == Edit::Add && state.refuses {
                return refused("map ports into", domain, ENOSPC);
            }
            for (guest, host) in guests.zip(hosts) {
                match edit {
                    Edit::Add => drop(state.ports.insert(guest, host)),
                    Edit::Remove => drop(state.ports.remove(&guest)),
                }
            }
            Ok(())
        })
    }

    fn bind_msi(&self, domain: DomId, pirq: Pirq, message: MsiMessage, table: u64, _: bool) -> Result<()> {
        assert!(table < GUEST_END, "a table at {table:#x}");
        let mapped = self.hypervisor.mapped().contains_key(&pirq.0);
        self.with(|state| {
            if state.refuses || !mapped {
                return refused("bind an interrupt of", domain, EINVAL);
            }
            state.bound.insert(pirq.0, message);
            Ok(())
        })
    }

    fn unbind_msi(&self, domain: DomId, pirq: Pirq) -> Result<()> {
        self.with(|state| match state.bound.remove(&pirq.0) {
            Some(_) => Ok(()),
            None => refused("unbind an interrupt of", domain, EINVAL),
        })
    }

    fn is_mapped(&self, _: DomId, pirq: Pirq) -> Result<bool> {
        Ok(self.hypervisor.mapped().contains_key(&pirq.0))
    }

    fn bind_line(&self, _: DomId, pirq: Pirq, slot: DeviceNumber, pin: u8, edit: Edit) -> Result<()> {
        assert!(pin < 4, "pin {pin}");
        self.with(|state| match edit {
            Edit::Add => drop(state.lines.insert((pirq.0, slot, pin))),
            Edit::Remove => drop(state.lines.remove(&(pirq.0, slot, pin))),
        });
        Ok(())
    }
}

/// The guest's device model, with a host bridge and a device of two functions.
pub struct Model {
    refuses: Mutex<bool>,
}

impl Model {
    const FUNCTIONS: [Devfn; 3] = [Devfn(0), Devfn(0x8), Devfn(0xb)];

    pub fn new() -> Arc<Self> {
        Arc::new(Self { refuses: Mutex::new(false) })
    }

    /// Whether it answers nothing.
    pub fn refuse(&self, refuses: bool) {
        *self.refuses.lock().expect("no panic holds it") = refuses;
    }

    fn answer<T>(&self, domain: DomId, function: Devfn, limit: Duration, value: T) -> Result<T> {
        assert!(limit <= Duration::from_secs(1), "a guest waits for {limit:?}");
        assert!(Self::FUNCTIONS.contains(&function), "{function} is none of its functions");
        match *self.refuses.lock().expect("no panic holds it") {
            true => refused("ask the device model of", domain, ENOENT),
            false => Ok(value),
        }
    }
}

impl DeviceModels for Model {
    fn slots(&self, _: DomId) -> Result<Vec<DeviceNumber>> {
        unreachable!("only the engine asks")
    }
    fn announce(&self, _: DomId, _: DeviceNumber) -> Result<()> {
        unreachable!("only transactions do")
    }
    fn request_eject(&self, _: DomId, _: DeviceNumber, _: Duration) -> Result<bool> {
        unreachable!("only transactions do")
    }
    fn has_ejected(&self, _: DomId, _: DeviceNumber, _: Duration) -> Result<bool> {
        Ok(false)
    }
    fn forget(&self, _: DomId, _: DeviceNumber) {
        unreachable!("only transactions do")
    }
    fn eject(&self, _: DomId, _: DeviceNumber) -> Result<()> {
        unreachable!("only transactions do")
    }

    fn functions(&self, domain: DomId, limit: Duration) -> Result<Vec<Devfn>> {
        self.answer(domain, Self::FUNCTIONS[0], limit, Self::FUNCTIONS.to_vec())
    }

    /// More than it was asked for, too.
    fn read_config(&self, domain: DomId, function: Devfn, access: Access, limit: Duration) -> Result<u32> {
        assert!(access.offset() < CONVENTIONAL_SIZE, "{access:?}");
        self.answer(domain, function, limit, u32::MAX - u32::from(access.offset()))
    }

    fn write_config(
        &self,
        domain: DomId,
        function: Devfn,
        access: Access,
        value: u32,
        limit: Duration,
    ) -> Result<()> {
        assert!(
            access.offset() < CONVENTIONAL_SIZE && value & !access.width().mask() == 0,
            "{access:?}: {value:#x}"
        );
        self.answer(domain, function, limit, ())
    }
}

/// The page of requests, which outlives a service. Clones share it.
#[derive(Clone)]
pub struct Page {
    memory: Arc<SharedMemory>,
    nothing: Arc<File>,
}

impl Page {
    pub fn new() -> Self {
        let memory = SharedMemory::anonymous(wire::PAGE_BYTES).expect("memory");
        let nothing = File::open("/dev/null").expect("a file");
        Self { memory: Arc::new(memory), nothing: Arc::new(nothing) }
    }
}

impl IoreqServer for Page {
    fn page(&self) -> &SharedMemory {
        &self.memory
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.nothing.as_fd()
    }

    fn take_event(&self) -> Result<Option<u16>> {
        Ok(None)
    }

    fn write_memory(&self, address: u64, bytes: &[u8]) -> Result<()> {
        assert!(!bytes.is_empty() && bytes.len() as u64 <= 2 * PAGE, "{} bytes", bytes.len());
        if address >= GUEST_END { refused("write memory at", address, EINVAL) } else { Ok(()) }
    }

    fn bind_vcpus(&mut self) -> Result<()> {
        Ok(())
    }

    fn notify(&self, _: u16) -> Result<()> {
        Ok(())
    }
}

/// Memory of a BAR, which outlives a service. Clones share it. What the guest must not write in it is nowhere written.
#[derive(Clone)]
pub struct Memory {
    bytes: Arc<Mutex<Vec<u8>>>,
    /// The MSI-X table: Xen's.
    table: Range<u64>,
}

impl Memory {
    pub fn new(space: &VirtualConfigSpace, bar: &Bar) -> Self {
        let table = table_of(space).filter(|(at, _)| at.index == bar.index).map_or(0..0, |(_, table)| table);
        Self { bytes: Arc::new(Mutex::new(vec![0; bar.size as usize])), table }
    }

    fn place(&self, offset: u64, bytes: u8) -> Range<u64> {
        assert!(matches!(bytes, 1 | 2 | 4 | 8) && offset.is_multiple_of(bytes.into()), "{offset:#x}/{bytes}");
        offset..offset + u64::from(bytes)
    }
}

impl BarMemory for Memory {
    fn read(&self, offset: u64, bytes: u8) -> u64 {
        let Range { start, end } = self.place(offset, bytes);
        let memory = self.bytes.lock().expect("no panic holds it");
        let found = memory.get(start as usize..end as usize);
        found
            .map_or(u64::MAX, |found| found.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn write(&self, offset: u64, bytes: u8, value: u64) {
        let range = self.place(offset, bytes);
        assert!(!meet(&range, &self.table), "the MSI-X table is written at {offset:#x}");
        let mut memory = self.bytes.lock().expect("no panic holds it");
        if let Some(place) = memory.get_mut(range.start as usize..range.end as usize) {
            place.copy_from_slice(&value.to_le_bytes()[..usize::from(bytes)]);
        }
    }
}
