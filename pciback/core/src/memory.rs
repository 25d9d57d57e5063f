//! Memory that a guest or another process reads and writes too, as the crates above map it.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

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

/// What must survive a killed service: words of a mapped file, 0 beyond a mapping that is too short.
///
/// A value that takes one word is stored in place. Values that change together are written to the one of two slots that is not in use and
/// switched by publishing a [`next_generation`], so that a service killed at any instant leaves the old or the new.
#[derive(Debug, Clone)]
pub struct Words(Arc<dyn SharedWords>);

impl Words {
    /// Those of a mapping.
    pub fn new(memory: impl SharedWords + 'static) -> Self {
        Self(Arc::new(memory))
    }

    /// All of them.
    pub(crate) fn all(&self) -> &[AtomicU32] {
        self.0.words()
    }

    pub(crate) fn get(&self, index: usize) -> u32 {
        self.all().get(index).map_or(0, |word| word.load(Relaxed))
    }

    pub(crate) fn set(&self, index: usize, value: u32) {
        if let Some(word) = self.all().get(index) {
            word.store(value, Relaxed);
        }
    }

    /// A word that was published, before what was stored before it.
    pub(crate) fn latest(&self, index: usize) -> u32 {
        self.all().get(index).map_or(0, |word| word.load(Acquire))
    }

    /// Stores a word after everything that was stored before it.
    pub(crate) fn publish(&self, index: usize, value: u32) {
        if let Some(word) = self.all().get(index) {
            word.store(value, Release);
        }
    }
}

/// The generation after this one; never 0, which means that nothing was ever stored.
pub(crate) fn next_generation(generation: u32) -> u32 {
    generation.checked_add(1).unwrap_or(2)
}
