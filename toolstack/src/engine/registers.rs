//! The registers that tell of errors: read for the audit log, looked at for containment, written to mask.

use std::io;

use pciback::Sbdf;
use pciback::config::{Access, CapabilityList, ConfigSpace};
use pciback::platform::Host;
use pciback::spec::{CapabilityId, ExtendedCapabilityId};

use crate::protocol::RegisterValue;

/// Registers of the header (section 7.5.1.1).
const HEADER: [(u16, &str); 2] = [(0x04, "Command"), (0x06, "Status")];
/// Registers of the AER capability (PCI Express 6.0, section 7.8.4), by offset in it.
const AER: [(u16, &str); 5] = [
    (0x04, "Uncorrectable Error Status"),
    (0x08, "Uncorrectable Error Mask"),
    (0x0c, "Uncorrectable Error Severity"),
    (0x10, "Correctable Error Status"),
    (CORRECTABLE_MASK, "Correctable Error Mask"),
];
const CORRECTABLE_MASK: u16 = 0x14;
/// Registers of the PCI Express capability (section 7.5.3).
const EXPRESS: [(u16, &str); 2] = [(0x08, "Device Control"), (0x0a, "Device Status")];
/// DPC Status and Error Source ID (sections 7.9.14.4 and 7.9.14.5).
const DPC_STATUS: u16 = 0x08;
const DPC_SOURCE: u16 = 0x0a;
const DPC_TRIGGERED: u32 = 1 << 0;

fn read(config: &dyn ConfigSpace, offset: u16, size: u32) -> io::Result<u32> {
    config.read(Access::new(u32::from(offset), size).map_err(io::Error::other)?)
}

fn write(config: &dyn ConfigSpace, offset: u16, value: u32) -> io::Result<()> {
    config.write(Access::new(u32::from(offset), 4).map_err(io::Error::other)?, value)
}

/// Where a function's capabilities that have to do with errors are. Finding them reads all of config space, so it is done once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Layout {
    express: Option<u16>,
    aer: Option<u16>,
    dpc: Option<u16>,
}

impl Layout {
    /// Looks for them.
    pub(super) fn find(host: &dyn Host, address: Sbdf) -> io::Result<Self> {
        let list = CapabilityList::walk(&host.config(address).map_err(io::Error::other)?.read_all()?);
        let extended = |id| list.extended(id).map(|found| found.offset);
        Ok(Self {
            express: list.legacy(CapabilityId::PCI_EXPRESS).map(|found| found.offset),
            aer: extended(ExtendedCapabilityId::AER),
            dpc: extended(ExtendedCapabilityId::DPC),
        })
    }
}

/// What a function's registers hold of errors; nothing where it cannot be read.
pub(super) fn of_errors(host: &dyn Host, address: Sbdf, layout: Option<Layout>) -> Vec<RegisterValue> {
    let mut found = Vec::new();
    let Ok(config) = host.config(address) else { return found };
    let mut add = |at: u16, size: u32, name: &str| {
        if let Ok(value) = read(config.as_ref(), at, size) {
            found.push(RegisterValue { address, name: name.to_owned(), value });
        }
    };
    HEADER.iter().for_each(|(offset, name)| add(*offset, 2, name));
    let Some(layout) = layout.or_else(|| Layout::find(host, address).ok()) else { return found };
    if let Some(express) = layout.express {
        EXPRESS.iter().for_each(|(offset, name)| add(express + offset, 2, name));
    }
    if let Some(aer) = layout.aer {
        AER.iter().for_each(|(offset, name)| add(aer + offset, 4, name));
    }
    found
}

/// A port that has cut off what is below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Contained {
    /// The function that made it, where it was one below the port.
    pub source: Option<Sbdf>,
}

/// Looks whether a port has triggered Downstream Port Containment.
pub(super) fn containment(host: &dyn Host, port: Sbdf, layout: Layout) -> io::Result<Option<Contained>> {
    let Some(at) = layout.dpc else { return Ok(None) };
    let config = host.config(port).map_err(io::Error::other)?;
    let status = read(config.as_ref(), at + DPC_STATUS, 2)?;
    if status & DPC_TRIGGERED == 0 || status == 0xffff {
        return Ok(None);
    }
    // DPC Trigger Reason: 1 and 2 are an ERR_NONFATAL and an ERR_FATAL message from below.
    let source = match status >> 1 & 3 {
        1 | 2 => {
            let id = read(config.as_ref(), at + DPC_SOURCE, 2)?;
            Some(Sbdf::from_devfn(port.segment(), (id >> 8) as u8, id as u8))
        }
        _ => None,
    };
    Ok(Some(Contained { source }))
}

/// Where correctable errors are masked, and what stood there before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Masked {
    /// The function, or its PF: a VF's own mask may be read-only (section 9.4.2 of SR-IOV).
    pub at: Sbdf,
    offset: u16,
    before: u32,
}

impl Masked {
    /// Takes over what another function's mask at the same place had found before, if that came first.
    pub(super) fn inherit(&mut self, earlier: Self) {
        self.before &= earlier.before;
    }
}

/// Masks all correctable errors of a function.
pub(super) fn mask(host: &dyn Host, address: Sbdf, pf: Option<Sbdf>) -> Result<Masked, String> {
    let bits = pciback::spec::CORRECTABLE_ERRORS.iter().fold(0, |bits, (bit, _)| bits | bit);
    let mut why = "no writable mask in an AER capability of its own or of its PF".to_owned();
    for at in [address].into_iter().chain(pf) {
        let tried = || -> io::Result<Option<Masked>> {
            let Some(aer) = Layout::find(host, at)?.aer else { return Ok(None) };
            let config = host.config(at).map_err(io::Error::other)?;
            let offset = aer + CORRECTABLE_MASK;
            let before = read(config.as_ref(), offset, 4)?;
            write(config.as_ref(), offset, before | bits)?;
            // Some bits need not be writable.
            let after = read(config.as_ref(), offset, 4)?;
            let stuck = after != before || before & bits == bits;
            Ok(stuck.then_some(Masked { at, offset, before }))
        };
        match tried() {
            Ok(Some(masked)) => return Ok(masked),
            Ok(None) => {}
            Err(error) => why = format!("{at}: {error}"),
        }
    }
    Err(why)
}

/// Lets them through again.
pub(super) fn unmask(host: &dyn Host, masked: Masked) -> Result<(), String> {
    let write = || -> io::Result<()> {
        let config = host.config(masked.at).map_err(io::Error::other)?;
        write(config.as_ref(), masked.offset, masked.before)
    };
    write().map_err(|error| format!("{}: {error}", masked.at))
}
