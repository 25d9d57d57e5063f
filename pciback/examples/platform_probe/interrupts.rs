//! MSI-X, lines, and the order that Xen wants.

use pciback::platform::{MsiSource, Pirq, Platform, Result};
use pciback::{DomId, Sbdf};

use super::{NOBODY, Subject, UNKNOWN, config, say};

/// The host bridge: a function without MSI-X.
const HOST_BRIDGE: Sbdf = Sbdf::from_devfn(0, 0, 0);

pub fn probe(platform: &Platform, subject: &Subject) -> Result<()> {
    let xen = platform.hypervisor.as_ref();
    let Subject { vf, other_vf, guest, plain_guest, .. } = *subject;
    let space = platform.host.config(vf)?;
    let function = platform.host.function(vf)?;
    let Some(offset) = config::capability(space.as_ref(), 0x11) else {
        println!("PROBE: the VF has no MSI-X");
        return Ok(());
    };
    let control = config::read(space.as_ref(), offset + 2, 2);
    let table = config::read(space.as_ref(), offset + 4, 4);
    let start = function.resources.get(table as usize & 7).map_or(0, |bar| bar.start);
    println!("PROBE: MSI-X at {offset:#x} control {control:#06x} table {table:#x} in {start:#x}");
    let entry = |entry, table| MsiSource::MsiX { entry, table };

    xen.assign(guest, vf)?;
    say("map_msi(entry 0) disabled, not prepared", xen.map_msi(guest, vf, entry(0, start)));
    say("release_msix, not prepared", xen.release_msix(vf));
    say("prepare_msix", xen.prepare_msix(vf));
    say("prepare_msix again", xen.prepare_msix(vf));
    say("prepare_msix(unknown)", xen.prepare_msix(UNKNOWN));
    say("prepare_msix(host bridge)", xen.prepare_msix(HOST_BRIDGE));
    say("release_msix(host bridge)", xen.release_msix(HOST_BRIDGE));
    let disabled = say("map_msi(entry 0) disabled", xen.map_msi(guest, vf, entry(0, start)));
    println!("PROBE: control after it {:#06x}", config::read(space.as_ref(), offset + 2, 2));
    if let Some(pirq) = disabled {
        say("unmap it", xen.unmap_pirq(guest, pirq));
    }
    config::write(space.as_ref(), offset + 2, 2, control | 0x8000);
    println!("PROBE: control enabled reads {:#06x}", config::read(space.as_ref(), offset + 2, 2));
    let first = say("map_msi(entry 0)", xen.map_msi(guest, vf, entry(0, start)));
    let twice = say("map_msi(entry 0) again", xen.map_msi(guest, vf, entry(0, start)));
    let second = say("map_msi(entry 1)", xen.map_msi(guest, vf, entry(1, start)));
    say("map_msi(entry 2047)", xen.map_msi(guest, vf, entry(2047, start)));
    say("map_msi(entry 2, wrong table)", xen.map_msi(guest, vf, entry(2, 0x1000)));
    say("map_msi(MSI) while MSI-X is on", xen.map_msi(guest, vf, MsiSource::Msi));
    say("map_msi(vf of guest) to plain guest", xen.map_msi(plain_guest, vf, entry(2, start)));
    say("map_msi(vf of guest) to nobody", xen.map_msi(NOBODY, vf, entry(2, start)));
    say("map_msi(unknown)", xen.map_msi(guest, UNKNOWN, entry(0, start)));
    say("map_msi(vf of dom0, not prepared)", xen.map_msi(guest, other_vf, entry(0, start)));
    say("release_msix while mapped", xen.release_msix(vf));
    say("restore_msi while mapped", xen.restore_msi(vf));
    say("unmap_pirq(never mapped)", xen.unmap_pirq(guest, Pirq(100)));
    say("unmap_pirq(out of range)", xen.unmap_pirq(guest, Pirq(1_000_000)));
    for pirq in [first, twice, second].into_iter().flatten() {
        say("unmap_pirq", xen.unmap_pirq(guest, pirq));
    }
    if let Some(pirq) = first {
        say("unmap_pirq again", xen.unmap_pirq(guest, pirq));
        say("unmap_pirq of nobody", xen.unmap_pirq(NOBODY, pirq));
    }
    println!("PROBE: control after unmapping all {:#06x}", config::read(space.as_ref(), offset + 2, 2));
    limit(platform, subject, start);
    say("release_msix", xen.release_msix(vf));
    say("release_msix again", xen.release_msix(vf));
    say("prepare_msix once more", xen.prepare_msix(vf));
    let kept = say("map_msi before deassign", xen.map_msi(guest, vf, entry(0, start)));
    say("deassign while mapped", xen.deassign(guest, vf));
    if let Some(pirq) = kept {
        say("unmap_pirq after deassign", xen.unmap_pirq(guest, pirq));
    }
    say("release_msix at the end", xen.release_msix(vf));
    say("map_msi(vf of IO)", xen.map_msi(guest, vf, entry(0, start)));
    config::write(space.as_ref(), offset + 2, 2, control);
    println!("PROBE: control at the end {:#06x}", config::read(space.as_ref(), offset + 2, 2));
    lines(platform, subject)
}

/// Maps all entries of the table, then one entry after the other again, until Xen has no more.
fn limit(platform: &Platform, subject: &Subject, table: u64) {
    let xen = platform.hypervisor.as_ref();
    let mut mapped = Vec::new();
    for entry in 0..64 {
        match xen.map_msi(subject.guest, subject.vf, MsiSource::MsiX { entry, table }) {
            Ok(pirq) => mapped.push(pirq),
            Err(error) => {
                println!("PROBE: after {} entries: {:?} <- {error}", mapped.len(), error.errno());
                break;
            }
        }
    }
    println!("PROBE: numbers {mapped:?}");
    for pirq in mapped {
        if let Err(error) = xen.unmap_pirq(subject.guest, pirq) {
            println!("PROBE: {error}");
        }
    }
}

fn lines(platform: &Platform, subject: &Subject) -> Result<()> {
    let xen = platform.hypervisor.as_ref();
    let guest = subject.guest;
    let gsi = platform.host.function(subject.pf)?.irq;
    println!("PROBE: the PF's line is {gsi}");
    let first = say("map_gsi", xen.map_gsi(guest, gsi));
    let again = say("map_gsi again", xen.map_gsi(guest, gsi));
    say("map_gsi(nobody)", xen.map_gsi(NOBODY, gsi));
    say("map_gsi(out of range)", xen.map_gsi(guest, 5000));
    say("map_gsi(never set up)", xen.map_gsi(guest, 23));
    if let Some(pirq) = first.or(again) {
        say("unmap_gsi", xen.unmap_gsi(guest, gsi, pirq));
        say("unmap_gsi again", xen.unmap_gsi(guest, gsi, pirq));
    }
    say("map_msi(unassigned, MSI)", xen.map_msi(DomId(0), subject.vf, MsiSource::Msi));
    Ok(())
}
