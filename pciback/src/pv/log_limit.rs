//! Log lines that a guest can provoke: one per kind and interval, with the number of those left out.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How often each kind of line may be written.
#[derive(Debug)]
pub struct LogLimit {
    interval: Duration,
    kinds: BTreeMap<&'static str, (Instant, u64)>,
}

impl LogLimit {
    /// One line per kind and `interval`.
    pub fn new(interval: Duration) -> Self {
        Self { interval, kinds: BTreeMap::new() }
    }

    /// Whether a line of this kind may be written now, and if so, how many were left out since the last one.
    pub fn allow(&mut self, kind: &'static str, now: Instant) -> Option<u64> {
        match self.kinds.get_mut(kind) {
            Some((last, left_out)) if now.saturating_duration_since(*last) < self.interval => {
                *left_out = left_out.saturating_add(1);
                None
            }
            Some((last, left_out)) => {
                *last = now;
                Some(std::mem::take(left_out))
            }
            None => {
                self.kinds.insert(kind, (now, 0));
                Some(0)
            }
        }
    }

    /// Writes a warning if its kind may be written now.
    pub fn warn(&mut self, kind: &'static str, text: impl FnOnce() -> String) {
        match self.allow(kind, Instant::now()) {
            Some(0) => log::warn!("{}", text()),
            Some(left_out) => log::warn!("{} ({left_out} more like this were not logged)", text()),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_kind_and_interval_with_the_number_left_out() {
        let mut limit = LogLimit::new(Duration::from_secs(5));
        let start = Instant::now();
        assert_eq!(limit.allow("a", start), Some(0));
        assert_eq!(limit.allow("b", start), Some(0));
        for second in 1..5 {
            assert_eq!(limit.allow("a", start + Duration::from_secs(second)), None);
        }
        assert_eq!(limit.allow("a", start + Duration::from_secs(5)), Some(4));
    }
}
