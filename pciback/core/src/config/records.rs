//! What an image holds, and why one cannot be taken over.

use thiserror::Error;

use super::image::{FunctionImage, VERSION};
use crate::{DomId, Sbdf};

/// The guest that an image belongs to: a domain id means the same guest only within one boot of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageOwner {
    /// A hash of the host's boot id.
    pub boot: u64,
    /// The guest.
    pub domain: DomId,
}

/// Why an image cannot be taken over.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ImageError {
    /// The mapping is too short.
    #[error("{address}: the state file has {bytes} bytes, it must have {needed}", needed = FunctionImage::BYTES)]
    Size {
        /// The function.
        address: Sbdf,
        /// What was given.
        bytes: usize,
    },
    /// It never was an image, or its creation did not finish.
    #[error("{address}: the state file is none of xpci's or was never completed (magic {found:#x})")]
    Magic {
        /// The function.
        address: Sbdf,
        /// What stands there.
        found: u32,
    },
    /// It was written by another version of xpci.
    #[error("{address}: the state file has version {found}, this xpcid reads version {VERSION}")]
    Version {
        /// The function.
        address: Sbdf,
        /// Its version.
        found: u32,
    },
    /// It belongs to something else.
    #[error("{address}: the state file belongs to another {what} ({found:#x} instead of {expected:#x})")]
    Mismatch {
        /// The function.
        address: Sbdf,
        /// `boot`, `domain`, `function` or `layout`.
        what: &'static str,
        /// What the file says.
        found: u64,
        /// What it should say.
        expected: u64,
    },
    /// A value in it cannot be.
    #[error("{address}: the state file is damaged: {what} is {found:#x}")]
    Damaged {
        /// The function.
        address: Sbdf,
        /// Which value.
        what: &'static str,
        /// What it is.
        found: u32,
    },
}

/// How the guest receives the function's interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InterruptMode {
    /// Not at all.
    #[default]
    Off,
    /// By its line.
    Intx,
    /// By MSI.
    Msi,
    /// By MSI-X.
    MsiX,
}

/// The vectors that are mapped for the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VectorState {
    /// Which interrupts the function sends.
    pub mode: InterruptMode,
    /// Entry of the table (0 for MSI and the line) and the guest's physical interrupt, at most [`FunctionImage::MAX_VECTORS`].
    pub entries: Vec<(u16, u32)>,
    /// Those of `entries` whose physical interrupt's number the guest chose; all others are of Xen's choice.
    pub chosen: Vec<u16>,
    /// The entry that was about to be mapped. Of Xen's choice: Xen may know its interrupt although `entries` does not. Of the guest's: it is in
    /// `entries`, and Xen may not know it.
    pub pending: Option<u16>,
}

impl VectorState {
    /// The physical interrupt of an entry.
    pub fn pirq_of(&self, entry: u16) -> Option<u32> {
        self.entries.iter().find(|(known, _)| *known == entry).map(|(_, pirq)| *pirq)
    }

    /// Clears an entry.
    pub fn forget(&mut self, entry: u16) {
        if let Some(index) = self.entries.iter().position(|(known, _)| *known == entry) {
            self.entries.remove(index);
        }
        self.chosen.retain(|known| *known != entry);
        self.pending = self.pending.filter(|pending| *pending != entry);
    }
}

/// How far a request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestStage {
    /// Its effects may have begun.
    Begun,
    /// Its effects are complete; the answer may not have been sent.
    Done {
        /// The protocol's error.
        error: i32,
        /// The value that answers it.
        value: u32,
    },
}

/// The guest's request in progress: enough to know it again, and what came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestRecord {
    /// The command.
    pub command: u32,
    /// Register.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// Value, or number of entries.
    pub value: u32,
    /// The command's further word.
    pub info: u32,
    /// A hash over the entries that came with it.
    pub entries_hash: u64,
    /// How far it has come.
    pub stage: RequestStage,
}
