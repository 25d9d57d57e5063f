//! Which functions guests may be able to reach.
//!
//! That no thread serves a function proves nothing: its thread may hang, its image may be damaged or of another version, or the device
//! may not have answered when the service started. In all these cases its interrupts and, in an HVM guest, its BARs stay mapped. So a
//! function counts as given from just before its guest can reach it until it is quiesced or its guest has ended.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pciback::Sbdf;

/// Functions that were given to guests and are not proved to be withdrawn.
#[derive(Debug, Clone, Default)]
pub(in crate::engine) struct Reachable(Arc<Mutex<BTreeSet<Sbdf>>>);

impl Reachable {
    fn locked(&self) -> MutexGuard<'_, BTreeSet<Sbdf>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest is about to be able to reach the function, or could in an earlier run of the service.
    pub fn add(&self, address: Sbdf) {
        self.locked().insert(address);
    }

    /// The guest can no longer reach the function: it was quiesced, or the guest has ended.
    pub fn withdrawn(&self, address: Sbdf) {
        self.locked().remove(&address);
    }

    pub fn contains(&self, address: Sbdf) -> bool {
        self.locked().contains(&address)
    }
}
