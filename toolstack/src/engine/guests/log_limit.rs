//! Limits the number of log lines that a guest can cause.

use std::time::Instant;

/// The largest number of lines at once.
const BURST: f64 = 200.0;
/// Lines per second in the long run.
const RATE: f64 = 0.2;

/// The log limit of one guest, so that a guest that changes its nodes endlessly cannot fill a disk. Suppressed lines are counted.
#[derive(Debug)]
pub(in crate::engine) struct LogLimit {
    left: f64,
    since: Instant,
    suppressed: u64,
}

impl LogLimit {
    pub fn new() -> Self {
        Self { left: BURST, since: Instant::now(), suppressed: 0 }
    }

    /// Whether a line may be written at `now`, and how many were suppressed before it.
    pub fn may_log(&mut self, now: Instant) -> Option<u64> {
        let elapsed = now.saturating_duration_since(self.since).as_secs_f64();
        self.left = (self.left + elapsed * RATE).min(BURST);
        self.since = now;
        if self.left < 1.0 {
            self.suppressed += 1;
            return None;
        }
        self.left -= 1.0;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_guest_can_cause_a_burst_of_lines_and_then_few() {
        let (mut limit, start) = (LogLimit::new(), Instant::now());
        let said = |limit: &mut LogLimit, from: u64, to: u64| {
            (from..to).filter_map(|ms| limit.may_log(start + Duration::from_millis(ms))).collect::<Vec<u64>>()
        };
        assert_eq!(said(&mut limit, 0, 1000).len(), 200);
        let later = said(&mut limit, 1000, 11_000);
        assert_eq!(later.len(), 2, "one in five seconds");
        assert!(later[0] > 800, "the first says how many are missing: {later:?}");
    }
}
