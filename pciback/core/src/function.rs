//! Words that every part of xpci uses for a function and its owner.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A Xen domain's number; 0 is dom0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct DomId(pub u16);

impl DomId {
    /// The control domain.
    pub const DOM0: Self = Self(0);
    /// Xen's quarantine domain, the owner of held functions (`DOMID_IO` of `xen.h`).
    pub const IO: Self = Self(0x7ff1);
    /// The first number that is no ordinary domain's (`DOMID_FIRST_RESERVED` of `xen.h`).
    pub const FIRST_RESERVED: Self = Self(0x7ff0);
}

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a function stands between the host and a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FunctionState {
    /// dom0 owns it and its ordinary driver may use it.
    Host,
    /// Taken from its driver, owned by `DOMID_IO`, ready to be attached.
    Held,
    /// A transaction is giving it to a guest.
    Attaching,
    /// A guest owns it and xpcid serves its config space.
    Attached,
    /// A transaction is taking it from a guest.
    Detaching,
    /// It is being reset; every access reads all ones.
    Resetting,
    /// It left the host; every access reads all ones.
    Gone,
    /// A reset, unbind, revoke or rollback failed; it is assigned to no guest until the quarantine is cleared.
    Quarantined,
}

impl fmt::Display for FunctionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Host => "host",
            Self::Held => "held",
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Detaching => "detaching",
            Self::Resetting => "resetting",
            Self::Gone => "gone",
            Self::Quarantined => "quarantined",
        })
    }
}
