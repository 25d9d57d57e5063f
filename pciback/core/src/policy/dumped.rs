//! Describes the functions of a dump to the filter, as far as a dump shows them.

use std::collections::HashMap;

use super::matching::Kind;
use crate::Sbdf;
use crate::config::bytes::Bytes;
use crate::config::shape;
use crate::config::{CapabilityList, FunctionKind, FunctionSpec, Identity, MsixCapability};
use crate::dump::{DumpedFunction, Region};
use crate::host::Resource;
use crate::spec::{ExtendedCapabilityId, header, sriov};

/// What is known of a VF from its PF's part of the same dump.
struct Parent<'a> {
    pf: &'a DumpedFunction,
    index: u16,
}

/// A function of a dump.
#[derive(Debug, Clone)]
pub struct Dumped {
    /// As the filter wants to know it.
    pub spec: FunctionSpec,
    /// What the dump does not show, one sentence each.
    pub unknown: Vec<String>,
}

/// Every function of a dump. VFs are known by an enabled SR-IOV capability in the same dump, or by ids that read all ones, as a VF's
/// do (PCI Express 6.0, section 9.3.4.1.1); `kind` decides for all of them instead. The sizes of BARs are those
/// that lspci -v printed; one that is not there is the smallest that a BAR can have, and is named in [`Dumped::unknown`].
pub fn specs(functions: &[DumpedFunction], kind: Option<Kind>) -> Vec<Dumped> {
    let parents = parents(functions);
    functions.iter().map(|function| spec(function, parents.get(&function.address), kind)).collect()
}

fn sriov_capability(bytes: &[u8]) -> Option<u16> {
    let offset = CapabilityList::walk(bytes).extended(ExtendedCapabilityId::SR_IOV)?.offset;
    // All registers up to the VF BARs must be there.
    (usize::from(offset) + 0x40 <= bytes.len()).then_some(offset)
}

/// The VFs that each PF of the dump has enabled.
fn parents(functions: &[DumpedFunction]) -> HashMap<Sbdf, Parent<'_>> {
    let mut parents = HashMap::new();
    for pf in functions {
        let Some(at) = sriov_capability(&pf.bytes) else { continue };
        let register = |offset| pf.bytes.word(at + offset);
        if register(sriov::CONTROL) & sriov::VF_ENABLE == 0 {
            continue;
        }
        let (first, stride) =
            (u32::from(register(sriov::FIRST_VF_OFFSET)), u32::from(register(sriov::VF_STRIDE)));
        // No more VFs than there are functions to be them.
        for index in 0..register(sriov::NUM_VFS).min(functions.len() as u16) {
            if let Some(vf) = pf.address.offset_by(first + stride * u32::from(index)) {
                parents.entry(vf).or_insert(Parent { pf, index });
            }
        }
    }
    parents
}

fn spec(function: &DumpedFunction, parent: Option<&Parent<'_>>, kind: Option<Kind>) -> Dumped {
    let bytes = function.bytes.clone();
    let vf_ids = bytes.dword(header::VENDOR_ID) == u32::MAX && bytes.dword(header::COMMAND) != u32::MAX;
    let is_virtual = match kind {
        Some(kind) => kind == Kind::Virtual,
        None => parent.is_some() || vf_ids,
    };
    let class = bytes.dword(header::REVISION_ID);
    let mut identity = Identity {
        vendor: bytes.word(header::VENDOR_ID),
        device: bytes.word(header::DEVICE_ID),
        subsystem_vendor: bytes.word(header::SUBSYSTEM_VENDOR_ID),
        subsystem: bytes.word(header::SUBSYSTEM_VENDOR_ID + 2),
        class: class >> 8,
        revision: class as u8,
    };
    let mut ranges = Ranges {
        resources: [Resource::default(); 13],
        regions: &function.regions,
        msix: shape::msix(&CapabilityList::walk(&bytes), &bytes),
        unknown: Vec::new(),
    };
    let kind = if is_virtual {
        let pf_bytes = parent.map(|parent| parent.pf.bytes.clone()).unwrap_or_default();
        if let Some(at) = sriov_capability(&pf_bytes) {
            identity.vendor = pf_bytes.word(header::VENDOR_ID);
            identity.device = pf_bytes.word(at + sriov::VF_DEVICE_ID);
            ranges.bars(|index| pf_bytes.dword(at + sriov::VF_BAR0 + 4 * index));
        }
        FunctionKind::Virtual {
            physical_function: parent.map_or(function.address, |parent| parent.pf.address),
            pf_bytes,
            index: parent.map_or(0, |parent| parent.index),
        }
    } else {
        ranges.bars(|index| bytes.dword(header::BAR0 + 4 * index));
        let rom = bytes.dword(header::ROM) & 0xffff_f800;
        if !matches!(rom, 0 | 0xffff_f800) {
            ranges.set(6, u64::from(rom), Resource::MEMORY);
        }
        FunctionKind::Physical
    };
    let line = u32::from(bytes.get(usize::from(header::INTERRUPT_LINE)).copied().unwrap_or(0));
    let Ranges { resources, unknown, .. } = ranges;
    let spec =
        FunctionSpec { address: function.address, bytes, resources, identity, kind, gsi: line, rom: None };
    Dumped { spec, unknown }
}

/// The ranges of a function, as its registers show where they begin and the dump's text how large they are.
struct Ranges<'a> {
    resources: [Resource; 13],
    regions: &'a [Region],
    msix: Option<MsixCapability>,
    unknown: Vec<String>,
}

impl Ranges<'_> {
    /// Those of six BARs.
    fn bars(&mut self, register: impl Fn(u16) -> u32) {
        let mut index = 0;
        while index < 6 {
            let low = register(index);
            let (flags, mask) = match low {
                0 | u32::MAX => (0, 0),
                _ if low & 1 != 0 => (Resource::IO, 0xffff_fffc),
                _ => {
                    let prefetch = if low & 8 != 0 { Resource::PREFETCH } else { 0 };
                    let wide = if low & 6 == 4 && index < 5 { Resource::MEMORY_64 } else { 0 };
                    (Resource::MEMORY | prefetch | wide, 0xffff_fff0)
                }
            };
            let is_wide = flags & Resource::MEMORY_64 != 0;
            let high = if is_wide { u64::from(register(index + 1)) << 32 } else { 0 };
            if flags != 0 {
                self.set(usize::from(index), high | u64::from(low & mask), flags);
            }
            index += if is_wide { 2 } else { 1 };
        }
    }

    /// One range, the size of which is in the dump's text or unknown.
    fn set(&mut self, index: usize, start: u64, flags: u64) {
        let found = self.regions.iter().find(|region| region.start == start && start != 0);
        let smallest = self.smallest(index, flags);
        let size = found.map_or(smallest, |region| region.size);
        if found.is_none() {
            let name = if index == 6 { "the expansion ROM".to_owned() } else { format!("BAR {index}") };
            let unit = if flags & Resource::IO != 0 { "ports" } else { "bytes" };
            let text = format!(
                "the size of {name} is unknown, {smallest} {unit} are shown; 'lspci -v -xxxx' prints sizes"
            );
            self.unknown.push(text);
        }
        self.resources[index] = Resource { start, size, flags };
    }

    /// The smallest size that a BAR can have: what its register can ask for (PCI Express 6.0, sections 7.5.1.2.1 and 7.5.1.2.4), or what
    /// holds the MSI-X structures in it.
    fn smallest(&self, index: usize, flags: u64) -> u64 {
        let least = match index {
            6 => 0x800,
            _ if flags & Resource::IO != 0 => return 4,
            _ => 16,
        };
        let parts = self.msix.iter().flat_map(|msix| [msix.table(), msix.pba()]);
        let within = parts.filter(|part| usize::from(part.bar) == index);
        within.fold(least, |size, part| size.max(part.end().next_power_of_two()))
    }
}
