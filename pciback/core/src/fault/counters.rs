//! The kernel's counters.

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
