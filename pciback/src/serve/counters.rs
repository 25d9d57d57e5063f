//! How much a serving thread has done, and how much of what its guest does wrong the log gets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A guest that asks for nonsense gets a line in the log at most this often.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// How much a thread has done.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    /// A guest that connects anew has no more to say than before.
    complaints: Mutex<Complaints>,
}

impl Counters {
    /// Whether a line about the guest's requests may be written to the log now, and how many were not since the last one.
    pub(super) fn may_complain(&self) -> Option<u64> {
        self.complaints.lock().unwrap_or_else(PoisonError::into_inner).may_say()
    }

    pub(super) fn count(&self, error: bool) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.errors.fetch_add(error.into(), Ordering::Relaxed);
    }

    /// Requests answered.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Those of them answered with an error, except reads of functions that are not there, which every bus scan makes.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}

/// Limits what a guest can put into the log.
#[derive(Debug, Default)]
struct Complaints {
    last: Option<Instant>,
    unsaid: u64,
}

impl Complaints {
    /// Whether a line may be written now, and how many were not since the last one.
    fn may_say(&mut self) -> Option<u64> {
        if self.last.is_some_and(|last| last.elapsed() < COMPLAINT_INTERVAL) {
            self.unsaid += 1;
            return None;
        }
        self.last = Some(Instant::now());
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_can_put_into_the_log_is_limited() {
        let mut complaints = Complaints::default();
        assert_eq!(complaints.may_say(), Some(0));
        for _ in 0..1000 {
            assert_eq!(complaints.may_say(), None);
        }
        complaints.last = Instant::now().checked_sub(COMPLAINT_INTERVAL);
        assert_eq!(complaints.may_say(), Some(1000));
    }
}
