//! What a policy says about errors.

use std::fmt;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Severity;

/// What is done about an error of a guest's function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// It is noted.
    Log,
    /// The guest's driver is notified, as Linux notifies drivers; the function is reset where the driver asks for it.
    TellGuest,
    /// The function is reset; the guest keeps it and its interrupts.
    Reset,
    /// The function is taken from the guest, which is asked first, and held again after a verified reset.
    Unplug,
    /// The guest is paused; its function is not touched.
    PauseGuest,
    /// The guest is destroyed; its functions are held again after verified resets.
    DestroyGuest,
    /// The function is taken from the guest, which is not asked, and no guest gets it until `xpci quarantine clear`.
    Quarantine,
}

impl Action {
    /// The words of a policy file.
    pub const WORDS: &[(&str, Self)] = &[
        ("log", Self::Log),
        ("tell-guest", Self::TellGuest),
        ("reset", Self::Reset),
        ("unplug", Self::Unplug),
        ("pause-guest", Self::PauseGuest),
        ("destroy-guest", Self::DestroyGuest),
        ("quarantine", Self::Quarantine),
    ];

    /// The words for what follows when a guest cannot be notified, or does not recover.
    pub const LAST_RESORTS: &[(&str, Self)] = &[
        ("log", Self::Log),
        ("reset", Self::Reset),
        ("unplug", Self::Unplug),
        ("pause-guest", Self::PauseGuest),
        ("destroy-guest", Self::DestroyGuest),
        ("quarantine", Self::Quarantine),
    ];

    /// The word of a policy file.
    pub fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, action)| *action == self).map_or("log", |(word, _)| word)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// What is done about the errors of one function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorPolicy {
    /// About a correctable error.
    pub correctable: Action,
    /// About a non-fatal one.
    pub non_fatal: Action,
    /// About a fatal one.
    pub fatal: Action,
    /// About a function that lost its state because the link above it was reset for another one's error.
    pub link_reset: Action,
    /// When the guest cannot be notified, does not answer in time, gives an invalid answer, or gives up; never `TellGuest`.
    pub unanswered: Action,
    /// When a function or its guest exceeds its limit of uncorrectable errors; never `TellGuest`.
    pub storm: Action,
    /// How long a guest may take for each answer, in seconds, 1-600.
    pub answer_seconds: u32,
    /// Whether the guest's driver is also asked to look at the function before a reset (`aer_mmio`). A driver that has no callback
    /// for that crashes its guest: Linux's xen-pcifront calls it unasked.
    pub mmio_enabled: bool,
    /// More correctable errors of a function than this within a minute are masked at the source, 1-1000000.
    pub correctable_per_minute: u32,
    /// How long they stay masked, in seconds, 1-86400.
    pub mask_seconds: u32,
    /// More uncorrectable errors of a function than this within an hour are a storm, 1-1000000.
    pub uncorrectable_per_hour: u32,
    /// More uncorrectable errors of all functions of its guest within an hour are one, too, 1-1000000.
    pub guest_per_hour: u32,
}

impl Default for ErrorPolicy {
    fn default() -> Self {
        Self {
            correctable: Action::Log,
            non_fatal: Action::TellGuest,
            fatal: Action::Quarantine,
            link_reset: Action::TellGuest,
            unanswered: Action::Quarantine,
            storm: Action::Quarantine,
            answer_seconds: 10,
            mmio_enabled: false,
            correctable_per_minute: 60,
            mask_seconds: 600,
            uncorrectable_per_hour: 10,
            guest_per_hour: 30,
        }
    }
}

impl fmt::Display for ErrorPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { correctable, non_fatal, fatal, link_reset, unanswered, storm, .. } = self;
        write!(
            f,
            "correctable {correctable}, non-fatal {non_fatal}, fatal {fatal}, link-reset {link_reset}, unanswered {unanswered}, \
             storm {storm}"
        )
    }
}

impl ErrorPolicy {
    /// What is done about a function's own error.
    pub const fn action(&self, severity: Severity) -> Action {
        match severity {
            Severity::Correctable => self.correctable,
            Severity::NonFatal => self.non_fatal,
            Severity::Fatal => self.fatal,
        }
    }

    /// How long a guest may take for each answer.
    pub fn answer_limit(&self) -> Duration {
        Duration::from_secs(u64::from(self.answer_seconds))
    }
}

/// What one policy file wishes; the rest is as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ErrorWishes {
    /// See [`ErrorPolicy::correctable`].
    pub correctable: Option<Action>,
    /// See [`ErrorPolicy::non_fatal`].
    pub non_fatal: Option<Action>,
    /// See [`ErrorPolicy::fatal`].
    pub fatal: Option<Action>,
    /// See [`ErrorPolicy::link_reset`].
    pub link_reset: Option<Action>,
    /// See [`ErrorPolicy::unanswered`].
    pub unanswered: Option<Action>,
    /// See [`ErrorPolicy::storm`].
    pub storm: Option<Action>,
    /// See [`ErrorPolicy::answer_seconds`].
    pub answer_seconds: Option<u32>,
    /// See [`ErrorPolicy::mmio_enabled`].
    pub mmio_enabled: Option<bool>,
    /// See [`ErrorPolicy::correctable_per_minute`].
    pub correctable_per_minute: Option<u32>,
    /// See [`ErrorPolicy::mask_seconds`].
    pub mask_seconds: Option<u32>,
    /// See [`ErrorPolicy::uncorrectable_per_hour`].
    pub uncorrectable_per_hour: Option<u32>,
    /// See [`ErrorPolicy::guest_per_hour`].
    pub guest_per_hour: Option<u32>,
}

impl ErrorWishes {
    /// Lays them over a policy.
    pub fn lay_over(&self, below: ErrorPolicy) -> ErrorPolicy {
        ErrorPolicy {
            correctable: self.correctable.unwrap_or(below.correctable),
            non_fatal: self.non_fatal.unwrap_or(below.non_fatal),
            fatal: self.fatal.unwrap_or(below.fatal),
            link_reset: self.link_reset.unwrap_or(below.link_reset),
            unanswered: self.unanswered.unwrap_or(below.unanswered),
            storm: self.storm.unwrap_or(below.storm),
            answer_seconds: self.answer_seconds.unwrap_or(below.answer_seconds),
            mmio_enabled: self.mmio_enabled.unwrap_or(below.mmio_enabled),
            correctable_per_minute: self.correctable_per_minute.unwrap_or(below.correctable_per_minute),
            mask_seconds: self.mask_seconds.unwrap_or(below.mask_seconds),
            uncorrectable_per_hour: self.uncorrectable_per_hour.unwrap_or(below.uncorrectable_per_hour),
            guest_per_hour: self.guest_per_hour.unwrap_or(below.guest_per_hour),
        }
    }
}
