//! Writes to sysfs that may block for minutes, in a process of their own.
//!
//! Unbinding a driver, a reset or a change of the number of VFs can sleep in the kernel where no signal reaches. A thread
//! that does so keeps its whole process, with its event channels, from ending; a child that holds no descriptor of the
//! service does not. The child is the service's own program, started anew with a hidden first argument.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::platform::Cause;

/// The hidden first argument of the child.
pub const SUBCOMMAND: &str = "__sysfs-write";

/// Does the work of the child and says how it ended, if this process was started to be one. The first thing in `main`.
pub fn run_if_child() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    (arguments.next()? == SUBCOMMAND).then(|| child_main(arguments))
}

/// The child: writes the second argument into the file named by the first, and reports the error number on its standard
/// output; 0 is success.
fn child_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    close_inherited();
    let (Some(path), Some(value)) = (arguments.next(), arguments.next()) else {
        return ExitCode::from(2);
    };
    let number = match write(Path::new(&path), value.as_encoded_bytes()) {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(Errno::EIO as i32),
    };
    match writeln!(io::stdout(), "{number}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Everything the service opens is closed on exec; this holds for what a library may have opened otherwise.
fn close_inherited() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return };
    let open: Vec<RawFd> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for descriptor in open.into_iter().filter(|descriptor| *descriptor > 2) {
        // The one that listed the directory is closed already.
        let _ = nix::unistd::close(descriptor);
    }
}

/// One write, as sysfs wants it.
pub fn write(path: &Path, value: &[u8]) -> io::Result<()> {
    let count = OpenOptions::new().write(true).open(path)?.write(value)?;
    if count == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Starts the children.
#[derive(Debug, Clone)]
pub struct Blocking {
    /// The service's own program; without one, writes are made in this process and nothing limits them.
    pub program: Option<PathBuf>,
}

impl Blocking {
    /// Writes `value` to `path` and waits up to `limit`. When that has passed the child goes on alone; `finished` runs when
    /// the write has ended, however late.
    pub fn write(
        &self,
        path: &Path,
        value: &str,
        limit: Duration,
        finished: impl FnOnce() + Send + 'static,
    ) -> Result<(), Cause> {
        let Some(program) = &self.program else {
            let written = write(path, value.as_bytes());
            finished();
            return written.map_err(Cause::from);
        };
        let spawned = Command::new(program)
            .arg(SUBCOMMAND)
            .arg(path)
            .arg(value)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => {
                finished();
                return Err(error.into());
            }
        };
        let Some(output) = child.stdout.take() else {
            finished();
            return Err(Cause::Malformed("the child has no standard output".into()));
        };
        // The pipe ends when the child does, whether it has answered or was killed.
        match wait_until_readable(&output, limit) {
            Ok(true) => {
                let answer = answer(child, output);
                finished();
                answer
            }
            Ok(false) => {
                log::warn!("write '{}' to {}: not done after {limit:?}", value.trim(), path.display());
                leave(child, output, path.to_owned(), finished);
                Err(Cause::TimedOut(limit))
            }
            Err(errno) => {
                leave(child, output, path.to_owned(), finished);
                Err(errno.into())
            }
        }
    }
}

fn wait_until_readable(output: &ChildStdout, limit: Duration) -> Result<bool, Errno> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the last part of a millisecond is not spent polling.
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(output.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno),
        }
    }
}

/// What the child reported, after it has ended.
fn answer(mut child: Child, output: ChildStdout) -> Result<(), Cause> {
    let mut text = String::new();
    let read = output.take(16).read_to_string(&mut text);
    let status = child.wait().map_err(Cause::from)?;
    read.map_err(Cause::from)?;
    match text.trim().parse() {
        Ok(0) => Ok(()),
        Ok(number) => Err(io::Error::from_raw_os_error(number).into()),
        Err(_) => Err(Cause::Malformed(format!("the child that writes ended with {status} and no answer"))),
    }
}

/// Lets the child go on, and takes note of its end, so that it does not stay as a zombie.
fn leave(child: Child, output: ChildStdout, path: PathBuf, finished: impl FnOnce() + Send + 'static) {
    let started = thread::Builder::new().name("xpci-reaper".into()).spawn(move || {
        match answer(child, output) {
            Ok(()) => log::info!("the late write to {} is done", path.display()),
            Err(cause) => log::warn!("the late write to {} failed: {cause}", path.display()),
        }
        finished();
    });
    if let Err(error) = started {
        log::error!("start a thread that waits for a child: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// A program that stands for the service's own.
    fn script(directory: &Path, text: &str) -> Blocking {
        let path = directory.join("program");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Blocking { program: Some(path) }
    }

    #[test]
    fn the_child_gets_path_and_value_and_its_error_number_comes_back() {
        let directory = tempfile::tempdir().unwrap();
        let seen = directory.path().join("seen");
        let blocking = script(directory.path(), &format!("echo \"$@\" > {}; echo 0", seen.display()));
        blocking.write(Path::new("/a/b"), "7", Duration::from_secs(30), || ()).unwrap();
        assert_eq!(fs::read_to_string(seen).unwrap(), "__sysfs-write /a/b 7\n");

        let blocking = script(directory.path(), "echo 16");
        let cause = blocking.write(Path::new("/a"), "1", Duration::from_secs(30), || ()).unwrap_err();
        assert!(matches!(cause, Cause::Os(Errno::EBUSY)), "{cause}");
    }

    #[test]
    fn a_child_that_dies_without_an_answer_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let blocking = script(directory.path(), "kill -9 $$");
        let cause = blocking.write(Path::new("/a"), "1", Duration::from_secs(30), || ()).unwrap_err();
        assert!(matches!(cause, Cause::Malformed(_)), "{cause}");
    }

    #[test]
    fn a_child_that_takes_too_long_goes_on_and_is_reaped() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let blocking = script(directory.path(), &format!("read line < {}; echo 0", fifo.display()));
        let (sender, receiver) = std::sync::mpsc::channel();
        let finished = Arc::new(AtomicBool::new(false));
        let late = Arc::clone(&finished);
        let limit = Duration::from_millis(50);
        let cause = blocking
            .write(Path::new("/a"), "1", limit, move || {
                late.store(true, Ordering::SeqCst);
                sender.send(()).unwrap();
            })
            .unwrap_err();
        assert!(matches!(cause, Cause::TimedOut(_)), "{cause}");
        assert!(!finished.load(Ordering::SeqCst));
        fs::write(&fifo, "go\n").unwrap();
        receiver.recv_timeout(Duration::from_secs(30)).unwrap();
    }

    #[test]
    fn without_a_program_the_write_is_made_here() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let blocking = Blocking { program: None };
        blocking.write(file.path(), "3", Duration::ZERO, || ()).unwrap();
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "3");
        let missing = blocking.write(Path::new("/nonexistent"), "3", Duration::ZERO, || ());
        assert!(matches!(missing, Err(Cause::Missing)));
    }
}
