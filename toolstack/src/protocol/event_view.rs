//! Events of functions, as they are shown, followed and logged.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pciback::fault::{Action, Detection, Fault, Severity};
use pciback::{DomId, FunctionState, Sbdf};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::outcome::few;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct EventView {
    /// The time, in UTC, for example `2026-11-21T10:43:47.123Z`.
    pub at: String,
    /// The function.
    pub address: Sbdf,
    /// The guest that had it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomId>,
    /// The name of that guest, if it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_name: Option<String>,
    /// The event itself.
    #[serde(flatten)]
    pub what: Happening,
}

/// The type of an event, and its details.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum Happening {
    /// The state of a function has changed.
    State {
        /// The old state.
        from: FunctionState,
        /// The new state.
        to: FunctionState,
    },
    /// An error, and the decision about it.
    Error {
        /// The function that reported the error: this one, one above it, or one below the same port.
        reporter: Sbdf,
        /// The severity.
        severity: Severity,
        /// The bits of the error status register; 0 if unknown.
        status: u32,
        /// Their names.
        errors: Vec<String>,
        /// How the error was detected.
        detection: Detection,
        /// The number of errors.
        count: u64,
        /// The action that was decided.
        action: Action,
        /// The reason for the action.
        reason: String,
    },
    /// Registers of the function and of the port above it, read right after an error.
    Registers {
        /// The registers, by function and name.
        registers: Vec<RegisterValue>,
    },
    /// The VFs of a PF were enabled or disabled.
    Vfs {
        /// The number of enabled VFs.
        enabled: u16,
    },
    /// The policies were reloaded, and the function's filter has changed.
    Policy {
        /// The registers with bits that are treated differently.
        registers: Vec<String>,
    },
    /// The outcome of an action.
    Outcome {
        /// Whether the action succeeded.
        ok: bool,
        /// The outcome, as text.
        text: String,
    },
}

/// One register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RegisterValue {
    /// The function.
    pub address: Sbdf,
    /// The name in the specification.
    pub name: String,
    /// The value.
    pub value: u32,
}

impl EventView {
    /// An event that happens now.
    pub fn now(address: Sbdf, domain: Option<DomId>, what: Happening) -> Self {
        Self { at: utc_of(SystemTime::now()), address, domain, domain_name: None, what }
    }

    /// An error, and the decision about a function because of it.
    pub fn error(
        address: Sbdf,
        domain: Option<DomId>,
        fault: &Fault,
        action: Action,
        reason: String,
    ) -> Self {
        let what = Happening::Error {
            reporter: fault.address,
            severity: fault.severity,
            status: fault.status,
            errors: fault.names().into_iter().map(str::to_owned).collect(),
            detection: fault.detection,
            count: fault.count,
            action,
            reason,
        };
        Self::now(address, domain, what)
    }
}

impl fmt::Display for EventView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.at, self.address)?;
        if let Some(domain) = self.domain {
            match &self.domain_name {
                Some(name) => write!(f, " ('{name}', domain {domain})")?,
                None => write!(f, " (domain {domain})")?,
            }
        }
        match &self.what {
            Happening::State { from, to } => write!(f, ": {from} -> {to}"),
            Happening::Error { reporter, severity, status, detection, count, action, reason, .. } => {
                let (severity, status, detection, count) = (*severity, *status, *detection, *count);
                let fault = Fault { address: *reporter, severity, status, detection, count };
                write!(f, ": {fault}; {action}: {reason}")
            }
            Happening::Registers { registers } => {
                f.write_str(": registers:")?;
                let mut last = None;
                for RegisterValue { address, name, value } in registers {
                    if last != Some(address) {
                        write!(f, " [{address}]")?;
                        last = Some(address);
                    }
                    write!(f, " {name} {value:08x},")?;
                }
                Ok(())
            }
            Happening::Vfs { enabled } => write!(f, ": {enabled} VFs are enabled"),
            Happening::Policy { registers } => {
                write!(f, ": the policies were reloaded; changed registers: {}", few(registers, 3))
            }
            Happening::Outcome { ok: true, text } => write!(f, ": {text}"),
            Happening::Outcome { ok: false, text } => write!(f, ": failed: {text}"),
        }
    }
}

/// A time in the protocol's format: UTC, for example `2026-11-21T10:43:47.123Z`.
pub fn utc_of(moment: SystemTime) -> String {
    utc(moment.duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// The date of a time since 1970 in the Gregorian calendar, by Howard Hinnant's algorithm `civil_from_days`.
fn utc(since: Duration) -> String {
    let (seconds, millis) = (since.as_secs(), since.subsec_millis());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 1 March of the year 0, in eras of 400 years with equal calendars.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.007Z"),
            (951_782_400, "2000-02-29T00:00:00.007Z"),
            (1_709_251_199, "2024-02-29T23:59:59.007Z"),
            (4_107_542_400, "2100-03-01T00:00:00.007Z"),
        ] {
            assert_eq!(utc(Duration::new(seconds, 7_000_000)), expected);
        }
    }

    #[test]
    fn an_event_is_one_flat_object_and_one_line() {
        let address = Sbdf::from_devfn(0, 1, 0x80);
        let fault = Fault {
            address,
            severity: Severity::NonFatal,
            status: 1 << 14,
            detection: Detection::Counters,
            count: 2,
        };
        let event = EventView {
            at: "T".into(),
            ..EventView::error(address, Some(DomId(3)), &fault, Action::Quarantine, "so it is".into())
        };
        assert_eq!(
            event.to_string(),
            "T 0000:01:10.0 (domain 3): non-fatal error of 0000:01:10.0: Completion Timeout, 2 times (found by the kernel's \
             counters); quarantine: so it is"
        );
        let text = serde_json::to_string(&event).unwrap();
        assert!(text.contains(r#""event":"error""#) && text.contains(r#""action":"quarantine""#), "{text}");
        assert_eq!(serde_json::from_str::<EventView>(&text).unwrap(), event);
    }
}
