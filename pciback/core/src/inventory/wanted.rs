//! What the service wants of functions.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Identity;
use crate::{Devfn, DomId, Sbdf};

/// A guest, and where it sees a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct GuestPlace {
    /// The guest.
    pub domain: DomId,
    /// Device and function number there.
    pub devfn: Devfn,
}

/// Where a function should stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// With dom0: the same as no intent at all.
    Host,
    /// Held: bound to a holding driver, owned by the quarantine domain.
    Held,
    /// With a guest.
    Attached(GuestPlace),
    /// Assigned to no guest. A guest that owned it when it was quarantined still owns it.
    Quarantined(Option<GuestPlace>),
    /// It left the host while a guest had it; that is remembered until it comes back.
    Gone,
}

/// What the service wants of one function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Intent {
    /// Where it should stand.
    pub want: Want,
    /// Its identity when it was taken; `None` where none was recorded: then any device passes.
    pub identity: Option<Identity>,
    /// Whether the service itself prepared its MSI-X table.
    pub msix_prepared: bool,
}

impl Intent {
    /// The guest that has the function as far as the service knows.
    pub const fn place(&self) -> Option<GuestPlace> {
        match self.want {
            Want::Attached(place) => Some(place),
            Want::Quarantined(place) => place,
            Want::Host | Want::Held | Want::Gone => None,
        }
    }
}

/// What the service wants, from its records.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// The functions that it manages. Of all others it wants only that Xen knows those that are there.
    pub functions: BTreeMap<Sbdf, Intent>,
    /// Functions that a transaction has, and PFs whose VFs are being changed: they are left alone with all their VFs, and so is
    /// what would have to wait for them.
    pub busy: BTreeSet<Sbdf>,
}

impl Wanted {
    /// Whether another transaction is using a function or its PF.
    pub(super) fn is_busy(&self, address: Sbdf, physical_function: Option<Sbdf>) -> bool {
        self.busy.contains(&address) || physical_function.is_some_and(|pf| self.busy.contains(&pf))
    }
}
