//! Writes to sysfs that may block for minutes, in processes of their own.
//!
//! Unbinding a driver, a reset or a change of the number of VFs can sleep in the kernel where no signal reaches. A thread
//! that does so keeps its whole process, with its event channels, from ending; a child that holds no descriptor of the
//! service does not. The child is the service's own program, started with a hidden first argument. Starting it takes longer than
//! most writes: a child that has answered is kept for the next one, and ends with the service, which closes its input.

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::platform::Cause;

/// The hidden first argument of the child.
pub const SUBCOMMAND: &str = "__sysfs-write";
/// How many children without work are kept.
const KEPT: usize = 8;

/// A request to the child, a line of JSON for each write.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    path: PathBuf,
    value: String,
}

/// Does the work of the child and says how it ended, if this process was started to be one. The first thing in `main`.
pub fn run_if_child() -> Option<ExitCode> {
    (std::env::args_os().nth(1)? == SUBCOMMAND).then(child_main)
}

/// The child: makes the writes that it reads from its standard input, and reports each one's error number on its standard
/// output; 0 is success.
fn child_main() -> ExitCode {
    close_inherited();
    for line in io::stdin().lock().lines() {
        let Ok(Ok(order)) = line.map(|line| serde_json::from_str::<Order>(&line)) else {
            return ExitCode::from(2);
        };
        let number = match write(&order.path, order.value.as_bytes()) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(Errno::EIO as i32),
        };
        if writeln!(io::stdout(), "{number}").is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
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
#[derive(Debug, Clone, Default)]
pub struct Blocking {
    /// The service's own program; without one, writes are made in this process and nothing limits them.
    program: Option<PathBuf>,
    /// Children without work.
    idle: Arc<Mutex<Vec<Writer>>>,
}

/// A child that makes one write after the other.
#[derive(Debug)]
struct Writer {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
}

impl Writer {
    fn start(program: &Path) -> io::Result<Self> {
        let mut child = Command::new(program)
            .arg(SUBCOMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(input), Some(output)) => Ok(Self { child, input, output }),
            _ => Err(io::Error::other("the child has no standard input or output")),
        }
    }

    /// What the child reports of the requested write; its end ends the waiting.
    fn answer(&mut self) -> Result<(), Cause> {
        // A line of a few bytes, written at once, when there is anything to read.
        let mut text = [0; 16];
        let length = io::Read::read(&mut self.output, &mut text).map_err(Cause::from)?;
        if length == 0 {
            let status = self.child.wait().map_err(Cause::from)?;
            let text = format!("the child that writes ended with {status} and no answer");
            return Err(Cause::Malformed(text));
        }
        match std::str::from_utf8(&text[..length]).ok().and_then(|text| text.trim().parse().ok()) {
            Some(0) => Ok(()),
            Some(number) => Err(io::Error::from_raw_os_error(number).into()),
            None => Err(Cause::Malformed("the child that writes answered no number".to_owned())),
        }
    }

    /// Ends a child that has nothing to do.
    fn end(self) {
        let Self { mut child, input, output } = self;
        drop((input, output));
        if let Err(error) = child.wait() {
            log::warn!("wait for a child: {error}");
        }
    }
}

impl Blocking {
    /// Writes are made in children which run `program`; without one, in this process.
    pub fn new(program: Option<PathBuf>) -> Self {
        Self { program, idle: Arc::default() }
    }

    /// Writes `value` to `path` and waits up to `limit`. When that has passed the child continues alone; `finished` runs when
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
        let mut writer = match self.told(program, path, value) {
            Ok(writer) => writer,
            Err(error) => {
                finished();
                return Err(error.into());
            }
        };
        // The pipe ends when the child does, whether it has answered or was killed.
        match wait_until_readable(writer.output.as_fd(), limit) {
            Ok(true) => {
                let answer = writer.answer();
                finished();
                match answer {
                    Err(Cause::Malformed(_)) => writer.end(),
                    _ => self.keep(writer),
                }
                answer
            }
            Ok(false) => {
                log::warn!("write '{}' to {}: not done after {limit:?}", value.trim(), path.display());
                leave(writer, path.to_owned(), finished);
                Err(Cause::TimedOut(limit))
            }
            Err(errno) => {
                leave(writer, path.to_owned(), finished);
                Err(errno.into())
            }
        }
    }

    /// A child with an order to write.
    fn told(&self, program: &Path, path: &Path, value: &str) -> io::Result<Writer> {
        let order = Order { path: path.to_owned(), value: value.to_owned() };
        let mut line = serde_json::to_vec(&order)?;
        line.push(b'\n');
        loop {
            let kept = self.idle().pop();
            let again = kept.is_some();
            let mut writer = kept.map_or_else(|| Writer::start(program), Ok)?;
            match writer.input.write_all(&line) {
                Ok(()) => return Ok(writer),
                // It was killed while it had nothing to do.
                Err(_) if again => writer.end(),
                Err(error) => return Err(error),
            }
        }
    }

    fn keep(&self, writer: Writer) {
        let mut idle = self.idle();
        if idle.len() < KEPT {
            idle.push(writer);
        } else {
            drop(idle);
            writer.end();
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Writer>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for output, or its end; `false`: neither came within the limit.
pub(in crate::platform) fn wait_until_readable(
    output: BorrowedFd<'_>,
    limit: Duration,
) -> Result<bool, Errno> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the last part of a millisecond is not spent polling.
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(output, PollFlags::POLLIN)], timeout) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno),
        }
    }
}

/// Lets the child continue, and waits for its exit, so that it does not stay as a zombie.
fn leave(mut writer: Writer, path: PathBuf, finished: impl FnOnce() + Send + 'static) {
    let started = thread::Builder::new().name("xpci-reaper".into()).spawn(move || {
        match writer.answer() {
            Ok(()) => log::info!("the late write to {} is done", path.display()),
            Err(cause) => log::warn!("the late write to {} failed: {cause}", path.display()),
        }
        finished();
        writer.end();
    });
    if let Err(error) = started {
        log::error!("start a thread that waits for a child: {error}");
    }
}

/// Makes a script that can be run at once. Another process writes it: a descriptor of this one, open for writing, would be inherited by what
/// other tests start at the same time, and the kernel runs no file that is open for writing (`ETXTBSY`).
#[cfg(test)]
pub(super) fn make_script(path: &Path, text: &str) {
    let mut install = Command::new("install");
    let mut install =
        install.args(["-m", "755", "/dev/stdin"]).arg(path).stdin(Stdio::piped()).spawn().unwrap();
    install.stdin.take().unwrap().write_all(format!("#!/bin/sh\n{text}\n").as_bytes()).unwrap();
    assert!(install.wait().unwrap().success(), "{}", path.display());
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// A program that stands for the service's own.
    fn script(directory: &Path, text: &str) -> Blocking {
        let path = directory.join("program");
        make_script(&path, text);
        Blocking::new(Some(path))
    }

    #[test]
    fn the_child_gets_path_and_value_and_its_error_number_comes_back() {
        let directory = tempfile::tempdir().unwrap();
        let seen = directory.path().join("seen");
        let work = format!(
            "echo \"$@\" >> {0}; while read line; do echo \"$line\" >> {0}; echo 0; done",
            seen.display()
        );
        let blocking = script(directory.path(), &work);
        for value in ["7", "8\n"] {
            blocking.write(Path::new("/a/b"), value, Duration::from_secs(30), || ()).unwrap();
        }
        let told = fs::read_to_string(seen).unwrap();
        let [started, first, second] = told.lines().collect::<Vec<_>>()[..] else { panic!("{told}") };
        assert_eq!(started, "__sysfs-write", "one child for both");
        assert_eq!(first, r#"{"path":"/a/b","value":"7"}"#);
        assert!(second.contains(r#""8"#), "{second}");

        let blocking = script(directory.path(), "read line; echo 16");
        for _ in 0..2 {
            // The second time the child has ended, and another one is started.
            let cause = blocking.write(Path::new("/a"), "1", Duration::from_secs(30), || ()).unwrap_err();
            assert!(matches!(cause, Cause::Os(Errno::EBUSY)), "{cause}");
            for writer in blocking.idle().iter_mut() {
                writer.child.wait().unwrap();
            }
        }
    }

    #[test]
    fn a_child_that_dies_without_an_answer_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let blocking = script(directory.path(), "read line; kill -9 $$");
        let cause = blocking.write(Path::new("/a"), "1", Duration::from_secs(30), || ()).unwrap_err();
        assert!(matches!(cause, Cause::Malformed(_)), "{cause}");
    }

    #[test]
    fn a_child_that_takes_too_long_goes_on_and_is_reaped() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let blocking =
            script(directory.path(), &format!("read order; read line < {}; echo 0", fifo.display()));
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
        let blocking = Blocking::new(None);
        blocking.write(file.path(), "3", Duration::ZERO, || ()).unwrap();
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "3");
        let missing = blocking.write(Path::new("/nonexistent"), "3", Duration::ZERO, || ());
        assert!(matches!(missing, Err(Cause::Missing)));
    }
}
