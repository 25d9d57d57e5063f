//! The functions of the simulated host, and what happens to them.

use std::collections::BTreeMap;
use std::sync::Arc;

use nix::errno::Errno;

use super::Answer;
use super::events::Listeners;
use super::hardware::Masks;
use super::model::{Description, DriverKind, ReservedMemory};
use super::placement::{Kind, Placement};
use super::registers::{Effect, Registers};
use super::xen::{Device, Owner, Xen};
use crate::config::Access;
use crate::platform::{HostEvent, Resource, Use, VfSettings};
use crate::{DomId, Sbdf};

pub(super) struct SimFunction {
    pub kind: Arc<Kind>,
    pub registers: Registers,
    pub resources: [Resource; 13],
    pub irq: u32,
    pub numa_node: Option<u32>,
    /// What its own driver makes.
    pub interfaces: Vec<String>,
    /// What uses it while it is bound to its own driver.
    pub uses: Vec<Use>,
    /// What the kernel reads from its expansion ROM.
    pub rom: Vec<u8>,
    pub reserved_memory: Option<ReservedMemory>,
    pub driver: Option<String>,
    pub driver_override: Option<String>,
    pub physical_function: Option<Sbdf>,
    pub virtual_functions: Vec<Sbdf>,
    pub vf_autoprobe: bool,
    /// What the PF's driver keeps for a VF.
    pub network: VfSettings,
    /// Answers all ones until it is reset.
    pub silent: bool,
    /// Resets have no effect, and no error shows that.
    pub unreset: bool,
    pub incarnation: u64,
}

pub(super) struct World {
    pub drivers: Vec<String>,
    pub driver_kinds: BTreeMap<String, DriverKind>,
    /// What its hardware database knows.
    pub names: BTreeMap<String, String>,
    pub placement: Placement,
    pub functions: BTreeMap<Sbdf, SimFunction>,
    pub xen: Xen,
    /// Whether dom0's kernel reports added and removed functions to Xen.
    pub reporting: bool,
    pub listeners: Listeners,
    /// What else is at memory addresses and I/O ports, as lines of `/proc/iomem` and `/proc/ioports`.
    pub memory: String,
    pub ports: String,
    /// How many functions have appeared.
    pub appeared: u64,
}

pub(super) const COMMAND: u16 = 0x04;
pub(super) const COMMAND_MEMORY: u16 = 1 << 1;
const SRIOV_CONTROL: u16 = 8;
const SRIOV_ENABLE: u16 = 1;

impl World {
    pub fn new(description: &Description) -> Result<Self, String> {
        let version = description.xen.split_once('.');
        let version = version.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let mut world = Self {
            drivers: description.drivers.clone(),
            driver_kinds: description.driver_kinds.clone(),
            names: description.names.clone(),
            placement: Placement::new(&description.models)?,
            functions: BTreeMap::new(),
            xen: Xen {
                version: version.ok_or_else(|| format!("xen: '{}' is no version", description.xen))?,
                extra_pirqs: description.extra_guest_irqs,
                devices: BTreeMap::new(),
                domains: BTreeMap::new(),
                lines: description
                    .functions
                    .iter()
                    .map(|function| function.irq)
                    .filter(|irq| *irq != 0)
                    .collect(),
                lost: 0,
                resets: Vec::new(),
            },
            reporting: true,
            listeners: Listeners::default(),
            memory: description.memory.clone(),
            ports: description.ports.clone(),
            appeared: 0,
        };
        for name in &description.drivers {
            if !world.driver_kinds.contains_key(name) {
                return Err(format!("drivers: nothing says what '{name}' takes; add it to driver-kinds"));
            }
        }
        for domain in &description.domains {
            if world.xen.domains.insert(DomId(domain.id), domain.into()).is_some()
                || DomId(domain.id) == DomId::DOM0
                || DomId(domain.id) >= DomId::FIRST_RESERVED
            {
                return Err(format!("domains: {} is taken", domain.id));
            }
        }
        for function in &description.functions {
            world.plug(function).map_err(|why| format!("{}: {why}", function.address))?;
        }
        world.reporting = description.report_to_xen;
        Ok(world)
    }

    pub fn function(&mut self, address: Sbdf) -> Answer<&mut SimFunction> {
        self.functions.get_mut(&address).ok_or(Errno::ENOENT)
    }

    /// A function appears in its slot, as `functions` of the description defines it.
    pub fn plug(&mut self, function: &super::model::Function) -> Result<(), String> {
        let made = self.placement.physical(function)?;
        if self.functions.contains_key(&function.address) {
            return Err("there is a function already".to_owned());
        }
        self.appear(function.address, made);
        self.bind(function.address);
        if function.num_vfs > 0 {
            self.set_num_vfs(function.address, function.num_vfs)
                .map_err(|errno| format!("num-vfs: {errno}"))?;
        }
        Ok(())
    }

    /// The kernel finds a function and, usually, reports it to Xen.
    pub fn appear(&mut self, address: Sbdf, mut function: SimFunction) {
        let physical_function = function.physical_function;
        self.appeared += 1;
        function.incarnation = self.appeared;
        self.functions.insert(address, function);
        // The kernel only logs what Xen says.
        if self.reporting
            && let Err(errno) = self.report(address, physical_function)
        {
            log::warn!("{address}: the simulated Xen refuses the report: {errno}");
        }
        // A notifier in the kernel reports it to Xen before the uevent is sent.
        self.listeners.tell(HostEvent::Added(address));
    }

    /// A function is removed, with its VFs: by the kernel, or physically.
    pub fn remove_function(&mut self, address: Sbdf) {
        let vfs = self.functions.get(&address).map(|gone| gone.virtual_functions.clone()).unwrap_or_default();
        for vf in vfs {
            self.remove_function(vf);
        }
        self.unbind(address);
        self.functions.remove(&address);
        if self.reporting
            && let Err(errno) = self.xen.remove(address)
        {
            log::warn!("{address}: the simulated Xen refuses to forget it: {errno}");
        }
        self.listeners.tell(HostEvent::Removed(address));
    }

    /// `PHYSDEVOP_pci_device_add`: Xen looks at the function's capabilities once, now.
    pub fn report(&mut self, address: Sbdf, physical_function: Option<Sbdf>) -> Answer<()> {
        let function = self.functions.get(&address).ok_or(Errno::ENODEV)?;
        let registers = &function.registers;
        let layout = &registers.masks().layout;
        let device = Device {
            owner: Owner::Host,
            physical_function,
            msi: layout.msi.is_some(),
            entries: layout.msix.map_or(0, |at| (registers.peek16(at + 2) & 0x7ff) + 1),
            used_entries: 0,
            broken: false,
            reserved_memory: function.reserved_memory,
        };
        self.xen.add(address, device)
    }

    /// Whether memory decoding is on; a VF's is its PF's (Xen looks there, too).
    pub fn decodes_memory(&self, address: Sbdf) -> bool {
        let function = self.functions.get(&address);
        let decoder = function.and_then(|function| function.physical_function).unwrap_or(address);
        self.read(decoder, COMMAND) & COMMAND_MEMORY != 0
    }

    /// Xen writes its own state into the function again; a vector keeps MSI-X enabled.
    pub fn restore_msi(&mut self, address: Sbdf) -> Answer<()> {
        self.xen.device(address)?;
        let vectors = self.xen.domains.values().flat_map(|domain| domain.vectors.values());
        let mut mapped = vectors.filter(|vector| vector.address == address);
        let Some(first) = mapped.next() else { return Ok(()) };
        let msix = first.entry.is_some();
        if msix && !self.decodes_memory(address) {
            return Err(Errno::ENXIO);
        }
        if let Some(function) = self.functions.get_mut(&address) {
            let layout = function.registers.masks().layout.clone();
            match (msix, layout.msix, layout.msi) {
                (true, Some(at), _) => function.registers.change16(at + 2, 0, 0x8000),
                (false, _, Some(at)) => function.registers.change16(at + 2, 0, 0x0001),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether the function answers on the bus: a VF only while its PF enables it.
    fn answers(&self, address: Sbdf) -> bool {
        let Some(function) = self.functions.get(&address).filter(|function| !function.silent) else {
            return false;
        };
        let Some(physical_function) = function.physical_function else { return true };
        self.functions.get(&physical_function).is_some_and(|pf| {
            let control = pf.registers.masks().layout.sriov.map(|at| pf.registers.peek16(at + SRIOV_CONTROL));
            !pf.silent && control.is_some_and(|control| control & SRIOV_ENABLE != 0)
        })
    }

    fn read(&self, address: Sbdf, at: u16) -> u16 {
        match self.functions.get(&address) {
            Some(function) if self.answers(address) => function.registers.peek16(at),
            _ => 0xffff,
        }
    }

    pub fn config_read(&self, address: Sbdf, access: Access) -> u32 {
        match self.functions.get(&address) {
            Some(function) if self.answers(address) => function.registers.read(access),
            _ => access.width().mask(),
        }
    }

    /// dom0's write, of which Xen keeps back what would touch its own interrupts.
    pub fn config_write(&mut self, address: Sbdf, access: Access, value: u32) {
        if !self.answers(address) || self.intercepted(address, access) {
            return;
        }
        let Some(function) = self.functions.get_mut(&address) else { return };
        match function.registers.write(access, value) {
            Effect::None => {}
            Effect::FunctionLevelReset => self.hardware_reset(address),
            Effect::SecondaryBusReset => self.reset_below(address),
        }
    }

    /// `pci_msi_conf_write_intercept` of Xen: MSI-X takes a control word of two bytes only; MSI with masks, while it is in
    /// use, its control word of two bytes and its mask of four. The rest vanishes.
    fn intercepted(&self, address: Sbdf, access: Access) -> bool {
        let (Some(function), Some(device)) = (self.functions.get(&address), self.xen.devices.get(&address))
        else {
            return false;
        };
        let (at, width) = (access.offset(), access.width().bytes());
        let layout = &function.registers.masks().layout;
        if let Some(msix) = layout.msix.filter(|_| device.entries > 0) {
            return (msix..msix + 12).contains(&at) && (at, width) != (msix + 2, 2);
        }
        let Some(msi) = layout.msi else { return false };
        let control = function.registers.peek16(msi + 2);
        let mask = if control & 0x80 != 0 { msi + 16 } else { msi + 12 };
        let in_use = self.xen.domains.values().flat_map(|domain| domain.vectors.values());
        let mut in_use = in_use.filter(|vector| vector.address == address && vector.entry.is_none());
        control & 0x100 != 0
            && (msi..mask + 8).contains(&at)
            && (at, width) != (msi + 2, 2)
            && (at, width) != (mask, 4)
            && in_use.next().is_some()
    }
}

impl SimFunction {
    /// The ids that Linux shows: a VF's follow from its PF.
    pub fn ids(&self, functions: &BTreeMap<Sbdf, Self>) -> (u16, u16) {
        let pf = self.physical_function.and_then(|pf| functions.get(&pf));
        let sriov = pf.and_then(|pf| Some((pf, pf.registers.masks().layout.sriov?)));
        match sriov {
            Some((pf, at)) => (pf.registers.peek16(0), pf.registers.peek16(at + 0x1a)),
            None => (self.registers.peek16(0), self.registers.peek16(2)),
        }
    }

    pub fn masks(&self) -> &Masks {
        self.registers.masks()
    }
}
