//! The QEMU process: started, watched, killed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::death::die_with_parent;

#[derive(Default)]
struct State {
    last: VecDeque<u8>,
    ended: Option<String>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// How much of the console is kept for error messages.
const LAST: usize = 6000;

/// A running machine and its serial console (Xen's and dom0's).
pub struct Qemu {
    pid: Pid,
    shared: Arc<Shared>,
    watcher: Option<JoinHandle<()>>,
    // Closing it would be an end of file on the serial line.
    _serial: Option<ChildStdin>,
}

impl Qemu {
    /// Starts it; the console goes to `logs`/console.log. It is killed when `life` is over, whatever the harness does.
    pub fn start(mut command: Command, logs: &Path, life: Duration) -> Result<Self> {
        let console = File::create(logs.join("console.log")).context("creating the console's log")?;
        let errors = File::create(logs.join("qemu.log")).context("creating QEMU's log")?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let shared = Arc::new(Shared::default());
        let (tell, told) = mpsc::channel();
        let (of_thread, errors) = (Arc::clone(&shared), logs.join("qemu.log"));
        // The kernel ties the child to the thread that started it, so that thread stays until QEMU has ended.
        let watcher = thread::Builder::new().name("qemu".into()).spawn(move || {
            die_with_parent(&mut command);
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    _ = tell.send(Err(error));
                    return;
                }
            };
            let output = child.stdout.take();
            let pid = Pid::from_raw(child.id() as i32);
            _ = tell.send(Ok((pid, child.stdin.take())));
            let (over, is_over) = mpsc::channel::<()>();
            // Reaping happens below only after this thread has been told, so that the pid cannot be another's.
            let guard = thread::spawn(move || {
                if is_over.recv_timeout(life) == Err(mpsc::RecvTimeoutError::Timeout) {
                    _ = kill(pid, Signal::SIGKILL);
                }
            });
            if let Some(output) = output {
                read_console(output, console, &of_thread);
            }
            _ = kill(pid, Signal::SIGKILL);
            drop(over);
            _ = guard.join();
            let why = child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
            let said = std::fs::read_to_string(errors).unwrap_or_default();
            of_thread.lock().ended = Some(format!("QEMU ended ({why}) {said}"));
            of_thread.changed.notify_all();
        })?;
        let (pid, serial) =
            told.recv().context("the QEMU thread died")?.context("starting qemu-system-x86_64")?;
        Ok(Self { pid, shared, watcher: Some(watcher), _serial: serial })
    }

    /// QEMU's process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// The last lines of the console.
    pub fn last_lines(&self) -> String {
        let state = self.shared.lock();
        let bytes: Vec<u8> = state.last.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// Fails, with the reason, if QEMU has ended.
    pub fn check(&self) -> Result<()> {
        match &self.shared.lock().ended {
            Some(why) => bail!("{why}"),
            None => Ok(()),
        }
    }

    /// Waits for a text on the console (only its last part is looked at).
    pub fn wait_console(&self, text: &str, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        let mut state = self.shared.lock();
        loop {
            let bytes: Vec<u8> = state.last.iter().copied().collect();
            if bytes.windows(text.len()).any(|w| w == text.as_bytes()) {
                return Ok(());
            }
            if let Some(why) = &state.ended {
                bail!("waiting for {text:?} on the console: {why}");
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no {text:?} on the console within {limit:?}");
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if self.check().is_ok() {
            _ = kill(self.pid, Signal::SIGKILL);
        }
        if let Some(watcher) = self.watcher.take() {
            _ = watcher.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read_console(mut from: impl Read, mut log: File, shared: &Shared) {
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        // A full disk must not stop the console.
        _ = log.write_all(&buffer[..n]);
        let mut state = shared.lock();
        state.last.extend(&buffer[..n]);
        let excess = state.last.len().saturating_sub(LAST);
        state.last.drain(..excess);
        drop(state);
        shared.changed.notify_all();
    }
}
