//! Assignment, reports and permissions.

use pciback::platform::hypervisor::DeviceReport;
use pciback::platform::{Platform, Result};
use pciback::{DomId, Sbdf};

use super::{NOBODY, Subject, UNKNOWN, say};

pub fn probe(platform: &Platform, subject: &Subject) -> Result<()> {
    let xen = platform.hypervisor.as_ref();
    let Subject { vf, guest, plain_guest, .. } = *subject;
    println!("PROBE: version {:?}", xen.version());
    say("device_known(vf)", xen.device_known(vf));
    say("device_known(unknown)", xen.device_known(UNKNOWN));
    say("assignable(vf of dom0)", xen.assignable(vf));
    say("assignable(unknown)", xen.assignable(UNKNOWN));

    say("deassign(guest, vf of dom0)", xen.deassign(guest, vf));
    say("deassign(IO, vf of dom0)", xen.deassign(DomId::IO, vf));
    say("assign(IO, vf)", xen.assign(DomId::IO, vf));
    say("assign(IO, vf) again", xen.assign(DomId::IO, vf));
    say("assignable(vf of IO)", xen.assignable(vf));
    say("assign(dom0, vf)", xen.assign(DomId::DOM0, vf));
    say("assign(nobody, vf)", xen.assign(NOBODY, vf));
    say("assign(plain guest, vf)", xen.assign(plain_guest, vf));
    say("assign(guest, unknown)", xen.assign(guest, UNKNOWN));
    say("assign(IO, unknown)", xen.assign(DomId::IO, UNKNOWN));
    say("assign(guest, vf)", xen.assign(guest, vf));
    say("assign(guest, vf) again", xen.assign(guest, vf));
    say("assign(plain guest, vf of guest)", xen.assign(plain_guest, vf));
    say("assign(IO, vf of guest)", xen.assign(DomId::IO, vf));
    say("assignable(vf of guest)", xen.assignable(vf));
    say("deassign(plain guest, vf of guest)", xen.deassign(plain_guest, vf));
    say("deassign(IO, vf of guest)", xen.deassign(DomId::IO, vf));
    say("deassign(nobody, vf of guest)", xen.deassign(NOBODY, vf));
    say("deassign(guest, unknown)", xen.deassign(guest, UNKNOWN));
    say("device_remove(vf of guest)", xen.device_remove(vf));
    say("device_known(vf removed from guest)", xen.device_known(vf));
    let report = |physical_function| DeviceReport { extended: false, physical_function, proximity: None };
    say("device_add(vf again)", xen.device_add(vf, report(Some(subject.pf))));
    say("assign(guest, vf re-added)", xen.assign(guest, vf));
    say("deassign(guest, vf)", xen.deassign(guest, vf));
    say("deassign(guest, vf) again", xen.deassign(guest, vf));
    say("assignable(vf of IO after guest)", xen.assignable(vf));
    say("deassign(IO, vf)", xen.deassign(DomId::IO, vf));
    say("deassign(IO, vf) again", xen.deassign(DomId::IO, vf));
    say("assign(guest, vf of dom0)", xen.assign(guest, vf));
    say("deassign(guest, vf) back", xen.deassign(guest, vf));

    say("device_add(vf known)", xen.device_add(vf, report(Some(subject.pf))));
    say("device_add(vf of unknown pf)", xen.device_add(Sbdf::from_devfn(0, 0xee, 8), report(Some(UNKNOWN))));
    say("device_known(vf of unknown pf)", xen.device_known(Sbdf::from_devfn(0, 0xee, 8)));
    say("device_remove(unknown)", xen.device_remove(UNKNOWN));
    say("device_remove(vf of IO)", xen.device_remove(subject.other_vf));
    say("device_known(vf removed)", xen.device_known(subject.other_vf));
    say("assign(guest, vf removed)", xen.assign(guest, subject.other_vf));
    say("device_add(vf)", xen.device_add(subject.other_vf, report(Some(subject.pf))));
    say("device_known(vf added)", xen.device_known(subject.other_vf));
    say("restore_msi(vf)", xen.restore_msi(vf));
    say("restore_msi(unknown)", xen.restore_msi(UNKNOWN));

    permissions(platform, subject)
}

fn permissions(platform: &Platform, subject: &Subject) -> Result<()> {
    let xen = platform.hypervisor.as_ref();
    let guest = subject.guest;
    let function = platform.host.function(subject.vf)?;
    let Some(bar) = function.resources.iter().find(|resource| resource.exists() && !resource.is_io()) else {
        println!("PROBE: the VF has no memory BAR");
        return Ok(());
    };
    let (first, frames) = (bar.start >> 12, bar.size.div_ceil(4096));
    say("iomem forbid, never allowed", xen.iomem_permission(guest, first, frames, false));
    say("iomem allow", xen.iomem_permission(guest, first, frames, true));
    say("iomem allow again", xen.iomem_permission(guest, first, frames, true));
    say("iomem forbid", xen.iomem_permission(guest, first, frames, false));
    say("iomem forbid again", xen.iomem_permission(guest, first, frames, false));
    say("iomem allow nobody", xen.iomem_permission(NOBODY, first, frames, true));
    say("iomem allow 0 frames", xen.iomem_permission(guest, first, 0, true));
    say("iomem allow overflow", xen.iomem_permission(guest, u64::MAX, 2, true));
    say("iomem allow the local APIC", xen.iomem_permission(guest, 0xfee00, 1, true));
    say("ioport forbid, never allowed", xen.ioport_permission(guest, 0xc000, 32, false));
    say("ioport allow", xen.ioport_permission(guest, 0xc000, 32, true));
    say("ioport forbid", xen.ioport_permission(guest, 0xc000, 32, false));
    say("ioport allow nobody", xen.ioport_permission(NOBODY, 0xc000, 32, true));
    say("ioport allow 0", xen.ioport_permission(guest, 0xc000, 0, true));
    say("ioport allow overflow", xen.ioport_permission(guest, 0xffff, 2, true));
    say("ioport allow Xen's serial port", xen.ioport_permission(guest, 0x3f8, 8, true));
    Ok(())
}
