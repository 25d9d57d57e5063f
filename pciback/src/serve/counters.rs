//! How much a serving thread has done, and how much of what its guest does wrong the log gets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A guest that asks for nonsense gets a line in the log at most this often.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// What the times of requests are counted by: a request that took longer than one of these and no longer than the next is counted with
/// the next. A guest's driver gives up after two seconds.
pub const TIME_BOUNDS: [Duration; 12] = [
    Duration::from_micros(5),
    Duration::from_micros(10),
    Duration::from_micros(25),
    Duration::from_micros(50),
    Duration::from_micros(100),
    Duration::from_micros(250),
    Duration::from_micros(500),
    Duration::from_millis(1),
    Duration::from_millis(5),
    Duration::from_millis(25),
    Duration::from_millis(100),
    Duration::from_secs(1),
];

/// One request of this many is timed: reading the clock can be a system call under Xen, two of which cost more than a read of a register.
const TIMED: u64 = 16;

/// How much a thread has done.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests answered.
    requests: AtomicU64,
    /// Those of them that were timed, by [`TIME_BOUNDS`]; the last are those that took longer.
    timed: [AtomicU64; TIME_BOUNDS.len() + 1],
    /// How long these took together.
    nanoseconds: AtomicU64,
    errors: AtomicU64,
    /// A guest that reconnects gets no new allowance of log messages.
    complaints: Mutex<Complaints>,
}

impl Counters {
    /// Whether a line about the guest's requests may be written to the log now, and how many were not since the last one.
    pub(super) fn may_complain(&self) -> Option<u64> {
        self.complaints.lock().unwrap_or_else(PoisonError::into_inner).may_say()
    }

    /// When a request was taken, if it is one that is timed.
    pub(super) fn taken(&self) -> Option<Instant> {
        self.requests().is_multiple_of(TIMED).then(Instant::now)
    }

    /// A request was answered; how long after it was taken, if it is timed.
    pub(super) fn answered(&self, error: bool, took: Option<Duration>) {
        if let Some(took) = took {
            self.time(took);
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.errors.fetch_add(error.into(), Ordering::Relaxed);
    }

    fn time(&self, took: Duration) {
        let bucket = TIME_BOUNDS.iter().position(|bound| took <= *bound).unwrap_or(TIME_BOUNDS.len());
        self.timed[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Requests answered.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Every 16th of them, by how long it took from being taken to its answer: by [`TIME_BOUNDS`], then those that took longer.
    pub fn timed(&self) -> [u64; TIME_BOUNDS.len() + 1] {
        std::array::from_fn(|bucket| self.timed[bucket].load(Ordering::Relaxed))
    }

    /// How long the timed ones took together.
    pub fn total_time(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed))
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
    fn a_request_is_counted_with_the_first_bound_that_it_does_not_exceed() {
        let counters = Counters::default();
        for nanoseconds in [0, 5_000, 5_001, 1_000_000_000, 1_000_000_001] {
            counters.time(Duration::from_nanos(nanoseconds));
        }
        assert_eq!(counters.timed(), [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
        assert_eq!(counters.total_time(), Duration::from_nanos(2_000_010_002));
    }

    #[test]
    fn all_requests_are_counted_and_the_first_of_each_sixteen_is_timed() {
        let counters = Counters::default();
        for number in 0..40 {
            let taken = counters.taken();
            assert_eq!(taken.is_some(), [0, 16, 32].contains(&number), "{number}");
            counters.answered(number % 4 == 0, taken.map(|taken| taken.elapsed()));
        }
        assert_eq!((counters.requests(), counters.errors()), (40, 10));
        assert_eq!(counters.timed().iter().sum::<u64>(), 3);
    }

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
