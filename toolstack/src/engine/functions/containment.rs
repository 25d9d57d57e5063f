//! Functions that are to be taken from their guests when their transaction ends.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pciback::Sbdf;

/// The degree of containment. A later request replaces an earlier one only if it is stricter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Containment {
    /// The function is withdrawn from its guest, reset and held, and may be attached again.
    Unplug,
    /// The function is withdrawn from its guest, and no guest gets it until 'xpci quarantine clear'.
    Quarantine,
}

/// Functions to be contained when their transaction ends, and why. Transactions read this as well, and write the reason to the journal,
/// so that it survives a killed service.
#[derive(Debug, Clone, Default)]
pub(in crate::engine) struct Awaiting(Arc<Mutex<BTreeMap<Sbdf, (Containment, String)>>>);

impl Awaiting {
    fn locked(&self) -> MutexGuard<'_, BTreeMap<Sbdf, (Containment, String)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn put(&self, address: Sbdf, containment: Containment, why: &str) {
        let mut waiting = self.locked();
        let stricter = waiting.get(&address).is_none_or(|(earlier, _)| *earlier < containment);
        if stricter {
            waiting.insert(address, (containment, why.to_owned()));
        }
    }

    pub fn take(&self, address: Sbdf) -> Option<(Containment, String)> {
        self.locked().remove(&address)
    }

    /// The reason why a function is to be quarantined at the end of its transaction.
    pub fn distrusted(&self, address: Sbdf) -> Option<String> {
        let waiting = self.locked();
        let (_, why) = waiting.get(&address).filter(|(what, _)| *what == Containment::Quarantine)?;
        Some(why.clone())
    }
}
