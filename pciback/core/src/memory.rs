//! Memory that a guest or another process reads and writes too, as the crates above map it.

use std::fmt::Debug;
use std::sync::atomic::AtomicU32;

/// Bytes of a page, the unit in which memory is mapped and given to guests.
pub const PAGE: u64 = 4096;

/// A mapping seen as words that are only ever accessed atomically. Words are in the machine's order (x86: little endian).
pub trait SharedWords: Debug + Send + Sync {
    /// All words of the mapping; the same ones at every call.
    fn words(&self) -> &[AtomicU32];
}

/// Memory of this process alone, for a filter that is only looked at.
impl SharedWords for Box<[AtomicU32]> {
    fn words(&self) -> &[AtomicU32] {
        self
    }
}
