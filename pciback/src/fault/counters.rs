//! The kernel's counters against the events that came: who finds more in the counters has missed an event.

use super::Severity;

/// How many errors of each kind the kernel has counted for a function (`aer_dev_*` in sysfs).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ErrorCounters {
    /// Correctable ones.
    pub correctable: u64,
    /// Non-fatal ones.
    pub non_fatal: u64,
    /// Fatal ones.
    pub fatal: u64,
}

impl ErrorCounters {
    /// One of them.
    pub const fn of(&self, severity: Severity) -> u64 {
        match severity {
            Severity::Correctable => self.correctable,
            Severity::NonFatal => self.non_fatal,
            Severity::Fatal => self.fatal,
        }
    }
}

/// What is known of one function's counters.
///
/// An event may be on its way while the counter shows the error already, so one that is missing counts as missed only when it is
/// missing at the next look, too.
#[derive(Debug, Clone, Copy)]
pub struct CrossCheck {
    /// What the counters should show: where they began, and one for each event since.
    expected: [u64; 3],
    /// How many were missing at the last look.
    missing: [u64; 3],
}

impl CrossCheck {
    /// Begins with what the counters show now.
    pub fn begin(counters: &ErrorCounters) -> Self {
        Self { expected: Severity::ALL.map(|severity| counters.of(severity)), missing: [0; 3] }
    }

    /// An event came.
    pub fn event(&mut self, severity: Severity) {
        let expected = &mut self.expected[severity as usize];
        *expected = expected.saturating_add(1);
    }

    /// Compares; returns the errors that no event told of, by severity.
    pub fn look(&mut self, counters: &ErrorCounters) -> Vec<(Severity, u64)> {
        let mut missed = Vec::new();
        for severity in Severity::ALL {
            let (expected, before) =
                (&mut self.expected[severity as usize], &mut self.missing[severity as usize]);
            let counted = counters.of(severity);
            let missing = match counted.checked_sub(*expected) {
                Some(missing) => missing,
                None => {
                    // Events of functions that the kernel could not ask are not counted; and another function may have come here.
                    *expected = counted;
                    0
                }
            };
            let sure = missing.min(*before);
            if sure > 0 {
                missed.push((severity, sure));
                *expected += sure;
            }
            *before = missing - sure;
        }
        missed
    }

    /// Whether something was missing at the last look: then there must be another one.
    pub fn is_open(&self) -> bool {
        self.missing != [0; 3]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(correctable: u64, non_fatal: u64, fatal: u64) -> ErrorCounters {
        ErrorCounters { correctable, non_fatal, fatal }
    }

    #[test]
    fn a_missed_event_is_found_at_the_second_look_and_once() {
        let mut check = CrossCheck::begin(&counters(5, 1, 0));
        assert_eq!(check.look(&counters(5, 1, 0)), []);
        assert_eq!(check.look(&counters(7, 2, 0)), []);
        assert!(check.is_open());
        assert_eq!(check.look(&counters(7, 2, 0)), [(Severity::Correctable, 2), (Severity::NonFatal, 1)]);
        assert!(!check.is_open());
        assert_eq!(check.look(&counters(7, 2, 0)), []);
    }

    #[test]
    fn an_event_that_comes_later_than_its_counter_is_not_missed() {
        let mut check = CrossCheck::begin(&counters(0, 0, 0));
        assert_eq!(check.look(&counters(0, 0, 1)), []);
        check.event(Severity::Fatal);
        assert_eq!(check.look(&counters(0, 0, 1)), []);
        assert!(!check.is_open());
    }

    #[test]
    fn events_without_a_count_and_counters_that_begin_anew_hide_nothing_later() {
        let mut check = CrossCheck::begin(&counters(0, 3, 0));
        check.event(Severity::Fatal);
        assert_eq!(check.look(&counters(0, 0, 0)), []);
        assert_eq!(check.look(&counters(0, 1, 1)), []);
        assert_eq!(check.look(&counters(0, 1, 1)), [(Severity::NonFatal, 1), (Severity::Fatal, 1)]);
    }

    #[test]
    fn one_that_is_new_at_the_second_look_waits_for_its_own() {
        let mut check = CrossCheck::begin(&counters(0, 0, 0));
        assert_eq!(check.look(&counters(1, 0, 0)), []);
        assert_eq!(check.look(&counters(3, 0, 0)), [(Severity::Correctable, 1)]);
        assert_eq!(check.look(&counters(3, 0, 0)), [(Severity::Correctable, 2)]);
    }
}
