//! The registers that a reset of a whole bus clears and that are written back afterwards.
//!
//! Linux keeps them over a reset that it makes itself, and knows nothing of one that the service makes: so these are the registers that
//! Linux keeps (`pci_save_state` and what it calls, of 6.12), those of MSI and MSI-X excepted.

use std::io;

use super::register;
use crate::config::{Access, CapabilityList, ConfigSpace};
use crate::spec::{CapabilityId, ExtendedCapabilityId, express, header, sriov};

/// Registers of a function with a header of type 0, and what they held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptRegisters(Vec<(Access, u32)>);

/// Link Control 2, in the PCI Express capability (PCI Express 6.0, section 7.5.3.19).
const LINK_CONTROL_2: u16 = 0x30;
/// Device/Port Types without a link: Root Complex Integrated Endpoint, Root Complex Event Collector (section 7.5.3.2).
const WITHOUT_LINK: [u32; 2] = [9, 10];
/// Resizable BAR Control of the first of up to six BARs; bits 7:5 of that one count them (section 7.8.6.3).
const RESIZABLE_BAR_CONTROL: u16 = 8;
const MOST_RESIZABLE: u16 = 6;
/// System Page Size, in the SR-IOV capability (section 9.3.3.14).
const SYSTEM_PAGE_SIZE: u16 = 0x20;
const VF_BARS: u16 = 6;

/// By capability: offset and bytes of each register.
const EXTENDED: &[(ExtendedCapabilityId, &[(u16, u16)])] = &[
    (ExtendedCapabilityId::LTR, &[(0x04, 4)]),
    // Masks and severities, and the generation and check of ECRC.
    (ExtendedCapabilityId::AER, &[(0x08, 4), (0x0c, 4), (0x14, 4), (0x18, 4)]),
    (ExtendedCapabilityId::ACS, &[(0x06, 2)]),
    (ExtendedCapabilityId::ARI, &[(0x06, 2)]),
    (ExtendedCapabilityId::ATS, &[(0x06, 2)]),
    (ExtendedCapabilityId::TPH_REQUESTER, &[(0x08, 4)]),
    (ExtendedCapabilityId::PTM, &[(0x08, 4)]),
    // What enables the substates is in the first one, and comes last.
    (ExtendedCapabilityId::L1_PM_SUBSTATES, &[(0x0c, 4), (0x08, 4)]),
];

/// The header, in the order in which it is written back: what decodes addresses comes after the addresses.
const HEADER: [(u16, u16); 11] = [
    (header::INTERRUPT_LINE, 1),
    (header::ROM, 4),
    (header::BAR0 + 20, 4),
    (header::BAR0 + 16, 4),
    (header::BAR0 + 12, 4),
    (header::BAR0 + 8, 4),
    (header::BAR0 + 4, 4),
    (header::BAR0, 4),
    (header::LATENCY_TIMER, 1),
    (header::CACHE_LINE_SIZE, 1),
    (header::COMMAND, 2),
];

impl KeptRegisters {
    /// Reads them. An error where the function does not answer: nothing could be written back.
    pub fn read(config: &dyn ConfigSpace) -> io::Result<Self> {
        let bytes = config.read_all()?;
        if bytes.iter().all(|byte| *byte == 0xff) {
            return Err(io::Error::other("it answers all ones"));
        }
        let accesses = registers(config, &bytes)?;
        accesses
            .into_iter()
            .map(|access| Ok((access, config.read(access)?)))
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// Writes them back.
    pub fn write_back(&self, config: &dyn ConfigSpace) -> io::Result<()> {
        self.0.iter().try_for_each(|(access, value)| config.write(*access, *value))
    }
}

fn registers(config: &dyn ConfigSpace, bytes: &[u8]) -> io::Result<Vec<Access>> {
    let list = CapabilityList::walk(bytes);
    let mut found: Vec<(u16, u16, u16)> = Vec::new();
    // Before the BARs, whose writable bits it decides on.
    if let Some(at) = list.extended(ExtendedCapabilityId::RESIZABLE_BAR).map(|found| found.offset) {
        let first = config.read(register(at, RESIZABLE_BAR_CONTROL, 4).map_err(io::Error::other)?)?;
        let count = (first >> 5 & 7) as u16;
        found.extend((0..count.min(MOST_RESIZABLE)).map(|index| (at, RESIZABLE_BAR_CONTROL + 8 * index, 4)));
    }
    if let Some(at) = list.legacy(CapabilityId::PCI_EXPRESS).map(|found| found.offset) {
        found.extend(express_registers(config, at)?);
    }
    if let Some(at) = list.legacy(CapabilityId::PCI_X).map(|found| found.offset) {
        // PCI-X Command.
        found.push((at, 2, 2));
    }
    for (id, registers) in EXTENDED {
        let Some(at) = list.extended(*id).map(|found| found.offset) else { continue };
        found.extend(registers.iter().map(|(offset, size)| (at, *offset, *size)));
    }
    if let Some(at) = list.extended(ExtendedCapabilityId::SR_IOV).map(|found| found.offset) {
        found.push((at, SYSTEM_PAGE_SIZE, 4));
        found.extend((0..VF_BARS).map(|index| (at, sriov::VF_BAR0 + 4 * index, 4)));
        found.push((at, sriov::CONTROL, 2));
    }
    found.extend(HEADER.iter().map(|(offset, size)| (0, *offset, *size)));
    // What a malformed list puts across the end is not there.
    Ok(found.into_iter().filter_map(|(at, offset, size)| register(at, offset, size).ok()).collect())
}

fn express_registers(config: &dyn ConfigSpace, at: u16) -> io::Result<Vec<(u16, u16, u16)>> {
    let flags = config.read(register(at, 2, 2).map_err(io::Error::other)?)?;
    let (version, kind) = (flags & 0xf, flags >> 4 & 0xf);
    let has_link = !WITHOUT_LINK.contains(&kind);
    let mut found = vec![(at, express::DEVICE_CONTROL, 2)];
    if has_link {
        found.push((at, express::LINK_CONTROL, 2));
    }
    // Version 1 ends before them (PCI Express 1.1, section 7.8).
    if version >= 2 {
        found.push((at, express::DEVICE_CONTROL_2, 2));
        if has_link {
            found.push((at, LINK_CONTROL_2, 2));
        }
    }
    Ok(found)
}
