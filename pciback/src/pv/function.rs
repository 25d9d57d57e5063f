//! One function as its guest reaches it: requests in, answers out.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use thiserror::Error;

use super::wire::{Command, ErrorCode, Request};
use crate::config::{
    Access, AccessError, ConfigSpace, FunctionImage, InterruptMode, SideEffect, VectorState,
    VirtualConfigSpace, Width,
};
use crate::platform::{Hypervisor, Pirq, PlatformError};
use crate::spec::header;
use crate::{DomId, Sbdf};

/// Bus Master Enable of Command (PCI Local Bus 3.0, section 6.2.2).
const BUS_MASTER: u32 = 1 << 2;

/// Why a request on a function was not carried out.
#[derive(Debug, Error)]
pub enum FunctionError {
    /// Offset and size make no access.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// A command that this backend does not have.
    #[error("{address}: command {command} is unknown or not implemented")]
    Unimplemented {
        /// The function.
        address: Sbdf,
        /// Its number.
        command: u32,
    },
    /// The function has no such capability, or hides it.
    #[error("{address}: it has no {capability} that its guest may use")]
    NoCapability {
        /// The function.
        address: Sbdf,
        /// `MSI` or `MSI-X`.
        capability: &'static str,
    },
    /// The other kind of interrupts is enabled.
    #[error("{address}: {wanted} was asked for while {enabled} is enabled")]
    Conflict {
        /// The function.
        address: Sbdf,
        /// What the guest asked for.
        wanted: &'static str,
        /// What it has.
        enabled: &'static str,
    },
    /// An MSI-X request that cannot be.
    #[error("{address}: {count} MSI-X entries were asked for, the table has {table_size} and a request 128")]
    EntryCount {
        /// The function.
        address: Sbdf,
        /// How many.
        count: u32,
        /// How many there are.
        table_size: u16,
    },
    /// An entry that is not in the table, or asked for twice.
    #[error("{address}: MSI-X entry {entry} was asked for twice or is beyond the table of {table_size}")]
    Entry {
        /// The function.
        address: Sbdf,
        /// Which.
        entry: u16,
        /// How many there are.
        table_size: u16,
    },
    /// The BAR that the MSI-X table is said to be in is none.
    #[error("{address}: its MSI-X table is said to be in BAR {bar}, which it does not have")]
    NoTable {
        /// The function.
        address: Sbdf,
        /// Which.
        bar: u8,
    },
    /// It is being reset or has left the host.
    #[error("{address}: it is being reset, or gone")]
    Unavailable {
        /// The function.
        address: Sbdf,
    },
    /// A register does not take what was written.
    #[error("{address}: the control register at {offset:#x} reads {found:#x} after {written:#x} was written")]
    Refused {
        /// The function.
        address: Sbdf,
        /// Where.
        offset: u16,
        /// What was written.
        written: u32,
        /// What it reads.
        found: u32,
    },
    /// Xen gave a number that the protocol cannot carry.
    #[error("{address}: Xen mapped physical interrupt {pirq}, the protocol carries 1 to 65535")]
    Number {
        /// The function.
        address: Sbdf,
        /// Which.
        pirq: u32,
    },
    /// Config space could not be reached.
    #[error("{address}: config space at {offset:#x}: {source}")]
    Hardware {
        /// The function.
        address: Sbdf,
        /// Where.
        offset: u16,
        /// Why.
        source: io::Error,
    },
    /// The hypervisor refused.
    #[error(transparent)]
    Platform(#[from] PlatformError),
}

impl FunctionError {
    /// The protocol's code for it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Access(_) => ErrorCode::INVALID_OFFSET,
            Self::Unimplemented { .. } => ErrorCode::NOT_IMPLEMENTED,
            Self::Hardware { .. } => ErrorCode::NO_DEVICE,
            _ => ErrorCode::FAILED,
        }
    }

    /// A short name of its kind.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Access(_) => "access",
            Self::Unimplemented { .. } => "command",
            Self::NoCapability { .. } | Self::NoTable { .. } => "capability",
            Self::Conflict { .. } | Self::EntryCount { .. } | Self::Entry { .. } => "interrupt request",
            Self::Unavailable { .. } => "unavailable",
            Self::Refused { .. } | Self::Number { .. } => "control register",
            Self::Hardware { .. } => "hardware",
            Self::Platform(_) => "hypervisor",
        }
    }
}

/// What came of a request.
#[derive(Debug)]
pub struct Outcome {
    /// What was read, a physical interrupt, or 0.
    pub value: u32,
    /// The physical interrupts of an MSI-X request's entries.
    pub vectors: Vec<u16>,
    /// The guest asked for a reset, and the image says that it runs: somebody must carry it out.
    pub reset: bool,
    /// Why it was not carried out.
    pub error: Option<FunctionError>,
}

impl Outcome {
    fn value(value: u32) -> Self {
        Self { value, vectors: Vec::new(), reset: false, error: None }
    }

    fn failed(command: Command, error: FunctionError) -> Self {
        let value = if command == Command::READ { u32::MAX } else { 0 };
        Self { value, vectors: Vec::new(), reset: false, error: Some(error) }
    }
}

/// One function as its guest reaches it.
pub struct ServedFunction {
    pub(super) domain: DomId,
    pub(super) address: Sbdf,
    pub(super) space: VirtualConfigSpace,
    pub(super) hw: Box<dyn ConfigSpace>,
    pub(super) hypervisor: Arc<dyn Hypervisor>,
    gone: bool,
}

impl std::fmt::Debug for ServedFunction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServedFunction")
            .field("domain", &self.domain)
            .field("address", &self.address)
            .field("gone", &self.gone)
            .finish_non_exhaustive()
    }
}

impl ServedFunction {
    /// A function for a guest. `space` was created, or resumed from what an earlier life of the service left.
    pub fn new(
        domain: DomId,
        address: Sbdf,
        space: VirtualConfigSpace,
        hw: Box<dyn ConfigSpace>,
        hypervisor: Arc<dyn Hypervisor>,
    ) -> Self {
        Self { domain, address, space, hw, hypervisor, gone: false }
    }

    /// Where it is on the host.
    pub fn address(&self) -> Sbdf {
        self.address
    }

    /// Its virtual config space.
    pub fn space(&self) -> &VirtualConfigSpace {
        &self.space
    }

    /// Its image.
    pub fn image(&self) -> &FunctionImage {
        self.space.image()
    }

    pub(super) fn image_mut(&mut self) -> &mut FunctionImage {
        self.space.image_mut()
    }

    /// The interrupts that are mapped for it.
    pub fn vectors(&self) -> VectorState {
        self.image().vectors()
    }

    /// Whether it left the host.
    pub fn gone(&self) -> bool {
        self.gone
    }

    /// It left the host: every access reads all ones from here on.
    pub fn set_gone(&mut self) {
        self.gone = true;
    }

    /// Whether hardware may be touched.
    pub(super) fn reachable(&self) -> bool {
        !self.gone && !self.image().resetting()
    }

    /// Carries out a request, whatever its segment, bus and device number are.
    pub fn execute(&mut self, request: &Request) -> Outcome {
        let result = match request.command {
            Command::READ => self.read(request).map(Outcome::value),
            Command::WRITE => self.write(request),
            Command::ENABLE_MSI => self.enable_msi().map(Outcome::value),
            Command::DISABLE_MSI => self.disable(InterruptMode::Msi).map(|()| Outcome::value(0)),
            Command::ENABLE_MSIX => self.enable_msix(request).map(|enabled| match enabled {
                Ok(vectors) => Outcome { vectors, ..Outcome::value(0) },
                // The frontend then tries again with this many.
                Err(possible) => Outcome::value(possible),
            }),
            Command::DISABLE_MSIX => self.disable(InterruptMode::MsiX).map(|()| Outcome::value(0)),
            Command(command) => Err(FunctionError::Unimplemented { address: self.address, command }),
        };
        result.unwrap_or_else(|error| Outcome::failed(request.command, error))
    }

    fn read(&self, request: &Request) -> Result<u32, FunctionError> {
        let access = Access::new(request.offset, request.size)?;
        if !self.reachable() {
            return Ok(access.width().mask());
        }
        self.space.read(access, self.hw.as_ref()).map_err(|source| self.hardware(access.offset(), source))
    }

    fn write(&mut self, request: &Request) -> Result<Outcome, FunctionError> {
        let access = Access::new(request.offset, request.size)?;
        if !self.reachable() {
            return Ok(Outcome::value(request.value));
        }
        let value = request.value & access.width().mask();
        let effect = self.space.write(access, value, self.hw.as_ref());
        let effect = effect.map_err(|source| self.hardware(access.offset(), source))?;
        let reset = effect == Some(SideEffect::FunctionLevelReset);
        if reset {
            self.image_mut().set_resetting(true);
        }
        Ok(Outcome { reset, ..Outcome::value(request.value) })
    }

    pub(super) fn hardware(&self, offset: u16, source: io::Error) -> FunctionError {
        FunctionError::Hardware { address: self.address, offset, source }
    }

    fn control(&self, offset: u16) -> Result<Access, FunctionError> {
        Ok(Access::new(u32::from(offset), u32::from(Width::Word.bytes()))?)
    }

    /// Changes bits of a 16-bit register of hardware, by one access of exactly that width: Xen lets no other pass where it
    /// watches. Nothing is written when nothing changes.
    pub(super) fn change_word(&self, offset: u16, clear: u32, set: u32) -> Result<(), FunctionError> {
        let access = self.control(offset)?;
        let io = |source| self.hardware(offset, source);
        let before = self.hw.read(access).map_err(io)?;
        let written = before & !clear | set;
        if written == before {
            return Ok(());
        }
        self.hw.write(access, written).map_err(io)?;
        let found = self.hw.read(access).map_err(io)?;
        if (found ^ written) & (clear | set) != 0 {
            return Err(FunctionError::Refused { address: self.address, offset, written, found });
        }
        Ok(())
    }

    /// Makes sure that the function sends nothing any more: bus mastering off, interrupts off and unmapped. Every part is tried;
    /// the first failure is the result.
    pub fn quiesce(&mut self) -> Result<(), FunctionError> {
        let master = if self.reachable() { self.change_word(header::COMMAND, BUS_MASTER, 0) } else { Ok(()) };
        let interrupts = self.release();
        self.image_mut().clear_request();
        // A function that vanished is as silent as can be.
        let master = if self.absent() { Ok(()) } else { master };
        master.and(interrupts)
    }

    /// Whether it does not answer: it reads all ones where that cannot be.
    fn absent(&self) -> bool {
        let Ok(access) = self.control(header::VENDOR_ID) else { return false };
        if self.gone {
            return true;
        }
        let Ok(command) = self.control(header::COMMAND) else { return false };
        // A VF's vendor id always reads all ones; its Command never does.
        let ones = |access| self.hw.read(access).is_ok_and(|value| value == 0xffff);
        !self.image().resetting() && ones(access) && ones(command)
    }

    /// The reset that [`Outcome::reset`] asked for is over. Puts the function back to where its guest expects it to be: config
    /// space as after a reset, interrupts that are mapped sent again.
    pub fn reset_done(&mut self) -> Result<(), FunctionError> {
        if !self.image().resetting() {
            return Ok(());
        }
        self.space.reset();
        let vectors = self.vectors();
        let restored = self.after_reset(&vectors);
        // Also after a failure: the guest is to see the function as it is, and the service decides what becomes of it.
        self.image_mut().set_resetting(false);
        restored
    }

    fn after_reset(&mut self, vectors: &VectorState) -> Result<(), FunctionError> {
        // The host's reset restores Command; the guest's is 0 again.
        self.change_word(header::COMMAND, BUS_MASTER, 0)?;
        if vectors.entries.is_empty() || !matches!(vectors.mode, InterruptMode::Msi | InterruptMode::MsiX) {
            return Ok(());
        }
        // Messages first: enabled without them the function would write to address 0.
        self.hypervisor.restore_msi(self.address)?;
        self.set_enable(vectors.mode, true)?;
        self.show_enabled(vectors.mode, true);
        Ok(())
    }

    /// Brings interrupts into a state that can be gone on from, after a service was killed at any point. `noted` are the
    /// physical interrupts that the images of all of the guest's functions know.
    pub fn settle(&mut self, noted: &BTreeSet<Pirq>) -> Result<(), FunctionError> {
        self.settle_vectors(noted)
    }
}
