//! Which of a guest's physical addresses hold BARs of its functions.
//!
//! Xen crashes a domain in which a page of the host is mapped over another one, and a guest that moves its BARs around may well put
//! one over another for a moment. So the first one stays, and the other is mapped when the place is free.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// The places of one guest's BARs, for all its functions.
#[derive(Debug, Default)]
pub struct Addresses {
    /// First address and the one behind the last. Those of BARs that fill whole pages are whole pages; smaller ones, which are
    /// never mapped, may share one.
    taken: Mutex<BTreeMap<u64, u64>>,
    released: AtomicU64,
}

impl Addresses {
    /// Takes the addresses from `start` to before `end`; `false`: one of them is taken.
    pub(super) fn take(&self, start: u64, end: u64) -> bool {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = taken.range(..end).next_back().is_none_or(|(_, end)| *end <= start);
        if is_free {
            taken.insert(start, end);
        }
        is_free
    }

    /// Gives up what was taken from `start` on.
    pub(super) fn release(&self, start: u64) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&start);
        self.released.fetch_add(1, Ordering::Relaxed);
    }

    /// How often something was given up: who was refused tries again when this changes.
    pub(super) fn released(&self) -> u64 {
        self.released.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_one_bars_until_it_is_given_up() {
        let addresses = Addresses::default();
        assert!(addresses.take(0xf300_0000, 0xf300_4000));
        for (start, end) in [
            (0xf300_0000, 0xf300_4000),
            (0xf300_3000, 0xf300_5000),
            (0xf2ff_f000, 0xf300_0001),
            (0xf300_1000, 0xf300_1100),
            (0xf000_0000, 0xf400_0000),
        ] {
            assert!(!addresses.take(start, end), "{start:#x}");
        }
        assert!(addresses.take(0xf300_4000, 0xf300_4100) && addresses.take(0xf2ff_0000, 0xf300_0000));
        assert!(addresses.take(0xf300_4f00, 0xf300_5000), "beside it in its page");
        assert!(!addresses.take(0xf300_4000, 0xf300_5000), "over both");
        addresses.release(0xf300_0000);
        assert_eq!(addresses.released(), 1);
        assert!(addresses.take(0xf300_1000, 0xf300_2000));
    }
}
