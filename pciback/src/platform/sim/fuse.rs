//! The end of the service in the middle of its work, as SIGKILL brings it.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

/// When a platform's callers die: at one of their changes to the outside. Clones are the same fuse.
///
/// A thread that dies unwinds, without a message; all others that use the platform do so at their next change or event. A
/// new platform of the same simulated host is the next life's.
#[derive(Debug, Clone, Default)]
pub struct Fuse(Arc<State>);

#[derive(Debug, Default)]
struct State {
    armed: AtomicBool,
    blown: AtomicBool,
    left: AtomicI64,
    after: AtomicBool,
}

/// Whether the change at which a caller dies is still made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// It is not.
    Before,
    /// It is; the caller does not learn of it.
    After,
}

impl Fuse {
    /// Callers die at the change after `changes` more.
    pub fn arm(&self, changes: u32, moment: Moment) {
        self.0.left.store(i64::from(changes), Ordering::SeqCst);
        self.0.after.store(moment == Moment::After, Ordering::SeqCst);
        self.0.armed.store(true, Ordering::SeqCst);
    }

    /// Callers die at whatever they do next.
    pub fn blow(&self) {
        self.0.blown.store(true, Ordering::SeqCst);
    }

    /// Whether that has happened.
    pub fn is_blown(&self) -> bool {
        self.0.blown.load(Ordering::SeqCst)
    }

    /// Whether both are the same life's.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Something that changes nothing outside.
    pub(super) fn look(&self) {
        if self.is_blown() {
            resume_unwind(Box::new("the service was killed"));
        }
    }

    /// A change.
    pub(super) fn change<T>(&self, change: impl FnOnce() -> T) -> T {
        self.look();
        let last = self.0.armed.load(Ordering::SeqCst) && self.0.left.fetch_sub(1, Ordering::SeqCst) == 0;
        let after = self.0.after.load(Ordering::SeqCst);
        if last && !after {
            self.blow();
            self.look();
        }
        let outcome = change();
        if last {
            self.blow();
            self.look();
        }
        outcome
    }
}
