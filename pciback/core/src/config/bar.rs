//! Virtual BARs: what kind and size each has. Sizes come from the host's resources, never from sizing live hardware.

use super::bytes::Bytes;
use super::function::{FunctionKind, FunctionSpec, GuestRom};
use super::list::CapabilityList;
use crate::host::Resource;
use crate::spec::{ExtendedCapabilityId, header, sriov};

/// What kind of range a BAR decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BarKind {
    /// I/O space.
    Io,
    /// Memory space, one register.
    Memory32,
    /// Memory space, this register and the next.
    Memory64,
    /// The expansion ROM.
    Rom,
}

/// One BAR of a function as its guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bar {
    /// 0-5, 6 for the expansion ROM.
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
    /// First address on the host; 0 of an expansion ROM that is a copy, and of one that the guest is not given.
    pub start: u64,
    /// Bytes as the host counts them.
    pub size: u64,
}

impl Bar {
    /// The offset of its (first) register.
    pub const fn offset(&self) -> u16 {
        match self.kind {
            BarKind::Rom => header::ROM,
            _ => header::BAR0 + 4 * self.index as u16,
        }
    }

    /// The bits of the register pair that a write changes: those above the size (PCI Express 6.0, section 7.5.1.2.1).
    pub fn address_mask(&self) -> u64 {
        // A power of two in the specification; a range of another size gets the next one, the largest below 2^64.
        let size = self.size.checked_next_power_of_two().unwrap_or(1 << 63);
        let mask = !(size - 1);
        match self.kind {
            BarKind::Io => mask & 0xffff_fffc,
            BarKind::Memory32 => mask & 0xffff_fff0,
            BarKind::Memory64 => mask & !0xf,
            BarKind::Rom => mask & 0xffff_f800,
        }
    }

    /// The constant low bits: I/O or memory, 64-bit, prefetchable.
    pub const fn flags(&self) -> u32 {
        let prefetchable = if self.prefetchable { 8 } else { 0 };
        match self.kind {
            BarKind::Io => 1,
            BarKind::Memory32 => prefetchable,
            BarKind::Memory64 => 4 | prefetchable,
            BarKind::Rom => 0,
        }
    }

    /// What the register pair holds before the guest writes: the host's address, which is what a PV guest maps.
    pub fn initial(&self) -> u64 {
        self.start & self.address_mask() | u64::from(self.flags())
    }

    /// All BARs of a function, in order.
    pub fn of(spec: &FunctionSpec) -> Vec<Self> {
        let registers = match &spec.kind {
            FunctionKind::Physical => spec.bytes.get(usize::from(header::BAR0)..),
            FunctionKind::Virtual { pf_bytes, .. } => CapabilityList::walk(pf_bytes)
                .extended(ExtendedCapabilityId::SR_IOV)
                .and_then(|capability| pf_bytes.get(usize::from(capability.offset + sriov::VF_BAR0)..)),
        }
        .unwrap_or_default();
        let mut bars = Vec::new();
        let mut index = 0;
        while index < 6 {
            let Some(resource) = spec.resources.get(usize::from(index)) else { break };
            let bar = Self::from_register(index, registers.dword(4 * u16::from(index)), resource);
            index += if bar.is_some_and(|bar| bar.kind == BarKind::Memory64) { 2 } else { 1 };
            bars.extend(bar);
        }
        let hosts = &spec.resources[6];
        let is_memory = hosts.exists() && !hosts.is_io();
        let rom = match spec.rom {
            Some(GuestRom::Copy(bytes)) => Some((0, u64::from(bytes))),
            Some(GuestRom::OfHost) => is_memory.then_some((hosts.start, hosts.size)),
            None => is_memory.then_some((0, hosts.size)),
        };
        bars.extend(rom.map(|(start, size)| Self {
            index: 6,
            kind: BarKind::Rom,
            prefetchable: false,
            start,
            size,
        }));
        bars
    }

    fn from_register(index: u8, register: u32, resource: &Resource) -> Option<Self> {
        // One without an address reads 0, as one that is not implemented: a guest would map what lies at address 0.
        if !resource.exists() || resource.flags & (Resource::ENHANCED_ALLOCATION | Resource::UNSET) != 0 {
            return None;
        }
        // A register that says nothing (never assigned, or a function that just vanished) leaves it to the host's flags, and
        // so does one that contradicts them.
        let says_io = register & 1 != 0;
        let silent = matches!(register, 0 | u32::MAX) || says_io != resource.is_io();
        let (wide, prefetchable) = if silent {
            (resource.flags & Resource::MEMORY_64 != 0, resource.flags & Resource::PREFETCH != 0)
        } else {
            (register & 6 == 4, register & 8 != 0)
        };
        let kind = match (resource.is_io(), wide && index < 5) {
            (true, _) => BarKind::Io,
            (false, true) => BarKind::Memory64,
            (false, false) => BarKind::Memory32,
        };
        let prefetchable = prefetchable && kind != BarKind::Io;
        Some(Self { index, kind, prefetchable, start: resource.start, size: resource.size })
    }
}
