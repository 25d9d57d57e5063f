//! A hypervisor that counts the interrupts it mapped.

use std::collections::BTreeMap;
use std::sync::Mutex;

use pciback::platform::hypervisor::DeviceReport;
use pciback::platform::{DomainInfo, Edit, Hypervisor, MsiSource, Pirq, PlatformError, ResetReach, Result};
use pciback::policy::RdmPolicy;
use pciback::{DomId, Sbdf};

/// Interrupts that one guest can have, as long as nothing else is said.
const LIMIT: usize = 12;
/// The numbers of a guest's physical interrupts end here.
const NUMBERS: u32 = 4096;

pub struct Counting {
    state: Mutex<State>,
}

struct State {
    mapped: BTreeMap<u32, (Sbdf, MsiSource)>,
    limit: usize,
    refuses: bool,
    forgives: bool,
}

impl Default for Counting {
    fn default() -> Self {
        Self::with_limit(LIMIT)
    }
}

impl Counting {
    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.state.lock().expect("no panic holds it"))
    }

    /// One whose guests can have so many interrupts.
    pub fn with_limit(limit: usize) -> Self {
        Self { state: Mutex::new(State { mapped: BTreeMap::new(), limit, refuses: false, forgives: false }) }
    }

    /// What is mapped, by number.
    pub fn mapped(&self) -> BTreeMap<u32, (Sbdf, MsiSource)> {
        self.with(|state| state.mapped.clone())
    }

    /// From now on what is mapped again is only refused: the notes of what is mapped are damaged.
    pub fn forgive(&self) {
        self.with(|state| state.forgives = true);
    }

    /// Whether new mappings are refused.
    pub fn refuse(&self, refuses: bool) {
        self.with(|state| state.refuses = refuses);
    }
}

impl State {
    fn map(&mut self, address: Sbdf, source: MsiSource, pirq: u32) -> Result<()> {
        let twice = self.mapped.values().any(|mapped| *mapped == (address, source));
        assert!(!twice || self.forgives, "{source:?} of {address} is mapped twice");
        let refuses = self.refuses || twice || self.mapped.len() >= self.limit || pirq >= NUMBERS;
        if refuses {
            return refused("map an interrupt of", address, ENOSPC);
        }
        let before = self.mapped.insert(pirq, (address, source));
        let is_free = before.is_none() || self.forgives;
        assert!(is_free, "interrupt {pirq} is another's already, of which Xen says nothing");
        Ok(())
    }
}

/// Error numbers.
pub const ENOENT: i32 = 2;
pub const EEXIST: i32 = 17;
pub const EINVAL: i32 = 22;
pub const ENOSPC: i32 = 28;

pub fn refused<T>(action: &'static str, subject: impl std::fmt::Display, errno: i32) -> Result<T> {
    Err(PlatformError::new(action, subject, std::io::Error::from_raw_os_error(errno)))
}

/// Serving a guest's requests never asks for these.
macro_rules! never {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, $($argument: $type),*) -> Result<$result> {
            panic!("{} was called: {:?}", stringify!($name), ($($argument),*,))
        })*
    };
}

impl Hypervisor for Counting {
    fn version(&self) -> (u32, u32) {
        (4, 17)
    }

    fn device_known(&self, _: Sbdf) -> Result<bool> {
        Ok(true)
    }

    never! {
        device_add(address: Sbdf, report: DeviceReport) -> ();
        device_remove(address: Sbdf) -> ();
        assign(domain: DomId, address: Sbdf, rdm: RdmPolicy) -> ();
        deassign(domain: DomId, address: Sbdf) -> ();
        assignable(address: Sbdf) -> bool;
        prepare_msix(address: Sbdf) -> bool;
        release_msix(address: Sbdf) -> ();
        note_reset(address: Sbdf, reach: ResetReach) -> bool;
        iomem_permission(domain: DomId, first: u64, frames: u64, edit: Edit) -> ();
        ioport_permission(domain: DomId, first: u32, count: u32, edit: Edit) -> ();
        map_gsi(domain: DomId, gsi: u32) -> Pirq;
        unmap_gsi(domain: DomId, gsi: u32, pirq: Pirq) -> ();
        domain(domain: DomId) -> DomainInfo;
        pause(domain: DomId) -> ();
        unpause(domain: DomId) -> ();
        destroy(domain: DomId) -> ();
    }

    fn restore_msi(&self, _: Sbdf) -> Result<()> {
        Ok(())
    }

    fn map_msi(&self, _: DomId, address: Sbdf, source: MsiSource) -> Result<Pirq> {
        self.with(|state| {
            let pirq = (24..).find(|pirq| !state.mapped.contains_key(pirq)).expect("one is free");
            state.map(address, source, pirq).map(|()| Pirq(pirq))
        })
    }

    fn map_msi_as(&self, _: DomId, address: Sbdf, source: MsiSource, pirq: Pirq) -> Result<()> {
        assert!(pirq.0 >= 24, "{source:?} is mapped to a line's number");
        self.with(|state| state.map(address, source, pirq.0))
    }

    fn unmap_pirq(&self, domain: DomId, pirq: Pirq) -> Result<()> {
        self.with(|state| match state.mapped.remove(&pirq.0) {
            Some(_) => Ok(()),
            None => refused("unmap an interrupt of domain", domain, EINVAL),
        })
    }
}
