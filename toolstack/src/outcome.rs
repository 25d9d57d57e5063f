//! The outcome of an operation, for people, for tools and as an exit code.

use std::fmt;

use pciback::platform::PlatformError;
use pciback::policy::Diagnostic;
use pciback::{DomId, Sbdf};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The type of a failure: stable words for tools, each with its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The host, the hypervisor or the guest did not do what was requested. Exit code 1.
    Failed,
    /// The command line or the request is not valid. Exit code 2.
    Usage,
    /// The service cannot be reached. Exit code 3.
    Unreachable,
    /// There is no such function or domain. Exit code 4.
    NotFound,
    /// The request does not fit the present state, or a policy forbids it; nothing was changed. Exit code 5.
    Refused,
    /// The operation failed and could not be undone: the function is quarantined. Exit code 6.
    Quarantined,
}

impl ErrorCode {
    /// Whether nothing was attempted.
    pub const fn is_refusal(self) -> bool {
        matches!(self, Self::Usage | Self::NotFound | Self::Refused)
    }

    /// The exit code of `xpci`.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Unreachable => 3,
            Self::NotFound => 4,
            Self::Refused => 5,
            Self::Quarantined => 6,
        }
    }
}

/// One of several obstacles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Obstacle {
    /// The obstacle.
    pub message: String,
    /// What the user can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl From<Failure> for Obstacle {
    fn from(failure: Failure) -> Self {
        Self { message: failure.message, hint: failure.hint }
    }
}

impl Obstacle {
    /// An obstacle below a headline that names the action, in words that follow "to": its own text does not repeat it.
    pub fn below(failure: Failure, action: &str) -> Self {
        let Self { message, hint } = failure.into();
        let reason = message.strip_prefix(&refused_to(action)).map(str::to_owned);
        Self { message: reason.unwrap_or(message), hint }
    }
}

/// The beginning of a refusal, before the reason.
pub fn refused_to(action: &str) -> String {
    format!("refused to {action}: ")
}

/// The beginning of a text for messages, with control characters as escapes: what cannot be read in a file may have any, and be as long as
/// the file.
pub fn excerpt(text: &str) -> String {
    const CHARACTERS: usize = 500;
    let mut shown = String::new();
    for letter in text.chars().take(CHARACTERS) {
        match letter.is_control() {
            true => shown.extend(letter.escape_default()),
            false => shown.push(letter),
        }
    }
    shown
}

/// The first `shown` entries of a list, and the number of further ones.
pub fn few(names: &[String], shown: usize) -> String {
    let first = names[..shown.min(names.len())].join(", ");
    match names.len().saturating_sub(shown) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

/// A failed operation: what was attempted, why it failed, and what the user can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// The type of the failure.
    pub code: ErrorCode,
    /// What was attempted and why it failed, in one sentence.
    pub message: String,
    /// What the user can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The function.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Sbdf>,
    /// The domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomId>,
    /// All obstacles, if there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub obstacles: Vec<Obstacle>,
    /// The mistakes in policy files, for tools; the message contains them as well.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mistakes: Vec<Diagnostic>,
}

impl Failure {
    /// A failure of the given type.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let (obstacles, mistakes) = (Vec::new(), Vec::new());
        Self { code, message: message.into(), hint: None, address: None, domain: None, obstacles, mistakes }
    }

    /// Refuses an action, in words that follow "to", if there are obstacles.
    pub fn refuse_for(action: &str, mut found: Vec<Self>) -> Result<(), Self> {
        // A failed check is no refusal, and takes precedence.
        if let Some(failed) = found.iter().position(|failure| !failure.code.is_refusal()) {
            return Err(found.swap_remove(failed));
        }
        match (found.len(), found.pop()) {
            (_, None) => Ok(()),
            (1, Some(only)) => Err(only),
            (count, Some(last)) => {
                let mut failure = Self::refused(format!("refused to {action}, for {count} reasons"));
                failure.domain = found.iter().chain([&last]).find_map(|one| one.domain);
                failure.address = found.iter().chain([&last]).find_map(|one| one.address);
                failure.obstacles =
                    found.into_iter().chain([last]).map(|one| Obstacle::below(one, action)).collect();
                Err(failure)
            }
        }
    }

    /// A refusal because of the present state; nothing was changed.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Refused, message)
    }

    /// A failure because there is no such thing.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::NotFound, message)
    }

    /// Adds what the user can do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the mistakes in policy files.
    pub fn mistakes(mut self, mistakes: Vec<Diagnostic>) -> Self {
        self.mistakes = mistakes;
        self
    }

    /// Adds the function.
    pub fn on(mut self, address: Sbdf) -> Self {
        self.address = Some(address);
        self
    }

    /// Adds the domain.
    pub fn of(mut self, domain: DomId) -> Self {
        self.domain = Some(domain);
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        for (index, obstacle) in self.obstacles.iter().enumerate() {
            write!(f, "{} {}", if index == 0 { ":" } else { ";" }, obstacle.message)?;
        }
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, " ({hint})"))
    }
}

impl std::error::Error for Failure {}

impl From<PlatformError> for Failure {
    fn from(error: PlatformError) -> Self {
        Self::new(ErrorCode::Failed, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::excerpt;

    #[test]
    fn of_a_text_from_a_file_a_printable_beginning_is_shown() {
        assert_eq!(excerpt("\u{1b}[2J\nnaïve"), "\\u{1b}[2J\\nnaïve");
        assert_eq!(excerpt(&"x".repeat(1 << 20)).len(), 500);
    }
}
