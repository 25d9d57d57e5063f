//! How many bytes each capability of a function takes, and which registers it has there.

use super::bytes::Bytes;
use super::interrupts::{MsiCapability, MsixCapability};
use super::list::{Capability, CapabilityList, ListProblem, MsixFault};
use crate::host::Resource;
use crate::spec::legacy::{MESSAGE_CONTROL, MSI_ADDRESS_64, MSI_MASKABLE};
use crate::spec::{self, AnyId, CapabilityId, Length, header};

impl CapabilityList {
    /// The range of bytes that belongs to a capability: what its specification says, cut at the end of its region and, where its
    /// last registers are optional or unknown, at the next capability.
    pub fn extent(&self, capability: &Capability, bytes: &[u8]) -> std::ops::Range<u16> {
        let region_end = match capability.id {
            AnyId::Legacy(_) => bytes.len().min(usize::from(header::EXTENDED)),
            AnyId::Extended(_) => bytes.len().min(4096),
        } as u16;
        let next =
            self.capabilities.iter().map(|other| other.offset).filter(|at| *at > capability.offset).min();
        let (length, optional) = length(capability, bytes);
        let end = capability.offset.saturating_add(length).min(region_end);
        let end = if optional { end.min(next.unwrap_or(region_end)) } else { end };
        capability.offset..end
    }

    /// Capabilities that run over the end of their region or into another.
    pub(super) fn crowding(&self, bytes: &[u8]) -> Vec<ListProblem> {
        let mut problems = Vec::new();
        for capability in &self.capabilities {
            let at = capability.offset;
            let extent = self.extent(capability, bytes);
            let (length, optional) = length(capability, bytes);
            if extent.end < at.saturating_add(length) && !optional {
                problems.push(ListProblem::Truncated { at, length });
            }
            let within =
                self.capabilities.iter().find(|other| other.offset > at && extent.contains(&other.offset));
            if let Some(other) = within {
                problems.push(ListProblem::Overlap { at, with: other.offset });
            }
        }
        problems
    }
}

/// How many bytes, and whether the last of them are optional.
fn length(capability: &Capability, bytes: &[u8]) -> (u16, bool) {
    // Even if its length is wrong, its header belongs to it: the list links are there.
    let header = match capability.id {
        AnyId::Legacy(_) => 2,
        AnyId::Extended(_) => 4,
    };
    let Some(spec) = spec::capability(capability.id) else { return (header, false) };
    let (length, optional) = measure(&spec.length, capability.offset, bytes);
    (length.max(header), optional)
}

fn measure(length: &Length, base: u16, bytes: &[u8]) -> (u16, bool) {
    let at = |offset: u16| base.saturating_add(offset);
    match *length {
        Length::Fixed(length) => (length, false),
        Length::UpTo(length) => (length, true),
        Length::Byte(offset) => (u16::from(bytes.byte(at(offset))).max(3), true),
        Length::High12(offset) => ((bytes.dword(at(offset)) >> 20).max(8) as u16, true),
        Length::Msi => {
            let control = bytes.word(at(MESSAGE_CONTROL));
            let wide = if control & MSI_ADDRESS_64 != 0 { 4 } else { 0 };
            let masks = if control & MSI_MASKABLE != 0 { 8 } else { 0 };
            (0x0c + wide + masks, false)
        }
        // Version 1: an endpoint's registers end with Link Status, the rest of the 0x3c bytes is optional.
        // An integrated endpoint's, and an event collector's, end with Device Status: they have no link.
        Length::Express => match (bytes.byte(at(2)) & 0xf, bytes.byte(at(2)) >> 4) {
            (0 | 1, 0x9 | 0xa) => (0x0c, false),
            (0 | 1, _) => (0x14, false),
            _ => (0x3c, true),
        },
        Length::Counted { base, unit, at: field, shift, mask, more } => {
            let count = ((bytes.dword(at(field)) >> shift) as u16 & mask) + more;
            (base.saturating_add(unit.saturating_mul(count)), true)
        }
        Length::Cases { at: dword, cases } => {
            let dword = bytes.dword(at(dword));
            let case = cases.iter().find(|(mask, value, _)| dword & mask == *value);
            case.map_or((4, false), |(_, _, length)| measure(length, base, bytes))
        }
        Length::Channels => (channels(base, bytes), true),
    }
}

/// To the end of the resources or of the last table. Tables are in units of 16 bytes; 128 phases of VC arbitration take four of
/// them, 256 phases of port arbitration at most sixteen.
fn channels(base: u16, bytes: &[u8]) -> u16 {
    let dword = |offset: u16| bytes.dword(base.saturating_add(offset));
    let table = |offset: u16, units| match dword(offset) >> 24 {
        0 => 0,
        first => 16 * (first as u16 + units),
    };
    let resources = (dword(4) & 7) as u16 + 1;
    let ports = (0..resources).map(|index| table(0x10 + 0x0c * index, 16)).max().unwrap_or(0);
    (0x10 + 0x0c * resources).max(table(8, 4)).max(ports)
}

/// The MSI capability of a function.
pub(super) fn msi(list: &CapabilityList, bytes: &[u8]) -> Option<MsiCapability> {
    let offset = list.legacy(CapabilityId::MSI)?.offset;
    let control = bytes.word(offset + MESSAGE_CONTROL);
    // Multiple Message Capable is a power of two; 6 and 7 are reserved.
    let vectors = 1 << ((control >> 1) & 7).min(5);
    let (address_64, maskable) = (control & MSI_ADDRESS_64 != 0, control & MSI_MASKABLE != 0);
    Some(MsiCapability { offset, address_64, maskable, vectors })
}

/// The MSI-X capability of a function.
pub(crate) fn msix(list: &CapabilityList, bytes: &[u8]) -> Option<MsixCapability> {
    let offset = list.legacy(CapabilityId::MSI_X)?.offset;
    let (table, pba) = (bytes.dword(offset + 4), bytes.dword(offset + 8));
    Some(MsixCapability {
        offset,
        table_size: (bytes.word(offset + MESSAGE_CONTROL) & 0x7ff) + 1,
        table_bar: table as u8 & 7,
        table_offset: table & !7,
        pba_bar: pba as u8 & 7,
        pba_offset: pba & !7,
    })
}

/// What is wrong with the places that an MSI-X capability names. Drivers find their own registers there, so that guarding such
/// places breaks the device, and Xen would write messages into whatever is behind the end of a BAR.
pub(super) fn msix_fault(msix: &MsixCapability, resources: &[Resource]) -> Option<MsixFault> {
    let (table, pba) = (msix.table(), msix.pba());
    for part in [table, pba] {
        let bar = part.bar;
        if bar > 5 {
            return Some(MsixFault::ReservedBar);
        }
        // A dump does not show the BARs of a VF without its PF.
        let known = resources.get(usize::from(bar)).filter(|resource| resource.exists());
        let Some(resource) = known else { continue };
        if resource.is_io() {
            return Some(MsixFault::IoSpace { bar });
        }
        if part.end() > resource.size {
            return Some(MsixFault::BehindTheEnd { bar });
        }
    }
    let overlap = table.bar == pba.bar && table.offset < pba.end() && pba.offset < table.end();
    overlap.then_some(MsixFault::Overlap { bar: table.bar })
}
