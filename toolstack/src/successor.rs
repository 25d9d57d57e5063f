//! A process of the service that takes over from the running one.
//!
//! The running process, the predecessor, starts the installed program with one end of a socket pair as standard input. The successor
//! reads its settings, opens Xen, and reports that it is ready; the predecessor serves the guests until then. When it has stopped serving
//! and released the lock, it gives the go-ahead. So guests wait only for this exchange, not for the start of a process.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The hidden option with which a successor is started.
pub const OPTION: &str = "--successor";

/// The error if the successor ended before it took over.
pub const ENDED: &str = "the new process ended; the service's log says why";

/// The messages of both sides: one byte each.
const READY: u8 = b'r';
const TAKE_OVER: u8 = b't';

/// The file and arguments of the running process.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
}

impl Program {
    /// The program of this process. Called early, while the path still names the file that was started: an upgrade replaces it.
    ///
    /// # Errors
    /// /proc/self/exe cannot be read.
    pub fn of_this_process() -> io::Result<Self> {
        let path = std::env::current_exe()?;
        let arguments = std::env::args_os().skip(1).filter(|argument| argument != OPTION).collect();
        Ok(Self { path, arguments })
    }

    /// Starts the file that is at the path now.
    ///
    /// # Errors
    /// The start failed, with the reason.
    pub fn start(&self) -> Result<Successor, String> {
        let named = self.path.display();
        let (link, other) = UnixStream::pair().map_err(|error| format!("make a socket pair: {error}"))?;
        let process = Command::new(&self.path)
            .args(&self.arguments)
            .arg(OPTION)
            // systemd's watchdog accepts notifications only from the process with this id.
            .env_remove("WATCHDOG_PID")
            .stdin(Stdio::from(OwnedFd::from(other)))
            .spawn()
            .map_err(|error| format!("cannot start {named}: {error}"))?;
        Ok(Successor { process: Some(process), link })
    }
}

/// The started process. If it is dropped before it was given the go-ahead, it is killed.
#[derive(Debug)]
pub struct Successor {
    process: Option<Child>,
    link: UnixStream,
}

impl Successor {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.as_ref().map_or(0, Child::id)
    }

    /// Waits until the process reports that it is ready.
    ///
    /// # Errors
    /// The process ended, or was not ready within `limit`.
    pub fn wait_until_ready(&mut self, limit: Duration) -> Result<(), String> {
        let failed = |error: &dyn std::fmt::Display| format!("wait for the new process: {error}");
        self.link.set_read_timeout(Some(limit)).map_err(|error| failed(&error))?;
        let mut word = [0];
        match self.link.read(&mut word) {
            Ok(1) if word == [READY] => Ok(()),
            Ok(_) => Err(ENDED.to_owned()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(format!("the new process was not ready within {limit:?}"))
            }
            Err(error) => Err(failed(&error)),
        }
    }

    /// Whether the process still waits for the go-ahead.
    pub fn is_there(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| matches!(process.try_wait(), Ok(None)))
    }

    /// Gives the go-ahead; the successor continues after this process ends.
    ///
    /// # Errors
    /// The successor has ended: no process serves the guests until the service is started again.
    pub fn take_over(mut self) -> io::Result<()> {
        self.link.write_all(&[TAKE_OVER])?;
        self.process = None;
        Ok(())
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // The process may have ended.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// The process that serves guests until this one takes over.
#[derive(Debug)]
pub struct Predecessor(UnixStream);

impl Predecessor {
    /// The predecessor at the other end of standard input.
    ///
    /// # Errors
    /// Standard input cannot be used.
    pub fn at_standard_input() -> io::Result<Self> {
        Ok(Self(io::stdin().as_fd().try_clone_to_owned()?.into()))
    }

    /// Reports that this process is ready, and waits for the go-ahead. `false`: `stop` became readable before.
    ///
    /// # Errors
    /// The predecessor ended without giving the go-ahead.
    pub fn wait_for_go_ahead(mut self, stop: BorrowedFd<'_>) -> io::Result<bool> {
        self.0.write_all(&[READY])?;
        loop {
            let mut fds =
                [PollFd::new(stop, PollFlags::POLLIN), PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            if fds[0].revents().is_some_and(|events| !events.is_empty()) {
                return Ok(false);
            }
            let mut word = [0];
            return match self.0.read(&mut word)? {
                1 if word == [TAKE_OVER] => Ok(true),
                _ => Err(io::Error::other("the running process continues")),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Successor {
        let arguments = ["-c", script].map(OsString::from).to_vec();
        Program { path: "/bin/sh".into(), arguments }.start().unwrap()
    }

    #[test]
    fn a_ready_process_gets_the_go_ahead() {
        let directory = tempfile::tempdir().unwrap();
        let heard = directory.path().join("heard");
        let fifo = nix::unistd::mkfifo(&heard, nix::sys::stat::Mode::S_IRWXU);
        fifo.unwrap();
        let mut successor = shell(&format!("printf r >&0; head -c 1 <&0 > {}", heard.display()));
        successor.wait_until_ready(LIMIT).unwrap();
        assert!(successor.is_there());
        successor.take_over().unwrap();
        assert_eq!(std::fs::read(&heard).unwrap(), b"t");
    }

    #[test]
    fn a_process_that_ends_before_it_is_ready_is_reported() {
        let mut successor = shell("exit 1");
        let why = successor.wait_until_ready(LIMIT).unwrap_err();
        assert!(why.contains("ended"), "{why}");
    }

    #[test]
    fn a_process_that_is_not_ready_in_time_is_reported_and_killed() {
        let mut successor = shell("exec sleep 1000");
        let why = successor.wait_until_ready(Duration::from_millis(10)).unwrap_err();
        assert!(why.contains("10ms"), "{why}");
        let process = nix::unistd::Pid::from_raw(successor.id() as i32);
        drop(successor);
        assert_eq!(nix::sys::signal::kill(process, None), Err(Errno::ESRCH));
    }

    #[test]
    fn a_successor_whose_predecessor_ends_without_the_go_ahead_does_not_take_over() {
        let (link, other) = UnixStream::pair().unwrap();
        let (stop, _never) = UnixStream::pair().unwrap();
        drop(other.try_clone());
        let ended = std::thread::spawn(move || drop(other));
        ended.join().unwrap();
        assert!(Predecessor(link).wait_for_go_ahead(stop.as_fd()).is_err());
    }

    #[test]
    fn a_successor_can_be_stopped_while_it_waits() {
        let (link, _predecessor) = UnixStream::pair().unwrap();
        let (stop, mut signal) = UnixStream::pair().unwrap();
        signal.write_all(b"x").unwrap();
        assert!(!Predecessor(link).wait_for_go_ahead(stop.as_fd()).unwrap());
    }
}
