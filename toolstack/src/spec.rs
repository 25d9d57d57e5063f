//! Reads the properties of functions, for the filter and for transactions.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use nix::errno::Errno;
use pciback::Sbdf;
use pciback::config::{
    Access, CapabilityList, ConfigSpace, Filter, FunctionSpec, GuestRom, Policy, PortAbove, Unroutable,
    VfRouting,
};
use pciback::inventory::Identity;
use pciback::platform::{Host, HostFunction};
use pciback::spec::{CapabilityId, ExtendedCapabilityId};

use crate::outcome::{ErrorCode, Failure};

/// Properties that are needed before a function is served.
pub trait SpecExt {
    /// Whether it has an MSI-X capability.
    fn has_msix(&self) -> bool;
    /// Whether it has an MSI or an MSI-X capability.
    fn has_messages(&self) -> bool;
    /// Whether it can send INTx.
    fn has_interrupt_pin(&self) -> bool;
}

/// Interrupt Pin (PCI Express 6.0, section 7.5.1.1.13); 0: the function uses none.
const INTERRUPT_PIN: usize = 0x3d;

impl SpecExt for FunctionSpec {
    fn has_msix(&self) -> bool {
        CapabilityList::walk(&self.bytes).legacy(CapabilityId::MSI_X).is_some()
    }

    fn has_messages(&self) -> bool {
        let list = CapabilityList::walk(&self.bytes);
        [CapabilityId::MSI, CapabilityId::MSI_X].iter().any(|id| list.legacy(*id).is_some())
    }

    fn has_interrupt_pin(&self) -> bool {
        !self.is_virtual() && self.bytes.get(INTERRUPT_PIN).is_some_and(|pin| *pin != 0)
    }
}

/// Reads a function, which must exist.
pub fn existing(host: &dyn Host, address: Sbdf) -> Result<HostFunction, Failure> {
    host.function(address).map_err(|error| match error.errno() {
        Some(Errno::ENOENT) => Failure::not_found(format!("there is no function {address} on this host"))
            .on(address)
            .hint("'lspci -D' lists them"),
        _ => Failure::from(error).on(address),
    })
}

/// Reads a function from config space and sysfs; for a VF, its PF is read as well.
pub fn function_spec(host: &dyn Host, address: Sbdf) -> Result<FunctionSpec, Failure> {
    let function = host.function(address)?;
    let hardware = host.config(address)?;
    let (pf, pf_hardware) = match function.physical_function {
        Some(pf) => (Some(host.function(pf)?), Some(host.config(pf)?)),
        None => (None, None),
    };
    FunctionSpec::read(&function, pf.as_ref(), hardware.as_ref(), pf_hardware.as_deref()).map_err(|error| {
        Failure::new(
            ErrorCode::Failed,
            format!("cannot read the capabilities and BARs of {address}: {error}"),
        )
        .on(address)
        .hint("a device that answers all ones may need a reset or a power cycle")
    })
}

/// What a guest gets of a function, in addition to its registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Given {
    /// Whether the guest gets the interrupt line.
    pub line: bool,
    /// The expansion ROM, if the guest gets one.
    pub rom: Option<GuestRom>,
}

/// As [`function_spec`], for a guest's function: an interrupt line that the guest does not get is hidden, and the ROM is the guest's.
pub fn guest_spec(host: &dyn Host, address: Sbdf, given: Given) -> Result<FunctionSpec, Failure> {
    let spec = function_spec(host, address)?;
    let gsi = if given.line { spec.gsi } else { 0 };
    Ok(FunctionSpec { gsi, rom: given.rom, ..spec })
}

/// The Device Serial Number of a function (PCI Express 6.0, section 7.9.3), if it can be read.
pub fn serial_number(host: &dyn Host, address: Sbdf) -> Option<u64> {
    let bytes = host.config(address).ok()?.read_all().ok()?;
    let list = CapabilityList::walk(&bytes);
    let at = usize::from(list.extended(ExtendedCapabilityId::SERIAL_NUMBER)?.offset);
    let number = bytes.get(at + 4..at + 12)?.try_into().ok()?;
    Some(u64::from_le_bytes(number))
}

/// Whether a function answers config accesses; otherwise it reads as all ones.
pub fn answers(host: &dyn Host, address: Sbdf) -> bool {
    let vendor = |config: Box<dyn ConfigSpace>| config.read(Access::new(0, 2).ok()?).ok();
    host.config(address).ok().and_then(vendor).is_some_and(|vendor| vendor != 0xffff)
}

/// Whether the routing IDs of this many VFs are reachable, by the current registers of the PF and the port above it; the inner error says
/// why not.
pub fn vf_routing(host: &dyn Host, pf: Sbdf, count: u16) -> Result<Result<(), Unroutable>, Failure> {
    let bytes = |address| {
        let read = host.config(address)?.read_all();
        read.map_err(|error| {
            Failure::new(ErrorCode::Failed, format!("cannot read the config space of {address}: {error}"))
        })
    };
    let Some(routing) = VfRouting::of(pf, &bytes(pf)?) else { return Ok(Ok(())) };
    let port = match host.ports_above(pf)?.first() {
        Some(port) => Some(PortAbove::of(*port, &bytes(*port)?)),
        None => None,
    };
    Ok(routing.check(count, port.as_ref()))
}

/// The identity of the device at an address; a VF has its PF's serial number.
pub fn identity(host: &dyn Host, function: &HostFunction) -> Identity {
    let serial = serial_number(host, function.physical_function.unwrap_or(function.address));
    Identity { serial, ..Identity::of(function) }
}

/// The inputs of the compilation of a filter: functions with the same inputs share the filter.
type Key = (Vec<u8>, Policy, Option<Vec<u16>>);

/// The filters in use. A compilation takes a fraction of a millisecond, and a filter has about 100 KiB; a thousand VFs with the same
/// layout and policy share one.
#[derive(Debug, Clone, Default)]
pub struct Filters {
    compiled: Arc<Mutex<HashMap<Key, Weak<Filter>>>>,
}

impl Filters {
    /// The filter of a function; `visible`: the capabilities that its guest has seen and that must stay visible.
    pub fn compile(
        &self,
        spec: &FunctionSpec,
        policy: Policy,
        visible: Option<&[u16]>,
    ) -> Result<Arc<Filter>, Failure> {
        let key: Key = (Filter::inputs(spec), policy, visible.map(<[u16]>::to_vec));
        let mut compiled = self.compiled.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(filter) = compiled.get(&key).and_then(Weak::upgrade) {
            return Ok(filter);
        }
        let filter = Filter::compile_keeping(spec, &key.1, visible).map(Arc::new).map_err(|error| {
            Failure::new(ErrorCode::Failed, format!("cannot build the filter of {}: {error}", spec.address))
                .on(spec.address)
        })?;
        compiled.retain(|_, filter| filter.strong_count() > 0);
        // Different inputs may give the same filter, for example if they differ in a register that the filter does not use.
        let same = compiled.values().filter_map(Weak::upgrade).find(|known| *known == filter);
        let filter = same.unwrap_or(filter);
        compiled.insert(key, Arc::downgrade(&filter));
        Ok(filter)
    }
}
