//! What a PV guest asks for its interrupts: Xen writes the messages, the guest gets physical interrupts to bind.

use log::warn;

use super::wire::{MSIX_ENTRIES, MsixEntry, Op, OpAnswer};
use crate::config::{InterruptMode, VectorState};
use crate::platform::{MsiSource, Pirq, Revoked};
use crate::serve::interrupts::PIRQS_END;
use crate::serve::{GuestFunction, InterruptError, Roster};

type Result<T> = std::result::Result<T, InterruptError>;

pub(super) fn enable_msi(function: &mut GuestFunction) -> Result<OpAnswer> {
    let entries = function.enable(InterruptMode::Msi, &[MsiSource::Msi])?;
    Ok(OpAnswer::value(entries.first().map_or(0, |(_, pirq)| *pirq)))
}

pub(super) fn enable_msix(function: &mut GuestFunction, op: &Op) -> Result<OpAnswer> {
    let msix = function.space.msix().ok_or(InterruptError::NoCapability(InterruptMode::MsiX))?;
    let count = op.value as usize;
    if count == 0 || count > MSIX_ENTRIES {
        return Err(InterruptError::Entries("none, or more than the page can hold"));
    }
    let asked = &op.entries[..count];
    if asked.iter().any(|asked| asked.entry >= msix.table_size) {
        return Err(InterruptError::Entries("beyond its table"));
    }
    let twice = (1..count).any(|index| asked[..index].iter().any(|other| other.entry == asked[index].entry));
    if twice {
        return Err(InterruptError::Entries("given twice"));
    }
    let table = function.msix_table(&msix)?;
    let sources: Vec<_> = asked.iter().map(|asked| MsiSource::MsiX { entry: asked.entry, table }).collect();
    let mapped = function.enable(InterruptMode::MsiX, &sources)?;
    let entries = mapped.iter().map(|&(entry, pirq)| MsixEntry { entry, vector: pirq as u16 }).collect();
    Ok(OpAnswer { entries, ..OpAnswer::value(0) })
}

pub(super) fn disable(function: &mut GuestFunction, mode: InterruptMode) -> Result<OpAnswer> {
    if function.vectors().mode == mode {
        function.release()?;
    }
    function.show_enable(mode, false);
    Ok(OpAnswer::value(0))
}

/// Unmaps vectors that a previous process mapped but could not record before it was killed.
pub(super) fn recover_interrupted(roster: &mut Roster) {
    let known: Vec<u32> = roster.functions.values().flat_map(|function| function.known_pirqs()).collect();
    for function in roster.functions.values_mut().filter(|function| function.interrupted()) {
        if let Err(error) = unmap_unknown(function, &known) {
            warn!("{}: recover a vector of domain {}: {error}", function.address(), roster.domain);
        }
    }
}

/// Pirqs below these are the ISA interrupts'.
const PIRQS: std::ops::Range<u32> = 16..PIRQS_END;

/// Unmaps a vector that a previous process mapped but could not record.
///
/// Xen chooses the number of a vector's pirq and does not report later which belongs to what. All pirqs of a PV guest's
/// functions are ours, since a guest has one PCI device in xenstore; so those that are not `known` are unmapped.
fn unmap_unknown(function: &mut GuestFunction, known: &[u32]) -> Result<()> {
    for pirq in PIRQS.filter(|pirq| !known.contains(pirq)) {
        Revoked::Interrupt.outcome(function.hypervisor.unmap_pirq(function.domain, Pirq(pirq)))?;
    }
    let vectors = VectorState { pending: None, ..function.vectors() };
    function.note(&vectors)
}
