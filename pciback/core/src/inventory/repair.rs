//! Repairs, and how they are shown.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::GuestPlace;
use crate::{DomId, Sbdf};

/// How a function is reported to Xen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ReportKind {
    /// A function of its own.
    Plain,
    /// One of an ARI device with a number above 7.
    Extended,
    /// A VF.
    Virtual {
        /// Its PF.
        physical_function: Sbdf,
    },
}

/// One repair, and what carrying it out means for the function and its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "repair", rename_all = "kebab-case")]
pub enum Repair {
    /// Takes a function from a living guest without asking it: every access reads all ones, nodes removed, interrupts
    /// unmapped, permissions revoked; given to the quarantine domain where Xen says that the guest owns it; MSI-X released
    /// where the service prepared it and the function is still there. The record becomes held, or stays quarantined.
    Withdraw {
        /// The function.
        address: Sbdf,
        /// Whose it was.
        #[serde(flatten)]
        place: GuestPlace,
    },
    /// The same for a guest that has ended.
    DetachFromDead {
        /// The function.
        address: Sbdf,
        /// Whose it was.
        #[serde(flatten)]
        place: GuestPlace,
    },
    /// Removes one function's backend nodes.
    RemoveNodes {
        /// The function.
        address: Sbdf,
        /// Whose nodes.
        #[serde(flatten)]
        place: GuestPlace,
    },
    /// Releases the MSI-X table that the service prepared, and notes it in the record.
    ReleaseMsix {
        /// The function.
        address: Sbdf,
    },
    /// Reports a function to Xen: dom0 owns it then. A record's note of a prepared MSI-X table is dropped, Xen has forgotten it.
    ReportToXen {
        /// The function.
        address: Sbdf,
        /// As what.
        #[serde(flatten)]
        kind: ReportKind,
    },
    /// Withdraws a function from Xen, and with it all that Xen kept of it.
    RemoveFromXen {
        /// The function.
        address: Sbdf,
    },
    /// Binds a function to the holding driver where it is not, and gives it to the quarantine domain where it is not its.
    Hold {
        /// The function.
        address: Sbdf,
    },
    /// Gives a function from the quarantine domain to dom0; no failure if dom0 owns it already. Its driver stays.
    Release {
        /// The function.
        address: Sbdf,
    },
    /// Writes the nodes of a function that its guest has, again.
    Publish {
        /// The function.
        address: Sbdf,
        /// Whose nodes.
        #[serde(flatten)]
        place: GuestPlace,
    },
    /// The record becomes quarantined, with the guest that it names; where there is none one is made. It is written before the
    /// steps that follow from it; neither the function nor Xen is touched.
    Quarantine {
        /// The function.
        address: Sbdf,
    },
    /// The record becomes gone.
    MarkGone {
        /// The function.
        address: Sbdf,
    },
    /// The record is removed.
    Forget {
        /// The function.
        address: Sbdf,
    },
}

impl Repair {
    /// The function that it is about.
    pub const fn address(&self) -> Sbdf {
        match *self {
            Self::Withdraw { address, .. }
            | Self::DetachFromDead { address, .. }
            | Self::RemoveNodes { address, .. }
            | Self::ReleaseMsix { address }
            | Self::ReportToXen { address, .. }
            | Self::RemoveFromXen { address }
            | Self::Hold { address }
            | Self::Release { address }
            | Self::Publish { address, .. }
            | Self::Quarantine { address }
            | Self::MarkGone { address }
            | Self::Forget { address } => address,
        }
    }
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Withdraw { address, place } => write!(f, "withdraw {address} from domain {}", place.domain),
            Self::DetachFromDead { address, place } => {
                write!(f, "detach {address} from domain {}, which has ended", place.domain)
            }
            Self::RemoveNodes { address, place } => {
                write!(f, "remove the xenstore nodes of {address} for domain {}", place.domain)
            }
            Self::ReleaseMsix { address } => write!(f, "release the MSI-X table of {address}"),
            Self::ReportToXen { address, kind: ReportKind::Virtual { physical_function } } => {
                write!(f, "report {address} to Xen as a VF of {physical_function}")
            }
            Self::ReportToXen { address, .. } => write!(f, "report {address} to Xen"),
            Self::RemoveFromXen { address } => write!(f, "remove {address} from Xen's list"),
            Self::Hold { address } => write!(f, "hold {address}"),
            Self::Release { address } => write!(f, "give {address} back to dom0"),
            Self::Publish { address, place } => {
                write!(f, "write the xenstore nodes of {address} for domain {} again", place.domain)
            }
            Self::Quarantine { address } => write!(f, "quarantine {address}"),
            Self::MarkGone { address } => write!(f, "mark {address} as gone"),
            Self::Forget { address } => write!(f, "forget {address}"),
        }
    }
}

/// Why a repair is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Reason {
    /// sysfs does not show it any more.
    Left,
    /// It had left, and is there again.
    Returned,
    /// Its identity is another than when it was taken.
    Replaced,
    /// Xen forgot it while a guest had it: its interrupts and DMA mappings are gone.
    ForgottenUnderGuest,
    /// Xen says that the guest no longer owns it.
    LostByGuest,
    /// Xen says that another domain owns it.
    OwnedBy {
        /// Which, where Xen says.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        owner: Option<DomId>,
    },
    /// dom0's driver took it while a guest had it.
    DriverUnderGuest,
    /// The guest has ended.
    GuestEnded,
    /// A guest owns it without a record that says so.
    Unrecorded,
    /// The service prepared it for a guest, but it is attached to none.
    LeftPrepared,
    /// sysfs shows it and Xen does not know it.
    UnknownToXen,
    /// Nothing but Xen knows it.
    OnlyInXen,
    /// It is not bound to a holding driver.
    NotHeld,
    /// dom0 owns it, not the quarantine domain, or the owner is unknown.
    NotQuarantined,
    /// The quarantine domain may own it, and it is not held.
    NobodyHolds,
    /// It is attached to its guest, and its nodes are missing.
    NotPublished,
    /// A bridge cannot be held.
    Bridge,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Left => "it left the host",
            Self::Returned => "it had left the host and is there again",
            Self::Replaced => "another device is in its slot",
            Self::ForgottenUnderGuest => {
                "Xen's list lost it while the guest had it, and its interrupts and DMA mappings with it"
            }
            Self::LostByGuest => "Xen says that the guest no longer owns it",
            Self::OwnedBy { owner: Some(owner) } => {
                return write!(f, "domain {owner} owns it in Xen, which xpci did not request");
            }
            Self::OwnedBy { owner: None } => "another domain owns it in Xen, which xpci did not request",
            Self::DriverUnderGuest => "a driver of dom0 took it while the guest had it",
            Self::GuestEnded => "the guest has ended",
            Self::Unrecorded => "no record says that the guest has it",
            Self::LeftPrepared => "it was prepared for a guest, and no guest has it",
            Self::UnknownToXen => "sysfs shows it, Xen does not know it",
            Self::OnlyInXen => "Xen knows it, sysfs does not show it",
            Self::NotHeld => "no holding driver has it",
            Self::NotQuarantined => "it should belong to Xen's quarantine domain",
            Self::NobodyHolds => "Xen's quarantine domain may own it, and it is not held",
            Self::NotPublished => "the guest has it, but its nodes are missing",
            Self::Bridge => "it is a bridge, which cannot be held",
        })
    }
}

/// One step of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Step {
    /// What to do.
    #[serde(flatten)]
    pub repair: Repair,
    /// Why.
    #[serde(flatten)]
    pub reason: Reason,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.repair, self.reason)
    }
}

/// Why something that looks wrong is left as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "remark", rename_all = "kebab-case")]
pub enum Remark {
    /// Another program holds it, for example xl.
    HeldByOthers,
    /// It is attached to a guest, but not by the service.
    GivenByOthers,
    /// A VF whose PF is not there, is no PF, or waits itself: it cannot be reported to Xen.
    PfMissing,
    /// A VF whose PF Xen does not know: withdrawing it could bring Xen down.
    PfUnknownToXen,
    /// A function that left, while Xen still knows VFs of it that stay.
    VfsStay,
    /// A PF that Xen gets to know while its VFs are enabled: Xen then does not know the size of their BARs.
    VfsEnabled,
    /// A PF that should be held again: its VFs would vanish.
    VfsInTheWay,
    /// Other numbers of VFs are enabled and shown: they are coming or going.
    Unsettled,
    /// No driver holds it while it is attached to a guest: binding one could reset it under the guest.
    NoHolderUnderGuest,
    /// The domain that owns it in Xen is ending.
    OwnerEnding,
    /// Xen did not say who owns it, so it is not held again.
    OwnerUnknown,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HeldByOthers => "held, but not by this service",
            Self::GivenByOthers => "owned by a guest that did not get it from this service",
            Self::PfMissing => "a VF whose PF is not there or not reported yet: it cannot be reported to Xen",
            Self::PfUnknownToXen => {
                "Xen knows this VF that left, but not its PF: removing it could bring Xen down; it goes with the next reboot"
            }
            Self::VfsStay => "it left the host, but Xen knows VFs of it that cannot be removed yet",
            Self::VfsEnabled => {
                "Xen gets to know this PF while its VFs are enabled: their MSI-X works only after they are destroyed and \
                 created again"
            }
            Self::VfsInTheWay => "it is not held again while it has VFs: they would vanish",
            Self::Unsettled => "its VFs are coming or going",
            Self::NoHolderUnderGuest => {
                "no driver holds it while a guest has it; binding one could reset it under the guest, so that waits"
            }
            Self::OwnerEnding => "the domain that owns it in Xen is ending",
            Self::OwnerUnknown => "Xen did not say who owns it, so it is not held again",
        })
    }
}

/// Something that is left as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Left {
    /// The function.
    pub address: Sbdf,
    /// Why.
    #[serde(flatten)]
    pub remark: Remark,
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.address, self.remark)
    }
}

/// What to do, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    /// The repairs.
    pub steps: Vec<Step>,
    /// What is left as it is, by address.
    pub left: Vec<Left>,
}

impl Plan {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            writeln!(f, "nothing to do: sysfs, Xen and xenstore agree")?;
        }
        for (index, step) in self.steps.iter().enumerate() {
            writeln!(f, "{}. {step}", index + 1)?;
        }
        if !self.left.is_empty() {
            writeln!(f, "left as it is:")?;
        }
        self.left.iter().try_for_each(|left| writeln!(f, "  {left}"))
    }
}
