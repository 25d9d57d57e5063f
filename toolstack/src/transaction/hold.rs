//! Taking a function from dom0 and giving it back.

use std::time::{Duration, Instant};

use log::warn;
use nix::errno::Errno;
use pciback::platform::{Host, HostFunction, Platform, PlatformError};
use pciback::policy::{PolicySet, RdmPolicy, Subject};
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

/// The driver that holds a PF whose guest creates VFs: of the drivers that hold, it alone lets `sriov_numvfs` be written. It has no error
/// handlers either.
pub const PF_STUB: &str = "pci-pf-stub";

/// The limit for the kernel to offer a new function to drivers after its event.
const APPEARANCE: Duration = Duration::from_secs(5);

/// The holding driver, if the function is bound to one.
pub fn holder_of(function: &HostFunction) -> Option<&str> {
    function.driver.as_deref().filter(|driver| HOLDERS.contains(driver))
}

/// Whether a holding driver has a function that the service has a record of. One without a record, an unmanaged PF, may have [`PF_STUB`]
/// for another purpose.
pub fn is_held(function: &HostFunction) -> bool {
    holder_of(function).is_some() || function.driver.as_deref() == Some(PF_STUB)
}

/// Whether policies have the guest that gets a PF create its VFs. Those for a guest's name do not count: no guest has it yet.
pub fn vfs_are_by_guest(policies: &PolicySet, function: &HostFunction) -> bool {
    function.total_vfs > 0
        && policies.merge(&Subject::of_host(function, None)).policy.virtual_functions.is_some()
}

/// The driver that holds a function.
fn holder_for(context: &Context<'_>, function: &HostFunction) -> Result<&'static str, Failure> {
    let host = context.platform.host.as_ref();
    if !vfs_are_by_guest(context.policies, function) {
        return choose_holder(host, context.settings.holder);
    }
    if host.drivers()?.iter().any(|driver| driver == PF_STUB) {
        return Ok(PF_STUB);
    }
    let text = format!(
        "a guest is to create VFs of {}, which needs {PF_STUB}, and that is not loaded",
        function.address
    );
    Err(Failure::refused(text).on(function.address).hint(format!("run 'modprobe {PF_STUB}'")))
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
    let holder = match holder_for(context, &function) {
        Ok(holder) => holder,
        Err(failure) => {
            // Other obstacles are reported together with this one.
            let in_use = if context.force { Ok(()) } else { refuse_in_use(host.as_ref(), record.address) };
            let found = [Some(failure.clone()), in_use.err()].into_iter().flatten().collect();
            let action = format!("make {} assignable", record.address);
            return Err(Failure::refuse_for(&action, found).err().unwrap_or(failure));
        }
    };
    let unrecoverable = |driver: &str| {
        let advice = if driver == PF_STUB { "" } else { "; load xen-pciback to avoid that" };
        format!(
            "{} is held by {driver}, which has no error handlers: an error below the same port cannot be recovered from{advice}",
            record.address
        )
    };
    let warning = (holder != HOLDERS[0]).then(|| unrecoverable(holder));
    if record.incarnation != function.incarnation {
        // The noted registers are those of another device.
        record.pristine = None;
    }
    record.incarnation = function.incarnation;
    let unresettable = unresettable(context, &function);
    let has_it = match holder {
        PF_STUB => function.driver.as_deref() == Some(PF_STUB),
        _ => holder_of(&function).is_some(),
    };
    if has_it {
        let warning = warning.filter(|_| function.driver.as_deref() != Some(HOLDERS[0]));
        return Ok(joined(warning.into_iter().chain(unresettable)));
    }
    let names_no_holder = |name: &String| name != PF_STUB && !HOLDERS.contains(&name.as_str());
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
    if holder == PF_STUB {
        // No driver of dom0 binds to VFs that a guest creates, also not when they are given back.
        record.vf_autoprobe = host.set_vf_autoprobe(record.address, false)?;
        context.write(record)?;
    }
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
    if record.vf_autoprobe {
        host.set_vf_autoprobe(record.address, true)?;
        record.vf_autoprobe = false;
    }
    let (before, limit) = (record.original_override.as_deref(), context.settings.driver_limit());
    let Some(original) = record.original_driver.clone() else {
        host.set_driver_override(record.address, before)?;
        // It had no driver and goes back without one. If a driver that does not hold is bound, it was never taken away.
        if is_held(&function) {
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
