//! The end of the service in the middle of its work, as SIGKILL brings it.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use super::locked;

/// When a platform's callers die: at one of their changes to the outside. Clones are the same fuse.
///
/// A thread that dies unwinds, without a message; all others that use the platform do so at their next change or event. A
/// new platform of the same simulated host belongs to the next process.
#[derive(Clone, Default)]
pub struct Fuse(Arc<State>);

type Wake = Box<dyn Fn() + Send>;

#[derive(Default)]
struct State {
    armed: AtomicBool,
    blown: AtomicBool,
    left: AtomicI64,
    after: AtomicBool,
    /// Called after each change.
    on_change: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// Wakes those who wait for events, because they die, too.
    wakes: Mutex<Vec<Wake>>,
}

/// Whether the change at which a caller dies is still made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// It is not.
    Before,
    /// It is; the caller gets no answer.
    After,
}

impl Fuse {
    /// Callers die at the change after `changes` more.
    pub fn arm(&self, changes: u32, moment: Moment) {
        self.0.left.store(i64::from(changes), Ordering::SeqCst);
        self.0.after.store(moment == Moment::After, Ordering::SeqCst);
        self.0.armed.store(true, Ordering::SeqCst);
    }

    /// Callers die at their next call.
    pub fn blow(&self) {
        self.0.blown.store(true, Ordering::SeqCst);
        for wake in locked(&self.0.wakes).drain(..) {
            wake();
        }
    }

    /// Calls something after each change.
    pub(super) fn on_change(&self, notify: impl Fn() + Send + Sync + 'static) {
        // The first stays: a fuse belongs to one platform.
        let _ = self.0.on_change.set(Box::new(notify));
    }

    /// Wakes threads that wait for events when callers die.
    pub(super) fn on_end(&self, wake: impl Fn() + Send + 'static) {
        let mut wakes = locked(&self.0.wakes);
        if self.is_blown() {
            wake();
        } else {
            wakes.push(Box::new(wake));
        }
    }

    /// Whether that has happened.
    pub fn is_blown(&self) -> bool {
        self.0.blown.load(Ordering::SeqCst)
    }

    /// Whether threads of that process are left: one that was killed has ended when its last system call has.
    pub fn is_used(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// The process whose end this is.
    pub(super) fn process(&self) -> Process {
        Process(Arc::downgrade(&self.0))
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
        if let Some(notify) = self.0.on_change.get() {
            notify();
        }
        if last {
            self.blow();
            self.look();
        }
        outcome
    }
}

/// A process that uses the simulated host, without keeping it alive.
#[derive(Clone)]
pub(super) struct Process(Weak<State>);

impl Process {
    /// Whether it has ended or is about to.
    pub fn has_ended(&self) -> bool {
        self.0.upgrade().is_none_or(|state| state.blown.load(Ordering::SeqCst))
    }

    /// Whether it is the one that ends with this fuse.
    pub fn is_of(&self, fuse: &Fuse) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&fuse.0))
    }
}
