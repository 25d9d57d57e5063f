//! The contents of a journal record.

use pciback::config::Access;
use pciback::platform::{PAGE, VfSettings};
use pciback::{Devfn, DomId, FunctionState, Sbdf};
use serde::{Deserialize, Serialize};

use super::VERSION;
use crate::steps::{Kind, Step};

/// The number of I/O ports.
const PORTS: u32 = 0x1_0000;

/// What the service knows about one function, and intends with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Record {
    /// [`VERSION`].
    pub version: u32,
    /// The boot in which it was written, from `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
    /// The function.
    pub address: Sbdf,
    /// Its state; during a transaction, the transitional state.
    pub state: FunctionState,
    /// The incarnation, which distinguishes devices that had this address since boot; 0 in records of versions without it.
    #[serde(default)]
    pub incarnation: u64,
    /// The driver that it is given back to.
    pub original_driver: Option<String>,
    /// The `driver_override` from before it was held, which is restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_override: Option<String>,
    /// Whether it was held before any driver was probed: after the release, drivers are probed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unprobed: bool,
    /// Whether drivers of dom0 were probed for VFs of this PF before it was held for a guest that creates VFs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vf_autoprobe: bool,
    /// Whether it is a PF with VFs that stay for the guest that created them, which starts again and has not asked for VFs yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keeps_vfs: bool,
    /// Whether it was held for one guest only (`pci-attach --managed`), and goes back to dom0 when the guest has released it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub managed: bool,
    /// Whether the service prepared its MSI-X table, and must release it.
    pub msix_prepared: bool,
    /// The guest that has it, gets it or loses it.
    pub guest: Option<GuestPlace>,
    /// Whether the device model of its guest, an HVM guest, may have a placeholder for it, so that the guest can be asked to release it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub announced: bool,
    /// Host resources that were granted to the guest.
    #[serde(default)]
    pub grants: Vec<Grant>,
    /// Whether its current or last guest does not have its interrupt line, because another owner uses it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub without_line: bool,
    /// The copy of an expansion ROM that its guest has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rom: Option<RomRecord>,
    /// Whether its guest has its own expansion ROM, which is granted like a BAR.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own_rom: bool,
    /// Whether its guest may still reach it, because switching it off could not be verified.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unproved: bool,
    /// Whether its history is unknown, because its record was unusable: a guest that has it may have got it from this service.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unknown_past: bool,
    /// Whether a guest has had it and it was not reset since, because other functions on its bus, which are reset with it, belonged to a
    /// guest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unreset: bool,
    /// The VF's network settings, after the first was set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkRecord>,
    /// Its registers from when it was first held; `None` until they could be read, and in records of versions that did not note them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pristine: Option<Vec<Pristine>>,
    /// The transaction in progress.
    pub transaction: Option<Progress>,
    /// Why it is quarantined.
    pub quarantine: Option<String>,
}

/// A guest, and the device number of the function in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestPlace {
    /// The guest.
    pub domain: DomId,
    /// Device and function number on the guest's bus 0000:00.
    pub devfn: Devfn,
}

/// A copy of an expansion ROM, by size and hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RomRecord {
    /// Its size in bytes, a power of two.
    pub bytes: u32,
    /// Its hash.
    pub hash: u64,
}

/// A grant to a guest; written to the journal before it takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "kind", rename_all = "kebab-case")]
pub enum Grant {
    /// Page frames of memory space.
    Iomem {
        /// The first page frame.
        first: u64,
        /// Their number.
        frames: u64,
    },
    /// I/O ports.
    Ioport {
        /// The first port.
        first: u32,
        /// Their number.
        count: u32,
    },
    /// An INTx line.
    Gsi {
        /// Its GSI.
        gsi: u32,
    },
}

impl Grant {
    /// Whether a host can have that.
    fn is_possible(&self) -> bool {
        match *self {
            Self::Iomem { first, frames } => {
                let end = first.checked_add(frames).and_then(|end| end.checked_mul(PAGE));
                frames > 0 && end.is_some()
            }
            Self::Ioport { first, count } => {
                count > 0 && first.checked_add(count).is_some_and(|end| end <= PORTS)
            }
            Self::Gsi { .. } => true,
        }
    }
}

/// The progress of a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Its list of steps and direction.
    pub kind: Kind,
    /// The step that runs or ran last: it and those before it may have taken effect.
    pub step: Step,
    /// Whether the steps are being undone.
    pub undoing: bool,
}

impl Record {
    /// A record of a function with an unknown history.
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
            vf_autoprobe: false,
            keeps_vfs: false,
            managed: false,
            msix_prepared: false,
            guest: None,
            announced: false,
            grants: Vec::new(),
            without_line: false,
            rom: None,
            own_rom: false,
            unproved: false,
            unknown_past: false,
            unreset: false,
            network: None,
            pristine: None,
            transaction: None,
            quarantine: None,
        }
    }

    /// Refuses contents that this program never writes.
    pub(super) fn check(&self) -> Result<(), String> {
        if let Some(grant) = self.grants.iter().find(|grant| !grant.is_possible()) {
            return Err(format!("it has the grant {grant:?}"));
        }
        let is_register =
            |register: &&Pristine| Access::new(register.offset.into(), register.width.into()).is_ok();
        match self.pristine.iter().flatten().find(|register| !is_register(register)) {
            Some(Pristine { offset, width, .. }) => {
                Err(format!("it has a register of {width} bytes at {offset:#x}"))
            }
            None => Ok(()),
        }
    }

    /// The owner of the function.
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

/// The owner of a function with a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// No domain: it is held, and is reset before it gets an owner.
    Held,
    /// This domain, dom0 included, has it or is about to get it.
    Domain(DomId),
    /// Not certain.
    Quarantined,
}

/// The value of one register from when the function was first held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Pristine {
    /// The offset of the register in config space.
    pub offset: u16,
    /// Its width in bytes.
    pub width: u8,
    /// The bits that store what is written.
    pub mask: u32,
    /// Their values.
    pub value: u32,
    /// The bits that guests could reach since they were last verified.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reached: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it so")]
const fn is_zero(bits: &u32) -> bool {
    *bits == 0
}

/// The network settings of a VF in the journal.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct NetworkRecord {
    /// What the administrator set by 'vf set'.
    pub wished: VfSettings,
    /// What the service's settings asked for when a guest last got it.
    #[serde(skip_serializing_if = "VfSettings::is_empty")]
    pub configured: VfSettings,
    /// The earlier values of those settings.
    pub before: VfSettings,
    /// Why these could not be restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl NetworkRecord {
    /// The settings that are to be in force.
    pub fn wanted(&self) -> VfSettings {
        self.wished.or(self.configured)
    }
}
