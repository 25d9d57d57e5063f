//! The one error of everything outside.

use std::fmt;
use std::io;

use nix::errno::Errno;
use thiserror::Error;

/// A result of the platform.
pub type Result<T> = std::result::Result<T, PlatformError>;

/// What was attempted, on what, and why it failed.
#[derive(Debug, Error)]
#[error("cannot {action} {subject}: {cause}")]
pub struct PlatformError {
    /// A verb phrase without a subject: `assign`, `map the shared page of`.
    pub action: &'static str,
    /// The function, domain, path or library it was attempted on.
    pub subject: String,
    /// Why it failed.
    #[source]
    pub cause: Cause,
}

/// Why the outside did not do what it was asked for.
#[derive(Debug, Error)]
pub enum Cause {
    /// The kernel or the hypervisor answered with an error number.
    #[error("{}", described(*.0))]
    Os(Errno),
    /// The function, domain or path does not exist, or no longer.
    #[error("it does not exist")]
    Missing,
    /// The answer did not come in time.
    #[error("no answer within {0:?}")]
    TimedOut(std::time::Duration),
    /// What was read has not the form it must have.
    #[error("malformed: {0}")]
    Malformed(String),
    /// A library, symbol, module or device node this host would need is not there; the text says how to get it.
    #[error("{0}")]
    Unavailable(String),
    /// The same, while the host may still be booting: it may be there soon.
    #[error("{0}")]
    NotYet(String),
}

/// An error number with its meaning. The C library's text for some misleads: `ENOTTY` is what Linux answers for a device that has no
/// such method.
fn described(errno: Errno) -> String {
    match errno {
        Errno::ENOTTY => "ENOTTY: Linux has no method for this device".to_owned(),
        Errno::EAGAIN => "EAGAIN: it is in use at the moment".to_owned(),
        other => other.to_string(),
    }
}

impl PlatformError {
    /// An error with its cause.
    pub fn new(action: &'static str, subject: impl fmt::Display, cause: impl Into<Cause>) -> Self {
        Self { action, subject: subject.to_string(), cause: cause.into() }
    }

    /// The error number, where there is one; a missing thing counts as `ENOENT`.
    pub fn errno(&self) -> Option<Errno> {
        match &self.cause {
            Cause::Os(errno) => Some(*errno),
            Cause::Missing => Some(Errno::ENOENT),
            Cause::TimedOut(_) => Some(Errno::ETIMEDOUT),
            Cause::Malformed(_) | Cause::Unavailable(_) | Cause::NotYet(_) => None,
        }
    }
}

/// What is taken away from a domain. Xen's answers say in each case in other words that it was not there: `docs/xen-answers.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revoked {
    /// A permission for memory or ports. Forbidding what was never allowed is no error; what dom0 itself has no permission for, Xen
    /// neither lets it give nor take (`EPERM`).
    Permission,
    /// An interrupt: a pirq, a line, or how it is delivered.
    Interrupt,
    /// The guard of an MSI-X table.
    MsixGuard,
    /// What an HVM guest reaches: mapped memory and ports, and what an ioreq server answers for.
    Reach,
}

impl Revoked {
    /// What came of taking it away: that it was not there, or that its domain is gone, is no failure.
    pub fn outcome(self, answer: Result<()>) -> Result<()> {
        let Err(error) = answer else { return Ok(()) };
        match (self, error.errno()) {
            (_, Some(Errno::ESRCH))
            | (Self::Permission, Some(Errno::EPERM))
            | (Self::Interrupt | Self::Reach, Some(Errno::EINVAL | Errno::ENOENT))
            | (Self::MsixGuard, Some(Errno::ENODEV)) => Ok(()),
            _ => Err(error),
        }
    }
}

impl From<Errno> for Cause {
    fn from(errno: Errno) -> Self {
        Self::Os(errno)
    }
}

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::NotFound, _) => Self::Missing,
            (_, Some(number)) => Self::Os(Errno::from_raw(number)),
            (_, None) => Self::Malformed(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_numbers_have_a_meaning_for_devices() {
        let text = |errno| PlatformError::new("reset", "0000:01:00.0", errno).to_string();
        assert_eq!(
            text(Errno::ENOTTY),
            "cannot reset 0000:01:00.0: ENOTTY: Linux has no method for this device"
        );
        assert_eq!(text(Errno::EAGAIN), "cannot reset 0000:01:00.0: EAGAIN: it is in use at the moment");
        assert_eq!(text(Errno::EIO), "cannot reset 0000:01:00.0: EIO: I/O error");
    }
}
