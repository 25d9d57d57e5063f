//! Contracts of Xen's interrupts.

use nix::errno::Errno;
use pciback::DomId;
use pciback::platform::{MsiSource, Pirq};
use pciback::policy::RdmPolicy;

use crate::Needs::Nothing;
use crate::host::{read, write};
use crate::hypervisor::ours;
use crate::{Broken, Contract, Fixture, NO_DOMAIN, UNKNOWN, ok, refused, same, undone};

pub const CONTRACTS: &[Contract] = &[
    ("msix/prepared-once-released-once", Nothing, prepare),
    ("msix/mapped-only-when-prepared-and-owned", Nothing, unprepared),
    ("msix/maps-entries-of-the-table-only", Nothing, map),
    ("msix/mapped-entries-outlive-the-assignment", Nothing, deassigned),
    ("msix/control-is-written-as-one-word", Nothing, control),
    ("pirq/unmapped-once", Nothing, unmap),
    ("pirq/mapped-to-the-number-that-is-asked-for", Nothing, chosen),
    ("pirq/asked-of-hvm-guests-only", Nothing, asked),
    ("gsi/lines-have-an-end", Nothing, lines),
];

/// The MSI-X capability of the VF: where it is, its entries, and the start of the BAR that holds its table.
fn table(fixture: &Fixture) -> Result<(u32, u16, u64), Broken> {
    let config = ok(fixture.platform.host.config(fixture.vf))?;
    let mut at = read(&*config, 0x34, 1)?;
    for _ in 0..48 {
        if at < 0x40 {
            break;
        }
        if read(&*config, at, 1)? == 0x11 {
            let entries = (read(&*config, at + 2, 2)? & 0x7ff) as u16 + 1;
            let bar = read(&*config, at + 4, 4)? as usize & 7;
            let vf = ok(fixture.platform.host.function(fixture.vf))?;
            let start =
                vf.resources.get(bar).filter(|bar| bar.exists()).ok_or("the table's BAR is missing")?;
            return Ok((at, entries, start.start));
        }
        at = read(&*config, at + 1, 1)?;
    }
    Err("the VF has no MSI-X".to_owned())
}

fn source(fixture: &Fixture, entry: u16) -> Result<MsiSource, Broken> {
    Ok(MsiSource::MsiX { entry, table: table(fixture)?.2 })
}

/// Runs with the VF given to the guest and prepared; nothing of it remains.
fn given(fixture: &Fixture, body: impl FnOnce(&mut Vec<Pirq>) -> Result<(), Broken>) -> Result<(), Broken> {
    let (xen, vf, guest) = (&fixture.platform.hypervisor, fixture.vf, fixture.guest);
    ours(fixture, || {
        let mut mapped = Vec::new();
        let body = || {
            same("this call prepared it", ok(xen.prepare_msix(vf))?, true)?;
            ok(xen.assign(guest, vf, RdmPolicy::Strict))?;
            body(&mut mapped)
        };
        let body = body();
        for pirq in mapped {
            // What the body unmapped itself is refused.
            let _ = xen.unmap_pirq(guest, pirq);
        }
        undone(|| body, || ok(xen.release_msix(vf)))
    })
}

fn prepare(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, vf) = (&fixture.platform.hypervisor, fixture.vf);
    ours(fixture, || {
        refused("release what is not prepared", xen.release_msix(vf), &[Errno::EBUSY])?;
        same("first", ok(xen.prepare_msix(vf))?, true)?;
        same("again", ok(xen.prepare_msix(vf))?, false)?;
        ok(xen.release_msix(vf))?;
        refused("release again", xen.release_msix(vf), &[Errno::EBUSY])?;
        refused("what is not there", xen.prepare_msix(UNKNOWN), &[Errno::ENODEV])?;
        refused("release what is not there", xen.release_msix(UNKNOWN), &[Errno::ENODEV])?;
        refused("restore what is not there", xen.restore_msi(UNKNOWN), &[Errno::ENODEV])
    })
}

fn unprepared(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, vf, guest) = (&fixture.platform.hypervisor, fixture.vf, fixture.guest);
    let first = source(fixture, 0)?;
    ours(fixture, || {
        refused("dom0 has it", xen.map_msi(guest, vf, first), &[Errno::ENODEV])?;
        ok(xen.assign(guest, vf, RdmPolicy::Strict))?;
        refused("not prepared", xen.map_msi(guest, vf, first), &[Errno::ENODATA])?;
        refused("not there", xen.map_msi(guest, UNKNOWN, first), &[Errno::ENODEV])?;
        refused("for a domain that does not exist", xen.map_msi(NO_DOMAIN, vf, first), &[Errno::ESRCH])
    })
}

fn map(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, vf, guest) = (&fixture.platform.hypervisor, fixture.vf, fixture.guest);
    let (at, entries, table) = table(fixture)?;
    let config = ok(fixture.platform.host.config(vf))?;
    let control = read(&*config, at + 2, 2)?;
    let body = |mapped: &mut Vec<Pirq>| {
        let behind = MsiSource::MsiX { entry: entries, table };
        refused("behind the table", xen.map_msi(guest, vf, behind), &[Errno::EINVAL])?;
        let one = ok(xen.map_msi(guest, vf, MsiSource::MsiX { entry: 0, table }))?;
        mapped.push(one);
        // Xen does not count: the same entry once more is another interrupt.
        let again = ok(xen.map_msi(guest, vf, MsiSource::MsiX { entry: 0, table }))?;
        mapped.push(again);
        same("two interrupts", one != again, true)?;
        refused("release in use", xen.release_msix(vf), &[Errno::EBUSY])?;
        ok(xen.restore_msi(vf))?;
        ok(xen.unmap_pirq(guest, again))?;
        ok(xen.unmap_pirq(guest, one))?;
        let next = ok(xen.map_msi(guest, vf, MsiSource::MsiX { entry: entries - 1, table }))?;
        mapped.push(next);
        same("a number is used again", [one, again].contains(&next), true)
    };
    // Restoring vectors sets MSI-X Enable.
    undone(|| given(fixture, body), || write(&*config, at + 2, 2, control))
}

fn deassigned(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, vf, guest) = (&fixture.platform.hypervisor, fixture.vf, fixture.guest);
    let first = source(fixture, 0)?;
    given(fixture, |mapped| {
        let pirq = ok(xen.map_msi(guest, vf, first))?;
        mapped.push(pirq);
        ok(xen.deassign(guest, vf))?;
        refused("release in use", xen.release_msix(vf), &[Errno::EBUSY])?;
        ok(xen.unmap_pirq(guest, pirq))?;
        refused("map what is taken", xen.map_msi(guest, vf, first), &[Errno::ENODEV])
    })
}

fn control(fixture: &Fixture) -> Result<(), Broken> {
    let (at, ..) = table(fixture)?;
    let config = ok(fixture.platform.host.config(fixture.vf))?;
    let before = read(&*config, at + 2, 2)?;
    undone(
        || {
            // Masked as a whole, so that nothing can be sent.
            write(&*config, at, 4, (before | 0xc000) << 16)?;
            same("a dword vanishes", read(&*config, at + 2, 2)?, before)?;
            write(&*config, at + 3, 1, before >> 8 | 0xc0)?;
            same("a byte vanishes", read(&*config, at + 2, 2)?, before)?;
            write(&*config, at + 2, 2, before | 0xc000)?;
            same("a word stays", read(&*config, at + 2, 2)?, before | 0xc000)
        },
        || write(&*config, at + 2, 2, before),
    )
}

fn unmap(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, vf, guest) = (&fixture.platform.hypervisor, fixture.vf, fixture.guest);
    let first = source(fixture, 0)?;
    given(fixture, |mapped| {
        let pirq = ok(xen.map_msi(guest, vf, first))?;
        mapped.push(pirq);
        refused("of a domain that does not exist", xen.unmap_pirq(NO_DOMAIN, pirq), &[Errno::ESRCH])?;
        ok(xen.unmap_pirq(guest, pirq))?;
        refused("twice", xen.unmap_pirq(guest, pirq), &[Errno::EINVAL])?;
        refused("out of range", xen.unmap_pirq(guest, Pirq(100_000)), &[Errno::EINVAL])
    })
}

fn chosen(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, vf, guest) = (&fixture.platform.hypervisor, fixture.vf, fixture.guest);
    let first = source(fixture, 0)?;
    given(fixture, |mapped| {
        // A free number that the domain has, whatever its range.
        let known = ok(xen.map_msi(guest, vf, first))?;
        ok(xen.unmap_pirq(guest, known))?;
        refused("out of range", xen.map_msi_as(guest, vf, first, Pirq(100_000)), &[Errno::EINVAL])?;
        refused("no number", xen.map_msi_as(guest, vf, first, Pirq(u32::MAX)), &[Errno::EINVAL])?;
        refused(
            "for a domain that does not exist",
            xen.map_msi_as(NO_DOMAIN, vf, first, known),
            &[Errno::ESRCH],
        )?;
        ok(xen.map_msi_as(guest, vf, first, known))?;
        mapped.push(known);
        let other = ok(xen.map_msi(guest, vf, first))?;
        mapped.push(other);
        same("two numbers", other != known, true)?;
        ok(xen.unmap_pirq(guest, known))?;
        refused("unmap again", xen.unmap_pirq(guest, known), &[Errno::EINVAL])
    })
}

fn asked(fixture: &Fixture) -> Result<(), Broken> {
    let hvm = &fixture.platform.hvm;
    refused("of a PV guest", hvm.is_mapped(fixture.guest, Pirq(50)), &[Errno::EINVAL])?;
    refused("of a domain that does not exist", hvm.is_mapped(NO_DOMAIN, Pirq(50)), &[Errno::ESRCH])
}

fn lines(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, guest) = (&fixture.platform.hypervisor, fixture.guest);
    refused("out of range", xen.map_gsi(guest, 100_000), &[Errno::EINVAL])?;
    refused("of a domain that does not exist", xen.map_gsi(NO_DOMAIN, 20), &[Errno::ESRCH])?;
    let pf = ok(fixture.platform.host.function(fixture.pf))?;
    if pf.irq == 0 || fixture.guest == DomId::DOM0 {
        return Ok(());
    }
    let pirq = ok(xen.map_gsi(guest, pf.irq))?;
    undone(
        || {
            same("the line's own number", pirq.0, pf.irq)?;
            same("again", ok(xen.map_gsi(guest, pf.irq))?, pirq)
        },
        || ok(xen.unmap_gsi(guest, pf.irq, pirq)),
    )?;
    refused("unmap again", xen.unmap_gsi(guest, pf.irq, pirq), &[Errno::EINVAL])
}
