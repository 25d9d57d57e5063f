//! The state of the simulated host besides xenstore.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

use super::config::Registers;
use super::model::{self, Description, Model};
use crate::platform::{MsiSource, Resource};
use crate::{DomId, Sbdf};

/// Who owns a function in Xen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// dom0.
    Host,
    /// The quarantine domain.
    Quarantine,
    /// A guest.
    Guest(DomId),
}

/// A vector that is mapped for a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vector {
    /// The function that sends it.
    pub address: Sbdf,
    /// Which of its interrupts; `None` for MSI.
    pub entry: Option<u16>,
}

/// What Xen knows of a function.
#[derive(Debug, Clone)]
pub(super) struct XenDevice {
    pub owner: Owner,
    pub msix_prepared: bool,
}

pub(super) struct SimFunction {
    pub model: String,
    pub registers: Registers,
    pub resources: [Resource; 13],
    pub irq: u32,
    pub driver: Option<String>,
    pub driver_override: Option<String>,
    pub physical_function: Option<Sbdf>,
    pub virtual_functions: Vec<Sbdf>,
    pub vf_autoprobe: bool,
    pub xen: Option<XenDevice>,
}

pub(super) struct SimDomain {
    pub id: DomId,
    pub name: String,
    pub kind: String,
    pub passthrough: bool,
    pub frames: BTreeSet<u64>,
    pub ports: BTreeSet<u32>,
    pub lines: BTreeSet<u32>,
    /// By pirq.
    pub vectors: BTreeMap<u32, Vector>,
}

pub(super) struct Failure {
    pub operation: String,
    pub address: Option<Sbdf>,
    pub errno: Errno,
    pub after: u32,
    pub times: u32,
}

pub(super) struct World {
    pub version: (u32, u32),
    pub drivers: Vec<String>,
    pub models: BTreeMap<String, Model>,
    pub functions: BTreeMap<Sbdf, SimFunction>,
    pub domains: BTreeMap<DomId, SimDomain>,
    pub failures: Vec<Failure>,
}

/// Interrupt lines of the host; a guest's pirqs lie behind them, 32 by default.
pub(super) const LINES: u32 = 24;
pub(super) const EXTRA_PIRQS: u32 = 32;

const VENDOR_ID: u16 = 0;

impl World {
    pub fn new(description: &Description) -> Result<Self, String> {
        let version = description.xen.split_once('.');
        let version = version.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let text = |value: &str| -> Result<Errno, String> { errno(value) };
        let mut world = Self {
            version: version.ok_or_else(|| format!("xen: '{}' is no version", description.xen))?,
            drivers: description.drivers.clone(),
            models: BTreeMap::new(),
            functions: BTreeMap::new(),
            domains: BTreeMap::new(),
            failures: Vec::new(),
        };
        for failure in &description.failures {
            world.failures.push(Failure {
                operation: failure.operation.clone(),
                address: failure.address,
                errno: text(&failure.errno)?,
                after: failure.after,
                times: failure.times,
            });
        }
        for domain in &description.domains {
            let id = DomId(domain.id);
            world.domains.insert(
                id,
                SimDomain {
                    id,
                    name: domain.name.clone(),
                    kind: domain.kind.clone(),
                    passthrough: domain.passthrough,
                    frames: BTreeSet::new(),
                    ports: BTreeSet::new(),
                    lines: BTreeSet::new(),
                    vectors: BTreeMap::new(),
                },
            );
        }
        for function in &description.functions {
            let model = description.models.get(&function.model);
            let model = model
                .ok_or_else(|| format!("{}: there is no model '{}'", function.address, function.model))?;
            let placed =
                place(model, &function.bars, 0).map_err(|why| format!("{}: {why}", function.address))?;
            let mut made = new_function(&function.model, model, placed, None)?;
            made.irq = function.irq;
            if let Some(sriov) = &model.sriov {
                let vf_model = description.models.get(&sriov.model);
                let vf_model = vf_model.ok_or_else(|| format!("there is no model '{}'", sriov.model))?;
                let vf_bars = place(vf_model, &sriov.bars, 0)?;
                for (index, bar) in vf_bars[..6].iter().enumerate() {
                    made.resources[7 + index] = Resource { size: bar.size * u64::from(sriov.total), ..*bar };
                }
            }
            made.driver = model.driver.clone().filter(|driver| description.drivers.contains(driver));
            world.functions.insert(function.address, made);
        }
        world.models =
            description.models.iter().map(|(name, model)| (name.clone(), clone_model(model))).collect();
        Ok(world)
    }

    /// Whether this call is one that shall fail.
    pub fn injected(&mut self, operation: &str, address: Option<Sbdf>) -> Result<(), Errno> {
        let matches = |failure: &&mut Failure| {
            failure.operation == operation
                && failure.times > 0
                && (failure.address.is_none() || failure.address == address)
        };
        let Some(failure) = self.failures.iter_mut().find(matches) else { return Ok(()) };
        if failure.after > 0 {
            failure.after -= 1;
            return Ok(());
        }
        failure.times -= 1;
        Err(failure.errno)
    }

    pub fn vectors(&self, domain: DomId) -> BTreeMap<u32, Vector> {
        self.domains.get(&domain).map(|domain| domain.vectors.clone()).unwrap_or_default()
    }

    /// Xen takes a dead domain's functions and forgets the rest.
    pub fn destroy(&mut self, domain: DomId) {
        self.domains.remove(&domain);
        let devices = self.functions.values_mut().filter_map(|function| function.xen.as_mut());
        for device in devices.filter(|device| device.owner == Owner::Guest(domain)) {
            device.owner = Owner::Quarantine;
        }
    }

    pub fn remove_function(&mut self, address: Sbdf) {
        let gone = self.functions.remove(&address);
        for vf in gone.map(|function| function.virtual_functions).unwrap_or_default() {
            self.functions.remove(&vf);
        }
        for domain in self.domains.values_mut() {
            domain.vectors.retain(|_, vector| vector.address != address);
        }
    }

    /// What NumVFs and VF Enable do, with dom0's kernel telling Xen.
    pub fn set_num_vfs(&mut self, pf: Sbdf, count: u16) -> Result<(), Errno> {
        let (model, present) = match self.functions.get(&pf) {
            None => return Err(Errno::ENOENT),
            Some(function) => (function.model.clone(), function.virtual_functions.len()),
        };
        let sriov = self.models.get(&model).and_then(|model| model.sriov.clone()).ok_or(Errno::ENOENT)?;
        if count > sriov.total {
            return Err(Errno::ERANGE);
        }
        if count > 0 && present > 0 && usize::from(count) != present {
            return Err(Errno::EBUSY);
        }
        if usize::from(count) == present {
            return Ok(());
        }
        if count == 0 {
            // PF drivers such as igb keep VFs that xen-pciback holds.
            let held =
                |vf: &Sbdf| self.functions.get(vf).is_some_and(|vf| vf.driver.as_deref() == Some("pciback"));
            let vfs = self.functions.get(&pf).map(|pf| pf.virtual_functions.clone()).unwrap_or_default();
            if vfs.iter().any(held) {
                return Err(Errno::EPERM);
            }
            for vf in vfs {
                self.remove_function(vf);
            }
        }
        let mut vfs = Vec::new();
        for index in 0..u32::from(count) {
            let vf = pf.offset_by(sriov.first_offset + index * sriov.stride).ok_or(Errno::ENOMEM)?;
            self.add_vf(pf, &sriov, vf, index)?;
            vfs.push(vf);
        }
        let register = model::hex(&sriov.num_vfs_register).map_err(|_| Errno::EIO)? as u16;
        if let Some(function) = self.functions.get_mut(&pf) {
            function.virtual_functions = vfs;
            function.registers.poke(register, &count.to_le_bytes());
        }
        Ok(())
    }

    fn add_vf(&mut self, pf: Sbdf, sriov: &model::Sriov, vf: Sbdf, index: u32) -> Result<(), Errno> {
        let model = self.models.get(&sriov.model).ok_or(Errno::EIO)?;
        let placed = place(model, &sriov.bars, index).map_err(|_| Errno::EIO)?;
        let mut made = new_function(&sriov.model, model, placed, Some(pf)).map_err(|_| Errno::EIO)?;
        let autoprobe = self.functions.get(&pf).is_some_and(|pf| pf.vf_autoprobe);
        made.driver = model.driver.clone().filter(|driver| autoprobe && self.drivers.contains(driver));
        self.functions.insert(vf, made);
        Ok(())
    }
}

/// Where the BARs of a function are; a VF's lie one behind the other.
fn place(model: &Model, starts: &BTreeMap<String, String>, index: u32) -> Result<[Resource; 13], String> {
    let mut resources = [Resource::default(); 13];
    for (number, bar) in &model.bars {
        let place: usize =
            number.parse().ok().filter(|number| *number < 7).ok_or(format!("no BAR {number}"))?;
        let start = starts.get(number).ok_or(format!("BAR {number} has no start"))?;
        let (size, flags) = (model::hex(&bar.size)?, model::hex(&bar.flags)?);
        if !size.is_power_of_two() {
            return Err(format!("BAR {number}: its size must be a power of two"));
        }
        resources[place] = Resource { start: model::hex(start)? + u64::from(index) * size, size, flags };
    }
    Ok(resources)
}

fn new_function(
    name: &str,
    model: &Model,
    resources: [Resource; 13],
    physical_function: Option<Sbdf>,
) -> Result<SimFunction, String> {
    let mut registers = Registers::new(model)?;
    if physical_function.is_none() {
        for (index, bar) in resources[..6].iter().enumerate().filter(|(_, bar)| bar.exists()) {
            registers.place_bar(index, bar.start, bar.size, bar.flags & Resource::MEMORY_64 != 0);
        }
    } else {
        // A VF's ids read all ones; its PF has them.
        registers.poke(VENDOR_ID, &[0xff; 4]);
    }
    Ok(SimFunction {
        model: name.to_owned(),
        registers,
        resources,
        irq: 0,
        driver: None,
        driver_override: None,
        physical_function,
        virtual_functions: Vec::new(),
        vf_autoprobe: true,
        xen: Some(XenDevice { owner: Owner::Host, msix_prepared: false }),
    })
}

fn clone_model(model: &Model) -> Model {
    Model {
        config: model.config.clone(),
        size: model.size,
        writable: model.writable.clone(),
        clear_on_one: model.clear_on_one.clone(),
        bars: model.bars.clone(),
        driver: model.driver.clone(),
        id: model.id.clone(),
        reset_methods: model.reset_methods.clone(),
        msix_entries: model.msix_entries,
        sriov: model.sriov.clone(),
    }
}

/// The error numbers that a description may name.
fn errno(name: &str) -> Result<Errno, String> {
    let known = [
        Errno::EPERM,
        Errno::ENOENT,
        Errno::EIO,
        Errno::ENXIO,
        Errno::EAGAIN,
        Errno::ENOMEM,
        Errno::EACCES,
        Errno::EBUSY,
        Errno::EEXIST,
        Errno::ENODEV,
        Errno::EINVAL,
        Errno::ENOSPC,
        Errno::ENOTTY,
        Errno::ETIMEDOUT,
        Errno::EOPNOTSUPP,
        Errno::ENODATA,
        Errno::ESRCH,
    ];
    let found = known.into_iter().find(|errno| format!("{errno:?}") == name);
    found.ok_or_else(|| format!("'{name}' is no error number that can be injected"))
}

impl World {
    /// The function that a mapped source belongs to must be there, and the table prepared.
    pub fn check_source(&self, address: Sbdf, source: MsiSource) -> Result<(), Errno> {
        let function = self.functions.get(&address).ok_or(Errno::ENODEV)?;
        let device = function.xen.as_ref().ok_or(Errno::ENODEV)?;
        let entries = self.models.get(&function.model).map_or(0, |model| model.msix_entries);
        match source {
            MsiSource::Msi => Ok(()),
            MsiSource::MsiX { .. } if entries == 0 => Err(Errno::ENODEV),
            MsiSource::MsiX { entry, .. } if entry >= entries => Err(Errno::EINVAL),
            MsiSource::MsiX { .. } if !device.msix_prepared => Err(Errno::ENODATA),
            MsiSource::MsiX { .. } => Ok(()),
        }
    }
}
