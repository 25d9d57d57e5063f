//! Which of a guest's physical interrupts its functions have.
//!
//! A guest may name the physical interrupt for a message itself. Xen takes a number that is in use without a word, maps nothing, and loses
//! an interrupt of the host each time. So each number is looked up here before.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::Sbdf;
use crate::platform::Pirq;

/// Lower numbers are interrupt lines', of the host's I/O APIC and of the guest's emulated devices: no machine has fewer, and Xen gives none of
/// them to a guest that asks for a free number for messages.
pub(super) const FIRST: Pirq = Pirq(24);

/// What has a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// The interrupt line.
    Line,
    /// An MSI-X entry, or MSI as entry 0.
    Entry(u16),
}

/// The physical interrupts of one guest's functions.
#[derive(Debug, Default)]
pub struct Numbers(Mutex<BTreeMap<Sbdf, Vec<(Pirq, Use)>>>);

impl Numbers {
    /// Replaces what a function has.
    pub(super) fn set(&self, function: Sbdf, has: Vec<(Pirq, Use)>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(function, has);
    }

    /// Who has a number.
    pub(super) fn holder(&self, number: Pirq) -> Option<(Sbdf, Use)> {
        let functions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = functions.iter().flat_map(|(function, has)| has.iter().map(|one| (*function, *one)));
        all.find(|(_, (taken, _))| *taken == number).map(|(function, (_, what))| (function, what))
    }
}
