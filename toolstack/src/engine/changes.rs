//! A count of changes of the host's functions, for threads that wait for one.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

/// A counter of events, on which threads can wait.
#[derive(Debug, Clone, Default)]
pub struct Changes(Arc<(Mutex<u64>, Condvar)>);

impl Changes {
    /// The current count. Read it before examining the state, then wait for a larger one.
    pub fn count(&self) -> u64 {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an event.
    pub fn another(&self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.1.notify_all();
    }

    /// Waits until the count is above `seen`; `false`: the deadline passed first.
    pub fn wait(&self, seen: u64, deadline: Instant) -> bool {
        let count = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.0.1.wait_timeout_while(count, left, |count| *count <= seen);
        *waited.unwrap_or_else(PoisonError::into_inner).0 > seen
    }
}
