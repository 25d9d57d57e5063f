//! The QEMU process: started, watched, killed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
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

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// What QEMU writes to its standard error.
    errors: PathBuf,
}

/// How much of the console is kept for error messages: also the head of a kernel's long account of its panic.
const LAST: usize = 16 << 10;
/// How many lines of the console, and of QEMU's own log, an error has.
const LINES: usize = 25;
/// A QEMU whose sockets are closed ends within this time, unless the socket alone is broken.
const END_LIMIT: Duration = Duration::from_secs(10);
/// Xen's last words when it, or dom0, has crashed: with `noreboot` the machine then stands still, and nothing answers any more.
const CRASHED: [&str; 2] =
    ["'noreboot' set - not rebooting.", "Manual reset required ('noreboot' specified)"];
/// How Linux and Xen begin to say why they panic. Xen's own reason is on the line after it, among the last.
const PANICS: [&str; 2] = ["Kernel panic", "Panic on CPU"];

/// A running machine and its serial console (Xen's and dom0's).
pub struct Qemu {
    pid: Pid,
    shared: Arc<Shared>,
    watcher: Option<JoinHandle<()>>,
    // Closing it would be an end of file on the serial line.
    serial: Mutex<Option<ChildStdin>>,
}

impl Qemu {
    /// Starts it; the console goes to `logs`/console.log. It is killed when `limit` is over, whatever the harness does.
    pub fn start(mut command: Command, logs: &Path, limit: Duration) -> Result<Self> {
        let console = File::create(logs.join("console.log")).context("creating the console's log")?;
        let path = logs.join("qemu.log");
        let errors = File::create(&path).context("creating QEMU's log")?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), errors: path });
        let (tell, told) = mpsc::channel();
        let of_thread = Arc::clone(&shared);
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
                let outlived = is_over.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
                if outlived {
                    _ = kill(pid, Signal::SIGKILL);
                }
                outlived
            });
            let crashed = output.is_some_and(|output| read_console(output, console, &of_thread));
            _ = kill(pid, Signal::SIGKILL);
            drop(over);
            let outlived = guard.join().unwrap_or(false);
            let status = child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
            of_thread.lock().ended = Some(match (crashed, outlived) {
                (true, _) => format!("Xen or dom0 crashed ({})", of_thread.panic()),
                (_, true) => format!("QEMU was killed, because its time limit of {limit:?} was over"),
                _ => format!("QEMU ended ({status})"),
            });
            of_thread.changed.notify_all();
        })?;
        let (pid, serial) =
            told.recv().context("the QEMU thread died")?.context("starting qemu-system-x86_64")?;
        Ok(Self { pid, shared, watcher: Some(watcher), serial: Mutex::new(serial) })
    }

    /// QEMU's process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// The last lines of the console.
    pub fn last_lines(&self) -> String {
        self.shared.console()
    }

    /// Presses debug keys of Xen, whose serial line takes them after Ctrl-A three times, and waits until the console has this text. Works
    /// while Xen does, whatever has become of dom0.
    pub fn press(&self, keys: &str, text: &str, limit: Duration) -> Result<()> {
        if let Some(serial) = self.serial.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            serial.write_all(format!("\x01\x01\x01{keys}").as_bytes()).context("typing on the console")?;
            serial.flush().context("typing on the console")?;
        }
        self.wait_console(text, limit)
    }

    /// Whoever needs to say what became of the machine.
    pub fn witness(&self) -> Witness {
        Witness(Arc::clone(&self.shared))
    }

    /// Fails, with the reason, if QEMU has ended.
    pub fn check(&self) -> Result<()> {
        if self.has_ended() { bail!("{}", self.shared.account()) } else { Ok(()) }
    }

    fn has_ended(&self) -> bool {
        self.shared.lock().ended.is_some()
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
            if state.ended.is_some() {
                drop(state);
                bail!("waiting for {text:?} on the console: {}", self.shared.account());
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
        if !self.has_ended() {
            _ = kill(self.pid, Signal::SIGKILL);
        }
        if let Some(watcher) = self.watcher.take() {
            _ = watcher.join();
        }
    }
}

/// Tells what became of a machine, also to threads that have nothing else of it.
#[derive(Clone)]
pub struct Witness(Arc<Shared>);

impl Witness {
    /// Whether QEMU runs or how it ended, the last lines that it wrote, and those of the console.
    pub fn account(&self) -> String {
        self.0.account()
    }

    /// The same of a machine whose sockets are closed: QEMU's end may still be on its way.
    pub fn account_of_end(&self) -> String {
        let state = self.0.lock();
        let ended = self.0.changed.wait_timeout_while(state, END_LIMIT, |state| state.ended.is_none());
        drop(ended);
        self.0.account()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn console(&self) -> String {
        let bytes: Vec<u8> = self.lock().last.iter().copied().collect();
        last_lines(&bytes)
    }

    /// The line in which a kernel, or Xen, says why it panicked.
    fn panic(&self) -> String {
        let bytes: Vec<u8> = self.lock().last.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let found = text.lines().rev().find(|line| PANICS.iter().any(|words| line.contains(words)));
        found.unwrap_or("for no reason on the console").trim().to_owned()
    }

    fn account(&self) -> String {
        let state = self.lock().ended.clone().unwrap_or_else(|| "QEMU is running".to_owned());
        let said = std::fs::read(&self.errors).map_or_else(|e| e.to_string(), |log| last_lines(&log));
        let shown = |text: String| if text.is_empty() { " nothing".to_owned() } else { format!("\n{text}") };
        format!("{state}; QEMU said:{}\nthe console says:{}", shown(said), shown(self.console()))
    }
}

fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).replace('\r', "");
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// Returns at the end of the console, or when Xen says there, in a line of its own, that the machine has crashed; whether it did.
fn read_console(mut from: impl Read, mut log: File, shared: &Shared) -> bool {
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        // A full disk must not stop the console.
        _ = log.write_all(&buffer[..n]);
        let mut state = shared.lock();
        state.last.extend(&buffer[..n]);
        let excess = state.last.len().saturating_sub(LAST);
        state.last.drain(..excess);
        let crashed = tells_of_a_crash(state.last.make_contiguous());
        drop(state);
        shared.changed.notify_all();
        if crashed {
            return true;
        }
    }
    false
}

/// Whether Xen said its last words; a guest's or dom0's lines do not begin like Xen's.
fn tells_of_a_crash(console: &[u8]) -> bool {
    let text = String::from_utf8_lossy(console);
    text.lines().any(|line| line.starts_with("(XEN) ") && CRASHED.iter().any(|words| line.contains(words)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xens_last_words_are_a_crash() {
        let console =
            b"[    3.1] Kernel panic\r\n(XEN) Hardware Dom0 crashed: 'noreboot' set - not rebooting.\r\n";
        assert!(tells_of_a_crash(console));
    }

    #[test]
    fn a_domain_that_writes_xens_last_words_is_no_crash() {
        assert!(!tells_of_a_crash(b"Hardware Dom0 crashed: 'noreboot' set - not rebooting.\r\n"));
    }

    #[test]
    fn a_qemu_that_ends_at_once_is_reported_with_its_words() -> Result<()> {
        let logs = tempfile::tempdir()?;
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-display", "none", "-nodefaults", "-device", "no-such-device"]);
        let qemu = Qemu::start(command, logs.path(), Duration::from_secs(60))?;
        let account = qemu.witness().account_of_end();
        assert!(account.contains("QEMU ended (exit status: 1)"), "{account}");
        assert!(account.contains("'no-such-device' is not a valid device model name"), "{account}");
        Ok(())
    }
}
