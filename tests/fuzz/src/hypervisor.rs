//! A hypervisor that counts the interrupts it mapped.

use std::collections::BTreeMap;
use std::sync::Mutex;

use pciback::platform::hypervisor::DeviceReport;
use pciback::platform::{DomainInfo, Edit, Hypervisor, MsiSource, Pirq, PlatformError, ResetReach, Result};
use pciback::policy::RdmPolicy;
use pciback::{DomId, Sbdf};

/// Interrupts that one guest can have.
const LIMIT: usize = 12;

#[derive(Default)]
pub struct Counting {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    mapped: BTreeMap<u32, MsiSource>,
    refuses: bool,
}

impl Counting {
    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.state.lock().expect("no panic holds it"))
    }

    /// What is mapped.
    pub fn mapped(&self) -> BTreeMap<u32, MsiSource> {
        self.with(|state| state.mapped.clone())
    }

    /// Whether new mappings are refused.
    pub fn refuse(&self, refuses: bool) {
        self.with(|state| state.refuses = refuses);
    }
}

fn refused<T>(action: &'static str, address: impl std::fmt::Display) -> Result<T> {
    Err(PlatformError::new(action, address, nix_errno()))
}

/// ENOSPC.
fn nix_errno() -> std::io::Error {
    std::io::Error::from_raw_os_error(28)
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
        map_msi_as(domain: DomId, address: Sbdf, source: MsiSource, pirq: Pirq) -> ();
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
            if state.refuses || state.mapped.len() == LIMIT {
                return refused("map an interrupt of", address);
            }
            assert!(!state.mapped.values().any(|mapped| *mapped == source), "{source:?} is mapped twice");
            let pirq = (16..).find(|pirq| !state.mapped.contains_key(pirq)).expect("one is free");
            state.mapped.insert(pirq, source);
            Ok(Pirq(pirq))
        })
    }

    fn unmap_pirq(&self, domain: DomId, pirq: Pirq) -> Result<()> {
        self.with(|state| match state.mapped.remove(&pirq.0) {
            Some(_) => Ok(()),
            None => refused("unmap an interrupt of domain", domain),
        })
    }
}
