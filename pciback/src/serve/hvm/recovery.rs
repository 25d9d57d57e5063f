//! Vectors that a previous process mapped but could not note before it was killed.
//!
//! Xen chose the number. It does not say which function a physical interrupt belongs to, but whether there is one. An HVM guest has numbers
//! that are not mapped to interrupts of the host: those of its emulated devices, and those that it has reserved for itself. Of the others,
//! each belongs to one of its functions: so one that no function is known to have is what was not noted.

use log::{info, warn};

use super::numbers;
use crate::platform::{HvmDomains, Pirq, Revoked};
use crate::serve::interrupts::PIRQS_END;
use crate::serve::{InterruptError, Roster};

/// Unmaps such vectors. `shared`: another toolstack has given functions to the guest, whose interrupts cannot be distinguished from ours.
pub(super) fn recover_interrupted(roster: &mut Roster, domains: &dyn HvmDomains, shared: bool) {
    if !roster.functions.values().any(|function| function.interrupted()) {
        return;
    }
    let domain = roster.domain;
    if shared {
        warn!(
            "domain {domain} has functions from another toolstack: an interrupt that was being mapped when xpcid was killed may stay \
             mapped until the guest ends"
        );
        return;
    }
    if let Err(error) = unmap_unknown(roster, domains) {
        warn!("domain {domain}: recover an interrupt that was being mapped when xpcid was killed: {error}");
    }
}

fn unmap_unknown(roster: &mut Roster, domains: &dyn HvmDomains) -> Result<(), InterruptError> {
    let domain = roster.domain;
    let known: Vec<u32> = roster.functions.values().flat_map(|function| function.known_pirqs()).collect();
    let Some(hypervisor) = roster.functions.values().next().map(|function| function.hypervisor.clone())
    else {
        return Ok(());
    };
    for number in (numbers::FIRST.0..PIRQS_END).filter(|number| !known.contains(number)) {
        if domains.is_mapped(domain, Pirq(number))? {
            info!(
                "domain {domain}: interrupt {number} is unmapped: it was being mapped when xpcid was killed"
            );
            // Xen cannot use an interrupt again that was unmapped while it was bound.
            Revoked::Interrupt.outcome(domains.unbind_msi(domain, Pirq(number)))?;
            Revoked::Interrupt.outcome(hypervisor.unmap_pirq(domain, Pirq(number)))?;
        }
    }
    for function in roster.functions.values_mut().filter(|function| function.interrupted()) {
        let mut vectors = function.vectors();
        vectors.pending = None;
        function.note(&vectors)?;
    }
    Ok(())
}
