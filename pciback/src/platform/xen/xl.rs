//! What Xen alone cannot do: a domain has parts in dom0 that only the toolstack which made them takes down.

use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::DomId;
use crate::platform::linux::blocking::wait_until_readable;

/// How much of what `xl` says is kept, in bytes.
const KEPT: usize = 1024;

/// Destroys a domain with all that belongs to it: device model, backends, nodes in xenstore.
pub fn destroy(domain: DomId, limit: Duration) -> io::Result<()> {
    run(Command::new("xl").args(["destroy", &domain.to_string()]), limit)
}

/// Runs a program to its end, which is when it closes its standard error, within the limit.
fn run(command: &mut Command, limit: Duration) -> io::Result<()> {
    let deadline = Instant::now() + limit;
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut said = Vec::new();
    let ended = loop {
        let Some(pipe) = &mut child.stderr else { break Ok(()) };
        let left = deadline.saturating_duration_since(Instant::now());
        // What goes on talking has no more time than what is silent.
        match if left.is_zero() { Ok(false) } else { wait_until_readable(pipe.as_fd(), left) } {
            Ok(true) => {}
            Ok(false) => {
                let text = format!("it was killed, having taken longer than {limit:?}");
                break Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            Err(errno) => break Err(errno.into()),
        }
        let mut bytes = [0; 256];
        match pipe.read(&mut bytes) {
            Ok(0) => break Ok(()),
            Ok(count) => said.extend(bytes[..count].iter().take(KEPT.saturating_sub(said.len()))),
            Err(error) => break Err(error),
        }
    };
    if ended.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    ended?;
    if status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&said).trim().replace('\n', "; ");
    Err(io::Error::other(format!("it ended with {status}: {text}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> io::Result<()> {
        run(Command::new("sh").args(["-c", script]), limit)
    }

    #[test]
    fn a_program_succeeds_or_says_why_not() {
        let long = Duration::from_secs(60);
        shell("exit 0", long).unwrap();
        let error = shell("echo no such domain >&2; echo twice >&2; exit 3", long).unwrap_err().to_string();
        assert!(error.contains("no such domain; twice") && error.contains('3'), "{error}");
        let error = shell("head -c 100000 /dev/zero >&2; exit 1", long).unwrap_err();
        assert!(error.to_string().len() < 2 * KEPT, "{error}");
        let missing = run(&mut Command::new("/nowhere/xl"), long).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn one_that_does_not_end_is_killed() {
        let error = shell("exec sleep 1000", Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
