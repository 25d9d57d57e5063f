//! What a record says.

use pciback::platform::VfSettings;
use pciback::{DomId, FunctionState, Sbdf};
use serde::{Deserialize, Serialize};

use super::VERSION;
use crate::steps::{Kind, Step};

/// What the service knows of one function and intends with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Record {
    /// [`VERSION`].
    pub version: u32,
    /// The boot it belongs to, `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
    /// The function.
    pub address: Sbdf,
    /// Where it stands; while a transaction runs, the state that leads to its end.
    pub state: FunctionState,
    /// Which of the functions that were at this address since boot it is; 0 in records of versions that did not ask.
    #[serde(default)]
    pub incarnation: u64,
    /// The driver it came from and goes back to.
    pub original_driver: Option<String>,
    /// The `driver_override` that it had, and has again when it goes back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_override: Option<String>,
    /// Whether it was taken before any driver had been asked: when it goes back, they are.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unprobed: bool,
    /// Whether the service itself prepared its MSI-X table, and so must release it.
    pub msix_prepared: bool,
    /// The guest that has it, gets it or loses it.
    pub guest: Option<GuestPlace>,
    /// What was given to the guest beyond the device itself.
    #[serde(default)]
    pub grants: Vec<Grant>,
    /// Whether the guest that has it, or had it last, does without its interrupt line, which another owner uses.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub without_line: bool,
    /// The copy of an expansion ROM that its guest has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rom: Option<RomRecord>,
    /// Whether its guest may still reach it: that it was switched off could not be proved.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unproved: bool,
    /// Whether what was done with it is not known, because its record could not be used: a guest that has it may be one of ours.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unknown_past: bool,
    /// Whether a guest has had it and it was not reset since, because others on its bus, which it is reset with, were a guest's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unreset: bool,
    /// A VF's network settings, once somebody has set one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkRecord>,
    /// Its registers as they were when it was first held; `None` until they could be read, and in records of versions that did not note
    /// them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pristine: Option<Vec<Pristine>>,
    /// The transaction in progress.
    pub transaction: Option<Progress>,
    /// Why it is quarantined.
    pub quarantine: Option<String>,
}

/// A guest, and where it sees the function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestPlace {
    /// The guest.
    pub domain: DomId,
    /// Device and function number in the guest, on its bus 0000:00.
    pub devfn: u8,
}

/// A copy of an expansion ROM, by which it is known again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RomRecord {
    /// How many bytes: a power of two.
    pub bytes: u32,
    /// Their hash.
    pub hash: u64,
}

/// One permission that a guest was given; noted before it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "kind", rename_all = "kebab-case")]
pub enum Grant {
    /// Page frames of memory space.
    Iomem {
        /// The first page frame.
        first: u64,
        /// How many.
        frames: u64,
    },
    /// I/O ports.
    Ioport {
        /// The first port.
        first: u32,
        /// How many.
        count: u32,
    },
    /// An INTx line.
    Gsi {
        /// The line.
        gsi: u32,
    },
}

/// How far a transaction is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// What it does.
    pub kind: Kind,
    /// The step that runs or ran last: it and those before it may have had their effect.
    pub step: Step,
    /// Whether its steps are being undone.
    pub undoing: bool,
}

impl Record {
    /// A function of which nothing is known but that it exists.
    pub fn new(address: Sbdf, boot: &str) -> Self {
        Self {
            version: VERSION,
            boot: boot.to_owned(),
            address,
            state: FunctionState::Host,
            incarnation: 0,
            original_driver: None,
            original_override: None,
            unprobed: false,
            msix_prepared: false,
            guest: None,
            grants: Vec::new(),
            without_line: false,
            rom: None,
            unproved: false,
            unknown_past: false,
            unreset: false,
            network: None,
            pristine: None,
            transaction: None,
            quarantine: None,
        }
    }

    /// Whose it is.
    pub(super) fn owner(&self) -> Owner {
        match (self.guest, self.state) {
            (Some(place), _) => Owner::Domain(place.domain),
            // While it is taken from dom0 or given back, dom0 may have it.
            (None, FunctionState::Held) if self.transaction.is_none() => Owner::Held,
            (None, FunctionState::Held | FunctionState::Host) => Owner::Domain(DomId::DOM0),
            (None, _) => Owner::Quarantined,
        }
    }
}

/// Whose a function with a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// It is held: whoever gets it next finds it reset.
    Held,
    /// This domain's, dom0 included, or about to be.
    Domain(DomId),
    /// Not known for sure.
    Quarantined,
}

/// One register, as it was when the function was first held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Pristine {
    /// Where the register is.
    pub offset: u16,
    /// Its width in bytes.
    pub width: u8,
    /// Which of its bits hold what is written.
    pub mask: u32,
    /// What they were.
    pub value: u32,
    /// Those that guests could reach since they were last known to be so.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reached: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it so")]
const fn is_zero(bits: &u32) -> bool {
    *bits == 0
}

/// What the journal knows of a VF's network settings.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct NetworkRecord {
    /// What the administrator set.
    pub wished: VfSettings,
    /// What the service's settings said when a guest got it last.
    #[serde(skip_serializing_if = "VfSettings::is_empty")]
    pub configured: VfSettings,
    /// What was there before, of those settings.
    pub before: VfSettings,
    /// Why that could not be put back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl NetworkRecord {
    /// What is to be in force.
    pub fn wanted(&self) -> VfSettings {
        self.wished.or(self.configured)
    }
}
