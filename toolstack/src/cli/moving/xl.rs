//! Running xl, and signals that must not end this program between two of its steps.

use std::ffi::OsStr;
use std::io;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::failed;
use crate::outcome::Failure;

/// A running xl.
pub(super) struct Xl {
    child: Child,
    shown: String,
}

impl Xl {
    /// Starts xl, which reports progress on standard error.
    pub fn start(arguments: &[&OsStr], input: Stdio) -> Result<Self, Failure> {
        let shown = arguments.join(OsStr::new(" ")).to_string_lossy().into_owned();
        let mut command = Command::new("xl");
        // Standard output is reserved for this program's answer.
        command.args(arguments).stdin(input).stdout(io::stderr());
        // xl inherits blocked signals, and leaves a process behind that waits for the guest's end: no signal may be blocked in it.
        let unblocked = interrupts().thread_unblock();
        let child = command.spawn();
        let blocked = unblocked.and_then(|()| interrupts().thread_block());
        blocked.map_err(|errno| fails(&shown, &format!("is run with signals blocked: {errno}")))?;
        match child {
            Ok(child) => Ok(Self { child, shown }),
            Err(error) => Err(fails(&shown, &format!("cannot be run: {error}"))),
        }
    }

    /// Waits for its end; a failure if it failed.
    pub fn wait(mut self) -> Result<(), Failure> {
        let status = self.child.wait();
        let status = status.map_err(|error| fails(&self.shown, &format!("cannot be waited for: {error}")))?;
        match status.success() {
            true => Ok(()),
            false => Err(fails(&self.shown, &format!("failed ({status})"))),
        }
    }
}

fn fails(shown: &str, why: &str) -> Failure {
    failed(format!("'xl {shown}' {why}"))
}

/// Runs xl, unless this program was interrupted.
pub(super) fn xl(arguments: &[&OsStr]) -> Result<(), Failure> {
    fail_if_interrupted()?;
    xl_anyway(arguments)
}

/// Runs xl for a step that must follow an earlier one.
pub(super) fn xl_anyway(arguments: &[&OsStr]) -> Result<(), Failure> {
    Xl::start(arguments, Stdio::null())?.wait()
}

/// The signals that must not end this program between two steps.
fn interrupts() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect()
}

/// Blocks these signals. To be called by the first thread, before others exist.
///
/// # Errors
/// Blocking the signals failed.
pub(in crate::cli) fn block_interrupts() -> Result<(), Failure> {
    interrupts().thread_block().map_err(|errno| failed(format!("block signals: {errno}")))
}

/// Fails if one of these signals is pending.
pub(super) fn fail_if_interrupted() -> Result<(), Failure> {
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let held_back = SignalFd::with_flags(&interrupts(), flags).and_then(|signals| signals.read_signal());
    match held_back {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(failed("interrupted".to_owned())),
        Err(errno) => Err(failed(format!("look for signals: {errno}"))),
    }
}
