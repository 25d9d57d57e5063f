//! Tells HVM guests that a function comes or goes, over the ACPI hotplug controller of their device model.
//!
//! The device model has a placeholder for each function, also for those that a guest has had since before its firmware ran: so every one can
//! be taken from it while it runs. The function is served before there is a placeholder and until it is gone, so that nobody in the guest ever
//! reaches the placeholder itself.

use log::warn;
use nix::errno::Errno;
use pciback::DomId;

use super::{Context, Withdrawal, place_of};
use crate::domains::{self, DomainType};
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};

/// Notifies an HVM guest of a function that is served. The text is a warning that it cannot be asked to release the function.
pub(super) fn announce(context: &Context<'_>, record: &mut Record) -> Result<Option<String>, Failure> {
    let place = place_of(record)?;
    let (domain, slot, store) = (place.domain, place.devfn.device(), context.platform.store.as_ref());
    if domains::kind(store, domain)? != DomainType::Hvm || !domains::has_acpi(store, domain)? {
        return Ok(None);
    }
    // Written first: whoever finds the record removes a placeholder that may be there.
    record.announced = true;
    context.write(record)?;
    let models = context.platform.device_models.as_ref();
    let Err(error) = models.announce(domain, slot) else { return Ok(None) };
    let is_taken = error.errno() == Some(Errno::EBUSY);
    let is_paused = context.platform.hypervisor.domain(domain)?.paused;
    // A guest whose firmware has not run finds the function without being notified.
    if is_taken || !is_paused || models.eject(domain, slot).is_err() {
        let failure = Failure::from(error).on(record.address).of(domain);
        return Err(match is_taken {
            true => Failure { code: ErrorCode::Refused, ..failure }
                .hint(format!("its device model has a device at {slot:x}; choose another number")),
            false => failure.hint("attach it before the guest starts, after 'xl create -p'"),
        });
    }
    record.announced = false;
    Ok(Some(format!("domain {domain} cannot be asked to release {} while it runs: {error}", record.address)))
}

/// Has an HVM guest release a function, as far as it is to be asked, and removes the placeholder. The text is a warning.
pub(super) fn take_back(context: &Context<'_>, record: &mut Record) -> Result<Option<String>, Failure> {
    if !record.announced {
        return Ok(None);
    }
    let place = place_of(record)?;
    let (domain, slot) = (place.domain, place.devfn.device());
    record.announced = false;
    if has_ended(context, domain) {
        return Ok(None);
    }
    let mut warning = None;
    // One that is paused cannot answer.
    let paused = context.platform.hypervisor.domain(domain).is_ok_and(|info| info.paused);
    if context.withdrawal == Withdrawal::Ask && !paused {
        (context.progress)(&format!("asking domain {domain} to release {}", record.address));
        let models = &context.platform.device_models;
        match models.request_eject(domain, slot, context.settings.guest_limit()) {
            Ok(true) => return Ok(None),
            Ok(false) => warning = Some(not_released(domain)),
            Err(_) if has_ended(context, domain) => return Ok(None),
            Err(error) => warning = Some(format!("{error}; it was withdrawn without the guest")),
        }
    }
    if let Some(text) = &warning {
        warn!("{}: {text}", record.address);
    }
    let left = match context.platform.device_models.eject(domain, slot) {
        Err(error) if !has_ended(context, domain) => {
            warn!("{}: {error}", record.address);
            Some(format!("{error}: the guest finds a device there that does nothing"))
        }
        _ => None,
    };
    Ok(super::hold::joined(warning.into_iter().chain(left)))
}

fn has_ended(context: &Context<'_>, domain: DomId) -> bool {
    // xenstore hears of it after Xen.
    context.withdrawal == Withdrawal::GuestEnded
        || matches!(context.platform.store.domain_exists(domain), Ok(false))
        || context
            .platform
            .hypervisor
            .domain(domain)
            .is_err_and(|error| matches!(error.errno(), Some(Errno::ESRCH | Errno::ENOENT)))
}

/// The warning that a function was withdrawn without the guest's consent.
pub fn not_released(domain: DomId) -> String {
    format!("domain {domain} did not release it in time; it was withdrawn without it")
}
