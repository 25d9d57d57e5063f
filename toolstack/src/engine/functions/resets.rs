//! Resets that run while a guest has the function.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pciback::Sbdf;

/// Functions that are being reset while a guest has them. A transaction that withdraws a function waits for the end of its reset before
/// the function can have another owner.
#[derive(Debug, Clone, Default)]
pub(in crate::engine) struct Resets(Arc<(Mutex<BTreeSet<Sbdf>>, Condvar)>);

impl Resets {
    /// Notes that a reset begins; `false`: one already runs.
    pub fn begin(&self, address: Sbdf) -> bool {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).insert(address)
    }

    /// Whether no reset runs.
    pub fn none(&self) -> bool {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    pub fn end(&self, address: Sbdf) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
        self.0.1.notify_all();
    }

    /// Waits until no reset of the function runs; `false`: the limit expired.
    pub fn wait(&self, address: Sbdf, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let running = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.0.1.wait_timeout_while(running, left, |running| running.contains(&address));
        !waited.unwrap_or_else(PoisonError::into_inner).0.contains(&address)
    }
}
