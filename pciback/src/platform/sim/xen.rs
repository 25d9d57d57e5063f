//! What Xen keeps of functions and domains, and how it answers: `docs/xen-answers.md` says what was seen in the lab.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::Answer;
use super::model::ReservedMemory;
use super::ranges::Ranges;
use crate::platform::{Edit, MsiSource, ResetReach};
use crate::policy::RdmPolicy;
use crate::{DomId, Sbdf, Uuid};

/// Who owns a function in Xen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owner {
    /// dom0.
    Host,
    /// The quarantine domain.
    Quarantine,
    /// A guest.
    Guest(DomId),
}

/// A vector that is mapped for a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vector {
    /// The function that sends it.
    pub address: Sbdf,
    /// Which of its interrupts; `None` for MSI.
    pub entry: Option<u16>,
}

/// A function as Xen found it when it was reported.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Device {
    pub owner: Owner,
    pub physical_function: Option<Sbdf>,
    pub msi: bool,
    /// Entries of its MSI-X table; 0 where it has none.
    pub entries: u16,
    /// Preparing it and each mapped entry count.
    pub used_entries: u32,
    /// A PF was withdrawn before its VFs, which Xen 4.20 holds against all of them.
    pub broken: bool,
    pub reserved_memory: Option<ReservedMemory>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Domain {
    pub id: DomId,
    pub name: String,
    pub kind: String,
    pub uuid: Uuid,
    pub passthrough: bool,
    pub shadow_paging: bool,
    /// Whether it has no ACPI.
    #[serde(default)]
    pub without_acpi: bool,
    /// How often it is paused.
    pub pauses: u32,
    pub has_run: bool,
    #[serde(default)]
    pub suspended: bool,
    pub frames: Ranges,
    pub ports: Ranges,
    /// Interrupt lines that it may use and that are mapped to it, by their number.
    pub lines: BTreeSet<u32>,
    /// By pirq.
    pub vectors: BTreeMap<u32, Vector>,
}

pub(super) struct Xen {
    pub version: (u32, u32),
    pub extra_pirqs: u32,
    pub devices: BTreeMap<Sbdf, Device>,
    pub domains: BTreeMap<DomId, Domain>,
    /// Lines that dom0 has set up.
    pub lines: BTreeSet<u32>,
    /// Interrupts of the host that were mapped to a number that had one already, and that cannot be unmapped any more.
    pub lost: u32,
    /// The resets that dom0 has told of, in order.
    pub resets: Vec<(Sbdf, ResetReach)>,
}

/// Interrupt lines of the host; a guest's pirqs lie behind them.
const LINES: u32 = 24;
/// The first version with `PHYSDEVOP_pci_device_reset`.
const NOTES_RESETS: (u32, u32) = (4, 20);
/// Page frames of 52 bits of address, and ports.
const FRAMES: u64 = 1 << 40;
const PORTS: u64 = 1 << 16;
/// What dom0 itself may not touch: the local APIC; the interrupt controllers, the timer and Xen's serial port.
const XEN_FRAMES: [(u64, u64); 1] = [(0xfee00, 0xfee01)];
const XEN_PORTS: [(u64, u64); 4] = [(0x20, 0x22), (0x40, 0x44), (0xa0, 0xa2), (0x3f8, 0x400)];

impl Xen {
    pub fn device(&mut self, address: Sbdf) -> Answer<&mut Device> {
        self.devices.get_mut(&address).ok_or(Errno::ENODEV)
    }

    pub fn domain(&mut self, id: DomId) -> Answer<&mut Domain> {
        self.domains.get_mut(&id).ok_or(Errno::ESRCH)
    }

    /// `false`: this version has no such call.
    pub fn note_reset(&mut self, address: Sbdf, reach: ResetReach) -> Answer<bool> {
        if self.version < NOTES_RESETS {
            return Ok(false);
        }
        self.device(address)?;
        self.resets.push((address, reach));
        Ok(true)
    }

    /// A domain for assignment; dom0 cannot be one.
    fn assignee(&self, id: DomId) -> Answer<Owner> {
        match id {
            DomId::IO => Ok(Owner::Quarantine),
            DomId::DOM0 => Err(Errno::EINVAL),
            id => {
                let domain = self.domains.get(&id).ok_or(Errno::ESRCH)?;
                if domain.passthrough { Ok(Owner::Guest(id)) } else { Err(Errno::EOPNOTSUPP) }
            }
        }
    }

    /// Takes a report; a function that is known stays as it is.
    pub fn add(&mut self, address: Sbdf, device: Device) -> Answer<()> {
        if let Some(physical_function) = device.physical_function {
            self.device(physical_function)?;
        }
        self.devices.entry(address).or_insert(device);
        Ok(())
    }

    /// Forgets a function, and takes it from its guest without asking.
    pub fn remove(&mut self, address: Sbdf) -> Answer<()> {
        self.device(address)?;
        // 4.17 does not look; the links from PF to VF came later.
        if self.version >= (4, 20) {
            let family = |(_, device): &(&Sbdf, &mut Device)| device.physical_function == Some(address);
            let mut vfs = 0;
            for (_, vf) in self.devices.iter_mut().filter(family) {
                vf.broken = true;
                vfs += 1;
            }
            if vfs > 0 {
                self.device(address)?.broken = true;
                return Err(Errno::EBUSY);
            }
        }
        self.devices.remove(&address);
        for domain in self.domains.values_mut() {
            domain.vectors.retain(|_, vector| vector.address != address);
        }
        Ok(())
    }

    pub fn assign(&mut self, id: DomId, address: Sbdf, rdm: RdmPolicy) -> Answer<()> {
        let owner = self.assignee(id)?;
        let device = self.device(address)?;
        if matches!(device.owner, Owner::Guest(_)) {
            return Err(Errno::EBUSY);
        }
        if device.broken && owner != Owner::Quarantine {
            return Err(Errno::EBADF);
        }
        match device.reserved_memory.filter(|_| rdm == RdmPolicy::Strict) {
            Some(ReservedMemory::Shared) => return Err(Errno::EPERM),
            // The quarantine domain has no memory.
            Some(ReservedMemory::InGuestMemory) if owner != Owner::Quarantine => return Err(Errno::EBUSY),
            _ => {}
        }
        device.owner = owner;
        Ok(())
    }

    pub fn deassign(&mut self, id: DomId, address: Sbdf) -> Answer<()> {
        if id == DomId::DOM0 {
            return Err(Errno::EINVAL);
        }
        let owner = self.assignee(id)?;
        let device = self.device(address)?;
        if device.owner != owner {
            return Err(Errno::ENODEV);
        }
        device.owner = if owner == Owner::Quarantine { Owner::Host } else { Owner::Quarantine };
        Ok(())
    }

    pub fn assignable(&self, address: Sbdf) -> bool {
        self.devices.get(&address).is_some_and(|device| !matches!(device.owner, Owner::Guest(_)))
    }

    /// `memory`: whether the function, or a VF's PF, decodes memory.
    pub fn prepare_msix(&mut self, address: Sbdf, memory: bool) -> Answer<bool> {
        let device = self.device(address)?;
        if device.entries == 0 {
            // Xen 4.17 would panic; the real platform asks hardware first and refuses.
            return Err(Errno::EINVAL);
        }
        if device.used_entries > 0 {
            return Ok(false);
        }
        if !memory {
            return Err(Errno::ENXIO);
        }
        device.used_entries = 1;
        Ok(true)
    }

    pub fn release_msix(&mut self, address: Sbdf) -> Answer<()> {
        let device = self.device(address)?;
        if device.used_entries != 1 {
            return Err(Errno::EBUSY);
        }
        device.used_entries = 0;
        Ok(())
    }

    pub fn map_msi(&mut self, id: DomId, address: Sbdf, source: MsiSource, memory: bool) -> Answer<u32> {
        let pirqs = LINES..LINES + self.extra_pirqs;
        let taken = &self.domain(id)?.vectors;
        let pirq = pirqs.rev().find(|pirq| !taken.contains_key(pirq)).ok_or(Errno::ENOSPC)?;
        self.take_entry(id, address, source, memory)?;
        self.domain(id)?.vectors.insert(pirq, Vector { address, entry: entry_of(source) });
        Ok(pirq)
    }

    pub fn map_msi_as(
        &mut self,
        id: DomId,
        address: Sbdf,
        source: MsiSource,
        memory: bool,
        pirq: u32,
    ) -> Answer<()> {
        if pirq >= LINES + self.extra_pirqs {
            return Err(Errno::EINVAL);
        }
        let domain = self.domain(id)?;
        if domain.vectors.contains_key(&pirq) || domain.lines.contains(&pirq) {
            self.lost += 1;
            return Ok(());
        }
        self.take_entry(id, address, source, memory)?;
        self.domain(id)?.vectors.insert(pirq, Vector { address, entry: entry_of(source) });
        Ok(())
    }

    fn take_entry(&mut self, id: DomId, address: Sbdf, source: MsiSource, memory: bool) -> Answer<()> {
        let device = self.device(address)?;
        if device.owner != Owner::Guest(id) {
            return Err(Errno::ENODEV);
        }
        match source {
            MsiSource::Msi if !device.msi => Err(Errno::ENODEV),
            MsiSource::Msi => Ok(()),
            MsiSource::MsiX { .. } if device.entries == 0 => Err(Errno::ENODEV),
            MsiSource::MsiX { entry, .. } if entry >= device.entries => Err(Errno::EINVAL),
            MsiSource::MsiX { .. } if !memory => Err(Errno::ENXIO),
            MsiSource::MsiX { .. } if device.used_entries == 0 => Err(Errno::ENODATA),
            MsiSource::MsiX { .. } => {
                // An entry that is mapped is mapped once more: Xen does not count, callers must.
                device.used_entries += 1;
                Ok(())
            }
        }
    }

    pub fn unmap_pirq(&mut self, id: DomId, pirq: u32) -> Answer<()> {
        let domain = self.domain(id)?;
        let Some(vector) = domain.vectors.remove(&pirq) else {
            return domain.lines.remove(&pirq).then_some(()).ok_or(Errno::EINVAL);
        };
        if let (Some(_), Some(device)) = (vector.entry, self.devices.get_mut(&vector.address)) {
            device.used_entries = device.used_entries.saturating_sub(1);
        }
        Ok(())
    }

    pub fn map_gsi(&mut self, id: DomId, gsi: u32) -> Answer<u32> {
        let set_up = self.lines.contains(&gsi);
        let domain = self.domain(id)?;
        if gsi >= LINES {
            return Err(Errno::EINVAL);
        }
        if !set_up {
            return Err(Errno::EPERM);
        }
        domain.lines.insert(gsi);
        Ok(gsi)
    }

    pub fn frames(&mut self, id: DomId, first: u64, count: u64, edit: Edit) -> Answer<()> {
        let domain = self.domain(id)?;
        change(&mut domain.frames, first, count, FRAMES, &XEN_FRAMES, edit)
    }

    pub fn ports(&mut self, id: DomId, first: u32, count: u32, edit: Edit) -> Answer<()> {
        let domain = self.domain(id)?;
        change(&mut domain.ports, first.into(), count.into(), PORTS, &XEN_PORTS, edit)
    }

    /// Takes back one pause.
    pub fn unpause(&mut self, id: DomId) -> Answer<()> {
        let domain = self.domain(id)?;
        domain.pauses = domain.pauses.checked_sub(1).ok_or(Errno::EINVAL)?;
        domain.has_run |= domain.pauses == 0;
        Ok(())
    }

    /// A domain is gone: its functions go into quarantine, its interrupts and permissions are forgotten.
    pub fn destroy(&mut self, id: DomId) {
        let pirqs: Vec<u32> =
            self.domains.get(&id).map(|domain| domain.vectors.keys().copied().collect()).unwrap_or_default();
        for pirq in pirqs {
            // It was listed a moment ago.
            let _ = self.unmap_pirq(id, pirq);
        }
        self.domains.remove(&id);
        for device in self.devices.values_mut().filter(|device| device.owner == Owner::Guest(id)) {
            device.owner = Owner::Quarantine;
        }
    }
}

fn entry_of(source: MsiSource) -> Option<u16> {
    matches!(source, MsiSource::MsiX { .. }).then(|| source.entry())
}

fn change(
    set: &mut Ranges,
    first: u64,
    count: u64,
    limit: u64,
    xens: &[(u64, u64)],
    edit: Edit,
) -> Answer<()> {
    let end = first.checked_add(count).filter(|end| count > 0 && *end <= limit).ok_or(Errno::EINVAL)?;
    if xens.iter().any(|(start, stop)| first < *stop && *start < end) {
        return Err(Errno::EPERM);
    }
    match edit {
        Edit::Add => set.insert(first, end),
        Edit::Remove => set.remove(first, end),
    }
    Ok(())
}
