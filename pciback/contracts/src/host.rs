//! Contracts of the host: its functions, their config space and drivers.

use nix::errno::Errno;
use pciback::Sbdf;
use pciback::config::{Access, ConfigSpace};
use pciback::platform::Cause;

use crate::Needs::{Nothing, WholePf};
use crate::{Broken, Contract, Fixture, LIMIT, UNKNOWN, missing, ok, refused, same, undone};

pub const CONTRACTS: &[Contract] = &[
    ("host/lists-what-is-there", Nothing, functions),
    ("host/what-is-not-there-is-missing", Nothing, unknown),
    ("host/vf-has-its-pfs-identity", Nothing, identity),
    ("host/widths-show-the-same-bytes", Nothing, widths),
    ("host/override-decides-the-driver", Nothing, drivers),
    ("host/reset-keeps-command", Nothing, reset),
    ("host/number-of-vfs-has-rules", Nothing, num_vfs),
    ("host/autoprobe-says-what-it-was", Nothing, autoprobe),
    ("host/what-left-reads-all-ones", WholePf, vanished),
];

fn functions(fixture: &Fixture) -> Result<(), Broken> {
    let listed = ok(fixture.platform.host.functions())?;
    same("sorted", listed.is_sorted(), true)?;
    for address in [fixture.pf, fixture.vf] {
        same("listed", listed.contains(&address), true)?;
        same("itself", ok(fixture.platform.host.function(address))?.address, address)?;
    }
    let pf = ok(fixture.platform.host.function(fixture.pf))?;
    same("the VFs of the PF", pf.virtual_functions.contains(&fixture.vf), true)?;
    same("their number", usize::from(pf.num_vfs), pf.virtual_functions.len())?;
    same("no more than it can have", pf.num_vfs <= pf.total_vfs, true)?;
    let drivers = ok(fixture.platform.host.drivers())?;
    same("the holder is loaded", drivers.contains(&fixture.holder), true)
}

fn unknown(fixture: &Fixture) -> Result<(), Broken> {
    let host = &fixture.platform.host;
    missing("function", host.function(UNKNOWN))?;
    missing("config", host.config(UNKNOWN).map(|_| ()))?;
    missing("unbind", host.unbind(UNKNOWN, LIMIT))?;
    missing("probe", host.probe(UNKNOWN, LIMIT))?;
    missing("reset", host.reset(UNKNOWN, LIMIT))?;
    missing("ports", host.ports_above(UNKNOWN))?;
    missing("uses", host.uses(UNKNOWN))?;
    missing("override", host.set_driver_override(UNKNOWN, None))?;
    missing("num_vfs", host.set_num_vfs(UNKNOWN, 1, LIMIT))
}

fn identity(fixture: &Fixture) -> Result<(), Broken> {
    let (pf, vf) = both(fixture)?;
    same("the PF", vf.physical_function, Some(fixture.pf))?;
    same(
        "ports above",
        ok(fixture.platform.host.ports_above(fixture.vf))?,
        ok(fixture.platform.host.ports_above(fixture.pf))?,
    )?;
    same("vendor", vf.vendor, pf.vendor)?;
    same("is no PF", (vf.total_vfs, vf.num_vfs, vf.irq), (0, 0, 0))?;
    let config = ok(fixture.platform.host.config(fixture.vf))?;
    same("ids in config space", read(&*config, 0, 4)?, u32::MAX)?;
    let bars = vf.resources[..6].iter().zip(&pf.resources[7..]);
    for (bar, all) in bars.filter(|(bar, all)| bar.exists() || all.exists()) {
        let inside = bar.start >= all.start && bar.start + bar.size <= all.start + all.size;
        same("a BAR within the PF's", inside, true)?;
        let index = (bar.start - all.start) / bar.size;
        let place = pf.virtual_functions.iter().position(|address| *address == fixture.vf);
        same("in the order of VFs", Some(index as usize), place)?;
    }
    Ok(())
}

fn both(
    fixture: &Fixture,
) -> Result<(pciback::platform::HostFunction, pciback::platform::HostFunction), Broken> {
    let host = &fixture.platform.host;
    Ok((ok(host.function(fixture.pf))?, ok(host.function(fixture.vf))?))
}

pub fn read(config: &dyn ConfigSpace, offset: u32, size: u32) -> Result<u32, Broken> {
    let access = Access::new(offset, size).map_err(|error| error.to_string())?;
    config.read(access).map_err(|error| error.to_string())
}

pub fn write(config: &dyn ConfigSpace, offset: u32, size: u32, value: u32) -> Result<(), Broken> {
    let access = Access::new(offset, size).map_err(|error| error.to_string())?;
    config.write(access, value).map_err(|error| error.to_string())
}

fn widths(fixture: &Fixture) -> Result<(), Broken> {
    for address in [fixture.pf, fixture.vf] {
        let config = ok(fixture.platform.host.config(address))?;
        same("size", matches!(config.size(), 256 | 4096), true)?;
        let whole = config.read_all().map_err(|error| error.to_string())?;
        same("all of it", whole.len(), usize::from(config.size()))?;
        // The header, and what stays the same behind it.
        for dword in (0..0x40u32).step_by(4).filter(|dword| *dword != 4) {
            let wide = read(&*config, dword, 4)?;
            let halves = read(&*config, dword, 2)? | read(&*config, dword + 2, 2)? << 16;
            let mut bytes = 0;
            for byte in 0..4 {
                bytes |= read(&*config, dword + byte, 1)? << (8 * byte);
            }
            same("halves", halves, wide)?;
            same("bytes", bytes, wide)?;
            let at = dword as usize;
            same("in one read", whole[at..at + 4].to_vec(), wide.to_le_bytes().to_vec())?;
        }
    }
    Ok(())
}

/// Puts the VF back to the driver and the override it had.
fn restored(
    fixture: &Fixture,
    address: Sbdf,
    body: impl FnOnce() -> Result<(), Broken>,
) -> Result<(), Broken> {
    let host = &fixture.platform.host;
    let before = ok(host.function(address))?;
    undone(body, || {
        ok(host.unbind(address, LIMIT))?;
        let wanted = before.driver_override.as_deref().or(before.driver.as_deref());
        ok(host.set_driver_override(address, wanted))?;
        if before.driver.is_some() {
            ok(host.probe(address, LIMIT))?;
        }
        ok(host.set_driver_override(address, before.driver_override.as_deref()))?;
        same("the driver of before", ok(host.function(address))?.driver, before.driver)
    })
}

fn drivers(fixture: &Fixture) -> Result<(), Broken> {
    let (host, vf) = (&fixture.platform.host, fixture.vf);
    let driver = || ok(host.function(vf)).map(|function| function.driver);
    restored(fixture, vf, || {
        ok(host.unbind(vf, LIMIT))?;
        same("after unbind", driver()?, None)?;
        same("who uses it then", ok(host.uses(vf))?, Vec::new())?;
        ok(host.unbind(vf, LIMIT))?;
        ok(host.set_driver_override(vf, Some("xpci-no-such-driver")))?;
        ok(host.probe(vf, LIMIT))?;
        same("overridden by a driver that is not loaded", driver()?, None)?;
        ok(host.set_driver_override(vf, Some(&fixture.holder)))?;
        same("only set", driver()?, None)?;
        ok(host.probe(vf, LIMIT))?;
        same("after probe", driver()?, Some(fixture.holder.clone()))?;
        ok(host.probe(vf, LIMIT))?;
        let function = ok(host.function(vf))?;
        same("shown", function.driver_override.as_deref(), Some(fixture.holder.as_str()))?;
        ok(host.set_driver_override(vf, None))?;
        let function = ok(host.function(vf))?;
        same("cleared", function.driver_override, None)?;
        same("clearing moves nothing", function.driver, Some(fixture.holder.clone()))?;
        match host.set_driver_override(vf, Some("two words")) {
            Err(error) if matches!(error.cause, Cause::Malformed(_)) => Ok(()),
            other => Err(format!("a name that is none: {other:?}")),
        }
    })
}

fn reset(fixture: &Fixture) -> Result<(), Broken> {
    let config = ok(fixture.platform.host.config(fixture.vf))?;
    let before = read(&*config, 4, 2)?;
    undone(
        || {
            // Bus Master is the bit of a VF's Command that can be set; no driver uses the function.
            write(&*config, 4, 2, before | 4)?;
            let set = read(&*config, 4, 2)?;
            same("Bus Master can be set", set & 4, 4)?;
            let bars: Result<Vec<_>, _> = (0x10..0x28).step_by(4).map(|at| read(&*config, at, 4)).collect();
            ok(fixture.platform.host.reset(fixture.vf, LIMIT))?;
            same("Command", read(&*config, 4, 2)?, set)?;
            let after: Result<Vec<_>, _> = (0x10..0x28).step_by(4).map(|at| read(&*config, at, 4)).collect();
            same("BARs", after?, bars?)
        },
        || write(&*config, 4, 2, before),
    )
}

fn num_vfs(fixture: &Fixture) -> Result<(), Broken> {
    let (host, pf) = (&fixture.platform.host, fixture.pf);
    let before = ok(host.function(pf))?;
    ok(host.set_num_vfs(pf, before.num_vfs, LIMIT))?;
    refused("too many", host.set_num_vfs(pf, before.total_vfs + 1, LIMIT), &[Errno::ERANGE])?;
    if let Some(other) = (1..=before.total_vfs).find(|count| *count != before.num_vfs) {
        refused("another number", host.set_num_vfs(pf, other, LIMIT), &[Errno::EBUSY])?;
    }
    missing("of a VF", host.set_num_vfs(fixture.vf, 1, LIMIT))?;
    same("nothing changed", ok(host.function(pf))?, before)
}

fn autoprobe(fixture: &Fixture) -> Result<(), Broken> {
    let (host, pf) = (&fixture.platform.host, fixture.pf);
    let before = ok(host.set_vf_autoprobe(pf, false))?;
    undone(
        || same("off", ok(host.set_vf_autoprobe(pf, true))?, false),
        || same("on", ok(host.set_vf_autoprobe(pf, before))?, true),
    )
}

fn vanished(fixture: &Fixture) -> Result<(), Broken> {
    let (host, pf) = (&fixture.platform.host, fixture.pf);
    let before = ok(host.function(pf))?;
    let config = ok(host.config(fixture.vf))?;
    let holder = ok(host.function(fixture.vf))?.driver_override;
    let autoprobe = ok(host.set_vf_autoprobe(pf, false))?;
    undone(
        || {
            ok(host.set_num_vfs(pf, 0, LIMIT))?;
            missing("the VF", host.function(fixture.vf))?;
            same("Xen's word", ok(fixture.platform.hypervisor.device_known(fixture.vf))?, false)?;
            same("a dword", read(&*config, 0x40, 4)?, u32::MAX)?;
            same("a byte", read(&*config, 4, 1)?, 0xff)?;
            write(&*config, 4, 2, 4)
        },
        || {
            ok(host.set_num_vfs(pf, before.num_vfs, LIMIT))?;
            ok(host.set_vf_autoprobe(pf, autoprobe))?;
            ok(host.set_driver_override(fixture.vf, holder.as_deref()))?;
            ok(host.probe(fixture.vf, LIMIT))?;
            same("Xen's word after", ok(fixture.platform.hypervisor.device_known(fixture.vf))?, true)
        },
    )
}
