//! What happened before, as far as it counts: errors within the last minute or hour.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{ErrorPolicy, Fault, Severity};

/// The window for correctable errors.
const MINUTE: Duration = Duration::from_secs(60);
/// The window for uncorrectable ones.
const HOUR: Duration = Duration::from_secs(3600);
/// How many steps a window slides in.
const STEPS: u32 = 12;

/// A sum over a sliding window, in a bounded number of parts.
#[derive(Debug, Clone, Default)]
struct Window {
    parts: VecDeque<(Instant, u64)>,
}

impl Window {
    fn add(&mut self, now: Instant, count: u64, length: Duration) {
        self.expire(now, length);
        match self.parts.back_mut() {
            Some((begun, sum)) if now.saturating_duration_since(*begun) < length / STEPS => {
                *sum = sum.saturating_add(count);
            }
            _ => self.parts.push_back((now, count)),
        }
    }

    fn expire(&mut self, now: Instant, length: Duration) {
        while self.parts.front().is_some_and(|(begun, _)| now.saturating_duration_since(*begun) >= length) {
            self.parts.pop_front();
        }
    }

    fn sum(&self, now: Instant, length: Duration) -> u64 {
        let young = self.parts.iter().filter(|(begun, _)| now.saturating_duration_since(*begun) < length);
        young.fold(0, |sum, (_, count)| sum.saturating_add(*count))
    }
}

/// The errors of one function, or of all functions of one guest.
#[derive(Debug, Clone, Default)]
pub struct History {
    correctable: Window,
    uncorrectable: Window,
}

/// Which limits are exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Storms {
    /// The function's correctable errors.
    pub correctable: bool,
    /// The function's uncorrectable ones.
    pub function: bool,
    /// The uncorrectable ones of all functions of its guest.
    pub guest: bool,
}

impl History {
    /// Counts an error.
    pub fn note(&mut self, fault: &Fault, now: Instant) {
        match fault.severity {
            Severity::Correctable => self.correctable.add(now, fault.count, MINUTE),
            Severity::NonFatal | Severity::Fatal => self.uncorrectable.add(now, fault.count, HOUR),
        }
    }

    /// Correctable errors of the last minute.
    pub fn correctable(&self, now: Instant) -> u64 {
        self.correctable.sum(now, MINUTE)
    }

    /// Uncorrectable errors of the last hour.
    pub fn uncorrectable(&self, now: Instant) -> u64 {
        self.uncorrectable.sum(now, HOUR)
    }

    /// Clears the correctable errors: they were masked, and their count starts from zero.
    pub fn forget_correctable(&mut self) {
        self.correctable = Window::default();
    }

    /// What of this function's history, and of its guest's, exceeds the policy's limits.
    pub fn storms(&self, guest: &Self, policy: &ErrorPolicy, now: Instant) -> Storms {
        Storms {
            correctable: self.correctable(now) > u64::from(policy.correctable_per_minute),
            function: self.uncorrectable(now) > u64::from(policy.uncorrectable_per_hour),
            guest: guest.uncorrectable(now) > u64::from(policy.guest_per_hour),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Detection;
    use super::*;
    use crate::Sbdf;

    fn fault(severity: Severity, count: u64) -> Fault {
        Fault {
            address: Sbdf::from_devfn(0, 1, 0x80),
            severity,
            status: 0,
            detection: Detection::Event,
            count,
        }
    }

    #[test]
    fn errors_count_for_a_minute_or_an_hour_and_take_little_room() {
        let (mut history, start) = (History::default(), Instant::now());
        for ms in 0..10_000u64 {
            history.note(&fault(Severity::Correctable, 1), start + Duration::from_millis(ms));
            history.note(&fault(Severity::Fatal, 2), start + Duration::from_millis(ms));
        }
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!((history.correctable(at(10)), history.uncorrectable(at(10))), (10_000, 20_000));
        assert!(history.correctable.parts.len() <= 3 && history.uncorrectable.parts.len() == 1);
        assert_eq!((history.correctable(at(71)), history.uncorrectable(at(71))), (0, 20_000));
        assert_eq!(history.uncorrectable(at(3601)), 0);
    }

    #[test]
    fn a_storm_begins_above_the_limit_and_not_at_it() {
        let policy = ErrorPolicy { uncorrectable_per_hour: 3, guest_per_hour: 5, ..ErrorPolicy::default() };
        let (mut own, mut guest, now) = (History::default(), History::default(), Instant::now());
        own.note(&fault(Severity::NonFatal, 3), now);
        guest.note(&fault(Severity::NonFatal, 5), now);
        assert_eq!(own.storms(&guest, &policy, now), Storms::default());
        own.note(&fault(Severity::NonFatal, 1), now);
        assert_eq!(own.storms(&guest, &policy, now), Storms { function: true, ..Storms::default() });
        guest.note(&fault(Severity::NonFatal, 1), now);
        assert!(own.storms(&guest, &policy, now).guest);
        own.note(&fault(Severity::Correctable, u64::MAX), now);
        own.note(&fault(Severity::Correctable, 1), now);
        assert!(own.storms(&guest, &policy, now).correctable);
        own.forget_correctable();
        assert!(!own.storms(&guest, &policy, now).correctable);
    }
}
