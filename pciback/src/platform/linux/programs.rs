//! Programs that do not take longer than they may.

use std::io;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::blocking::wait_until_readable;

/// How much of what a program says that is only run is kept, in bytes.
const KEPT: usize = 1024;

/// How much of what is asked for is kept, in bytes: Xen's log has 16 KiB unless its command line says otherwise.
const ANSWER: usize = 1 << 20;

/// What a program that must succeed prints, within the limit.
pub fn output(mut command: Command, limit: Duration) -> io::Result<String> {
    let (reader, writer) = io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let child = command.spawn()?;
    // With it goes the pipe's end of this process: what is read ends when the program does.
    drop(command);
    finish(child, reader, ANSWER, limit)
}

/// Runs a program to its end, which is when it closes its standard error, within the limit.
pub fn run(command: &mut Command, limit: Duration) -> io::Result<()> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    match child.stderr.take() {
        Some(pipe) => finish(child, pipe, KEPT, limit).map(drop),
        None => Err(io::Error::other("its standard error is no pipe")),
    }
}

/// Waits until a program closes the pipe and ends, and returns what it wrote there.
fn finish(
    mut child: Child,
    mut pipe: impl io::Read + AsFd,
    kept: usize,
    limit: Duration,
) -> io::Result<String> {
    let deadline = Instant::now() + limit;
    let mut said = Vec::new();
    let ended = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // A program that keeps writing output gets no more time than a silent one.
        match if left.is_zero() { Ok(false) } else { wait_until_readable(pipe.as_fd(), left) } {
            Ok(true) => {}
            Ok(false) => {
                let text = format!("it was killed, having taken longer than {limit:?}");
                break Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            Err(errno) => break Err(errno.into()),
        }
        let mut bytes = [0; 4096];
        match pipe.read(&mut bytes) {
            Ok(0) => break Ok(()),
            Ok(count) => said.extend(bytes[..count].iter().take(kept.saturating_sub(said.len()))),
            Err(error) => break Err(error),
        }
    };
    if ended.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    ended?;
    let said = String::from_utf8_lossy(&said).into_owned();
    if status.success() {
        return Ok(said);
    }
    let text: String = said.trim().chars().take(KEPT).collect();
    Err(io::Error::other(format!("it ended with {status}: {}", text.replace('\n', "; "))))
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
    fn what_a_program_prints_is_its_answer_unless_it_fails() {
        let asked = |script: &str| {
            let mut shell = Command::new("sh");
            shell.args(["-c", script]);
            output(shell, Duration::from_secs(60))
        };
        assert_eq!(asked("echo one; echo two").unwrap(), "one\ntwo\n");
        assert_eq!(asked("head -c 3000000 /dev/zero").unwrap().len(), ANSWER);
        let error = asked("echo no access >&2; exit 1").unwrap_err().to_string();
        assert!(error.contains("no access"), "{error}");
    }

    #[test]
    fn one_that_does_not_end_is_killed() {
        let error = shell("exec sleep 1000", Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
