//! A running xpcid with directories of its own.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Longer than anything a test waits for takes on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(60);

/// The program, without anything of the caller's that it would heed.
pub fn program(path: &str) -> Command {
    let mut command = Command::new(path);
    for name in ["XPCI_SOCKET", "COLUMNS", "RUST_LOG", "RUST_LOG_STYLE", "RUST_BACKTRACE"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// `xpci` with a socket.
pub fn xpci(socket: &Path, arguments: &[&str]) -> Output {
    let mut command = program(env!("CARGO_BIN_EXE_xpci"));
    command.arg("--socket").arg(socket).args(arguments).output().unwrap()
}

/// The service; killed when it is dropped.
pub struct Daemon {
    pub directory: TempDir,
    child: Child,
    log: mpsc::Receiver<String>,
}

impl Daemon {
    /// Starts it on a host that the text describes and waits until it is ready.
    pub fn start(host: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), host)
    }

    /// The same, in a directory where something lies already.
    pub fn start_in(directory: TempDir, host: &str) -> Self {
        Self::start_with(directory, host, "")
    }

    /// The same, with more settings.
    pub fn start_with(directory: TempDir, host: &str, settings: &str) -> Self {
        describe(directory.path(), host, settings);
        Self::run_until_ready(directory, service)
    }

    /// Runs a program that is the service in a directory, and waits until it is ready.
    pub fn run_until_ready(directory: TempDir, program: impl FnOnce(&Path) -> Command) -> Self {
        let program = program(directory.path());
        let daemon = Self::run(directory, program);
        daemon.wait_for_log("ready on");
        daemon
    }

    /// Runs a program that is the service in a directory.
    pub fn run(directory: TempDir, mut program: Command) -> Self {
        let mut child = program.stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (sender, log) = mpsc::channel();
        thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { directory, child, log }
    }

    /// Waits for a line of its log.
    pub fn wait_for_log(&self, wanted: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        let mut seen = Vec::new();
        loop {
            match self.log.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(wanted) => return line,
                Ok(line) => seen.push(line),
                Err(error) => panic!("xpcid did not log '{wanted}' ({error}); it did:\n{}", seen.join("\n")),
            }
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("run/control")
    }

    pub fn xpci(&self, arguments: &[&str]) -> Output {
        xpci(&self.socket(), arguments)
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for the end of its process; others that it started may continue.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Waits for its end: what it still logged ends when it does.
    pub fn wait(&mut self) -> (ExitStatus, Vec<String>) {
        let deadline = Instant::now() + LIMIT;
        let mut lines = Vec::new();
        loop {
            match self.log.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => lines.push(line),
                Err(mpsc::RecvTimeoutError::Disconnected) => return (self.child.wait().unwrap(), lines),
                Err(error) => panic!("xpcid did not stop ({error}):\n{}", lines.join("\n")),
            }
        }
    }

    /// Starts it again in the same directories.
    pub fn start_again(mut self) -> Self {
        let _ = self.child.kill();
        self.wait();
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap());
        Self::run_until_ready(directory, service)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes the host and the settings of a service into its directory.
pub fn describe(directory: &Path, host: &str, settings: &str) {
    fs::write(directory.join("host.yaml"), host).unwrap();
    fs::write(directory.join("settings.yaml"), format!("guest-limit-seconds: 1\n{settings}")).unwrap();
}

/// Puts a copy of a program at a path, in place of an earlier one as a package's upgrade does.
///
/// A process of its own writes it: one that another test starts at that moment would inherit an open file of ours, and the kernel refuses
/// to start a program that is open for writing (ETXTBSY).
pub fn install_program(from: &Path, to: &Path) {
    let installed = Command::new("install").args(["-m", "755"]).arg(from).arg(to).output().unwrap();
    assert!(installed.status.success(), "{installed:?}");
}

/// The same with a script.
pub fn install_script(text: &str, to: &Path) {
    let script = to.with_extension("script");
    fs::write(&script, text).unwrap();
    install_program(&script, to);
}

/// `xpcid` on the host and in the directories of a test.
pub fn service(directory: &Path) -> Command {
    let mut command = program(env!("CARGO_BIN_EXE_xpcid"));
    command
        .arg("--platform")
        .arg(format!("sim:{}", directory.join("host.yaml").display()))
        .arg("--settings")
        .arg(directory.join("settings.yaml"))
        .arg("--run-directory")
        .arg(directory.join("run"))
        .arg("--state-directory")
        .arg(directory.join("state"))
        .arg("--policies")
        .arg(directory.join("policies"));
    command
}
