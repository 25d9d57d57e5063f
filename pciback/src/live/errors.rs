//! The registers that control and report errors: AER, Device Control and Status, DPC.

use std::io;

use super::{Changed, change, register};
use crate::Sbdf;
use crate::config::{Access, CapabilityList, ConfigSpace};
use crate::containment::Setting;
use crate::platform::Host;
use crate::spec::{CORRECTABLE_ERRORS, CapabilityId, ExtendedCapabilityId, aer, dpc, express, header};

/// Registers of the header (section 7.5.1.1).
const HEADER: [(Access, &str); 2] =
    [(super::COMMAND, "Command"), (Access::fixed::<{ header::STATUS }, 2>(), "Status")];
/// Status: what a written 1 clears (section 7.5.1.1.4).
const STATUS_EVENTS: u32 = 0xf900;
/// Device Status: likewise, of errors (section 7.5.3.5).
const DEVICE_STATUS_EVENTS: u32 = 0x000f;
/// Registers of the AER capability (PCI Express 6.0, section 7.8.4), by offset in it.
const AER: [(u16, &str); 5] = [
    (aer::UNCORRECTABLE_STATUS, "Uncorrectable Error Status"),
    (aer::UNCORRECTABLE_MASK, "Uncorrectable Error Mask"),
    (aer::UNCORRECTABLE_SEVERITY, "Uncorrectable Error Severity"),
    (aer::CORRECTABLE_STATUS, "Correctable Error Status"),
    (aer::CORRECTABLE_MASK, "Correctable Error Mask"),
];
/// Registers of the PCI Express capability (section 7.5.3).
const EXPRESS: [(u16, &str); 2] =
    [(express::DEVICE_CONTROL, "Device Control"), (express::DEVICE_STATUS, "Device Status")];

fn read(config: &dyn ConfigSpace, capability: u16, at: u16, size: u16) -> io::Result<u32> {
    config.read(register(capability, at, size).map_err(io::Error::other)?)
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
    pub fn find(host: &dyn Host, address: Sbdf) -> io::Result<Self> {
        let list = CapabilityList::walk(&host.config(address).map_err(io::Error::other)?.read_all()?);
        let extended = |id| list.extended(id).map(|found| found.offset);
        Ok(Self {
            express: list.legacy(CapabilityId::PCI_EXPRESS).map(|found| found.offset),
            aer: extended(ExtendedCapabilityId::AER),
            dpc: extended(ExtendedCapabilityId::DPC),
        })
    }
}

/// What a function's registers hold of errors, by their names; nothing where it cannot be read.
pub fn of_errors(host: &dyn Host, address: Sbdf, layout: Option<Layout>) -> Vec<(&'static str, u32)> {
    let mut found = Vec::new();
    let Ok(config) = host.config(address) else { return found };
    let mut add =
        |value: io::Result<u32>, name: &'static str| found.extend(value.ok().map(|value| (name, value)));
    HEADER.iter().for_each(|(access, name)| add(config.read(*access), name));
    let Some(layout) = layout.or_else(|| Layout::find(host, address).ok()) else { return found };
    if let Some(express) = layout.express {
        EXPRESS.iter().for_each(|(at, name)| add(read(config.as_ref(), express, *at, 2), name));
    }
    if let Some(aer) = layout.aer {
        AER.iter().for_each(|(at, name)| add(read(config.as_ref(), aer, *at, 4), name));
    }
    found
}

/// Clears what a function's registers hold of errors, after they have been read as `found`: what came since stays.
pub fn clear_errors(
    host: &dyn Host,
    address: Sbdf,
    layout: Option<Layout>,
    found: &[(&'static str, u32)],
) -> io::Result<()> {
    let config = host.config(address).map_err(io::Error::other)?;
    let layout = layout.map_or_else(|| Layout::find(host, address), Ok)?;
    let write = |capability: u16, at: u16, size: u16, name: &str, mask: u32| {
        let seen = found.iter().find(|(known, _)| *known == name).map_or(0, |(_, value)| *value);
        let all_ones = u32::MAX >> (32 - 8 * u32::from(size));
        if seen & mask == 0 || seen == all_ones {
            return Ok(());
        }
        config.write(register(capability, at, size).map_err(io::Error::other)?, seen & mask)
    };
    write(0, header::STATUS, 2, "Status", STATUS_EVENTS)?;
    if let Some(at) = layout.express {
        write(at, express::DEVICE_STATUS, 2, "Device Status", DEVICE_STATUS_EVENTS)?;
    }
    if let Some(at) = layout.aer {
        write(at, aer::UNCORRECTABLE_STATUS, 4, "Uncorrectable Error Status", u32::MAX)?;
        write(at, aer::CORRECTABLE_STATUS, 4, "Correctable Error Status", u32::MAX)?;
    }
    Ok(())
}

/// A port that has cut off what is below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contained {
    /// The function that made it, where it was one below the port.
    pub source: Option<Sbdf>,
}

/// Looks whether a port has triggered Downstream Port Containment.
pub fn containment(host: &dyn Host, port: Sbdf, layout: Layout) -> io::Result<Option<Contained>> {
    let Some(at) = layout.dpc else { return Ok(None) };
    let config = host.config(port).map_err(io::Error::other)?;
    let status = read(config.as_ref(), at, dpc::STATUS, 2)?;
    if status & u32::from(dpc::TRIGGERED) == 0 || status == 0xffff {
        return Ok(None);
    }
    // DPC Trigger Reason: 1 and 2 are an ERR_NONFATAL and an ERR_FATAL message from below.
    let source = match status >> 1 & 3 {
        1 | 2 => {
            let id = read(config.as_ref(), at, dpc::SOURCE, 2)?;
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
    register: Access,
    before: u32,
}

impl Masked {
    /// Takes over what another function's mask at the same place had found before, if that came first.
    pub fn inherit(&mut self, earlier: Self) {
        self.before &= earlier.before;
    }
}

/// Masks all correctable errors of a function.
pub fn mask(host: &dyn Host, address: Sbdf, pf: Option<Sbdf>) -> Result<Masked, String> {
    let bits = CORRECTABLE_ERRORS.iter().fold(0, |bits, (bit, _)| bits | bit);
    let mut why = "no writable mask in an AER capability of its own or of its PF".to_owned();
    for at in [address].into_iter().chain(pf) {
        let tried = || -> io::Result<Option<Masked>> {
            let Some(capability) = Layout::find(host, at)?.aer else { return Ok(None) };
            let config = host.config(at).map_err(io::Error::other)?;
            let register = register(capability, aer::CORRECTABLE_MASK, 4).map_err(io::Error::other)?;
            let before = config.read(register)?;
            // Some bits need not be writable.
            let taken = match change(config.as_ref(), register, 0, bits)? {
                Changed::Kept => true,
                Changed::Differs { found, .. } => found != before,
                Changed::Silent => false,
            };
            Ok(taken.then_some(Masked { at, register, before }))
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
pub fn unmask(host: &dyn Host, masked: Masked) -> Result<(), String> {
    let write = || -> io::Result<()> {
        let config = host.config(masked.at).map_err(io::Error::other)?;
        config.write(masked.register, masked.before)
    };
    write().map_err(|error| format!("{}: {error}", masked.at))
}

/// Puts the decided bits of a register to `bits`, reads them back, and returns those that differ. An error: it answers all ones, or somebody is
/// changing it.
pub fn put(config: &dyn ConfigSpace, setting: &Setting, bits: u32) -> io::Result<u32> {
    let gone = setting.access.width().mask();
    let current = config.read(setting.access)?;
    if current == gone {
        return Err(io::Error::other("it answers all ones"));
    }
    if current & setting.row.busy != 0 {
        return Err(io::Error::other("a device below is being reset; try again"));
    }
    if let Some(value) = setting.merged(current, bits) {
        config.write(setting.access, value)?;
    }
    Ok((config.read(setting.access)? ^ bits) & setting.row.mask)
}
