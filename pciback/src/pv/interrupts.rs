//! A function's MSI and MSI-X, mapped through Xen.
//!
//! What is mapped is noted in the function's image, so that a service that is killed leaves no interrupt that nobody knows:
//!
//! | note | means |
//! | --- | --- |
//! | mode off, no entries | nothing is mapped, Enable is clear |
//! | mode MSI or MSI-X, nothing pending | exactly `entries` are mapped |
//! | the same, an entry pending | that entry may be mapped too |
//! | mode off, entries | `entries` are being unmapped, some may be already |

use std::collections::BTreeSet;

use nix::errno::Errno;

use super::function::{FunctionError, ServedFunction};
use super::wire::{MAX_ENTRIES, Request};
use crate::config::{InterruptMode, VectorState};
use crate::platform::{MsiSource, Pirq};

/// MSI Enable in MSI's Message Control (PCI Express 6.0, section 7.7.1.2).
const MSI_ENABLE: u32 = 1;
/// MSI-X Enable in MSI-X's Message Control (PCI Express 6.0, section 7.7.2.2).
const MSIX_ENABLE: u32 = 1 << 15;
/// How many interrupts beyond the highest that is noted are looked at for lost ones.
const MAX_LOST: usize = 8;

impl ServedFunction {
    fn note(&mut self, state: &VectorState) {
        // At most 128 entries are ever noted, the image has room for several times that.
        let stored = self.image_mut().set_vectors(state);
        debug_assert!(stored);
    }

    /// Sets or clears Enable in the physical control register, where there is one.
    pub(super) fn set_enable(&self, mode: InterruptMode, enable: bool) -> Result<(), FunctionError> {
        let place = match mode {
            InterruptMode::Msi => self.space.msi().map(|msi| (msi.offset + 2, MSI_ENABLE)),
            InterruptMode::MsiX => self.space.msix().map(|msix| (msix.offset + 2, MSIX_ENABLE)),
            InterruptMode::Off | InterruptMode::Intx => None,
        };
        let Some((offset, bit)) = place else { return Ok(()) };
        let (clear, set) = if enable { (0, bit) } else { (bit, 0) };
        self.change_word(offset, clear, set)
    }

    /// Sets what the guest reads as Enable.
    pub(super) fn show_enabled(&mut self, mode: InterruptMode, enabled: bool) {
        match mode {
            InterruptMode::Msi => self.space.set_msi_enabled(enabled),
            InterruptMode::MsiX => self.space.set_msix_enabled(enabled),
            InterruptMode::Off | InterruptMode::Intx => {}
        }
    }

    fn check_available(&self, wanted: InterruptMode) -> Result<(), FunctionError> {
        if !self.reachable() {
            return Err(FunctionError::Unavailable { address: self.address });
        }
        let (wanted_name, other, other_name) = match wanted {
            InterruptMode::Msi => ("MSI", InterruptMode::MsiX, "MSI-X"),
            _ => ("MSI-X", InterruptMode::Msi, "MSI"),
        };
        if self.vectors().mode == other {
            return Err(FunctionError::Conflict {
                address: self.address,
                wanted: wanted_name,
                enabled: other_name,
            });
        }
        Ok(())
    }

    /// Enables MSI; the result is its physical interrupt. Enabled again, it is mapped anew.
    pub(super) fn enable_msi(&mut self) -> Result<u32, FunctionError> {
        let address = self.address;
        if self.space.msi().is_none() {
            return Err(FunctionError::NoCapability { address, capability: "MSI" });
        }
        self.check_available(InterruptMode::Msi)?;
        self.release()?;
        match self.map(InterruptMode::Msi, &[(0, MsiSource::Msi)]) {
            Ok(vectors) => Ok(vectors.first().map_or(0, |vector| u32::from(*vector))),
            Err((_, error)) => Err(error),
        }
    }

    /// Enables MSI-X for the request's entries; the result is their physical interrupts, or how many could have been had when
    /// the guest has too few. Enabled again, all are mapped anew.
    pub(super) fn enable_msix(&mut self, request: &Request) -> Result<Result<Vec<u16>, u32>, FunctionError> {
        let address = self.address;
        let msix = self.space.msix().ok_or(FunctionError::NoCapability { address, capability: "MSI-X" })?;
        self.check_available(InterruptMode::MsiX)?;
        let (count, table_size) = (request.value, msix.table_size);
        let asked = request.entries.len();
        if count == 0 || count as usize != asked || asked > MAX_ENTRIES || asked > usize::from(table_size) {
            return Err(FunctionError::EntryCount { address, count, table_size });
        }
        let mut seen = BTreeSet::new();
        for entry in &request.entries {
            if *entry >= table_size || !seen.insert(*entry) {
                return Err(FunctionError::Entry { address, entry: *entry, table_size });
            }
        }
        let table = self.space.bars().iter().find(|bar| bar.index == msix.table_bar && bar.size != 0);
        let table = table.ok_or(FunctionError::NoTable { address, bar: msix.table_bar })?.start;
        let sources: Vec<(u16, MsiSource)> =
            request.entries.iter().map(|entry| (*entry, MsiSource::MsiX { entry: *entry, table })).collect();
        self.release()?;
        match self.map(InterruptMode::MsiX, &sources) {
            Ok(vectors) => Ok(Ok(vectors)),
            Err((mapped, FunctionError::Platform(error)))
                if error.errno() == Some(Errno::ENOSPC) && mapped > 0 =>
            {
                Ok(Err(mapped as u32))
            }
            Err((_, error)) => Err(error),
        }
    }

    /// Sets Enable and maps `sources` one after the other. A failure undoes all of it, and says how many were mapped.
    fn map(
        &mut self,
        mode: InterruptMode,
        sources: &[(u16, MsiSource)],
    ) -> Result<Vec<u16>, (usize, FunctionError)> {
        let mut state = VectorState { mode, entries: Vec::new(), pending: None };
        self.note(&state);
        let mapped = self.map_each(&mut state, sources);
        match mapped {
            Ok(vectors) => {
                self.show_enabled(mode, true);
                Ok(vectors)
            }
            Err(error) => {
                // An error of Xen's means that the pending entry was not mapped.
                state.pending = None;
                self.note(&state);
                if let Err(undo) = self.release() {
                    log::error!("{}: undoing a failed mapping of interrupts: {undo}", self.address);
                }
                Err((state.entries.len(), error))
            }
        }
    }

    fn map_each(
        &mut self,
        state: &mut VectorState,
        sources: &[(u16, MsiSource)],
    ) -> Result<Vec<u16>, FunctionError> {
        self.set_enable(state.mode, true)?;
        let mut vectors = Vec::with_capacity(sources.len());
        for (entry, source) in sources {
            state.pending = Some(*entry);
            self.note(state);
            let pirq = self.hypervisor.map_msi(self.domain, self.address, *source)?;
            state.pending = None;
            state.entries.push((*entry, pirq.0));
            match u16::try_from(pirq.0) {
                Ok(vector) if vector != 0 => vectors.push(vector),
                _ => return Err(FunctionError::Number { address: self.address, pirq: pirq.0 }),
            }
        }
        self.note(state);
        Ok(vectors)
    }

    /// Disables MSI or MSI-X; nothing happens when it is not enabled.
    pub(super) fn disable(&mut self, mode: InterruptMode) -> Result<(), FunctionError> {
        if self.vectors().mode == mode { self.release() } else { Ok(()) }
    }

    /// Unmaps all interrupts and clears Enable. Every part is tried; the first failure is the result.
    pub(super) fn release(&mut self) -> Result<(), FunctionError> {
        let state = self.vectors();
        if state == VectorState::default() {
            return Ok(());
        }
        if state.mode == InterruptMode::Intx {
            // The line belongs to the attach transaction, which mapped it.
            return Ok(());
        }
        self.note(&VectorState { mode: InterruptMode::Off, pending: None, ..state.clone() });
        let mut failed: Option<FunctionError> = None;
        let mut kept = Vec::new();
        for (entry, pirq) in &state.entries {
            if let Err(error) = self.hypervisor.unmap_pirq(self.domain, Pirq(*pirq)) {
                match error.errno() {
                    // It is not mapped any more, or the guest is not there any more.
                    Some(Errno::EINVAL | Errno::ESRCH) => {}
                    _ => {
                        kept.push((*entry, *pirq));
                        failed.get_or_insert(error.into());
                    }
                }
            }
        }
        for mode in [InterruptMode::MsiX, InterruptMode::Msi] {
            if self.reachable()
                && let Err(error) = self.set_enable(mode, false)
            {
                failed.get_or_insert(error);
            }
            self.show_enabled(mode, false);
        }
        // What could not be unmapped stays noted, for the next attempt.
        self.note(&VectorState { mode: InterruptMode::Off, entries: kept, pending: None });
        failed.map_or(Ok(()), Err)
    }

    /// Finishes what a killed service had begun, before the guest is served again.
    pub(super) fn settle_vectors(&mut self, noted: &BTreeSet<Pirq>) -> Result<(), FunctionError> {
        let state = self.vectors();
        if state.mode == InterruptMode::Off && !state.entries.is_empty() {
            return self.release();
        }
        let Some(entry) = state.pending else { return Ok(()) };
        let recovered = self.unmap_lost(state.mode, entry, noted);
        // The request that mapped it is done again from its beginning.
        self.note(&VectorState { pending: None, ..state });
        let released = self.release();
        recovered.and(released)
    }

    /// Unmaps an interrupt that was mapped for this function without having been noted.
    ///
    /// Xen does not tell which physical interrupts a domain has, and maps the same entry a second time without a word. But
    /// it always takes the highest number that is free (`get_free_pirq`), one thread maps for a guest, and nothing was
    /// mapped since. So when the entry is mapped once more, a lost interrupt has a higher number than the one that comes
    /// out: it was the highest free number then, this is the highest now. Between the two every number is taken,
    /// by interrupts that are noted. So: map, unmap that again, then unmap upwards from there what is not
    /// noted, until Xen says that there is nothing: that is either the lost one, or the end of the domain's numbers.
    /// In this order the search can itself be interrupted anywhere and be done again: lost numbers stay above the highest
    /// that is free.
    ///
    /// This trusts that nobody else maps message-signalled interrupts for this guest while we serve it. A guest has only one PCI
    /// frontend, so no other backend does.
    fn unmap_lost(
        &mut self,
        mode: InterruptMode,
        entry: u16,
        noted: &BTreeSet<Pirq>,
    ) -> Result<(), FunctionError> {
        if !self.reachable() {
            return Err(FunctionError::Unavailable { address: self.address });
        }
        let source = match mode {
            InterruptMode::Msi => MsiSource::Msi,
            InterruptMode::MsiX => {
                let bar = self.space.msix().and_then(|msix| {
                    self.space.bars().iter().find(|bar| bar.index == msix.table_bar && bar.size != 0)
                });
                match bar {
                    Some(bar) => MsiSource::MsiX { entry, table: bar.start },
                    None => return Ok(()),
                }
            }
            InterruptMode::Off | InterruptMode::Intx => return Ok(()),
        };
        self.set_enable(mode, true)?;
        let lowest = match self.hypervisor.map_msi(self.domain, self.address, source) {
            Ok(pirq) => {
                self.hypervisor.unmap_pirq(self.domain, pirq)?;
                pirq.0
            }
            // All numbers are taken: the lost one lies among those that are noted, or next above them.
            Err(error) if error.errno() == Some(Errno::ENOSPC) => match noted.first() {
                Some(lowest) => lowest.0,
                None => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        };
        let candidates = (lowest.saturating_add(1)..=u32::from(u16::MAX)).map(Pirq);
        for pirq in candidates.filter(|pirq| !noted.contains(pirq)).take(MAX_LOST) {
            match self.hypervisor.unmap_pirq(self.domain, pirq) {
                Ok(()) => log::info!("{}: recovered the lost physical interrupt {}", self.address, pirq.0),
                Err(error) if error.errno() == Some(Errno::EINVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
