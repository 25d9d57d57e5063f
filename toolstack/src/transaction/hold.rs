//! Taking a function from dom0 and giving it back.

use std::time::Duration;

use log::warn;
use nix::errno::Errno;
use pciback::DomId;
use pciback::platform::{Host, HostFunction};

use super::Context;
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::settings::Holder;

/// Drivers that hold a function without using it, best first: recovery from errors in the neighbourhood is vetoed by
/// a driver without error handlers, and pci-stub has none.
const HOLDERS: [&str; 2] = ["pciback", "pci-stub"];

/// The driver that holds, when the function is bound to such a one.
pub fn holder_of(function: &HostFunction) -> Option<&str> {
    function.driver.as_deref().filter(|driver| HOLDERS.contains(driver))
}

/// Chooses the driver that will hold.
fn choose_holder(context: &Context<'_>) -> Result<&'static str, Failure> {
    let loaded = context.platform.host.drivers()?;
    let wanted: &[&'static str] = match context.settings.holder {
        Holder::Auto => &HOLDERS,
        Holder::Pciback => &HOLDERS[..1],
        Holder::PciStub => &HOLDERS[1..],
    };
    let found = wanted.iter().find(|holder| loaded.iter().any(|driver| driver == *holder)).copied();
    found.ok_or_else(|| {
        Failure::refused(format!(
            "no driver that holds functions is loaded (looked for {})",
            wanted.join(", ")
        ))
        .hint("run 'modprobe xen-pciback', or 'modprobe pci-stub'")
    })
}

pub(super) fn take_driver(context: &Context<'_>, record: &mut Record) -> Result<Option<String>, Failure> {
    let host = &context.platform.host;
    let function = host.function(record.address)?;
    let holder = choose_holder(context)?;
    let warning = (holder == "pci-stub").then(|| {
        format!(
            "{} is held by pci-stub, which has no error handlers: an error below the same port cannot be recovered from; \
             load xen-pciback to avoid that",
            record.address
        )
    });
    if holder_of(&function).is_some() {
        record.incarnation = function.incarnation;
        return Ok(warning.filter(|_| function.driver.as_deref() == Some("pci-stub")));
    }
    record.incarnation = function.incarnation;
    if let Some(driver) = &function.driver {
        // One without a driver may be on its way back from an attempt that failed: what is known stays.
        record.original_driver = Some(driver.clone());
    }
    context.write(record)?;
    (context.progress)(&format!("binding {} to {holder}", record.address));
    host.set_driver_override(record.address, Some(holder))?;
    rebind(host.as_ref(), &function, context.settings.driver_limit())?;
    let bound = host.function(record.address)?.driver;
    if bound.as_deref() == Some(holder) {
        return Ok(warning);
    }
    Err(Failure::new(
        ErrorCode::Failed,
        format!(
            "bind {} to {holder}: the kernel left it with {}",
            record.address,
            bound.as_deref().unwrap_or("no driver")
        ),
    )
    .on(record.address)
    .hint("see dom0's kernel log"))
}

pub(super) fn give_back_driver(
    context: &Context<'_>,
    record: &mut Record,
) -> Result<Option<String>, Failure> {
    let host = &context.platform.host;
    if context.left_the_host(record) {
        return Ok(None);
    }
    let function = host.function(record.address)?;
    host.set_driver_override(record.address, None)?;
    let Some(original) = record.original_driver.clone() else {
        // It came without a driver; it goes back without one. A driver that does not hold was never taken away.
        if holder_of(&function).is_none() {
            return Ok(None);
        }
        host.unbind(record.address, context.settings.driver_limit())?;
        return Ok(None);
    };
    if function.driver.as_ref() == Some(&original) {
        return Ok(None);
    }
    (context.progress)(&format!("giving {} back to {original}", record.address));
    // Only the driver it came from may take it, even where another loaded one would match too.
    host.set_driver_override(record.address, Some(&original))?;
    let bound = rebind(host.as_ref(), &function, context.settings.driver_limit());
    host.set_driver_override(record.address, None)?;
    bound?;
    let now = host.function(record.address)?.driver;
    if now.as_ref() == Some(&original) {
        return Ok(None);
    }
    warn!("{}: {original} did not take it back", record.address);
    Ok(Some(format!(
        "{} is dom0's again, but {original} did not take it (it has {}); load that driver or see dom0's kernel log",
        record.address,
        now.as_deref().unwrap_or("no driver")
    )))
}

fn rebind(host: &dyn Host, function: &HostFunction, limit: Duration) -> Result<(), Failure> {
    host.unbind(function.address, limit)?;
    host.probe(function.address, limit)?;
    Ok(())
}

pub(super) fn own(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    let hypervisor = &context.platform.hypervisor;
    if !hypervisor.device_known(record.address)? {
        return Err(Failure::refused(format!("Xen does not know {}", record.address))
            .on(record.address)
            .hint("dom0's kernel failed to report it; see 'xl dmesg'"));
    }
    if !hypervisor.assignable(record.address)? {
        return Err(Failure::refused(format!("{} belongs to a guest already", record.address))
            .on(record.address)
            .hint("find the guest with 'xl pci-list' and detach it there first"));
    }
    match hypervisor.assign(DomId::IO, record.address) {
        // The quarantine domain owns it already, for example because xl holds it.
        Err(error) if matches!(error.errno(), Some(Errno::EBUSY | Errno::EEXIST)) => Ok(()),
        other => Ok(other?),
    }
}

pub(super) fn disown(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    if context.left_the_host(record) {
        // Another one at its address is dom0's already.
        return Ok(());
    }
    match context.platform.hypervisor.deassign(DomId::IO, record.address) {
        // It is not the quarantine domain's: dom0 has it, or it left the host.
        Err(error) if matches!(error.errno(), Some(Errno::ENODEV | Errno::EINVAL)) => Ok(()),
        other => Ok(other?),
    }
}
