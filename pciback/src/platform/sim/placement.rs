//! Makes functions of models, and places their BARs as firmware does.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::hardware::{Masks, Sizes, VF_BAR0};
use super::model::{self, Domain as DomainText, Function, Model, hex};
use super::registers::Registers;
use super::world::SimFunction;
use super::xen::Domain;
use crate::platform::Resource;
use crate::{DomId, Sbdf, Uuid};

/// A kind of function, ready to be made many times.
pub(super) struct Kind {
    pub power_up: Arc<Vec<u8>>,
    pub masks: Arc<Masks>,
    pub sizes: Sizes,
    pub reset_methods: Vec<String>,
    /// What the kernel reads as its VPD.
    pub vpd: Option<Vec<u32>>,
    /// The kind of its VFs.
    pub virtual_function: Option<Arc<Kind>>,
}

/// All kinds, and the addresses that are still free.
pub(super) struct Placement {
    kinds: BTreeMap<String, Arc<Kind>>,
    free_memory: u64,
    free_ports: u64,
}

/// `IORESOURCE_SIZEALIGN`, `IORESOURCE_READONLY`.
const SIZE_ALIGNED: u64 = 0x4_0000;
const READ_ONLY: u64 = 0x4000;
const BAR0: u16 = 0x10;
const ROM: u16 = 0x30;

impl Placement {
    pub fn new(models: &BTreeMap<String, Model>) -> Result<Self, String> {
        let mut kinds = BTreeMap::new();
        let (vfs, others): (Vec<_>, Vec<_>) = models
            .iter()
            .partition(|(name, _)| models.values().any(|pf| pf.virtual_function.as_ref() == Some(name)));
        for (name, model) in vfs.into_iter().chain(others) {
            let kind = kind(model, &kinds, models).map_err(|why| format!("model '{name}': {why}"))?;
            kinds.insert(name.clone(), Arc::new(kind));
        }
        // Below the 4 GiB that everything reaches, and where QEMU's root ports have their ports.
        Ok(Self { kinds, free_memory: 0x8000_0000, free_ports: 0xc000 })
    }

    fn place(&mut self, size: u64, io: bool) -> u64 {
        let free = if io { &mut self.free_ports } else { &mut self.free_memory };
        // Pages of their own, because a guest is allowed whole pages.
        let step = if io { size } else { size.max(4096) };
        let start = free.next_multiple_of(step);
        *free = start + step;
        start
    }

    /// A function with its BARs placed, as `functions` of a description has it.
    pub fn physical(&mut self, function: &Function) -> Result<SimFunction, String> {
        let kind = self
            .kinds
            .get(&function.model)
            .ok_or_else(|| format!("there is no model '{}'", function.model))?;
        let kind = Arc::clone(kind);
        let mut made = SimFunction {
            registers: Registers::new(Arc::clone(&kind.power_up), Arc::clone(&kind.masks)),
            kind: Arc::clone(&kind),
            resources: Default::default(),
            irq: function.irq,
            numa_node: function.numa_node,
            interfaces: function.interfaces.clone(),
            uses: function.uses.clone(),
            rom: Vec::new(),
            reserved_memory: function.reserved_memory,
            driver: None,
            driver_override: None,
            physical_function: None,
            virtual_functions: Vec::new(),
            vf_autoprobe: true,
            network: super::network::FRESH,
            silent: false,
            unreset: false,
            incarnation: 0,
        };
        made.registers.poke(0x3c, &[function.irq as u8]);
        if let Some((secondary, subordinate)) = function.buses {
            // What firmware writes into a type 1 header (PCI Express 6.0, section 7.5.1.3).
            made.registers.poke(0x18, &[function.address.bus(), secondary, subordinate]);
        }
        for (index, size) in (0u8..).zip(kind.sizes).filter(|(_, size)| *size != 0) {
            let at = match index {
                0..6 => BAR0 + 4 * u16::from(index),
                6 => ROM,
                _ => kind.masks.layout.sriov.ok_or("no SR-IOV")? + VF_BAR0 + 4 * u16::from(index - 7),
            };
            let flags = flags(made.registers.peek(at), index == 6);
            let chosen =
                if index < 7 { function.bars.get(&index) } else { function.vf_bars.get(&(index - 7)) };
            let start = match chosen {
                Some(start) => hex(start)?,
                None => self.place(size, flags & Resource::IO != 0),
            };
            if !start.is_multiple_of(size.min(1 << 40)) && index < 7 {
                return Err(format!("BAR {index}: {start:#x} is no multiple of its size"));
            }
            let low_bits = if index == 6 {
                0
            } else if flags & Resource::IO != 0 {
                0x3
            } else {
                0xf
            };
            made.registers.place_bar(at, start, low_bits, flags & Resource::MEMORY_64 != 0);
            // As Linux shows what found no place.
            let unset = if start == 0 { Resource::UNSET } else { 0 };
            made.resources[usize::from(index)] = Resource { start, size, flags: flags | unset };
        }
        let known = |index: &u8, count: u8| *index < count && kind.sizes[usize::from(*index)] != 0;
        if let Some(index) = function.bars.keys().find(|index| !known(index, 7)) {
            return Err(format!("the model has no BAR {index}"));
        }
        Ok(made)
    }

    /// The VF with this index: its BARs lie one behind the other in the PF's VF BARs.
    pub fn virtual_function(pf: Sbdf, parent: &SimFunction, index: u16) -> Option<SimFunction> {
        let kind = parent.kind.virtual_function.as_ref()?;
        let mut resources: [Resource; 13] = Default::default();
        for (place, (all, size)) in resources.iter_mut().zip(parent.resources[7..].iter().zip(kind.sizes)) {
            if all.is_placed() {
                *place = Resource { start: all.start + u64::from(index) * size, size, flags: all.flags };
            }
        }
        Some(SimFunction {
            registers: Registers::new(Arc::clone(&kind.power_up), Arc::clone(&kind.masks)),
            kind: Arc::clone(kind),
            resources,
            irq: 0,
            numa_node: parent.numa_node,
            interfaces: Vec::new(),
            uses: Vec::new(),
            rom: Vec::new(),
            reserved_memory: None,
            driver: None,
            driver_override: None,
            physical_function: Some(pf),
            virtual_functions: Vec::new(),
            vf_autoprobe: true,
            network: super::network::FRESH,
            silent: false,
            unreset: false,
            incarnation: 0,
        })
    }
}

fn kind(
    model: &Model,
    kinds: &BTreeMap<String, Arc<Kind>>,
    models: &BTreeMap<String, Model>,
) -> Result<Kind, String> {
    let mut power_up = model::rows(&model.config, model.size)?;
    let mut sizes: Sizes = [0; 13];
    for (index, size) in &model.bars {
        let place =
            sizes[..7].get_mut(usize::from(*index)).ok_or_else(|| format!("there is no BAR {index}"))?;
        *place = hex(size)?;
        if !place.is_power_of_two() || *place < 4 {
            return Err(format!("BAR {index}: its size must be a power of two"));
        }
    }
    let virtual_function = match &model.virtual_function {
        None => None,
        Some(name) => Some(kinds.get(name).ok_or_else(|| format!("there is no model '{name}'"))?),
    };
    let vf = models.values().any(|other| other.virtual_function.is_some() && is_same(other, model, models));
    if let Some(virtual_function) = virtual_function {
        let probe = Masks::derive(&power_up, &sizes, false);
        let at = usize::from(probe.layout.sriov.ok_or("it has VFs, but no SR-IOV capability")?);
        let total = u16::from_le_bytes([power_up[at + 0x0e], power_up[at + 0x0f]]);
        for (place, size) in sizes[7..].iter_mut().zip(virtual_function.sizes) {
            *place = size * u64::from(total);
        }
    }
    let mut masks = Masks::derive(&power_up, &sizes, vf);
    for (rows, target) in
        [(&model.writable, &mut masks.writable), (&model.clear_on_one, &mut masks.clear_on_one)]
    {
        for (offset, mask) in rows {
            let (offset, mask) = (hex(offset)? as usize, hex(mask)? as u32);
            let place =
                target.get_mut(offset..offset + 4).ok_or_else(|| format!("no register {offset:#x}"))?;
            place.copy_from_slice(&mask.to_le_bytes());
        }
    }
    masks.layout.disable_messages(&mut power_up);
    let vpd = model.vpd.as_ref().map(|text| model::rows(text, 256)).transpose()?;
    let dwords = |bytes: Vec<u8>| {
        bytes.chunks_exact(4).map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect()
    };
    Ok(Kind {
        vpd: vpd.map(dwords),
        power_up: Arc::new(power_up),
        masks: Arc::new(masks),
        sizes,
        reset_methods: model.reset_methods.clone(),
        virtual_function: virtual_function.cloned(),
    })
}

/// Whether `pf` names `model` as the kind of its VFs.
fn is_same(pf: &Model, model: &Model, models: &BTreeMap<String, Model>) -> bool {
    let named = pf.virtual_function.as_ref().and_then(|name| models.get(name));
    named.is_some_and(|named| std::ptr::eq(named, model))
}

/// Linux's flags of a range, from the low bits of its register.
fn flags(low: u8, rom: bool) -> u64 {
    let low = u64::from(low);
    if rom {
        return SIZE_ALIGNED | READ_ONLY | Resource::PREFETCH | Resource::MEMORY;
    }
    if low & 1 != 0 {
        return SIZE_ALIGNED | Resource::IO | low & 1;
    }
    let wide = if low & 6 == 4 { Resource::MEMORY_64 } else { 0 };
    let prefetch = if low & 8 != 0 { Resource::PREFETCH } else { 0 };
    SIZE_ALIGNED | Resource::MEMORY | wide | prefetch | low & 0xf
}

impl From<&DomainText> for Domain {
    fn from(text: &DomainText) -> Self {
        Self {
            id: DomId(text.id),
            name: text.name.clone(),
            kind: text.kind.clone(),
            // Without one: the same each time, and no two the same.
            uuid: text.uuid.unwrap_or(Uuid(u128::from(text.id).to_be_bytes())),
            passthrough: text.passthrough,
            shadow_paging: text.shadow_paging,
            without_acpi: text.without_acpi,
            pauses: text.paused.into(),
            has_run: !text.paused,
            suspended: false,
            frames: Default::default(),
            ports: Default::default(),
            lines: Default::default(),
            vectors: BTreeMap::new(),
        }
    }
}
