//! Taking a function from dom0 and giving it back.

use std::time::{Duration, Instant};

use log::warn;
use nix::errno::Errno;
use pciback::platform::{Host, HostFunction, Platform, PlatformError};
use pciback::policy::RdmPolicy;
use pciback::serve::pv::nodes;
use pciback::{DomId, Sbdf};

use super::Context;
use super::reset::plan_for;
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::settings::Holder;

/// Drivers that hold a function without using it, best first. The kernel's recovery from an error fails if a driver below the same port
/// has no error handlers, and pci-stub has none.
const HOLDERS: [&str; 2] = ["pciback", "pci-stub"];

/// The limit for the kernel to offer a new function to drivers after its event.
const APPEARANCE: Duration = Duration::from_secs(5);

/// The holding driver, if the function is bound to one.
pub fn holder_of(function: &HostFunction) -> Option<&str> {
    function.driver.as_deref().filter(|driver| HOLDERS.contains(driver))
}

/// Chooses a holding driver among those that are loaded.
pub fn choose_holder(host: &dyn Host, setting: Holder) -> Result<&'static str, Failure> {
    let loaded = host.drivers()?;
    let wanted: &[&'static str] = match setting {
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
    refuse_owned(context, record)?;
    let holder = match choose_holder(host.as_ref(), context.settings.holder) {
        Ok(holder) => holder,
        Err(failure) => {
            // Other obstacles are reported together with this one.
            let in_use = if context.force { Ok(()) } else { refuse_in_use(host.as_ref(), record.address) };
            let found = [Some(failure.clone()), in_use.err()].into_iter().flatten().collect();
            let action = format!("make {} assignable", record.address);
            return Err(Failure::refuse_for(&action, found).err().unwrap_or(failure));
        }
    };
    let warning = (holder == "pci-stub").then(|| {
        format!(
            "{} is held by pci-stub, which has no error handlers: an error below the same port cannot be recovered from; \
             load xen-pciback to avoid that",
            record.address
        )
    });
    if record.incarnation != function.incarnation {
        // The noted registers are those of another device.
        record.pristine = None;
    }
    record.incarnation = function.incarnation;
    let unresettable = unresettable(context, &function);
    if holder_of(&function).is_some() {
        let warning = warning.filter(|_| function.driver.as_deref() == Some("pci-stub"));
        return Ok(joined(warning.into_iter().chain(unresettable)));
    }
    let names_no_holder = |name: &String| !HOLDERS.contains(&name.as_str());
    if let Some(before) = function.driver_override.filter(names_no_holder) {
        record.original_override = Some(before);
    }
    // Written to the journal before anything is changed.
    context.write(record)?;
    host.set_driver_override(record.address, Some(holder))?;
    // Writing driver_override waits for a probe that is under way; after it, only the holding driver can bind.
    let function = host.function(record.address)?;
    if let Some(driver) = function.driver {
        // A function without a driver may come from a failed attempt, so that the noted driver is kept.
        record.original_driver = Some(driver);
        record.unprobed = false;
        context.write(record)?;
    }
    let taken = match refuse_in_use(host.as_ref(), record.address) {
        Err(failure) if context.force && failure.code == ErrorCode::Refused => {
            Some(format!("taken although {}", failure.message))
        }
        other => other.map(|()| None)?,
    };
    (context.progress)(&format!("binding {} to {holder}", record.address));
    bind(context, record.address, holder)?;
    host.forget_slot(record.address)?;
    Ok(joined(taken.into_iter().chain(warning).chain(unresettable)))
}

/// Joins warnings into one.
pub(super) fn joined(warnings: impl Iterator<Item = String>) -> Option<String> {
    let warnings: Vec<String> = warnings.collect();
    Some(warnings.join("; ")).filter(|text| !text.is_empty())
}

/// Warns at once that a function cannot be attached later because no reset is possible.
fn unresettable(context: &Context<'_>, function: &HostFunction) -> Option<String> {
    let plan = plan_for(&context.settings.reset, context.policies, function);
    let failure = context.buses().refuse_unresettable(&plan, function, None).err()?;
    let hint = failure.hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
    Some(format!("{} cannot be attached as it is: {}{hint}", function.address, failure.message))
}

/// Refuses to take a function from a driver while it is in use.
pub fn refuse_in_use(host: &dyn Host, address: Sbdf) -> Result<(), Failure> {
    let uses: Vec<String> = host.uses(address)?.iter().map(ToString::to_string).collect();
    if uses.is_empty() {
        return Ok(());
    }
    Err(Failure::refused(format!("{address} is in use: {}", uses.join("; ")))
        .on(address)
        .hint("stop that first; 'xpci pci-assignable-add --force' takes the function anyway"))
}

/// Binds a function to the driver in its override.
fn bind(context: &Context<'_>, address: Sbdf, driver: &str) -> Result<(), Failure> {
    let (host, limit) = (&context.platform.host, context.settings.driver_limit());
    let deadline = Instant::now() + APPEARANCE;
    host.unbind(address, limit)?;
    loop {
        let seen = context.serving.host_changes();
        host.probe(address, limit)?;
        let bound = host.function(address)?.driver;
        if bound.as_deref() == Some(driver) {
            return Ok(());
        }
        // The kernel does not offer a new function to drivers before it has finished its set-up, which an event reports.
        if bound.is_some() || !context.serving.wait_for_host(seen, deadline) {
            let left_with = bound.as_deref().unwrap_or("no driver");
            let text = format!("bind {address} to {driver}: afterwards it has {left_with}");
            return Err(Failure::new(ErrorCode::Failed, text).on(address).hint("see dom0's kernel log"));
        }
    }
}

pub(super) fn give_back_driver(
    context: &Context<'_>,
    record: &mut Record,
) -> Result<Option<String>, Failure> {
    let host = &context.platform.host;
    if context.left_the_host(record) {
        return Ok(None);
    }
    // Unbinding from xen-pciback resets the function.
    refuse_owned(context, record)?;
    let function = host.function(record.address)?;
    let (before, limit) = (record.original_override.as_deref(), context.settings.driver_limit());
    let Some(original) = record.original_driver.clone() else {
        host.set_driver_override(record.address, before)?;
        // It had no driver and goes back without one. If a driver that does not hold is bound, it was never taken away.
        if holder_of(&function).is_some() {
            host.unbind(record.address, limit)?;
        }
        if record.unprobed {
            host.probe(record.address, limit)?;
        }
        return Ok(None);
    };
    if function.driver.as_ref() == Some(&original) {
        host.set_driver_override(record.address, before)?;
        return Ok(None);
    }
    (context.progress)(&format!("giving {} back to {original}", record.address));
    // The override keeps other loaded drivers that match from binding.
    host.set_driver_override(record.address, Some(&original))?;
    let bound = host.unbind(record.address, limit).and_then(|()| host.probe(record.address, limit));
    host.set_driver_override(record.address, before)?;
    bound?;
    let now = host.function(record.address)?.driver;
    if now.as_ref() == Some(&original) {
        return Ok(None);
    }
    warn!("{}: {original} did not bind to it again", record.address);
    Ok(Some(format!(
        "{} belongs to dom0 again, but {original} did not bind to it (it has {}); load that driver or see dom0's kernel log",
        record.address,
        now.as_deref().unwrap_or("no driver")
    )))
}

pub(super) fn own(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    let hypervisor = &context.platform.hypervisor;
    if !hypervisor.device_known(record.address)? {
        return Err(Failure::refused(format!("Xen does not know {}", record.address))
            .on(record.address)
            .hint("dom0's kernel failed to report it; see 'xl dmesg'"));
    }
    if !hypervisor.assignable(record.address)? {
        return Err(guest_owned(context.platform, record.address));
    }
    // With relaxed RDM policy, as xl does: the quarantine domain has no memory that could collide with reserved memory, and runs no code.
    match hypervisor.assign(DomId::IO, record.address, RdmPolicy::Relaxed) {
        // The quarantine domain owns it already, for example because xl made it assignable.
        Err(error) if matches!(error.errno(), Some(Errno::EBUSY | Errno::EEXIST)) => Ok(()),
        Err(error) => Err(refusal(error, record.address)),
        Ok(()) => Ok(()),
    }
}

fn refusal(error: PlatformError, address: Sbdf) -> Failure {
    let errno = error.errno();
    let failure = Failure::from(error).on(address);
    match errno {
        Some(Errno::EPERM) => failure.hint(
            "Xen answers this for reserved memory (RMRR) that the function shares with others, and for what its security policy \
             (XSM) forbids; 'xl dmesg' shows which",
        ),
        _ => failure.hint("'xl dmesg' shows Xen's reason"),
    }
}

/// The refusal to take a function that another toolstack has attached to a guest.
pub fn guest_owned(platform: &Platform, address: Sbdf) -> Failure {
    match nodes::pciback_guest(platform.store.as_ref(), address) {
        Ok(Some(domain)) => {
            Failure::refused(format!("{address} belongs to domain {domain}, through xen-pciback"))
                .of(domain)
                .hint(format!("detach it with 'xl pci-detach {domain} {address}' first"))
        }
        _ => Failure::refused(format!("{address} belongs to a guest already"))
            .hint("find the guest with 'xl pci-list' and detach it there first"),
    }
    .on(address)
}

/// Whether a guest has a function that another toolstack attached. If the record of the function was lost, xl's nodes in xenstore decide.
pub fn is_owned_by_other_toolstack(platform: &Platform, record: &Record) -> Result<bool, Failure> {
    let address = record.address;
    if record.guest.is_some() || !is_guest_owned(platform, address)? {
        return Ok(false);
    }
    Ok(!record.unknown_past || nodes::pciback_guest(platform.store.as_ref(), address)?.is_some())
}

/// Whether a guest owns the function in Xen.
pub(super) fn is_guest_owned(platform: &Platform, address: Sbdf) -> Result<bool, Failure> {
    let hypervisor = &platform.hypervisor;
    Ok(hypervisor.device_known(address)? && !hypervisor.assignable(address)?)
}

/// Refuses to touch a function that a guest owns in Xen although it should not: another toolstack can attach what xen-pciback holds.
pub(super) fn refuse_owned(context: &Context<'_>, record: &Record) -> Result<(), Failure> {
    if !context.left_the_host(record) && is_guest_owned(context.platform, record.address)? {
        return Err(guest_owned(context.platform, record.address));
    }
    Ok(())
}

pub(super) fn disown(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    if context.left_the_host(record) {
        // Another device at its address belongs to dom0 already.
        return Ok(());
    }
    refuse_owned(context, record)?;
    match context.platform.hypervisor.deassign(DomId::IO, record.address) {
        // The quarantine domain does not own it: it is dom0's, or it left the host.
        Err(error) if matches!(error.errno(), Some(Errno::ENODEV | Errno::EINVAL)) => Ok(()),
        other => Ok(other?),
    }
}
