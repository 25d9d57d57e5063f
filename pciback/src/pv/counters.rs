//! What a serving thread has done, readable from elsewhere at any time.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// Counters of one guest's serving thread.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) interrupts: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) late: AtomicU64,
    pub(super) spun: AtomicU64,
    pub(super) wakeups: AtomicU64,
}

/// Their values at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct CounterValues {
    /// Config reads answered.
    pub reads: u64,
    /// Config writes answered.
    pub writes: u64,
    /// Other requests answered.
    pub interrupts: u64,
    /// Of all of these, those answered with an error.
    pub errors: u64,
    /// Requests that the frontend had given up before the answer was there.
    pub late: u64,
    /// Requests that were found while spinning, without waiting for an event.
    pub spun: u64,
    /// Times the thread was woken.
    pub wakeups: u64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64) {
        // One thread writes: no read-modify-write is needed, and a reader may be one behind.
        counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// The values now.
    pub fn values(&self) -> CounterValues {
        CounterValues {
            reads: self.reads.load(Relaxed),
            writes: self.writes.load(Relaxed),
            interrupts: self.interrupts.load(Relaxed),
            errors: self.errors.load(Relaxed),
            late: self.late.load(Relaxed),
            spun: self.spun.load(Relaxed),
            wakeups: self.wakeups.load(Relaxed),
        }
    }
}
