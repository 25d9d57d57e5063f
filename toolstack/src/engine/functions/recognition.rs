//! Whether the devices of the host were read since the service started. Before that it is not known which functions those are that guests
//! have persistently. What depends on it waits, on threads.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Whether the devices were read.
#[derive(Debug, Clone, Default)]
pub(in crate::engine) struct Recognition(Arc<(Mutex<bool>, Condvar)>);

impl Recognition {
    /// The devices were read.
    pub fn end(&self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.1.notify_all();
    }

    pub fn has_ended(&self) -> bool {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the devices were read.
    pub fn wait(&self) {
        let ended = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.0.1.wait_while(ended, |ended| !*ended).unwrap_or_else(PoisonError::into_inner));
    }

    /// The same; `false`: the limit expired.
    pub fn wait_for(&self, limit: Duration) -> bool {
        let ended = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.1.wait_timeout_while(ended, limit, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}
