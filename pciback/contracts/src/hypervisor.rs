//! Contracts of Xen: who owns a function, and what a domain may touch.

use nix::errno::Errno;
use pciback::DomId;
use pciback::platform::hypervisor::DeviceReport;
use pciback::platform::{Edit, ResetReach};
use pciback::policy::RdmPolicy;

use crate::Needs::{Nothing, PlainGuest};
use crate::{Broken, Contract, Fixture, NO_DOMAIN, UNKNOWN, ok, refused, same, undone};

pub const CONTRACTS: &[Contract] = &[
    ("xen/knows-what-was-reported", Nothing, known),
    ("xen/assignment-goes-round", Nothing, round),
    ("xen/assignment-is-refused", Nothing, refusals),
    ("xen/a-domain-without-passthrough-gets-nothing", PlainGuest, plain),
    ("xen/memory-is-allowed-and-forbidden", Nothing, memory),
    ("xen/ports-are-allowed-and-forbidden", Nothing, ports),
    ("xen/withdrawing-takes-a-function-from-its-guest", Nothing, withdrawn),
    ("xen/a-domain-that-is-not-there-cannot-be-stopped", Nothing, nobody_to_stop),
    ("xen/is-told-of-resets-from-4.20-on", Nothing, resets),
    ("rings/what-no-guest-offers-is-refused", Nothing, rings),
];

/// Runs with the VF owned by dom0, and gives it back to whom it was.
pub fn ours(fixture: &Fixture, body: impl FnOnce() -> Result<(), Broken>) -> Result<(), Broken> {
    let (xen, vf) = (&fixture.platform.hypervisor, fixture.vf);
    let home = || {
        // Whichever domain owns it, one of these is right and the others are refused.
        for owner in [fixture.guest, DomId::IO] {
            let _ = xen.deassign(owner, vf);
        }
    };
    let held = xen.deassign(DomId::IO, vf).is_ok();
    home();
    undone(body, || {
        home();
        if held { ok(xen.assign(DomId::IO, vf, RdmPolicy::Strict)) } else { Ok(()) }
    })
}

fn report(fixture: &Fixture) -> DeviceReport {
    DeviceReport { extended: false, physical_function: Some(fixture.pf), proximity: None }
}

fn known(fixture: &Fixture) -> Result<(), Broken> {
    let xen = &fixture.platform.hypervisor;
    same("the PF", ok(xen.device_known(fixture.pf))?, true)?;
    same("the VF", ok(xen.device_known(fixture.vf))?, true)?;
    same("another", ok(xen.device_known(UNKNOWN))?, false)?;
    ok(xen.device_add(fixture.vf, report(fixture)))?;
    refused("withdraw another", xen.device_remove(UNKNOWN), &[Errno::ENODEV])?;
    let orphan = DeviceReport { physical_function: Some(UNKNOWN), ..report(fixture) };
    let far = UNKNOWN.offset_by(1).ok_or("no address")?;
    refused("a VF of another", xen.device_add(far, orphan), &[Errno::ENODEV])?;
    same("version", xen.version() >= (4, 17), true)
}

fn resets(fixture: &Fixture) -> Result<(), Broken> {
    let xen = &fixture.platform.hypervisor;
    let has_call = xen.version() >= (4, 20);
    for reach in [ResetReach::Function, ResetReach::Bus] {
        same("noted", ok(xen.note_reset(fixture.vf, reach))?, has_call)?;
        if has_call {
            refused("of another", xen.note_reset(UNKNOWN, reach), &[Errno::ENODEV])?;
        } else {
            same("of another", ok(xen.note_reset(UNKNOWN, reach))?, false)?;
        }
    }
    Ok(())
}

fn nobody_to_stop(fixture: &Fixture) -> Result<(), Broken> {
    let xen = &fixture.platform.hypervisor;
    refused("look at", xen.domain(NO_DOMAIN), &[Errno::ESRCH])?;
    refused("pause", xen.pause(NO_DOMAIN), &[Errno::ESRCH])?;
    refused("unpause", xen.unpause(NO_DOMAIN), &[Errno::ESRCH])?;
    refused("destroy", xen.destroy(NO_DOMAIN), &[Errno::ESRCH])
}

fn round(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, vf, guest) = (&fixture.platform.hypervisor, fixture.vf, fixture.guest);
    ours(fixture, || {
        same("dom0's", ok(xen.assignable(vf))?, true)?;
        ok(xen.assign(DomId::IO, vf, RdmPolicy::Strict))?;
        ok(xen.assign(DomId::IO, vf, RdmPolicy::Strict))?;
        same("held", ok(xen.assignable(vf))?, true)?;
        ok(xen.assign(guest, vf, RdmPolicy::Strict))?;
        same("the guest's", ok(xen.assignable(vf))?, false)?;
        refused("give it again", xen.assign(guest, vf, RdmPolicy::Strict), &[Errno::EBUSY])?;
        refused("hold it", xen.assign(DomId::IO, vf, RdmPolicy::Strict), &[Errno::EBUSY])?;
        refused("take it from IO", xen.deassign(DomId::IO, vf), &[Errno::ENODEV])?;
        ok(xen.deassign(guest, vf))?;
        refused("take it again", xen.deassign(guest, vf), &[Errno::ENODEV])?;
        // It is IO's now, wherever it came from.
        ok(xen.deassign(DomId::IO, vf))?;
        refused("take it from IO again", xen.deassign(DomId::IO, vf), &[Errno::ENODEV])?;
        ok(xen.assign(guest, vf, RdmPolicy::Strict))?;
        ok(xen.deassign(guest, vf))?;
        ok(xen.deassign(DomId::IO, vf))
    })
}

fn refusals(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, vf, guest) = (&fixture.platform.hypervisor, fixture.vf, fixture.guest);
    ours(fixture, || {
        refused("to dom0", xen.assign(DomId::DOM0, vf, RdmPolicy::Strict), &[Errno::EINVAL])?;
        refused(
            "to a domain that does not exist",
            xen.assign(NO_DOMAIN, vf, RdmPolicy::Strict),
            &[Errno::ESRCH],
        )?;
        refused("from a domain that does not exist", xen.deassign(NO_DOMAIN, vf), &[Errno::ESRCH])?;
        refused("from who has it not", xen.deassign(guest, vf), &[Errno::ENODEV])?;
        for domain in [guest, DomId::IO] {
            refused("what is not there", xen.assign(domain, UNKNOWN, RdmPolicy::Strict), &[Errno::ENODEV])?;
            refused("take what is not there", xen.deassign(domain, UNKNOWN), &[Errno::ENODEV])?;
        }
        same("assignable", ok(xen.assignable(UNKNOWN))?, false)
    })
}

fn plain(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, vf) = (&fixture.platform.hypervisor, fixture.vf);
    let plain = fixture.plain_guest.ok_or("a domain without passthrough is missing")?;
    ours(fixture, || {
        let none = [Errno::EOPNOTSUPP];
        refused("assign", xen.assign(plain, vf, RdmPolicy::Strict), &none)?;
        refused("deassign", xen.deassign(plain, vf), &none)?;
        ok(xen.assign(fixture.guest, vf, RdmPolicy::Strict))?;
        refused("what somebody else has", xen.assign(plain, vf, RdmPolicy::Strict), &none)
    })
}

fn memory(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, guest) = (&fixture.platform.hypervisor, fixture.guest);
    let vf = ok(fixture.platform.host.function(fixture.vf))?;
    let bar =
        vf.resources.iter().find(|bar| bar.exists() && !bar.is_io()).ok_or("the VF has no memory BAR")?;
    let (first, frames) = (bar.start >> 12, bar.size.div_ceil(4096));
    undone(
        || {
            for edit in [Edit::Add, Edit::Add, Edit::Remove, Edit::Remove] {
                ok(xen.iomem_permission(guest, first, frames, edit))?;
            }
            let allow = |domain, first, frames| xen.iomem_permission(domain, first, frames, Edit::Add);
            refused("for a domain that does not exist", allow(NO_DOMAIN, first, frames), &[Errno::ESRCH])?;
            refused("no frames", allow(guest, first, 0), &[Errno::EINVAL])?;
            refused("behind the end", allow(guest, u64::MAX, 2), &[Errno::EINVAL])?;
            refused("the local APIC", allow(guest, 0xfee00, 1), &[Errno::EPERM])
        },
        || ok(xen.iomem_permission(guest, first, frames, Edit::Remove)),
    )
}

fn ports(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, guest) = (&fixture.platform.hypervisor, fixture.guest);
    // Ports that nothing on a PC or in the lab uses.
    let (first, count) = (0xe000, 32);
    undone(
        || {
            for edit in [Edit::Add, Edit::Add, Edit::Remove, Edit::Remove] {
                ok(xen.ioport_permission(guest, first, count, edit))?;
            }
            let allow = |domain, first, count| xen.ioport_permission(domain, first, count, Edit::Add);
            refused("for a domain that does not exist", allow(NO_DOMAIN, first, count), &[Errno::ESRCH])?;
            refused("no ports", allow(guest, first, 0), &[Errno::EINVAL])?;
            refused("behind the end", allow(guest, 0xfff0, 0x20), &[Errno::EINVAL])?;
            refused("Xen's serial port", allow(guest, 0x3f8, 8), &[Errno::EPERM])
        },
        || ok(xen.ioport_permission(guest, first, count, Edit::Remove)),
    )
}

fn withdrawn(fixture: &Fixture) -> Result<(), Broken> {
    let (xen, vf, guest) = (&fixture.platform.hypervisor, fixture.vf, fixture.guest);
    ours(fixture, || {
        ok(xen.assign(guest, vf, RdmPolicy::Strict))?;
        undone(
            || {
                ok(xen.device_remove(vf))?;
                same("known", ok(xen.device_known(vf))?, false)?;
                refused("again", xen.device_remove(vf), &[Errno::ENODEV])?;
                refused("assign it", xen.assign(guest, vf, RdmPolicy::Strict), &[Errno::ENODEV])
            },
            || ok(xen.device_add(vf, report(fixture))),
        )?;
        same("dom0's", ok(xen.assignable(vf))?, true)?;
        refused("the guest's no more", xen.deassign(guest, vf), &[Errno::ENODEV])
    })
}

fn rings(fixture: &Fixture) -> Result<(), Broken> {
    let connect = |domain, grant, port| fixture.platform.rings.connect(domain, grant, port).map(|_| ());
    let wrong = [Errno::EINVAL];
    refused("a grant that was not made", connect(fixture.guest, 0x7fff, 1), &wrong)?;
    refused("a grant out of range", connect(fixture.guest, u32::MAX, 1), &wrong)?;
    refused("of a domain that does not exist", connect(NO_DOMAIN, 8, 1), &wrong)?;
    refused("of dom0", connect(DomId::DOM0, 8, 1), &wrong)
}
