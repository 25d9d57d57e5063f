//! Host resources that a guest gets with the function: access to its BARs, I/O ports and expansion ROM, and its interrupt line.
//!
//! Functions may share such resources: an interrupt line, or a page with two small BARs. A guest with two such functions keeps the shared
//! resources until it loses the second function.

use nix::errno::Errno;
use pciback::DomId;
use pciback::live::{self, PlacedBar};
use pciback::platform::{
    Edit, Foreign, Host, HostFunction, PAGE, Pirq, Platform, Resource, Revoked, foreign_bar,
};

use super::hold::joined;
use super::reset::config_failure;
use super::sharing::{Line, LineCheck, refuse_pages};
use super::{Context, guest_of, rom};
use crate::domains::{self, DomainType};
use crate::former_owners::FormerOwners;
use crate::journal::{Grant, Record};
use crate::outcome::Failure;

/// Grants the resources. The text is a warning that the guest does not get the interrupt line, or about its expansion ROM.
pub(super) fn grant(context: &Context<'_>, record: &mut Record) -> Result<Option<String>, Failure> {
    let domain = guest_of(record)?;
    let function = context.platform.host.function(record.address)?;
    let rom = rom::own(context.platform, context.policies, &function, Some(domain))?;
    refuse_foreign(context.platform.host.as_ref(), &function, rom)?;
    decode(context, &function, rom)?;
    let mut grants: Vec<Grant> = function.bars().iter().chain(&rom).filter_map(bar_grant).collect();
    let spec = crate::spec::function_spec(context.platform.host.as_ref(), record.address)?;
    let line = LineCheck::of(context, &function, &spec, domain)?;
    // Locked, so that no other transaction grants or revokes the same resources meanwhile.
    let mut granted = context.journal.granted();
    refuse_pages(context, &function, domain, &grants, &granted)?;
    let withheld = match line.settle(context, &granted)? {
        Line::Given(line) => {
            grants.extend(line.map(|gsi| Grant::Gsi { gsi }));
            None
        }
        Line::Withheld(warning) => Some(warning),
    };
    record.without_line = withheld.is_some();
    record.own_rom = rom.is_some();
    granted.insert(record.address, (domain, grants.clone()));
    // Written to the journal first, because only grants in the journal are revoked.
    record.grants = grants;
    context.write(record)?;
    note_owner(context.former_owners, context.platform, record)?;
    for (index, grant) in record.grants.clone().into_iter().enumerate() {
        let Err(error) = permit(context, domain, grant, Edit::Add) else { continue };
        if matches!(error.errno(), Some(Errno::EPERM | Errno::EINVAL)) {
            // Refused by Xen without an effect, so that this grant and those after it need not be revoked.
            record.grants.truncate(index);
            granted.insert(record.address, (domain, record.grants.clone()));
        }
        return Err(Failure::from(error).on(record.address).of(domain));
    }
    let shared_decoder = rom.map(|_| rom::shared_decoder(record.address, domain));
    Ok(joined(withheld.into_iter().chain(shared_decoder)))
}

/// Refuses BARs, and the expansion ROM that the guest is given, that the kernel does not list as the function's, and pages that also
/// contain resources of other drivers.
pub(super) fn refuse_foreign(
    host: &dyn Host,
    function: &HostFunction,
    rom: Option<Resource>,
) -> Result<(), Failure> {
    let ranges: Vec<Resource> = function.bars().iter().copied().chain(rom).collect();
    if !ranges.iter().any(Resource::is_placed) {
        return Ok(());
    }
    let address = function.address;
    let (memory, ports) = (host.memory_map()?, host.port_map()?);
    let Some((bar, why)) = foreign_bar(address, &ranges, &memory, &ports) else { return Ok(()) };
    let (what, file) = if bar.is_io() { ("ports", "/proc/ioports") } else { ("memory", "/proc/iomem") };
    let (first, last) = (bar.start, bar.start.saturating_add(bar.size - 1));
    let (why, otherwise) = match why {
        Foreign::NotListed => (
            "the kernel does not list it as this function's".to_owned(),
            "have Linux reassign the addresses of the device",
        ),
        Foreign::Occupied(range) => (
            format!("{:#x}-{:#x} there is {}", range.first, range.last, range.name),
            "have Linux reassign the addresses of the device, or have dom0 stop using it (a framebuffer: video=efifb:off)",
        ),
    };
    let text = format!("give {what} {first:#x}-{last:#x} of {address} to a guest: {why}");
    Err(Failure::refused(text).on(address).hint(format!("see {file}; {otherwise}")))
}

/// Enables decoding before the guest can reach a BAR. It stays enabled until the guest can no longer reach it, because the guest's writes
/// to these bits do not reach hardware. The decoder of the expansion ROM is off: firmware may have left it on, and BARs may not answer then.
fn decode(context: &Context<'_>, function: &HostFunction, rom: Option<Resource>) -> Result<(), Failure> {
    let config = context.platform.host.config(function.address)?;
    let mut bars = PlacedBar::of_host(function);
    bars.extend(rom.as_ref().map(PlacedBar::of_rom));
    live::disable_rom(config.as_ref())
        .and_then(|()| live::decode_bars(config.as_ref(), &bars))
        .and_then(|changed| changed.kept("Command"))
        .map_err(|error| config_failure("enable decoding of", function.address, &error))
}

/// Notes that a PV guest may map the function's BARs and expansion ROM; such mappings survive the revocation.
pub fn note_owner(owners: &FormerOwners, platform: &Platform, record: &Record) -> Result<(), Failure> {
    let domain = guest_of(record)?;
    if domains::kind(platform.store.as_ref(), domain)? == DomainType::Hvm {
        return Ok(());
    }
    let frames: Vec<(u64, u64)> = record
        .grants
        .iter()
        .filter_map(|grant| match *grant {
            Grant::Iomem { first, frames } => Some((first, frames)),
            Grant::Ioport { .. } | Grant::Gsi { .. } => None,
        })
        .collect();
    owners.note(platform.hypervisor.as_ref(), record.address, domain, &frames)
}

pub(super) fn revoke(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    let domain = guest_of(record)?;
    let mut granted = context.journal.granted();
    granted.remove(&record.address);
    let kept: Vec<Grant> = granted
        .values()
        .filter(|(guest, _)| *guest == domain)
        .flat_map(|(_, grants)| grants.clone())
        .collect();
    let mut first_failure = Ok(());
    for grant in record.grants.iter().flat_map(|grant| without(*grant, &kept)) {
        let revoked = permit(context, domain, grant, Edit::Remove).map_err(Failure::from);
        first_failure = first_failure.and(revoked);
    }
    first_failure.map_err(|failure| failure.on(record.address).of(domain))?;
    record.grants.clear();
    record.own_rom = false;
    Ok(())
}

/// The grant of a BAR or an expansion ROM; `None` where there is none with an address.
pub(super) fn bar_grant(bar: &Resource) -> Option<Grant> {
    match (bar.is_placed(), bar.is_io()) {
        (false, _) => None,
        (true, true) => Some(Grant::Ioport { first: bar.start as u32, count: bar.size as u32 }),
        (true, false) => {
            let first = bar.start / PAGE;
            Some(Grant::Iomem { first, frames: (bar.start + bar.size).div_ceil(PAGE) - first })
        }
    }
}

/// The parts of a grant that no other grant contains. I/O ports are granted exactly, so that functions never share them.
fn without(grant: Grant, others: &[Grant]) -> Vec<Grant> {
    let mut parts = vec![grant];
    for other in others {
        parts = parts.into_iter().flat_map(|part| cut(part, *other)).flatten().collect();
    }
    parts
}

/// The parts below and above another grant.
fn cut(grant: Grant, other: Grant) -> [Option<Grant>; 2] {
    match (grant, other) {
        (Grant::Gsi { gsi }, Grant::Gsi { gsi: other }) if gsi == other => [None, None],
        (Grant::Iomem { first, frames }, Grant::Iomem { first: from, frames: length }) => {
            let (end, to) = (first + frames, from + length);
            let part =
                |first: u64, end: u64| (first < end).then(|| Grant::Iomem { first, frames: end - first });
            [part(first, end.min(from)), part(first.max(to), end)]
        }
        _ => [Some(grant), None],
    }
}

fn permit(context: &Context<'_>, domain: DomId, grant: Grant, edit: Edit) -> pciback::platform::Result<()> {
    let hypervisor = &context.platform.hypervisor;
    let (what, answer) = match grant {
        Grant::Iomem { first, frames } => {
            (Revoked::Permission, hypervisor.iomem_permission(domain, first, frames, edit))
        }
        Grant::Ioport { first, count } => {
            (Revoked::Permission, hypervisor.ioport_permission(domain, first, count, edit))
        }
        Grant::Gsi { gsi } if edit == Edit::Add => {
            (Revoked::Interrupt, hypervisor.map_gsi(domain, gsi).map(drop))
        }
        Grant::Gsi { gsi } => (Revoked::Interrupt, hypervisor.unmap_gsi(domain, gsi, Pirq(gsi))),
    };
    match edit {
        Edit::Add => answer,
        Edit::Remove => what.outcome(answer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(first: u64, frames: u64) -> Grant {
        Grant::Iomem { first, frames }
    }

    #[test]
    fn grants_that_another_function_of_the_guest_needs_are_not_revoked() {
        for (others, left) in [
            (vec![], vec![frames(10, 6)]),
            (vec![frames(4, 6), frames(16, 4)], vec![frames(10, 6)]),
            (vec![frames(8, 3)], vec![frames(11, 5)]),
            (vec![frames(15, 1)], vec![frames(10, 5)]),
            (vec![frames(12, 1), frames(14, 1)], vec![frames(10, 2), frames(13, 1), frames(15, 1)]),
            (vec![frames(10, 6)], vec![]),
            (vec![Grant::Gsi { gsi: 10 }, Grant::Ioport { first: 10, count: 6 }], vec![frames(10, 6)]),
        ] {
            assert_eq!(without(frames(10, 6), &others), left, "{others:?}");
        }
        let line = Grant::Gsi { gsi: 21 };
        assert_eq!(without(line, &[Grant::Gsi { gsi: 20 }, frames(21, 1)]), [line]);
        assert_eq!(without(line, &[line]), []);
    }
}
