//! MSI and MSI-X of a guest's function, set up through Xen.
//!
//! Xen watches dom0's writes to the capabilities: only an exact two-byte write of Message Control gets through, others vanish
//! silently. So Control is written as one word and read back.

use std::io;

use log::warn;
use thiserror::Error;

use super::function::GuestFunction;
use crate::Sbdf;
use crate::config::{FunctionImage, InterruptMode, MsixCapability, VectorState};
use crate::live::{self, Changed, Switch};
use crate::platform::{MsiSource, Pirq, PlatformError, Revoked};
use crate::spec::legacy::MESSAGE_CONTROL;

/// Why a guest's interrupts are not as it asked.
#[derive(Debug, Error)]
pub enum InterruptError {
    /// The function has no such capability, or the guest is not shown it.
    #[error("the guest asks for {0:?}, which the function does not have")]
    NoCapability(InterruptMode),
    /// One kind excludes the other (PCI Express 6.0, section 7.7).
    #[error("the guest asks for {wanted:?} while {active:?} is enabled")]
    Conflict {
        /// What it asks for.
        wanted: InterruptMode,
        /// What is enabled.
        active: InterruptMode,
    },
    /// The list of MSI-X entries makes no sense.
    #[error("the guest asks for MSI-X entries that are {0}")]
    Entries(&'static str),
    /// The message names a physical interrupt that the guest cannot have for it.
    #[error("the guest's message for {interrupt} of {address} names its interrupt {}, which is {holder}", pirq.0)]
    Taken {
        /// Which of the function's interrupts.
        interrupt: MsiSource,
        /// The function.
        address: Sbdf,
        /// The number.
        pirq: Pirq,
        /// Its owner.
        holder: String,
    },
    /// Message Control does not keep what is written.
    #[error("Message Control at {offset:#x} reads {found:#06x} after {written:#06x} was written")]
    Control {
        /// The register.
        offset: u16,
        /// What was written.
        written: u32,
        /// What it reads.
        found: u32,
    },
    /// Message Control reads all ones: the device does not answer.
    #[error("Message Control at {offset:#x} reads all ones")]
    Silent {
        /// The register.
        offset: u16,
    },
    /// Config access failed.
    #[error("config access: {0}")]
    Config(#[from] io::Error),
    /// Xen refused.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// Undoing failed too.
    #[error("{first}; and undoing it: {second}")]
    Both {
        /// Why it failed.
        first: Box<InterruptError>,
        /// Why it could not be undone.
        second: Box<InterruptError>,
    },
}

type Result<T> = std::result::Result<T, InterruptError>;

/// The end of the physical interrupts of any guest: by default Xen gives a guest as many as there are interrupt lines, and 32 more.
pub(super) const PIRQS_END: u32 = 1024;

impl GuestFunction {
    pub(super) fn vectors(&self) -> VectorState {
        self.space.image().vectors()
    }

    /// Whether an earlier process was about to map a vector when it was killed, and Xen chose the number.
    pub(super) fn interrupted(&self) -> bool {
        let vectors = self.vectors();
        vectors.pending.is_some_and(|entry| vectors.pirq_of(entry).is_none())
    }

    /// The physical interrupts of the guest that are known to belong to it.
    pub(super) fn known_pirqs(&self) -> Vec<u32> {
        self.vectors().entries.iter().map(|(_, pirq)| *pirq).chain([self.line]).collect()
    }

    pub(super) fn note(&mut self, vectors: &VectorState) -> Result<()> {
        let stored = self.space.image_mut().set_vectors(vectors);
        self.device().vectors_noted(self);
        stored.then_some(()).ok_or(InterruptError::Entries("more than can be noted"))
    }

    /// Where the capability with a kind of interrupts is.
    pub(super) fn capability_of(&self, mode: InterruptMode) -> Result<u16> {
        let offset = match mode {
            InterruptMode::Msi => self.space.msi().map(|msi| msi.offset),
            InterruptMode::MsiX => self.space.msix().map(|msix| msix.offset),
            InterruptMode::Off | InterruptMode::Intx => None,
        };
        offset.ok_or(InterruptError::NoCapability(mode))
    }

    /// Where the host has placed the BAR that holds the MSI-X table.
    pub(super) fn msix_table(&self, msix: &MsixCapability) -> Result<u64> {
        let bar = self.space.bars().iter().find(|bar| bar.index == msix.table_bar);
        bar.map(|bar| bar.start).ok_or(InterruptError::Entries("in a table that no BAR holds"))
    }

    fn set_enable(&self, mode: InterruptMode, switch: Switch) -> Result<()> {
        let capability = self.capability_of(mode)?;
        let changed = live::set_message_control(self.hardware.as_ref(), mode, capability, switch)?;
        kept(capability, changed)
    }

    /// What the guest reads back.
    pub(super) fn show_enable(&mut self, mode: InterruptMode, enabled: bool) {
        match mode {
            InterruptMode::Msi => self.space.set_msi_enabled(enabled),
            InterruptMode::MsiX => self.space.set_msix_enabled(enabled),
            InterruptMode::Off | InterruptMode::Intx => {}
        }
    }

    /// Maps one vector so that it is never lost: noted as about to be mapped, mapped, noted as mapped.
    pub(super) fn map(&mut self, vectors: &mut VectorState, source: MsiSource) -> Result<Pirq> {
        let entry = source.entry();
        self.revocation.check().map_err(io::Error::from)?;
        if vectors.entries.len() >= FunctionImage::MAX_VECTORS {
            // Mapped, it could not be noted, and nobody would unmap it.
            return Err(InterruptError::Entries("more than can be noted"));
        }
        vectors.pending = Some(entry);
        self.note(vectors)?;
        let pirq = self.hypervisor.map_msi(self.domain, self.address, source)?;
        vectors.pending = None;
        vectors.entries.push((entry, pirq.0));
        self.note(vectors)?;
        Ok(pirq)
    }

    /// Maps one vector likewise to a physical interrupt of the guest's choice, which nothing may be mapped to. Its number is known, so that it
    /// is noted at once.
    pub(super) fn map_chosen(
        &mut self,
        vectors: &mut VectorState,
        source: MsiSource,
        pirq: Pirq,
    ) -> Result<()> {
        let entry = source.entry();
        self.revocation.check().map_err(io::Error::from)?;
        vectors.pending = Some(entry);
        vectors.entries.push((entry, pirq.0));
        vectors.chosen.push(entry);
        self.note(vectors)?;
        let mapped = self.hypervisor.map_msi_as(self.domain, self.address, source, pirq);
        if mapped.is_err() {
            vectors.forget(entry);
        }
        vectors.pending = None;
        self.note(vectors)?;
        Ok(mapped?)
    }

    /// Unmaps one vector. What is not mapped is no failure: it may be unmapped already, by a previous process or with the domain. On an
    /// error it stays noted, to be unmapped by the next try: its number is recorded nowhere else.
    pub(super) fn unmap(&mut self, vectors: &mut VectorState, entry: u16) -> Result<()> {
        let Some(pirq) = vectors.pirq_of(entry).map(Pirq) else { return Ok(()) };
        self.device().unbind(self, pirq);
        Revoked::Interrupt.outcome(self.hypervisor.unmap_pirq(self.domain, pirq))?;
        vectors.forget(entry);
        self.note(vectors)
    }

    /// Unmaps all vectors and clears Enable, as far as that goes.
    pub(super) fn release(&mut self) -> Result<()> {
        let mut vectors = self.vectors();
        let mode = vectors.mode;
        let mut outcome = Ok(());
        for (entry, _) in vectors.entries.clone().into_iter().rev() {
            outcome = outcome.and(self.unmap(&mut vectors, entry));
        }
        if matches!(mode, InterruptMode::Msi | InterruptMode::MsiX) {
            if !self.resetting() {
                outcome = outcome.and(self.set_enable(mode, Switch::Off));
            }
            self.show_enable(mode, false);
        }
        // A vector that was about to be mapped stays noted: Xen may have it.
        if vectors.entries.is_empty() {
            vectors.mode = InterruptMode::Off;
        }
        self.note(&vectors)?;
        outcome.and(Ok(self.apply_interrupt_disable()?))
    }

    /// Starts again with one kind of interrupts.
    pub(super) fn begin(&mut self, mode: InterruptMode) -> Result<VectorState> {
        let active = self.vectors().mode;
        if active == mode {
            // Enabled twice without being disabled, by a guest that was restarted or a request that is done again.
            self.release()?;
        } else if active != InterruptMode::Off {
            return Err(InterruptError::Conflict { wanted: mode, active });
        }
        let vectors = VectorState { mode, pending: self.vectors().pending, ..VectorState::default() };
        self.note(&vectors)?;
        if mode == InterruptMode::MsiX {
            // Each vector is masked until Xen has written its message.
            self.set_enable(mode, Switch::On)?;
        }
        self.apply_interrupt_disable()?;
        Ok(vectors)
    }

    /// Sets MSI Enable, now that Xen has written the message: without one, an MSI would go to address 0.
    pub(super) fn enable_mapped_msi(&self) -> Result<()> {
        self.set_enable(InterruptMode::Msi, Switch::On)
    }

    /// Enables a kind of interrupts with these vectors; what was mapped, entry by entry. On an error none is.
    pub(super) fn enable(&mut self, mode: InterruptMode, sources: &[MsiSource]) -> Result<Vec<(u16, u32)>> {
        self.capability_of(mode)?;
        let mapped = self.begin(mode).and_then(|mut vectors| {
            sources.iter().try_for_each(|source| self.map(&mut vectors, *source).map(drop))?;
            if mode == InterruptMode::Msi {
                self.enable_mapped_msi()?;
            }
            Ok(vectors.entries)
        });
        match mapped {
            Ok(entries) => {
                self.show_enable(mode, true);
                Ok(entries)
            }
            Err(InterruptError::Conflict { wanted, active }) => {
                Err(InterruptError::Conflict { wanted, active })
            }
            Err(first) => Err(match self.release() {
                Ok(()) => first,
                Err(second) => InterruptError::Both { first: Box::new(first), second: Box::new(second) },
            }),
        }
    }
}

/// After a reset: Enable and, through Xen, the vectors' messages are put back.
pub(super) fn restore(function: &mut GuestFunction) -> io::Result<()> {
    let mode = function.vectors().mode;
    if matches!(mode, InterruptMode::Msi | InterruptMode::MsiX) {
        // Messages first, Xen sets Enable itself: with Enable and no message an MSI would go to address 0.
        function.hypervisor.restore_msi(function.address).map_err(io::Error::other)?;
        function.set_enable(mode, Switch::On).map_err(io::Error::other)?;
        function.show_enable(mode, true);
    }
    Ok(())
}

/// Whether Message Control of the capability at an offset kept what was written.
pub(super) fn kept(capability: u16, changed: Changed) -> Result<()> {
    let offset = capability + MESSAGE_CONTROL;
    match changed {
        Changed::Kept => Ok(()),
        Changed::Differs { written, found } => Err(InterruptError::Control { offset, written, found }),
        Changed::Silent => Err(InterruptError::Silent { offset }),
    }
}

/// Takes all interrupts from the guest, one that was only about to be mapped included.
pub(super) fn release_all(function: &mut GuestFunction) -> Result<()> {
    function.release()?;
    if let Some(entry) = function.vectors().pending {
        // A previous process was killed between the note and the mapping, or Xen refused it.
        warn!("{}: entry {entry} may be mapped to domain {}", function.address, function.domain);
        function.note(&VectorState::default())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::test_machine::Machine;

    #[test]
    fn a_vector_that_cannot_be_noted_is_not_mapped() {
        let machine = Machine::new();
        let mut function = machine.open(Sbdf::from_devfn(0, 1, 0x10));
        let entries = (10u16..).zip(100..).take(FunctionImage::MAX_VECTORS).collect();
        let mut vectors = VectorState { mode: InterruptMode::MsiX, entries, ..VectorState::default() };
        function.note(&vectors).unwrap();
        let table = function.msix_table(&function.space.msix().unwrap()).unwrap();
        let refused = function.map(&mut vectors, MsiSource::MsiX { entry: 0, table });
        assert!(matches!(refused, Err(InterruptError::Entries(_))), "{refused:?}");
        assert!(machine.pirqs().is_empty(), "it is mapped, and nobody knows it");
    }
}
