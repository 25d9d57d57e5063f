//! The lab's agent: runs inside dom0 and inside each guest, starts commands for the harness and reports them.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use crate::wire::{Exit, Frame, Kind, LineDecoder, Start};

/// Name of the virtio-serial port between dom0's agent and the harness.
pub const PORT_NAME: &str = "xpci.lab.0";

/// Where frames leave, and in which form.
struct Outlet {
    to: Mutex<File>,
    lines: bool,
}

impl Outlet {
    fn send(&self, frame: &Frame) {
        let bytes = if self.lines { frame.to_line() } else { frame.to_bytes() };
        let mut to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        // There is no one to report to when the harness itself is gone.
        _ = to.write_all(&bytes);
    }

    /// Longest piece of output in one frame: on a console, a damaged frame must cost little.
    fn piece(&self) -> usize {
        if self.lines { 1500 } else { 32 << 10 }
    }
}

enum Input {
    Data(Vec<u8>),
    End,
}

struct Running {
    pid: Pid,
    input: mpsc::Sender<Input>,
}

type Table = Arc<Mutex<HashMap<u32, Running>>>;

/// Serves the harness on dom0's virtio-serial port until QEMU goes away.
pub fn serve_dom0() -> Result<()> {
    let port = wait_for_port(Duration::from_secs(60))?;
    let mut input =
        OpenOptions::new().read(true).write(true).open(&port).context("opening the agent's port")?;
    let outlet = Arc::new(Outlet { to: Mutex::new(input.try_clone()?), lines: false });
    let table = Table::default();
    outlet.send(&Frame::new(Kind::PONG, 0, ""));
    while let Some(frame) = Frame::read(&mut input)? {
        take(frame, &outlet, &table);
    }
    Ok(())
}

/// Serves the harness on a guest's console.
pub fn serve_guest() -> Result<()> {
    let mut console =
        OpenOptions::new().read(true).write(true).open("/dev/hvc0").context("opening /dev/hvc0")?;
    make_raw(&console)?;
    let outlet = Arc::new(Outlet { to: Mutex::new(console.try_clone()?), lines: true });
    let table = Table::default();
    let log = Arc::clone(&outlet);
    thread::spawn(move || forward_kernel_log(&log));
    let mut decoder = LineDecoder::default();
    let mut buffer = [0; 4096];
    loop {
        let n = console.read(&mut buffer).context("reading the console")?;
        for frame in decoder.push(&buffer[..n]) {
            take(frame, &outlet, &table);
        }
        decoder.noise.clear();
    }
}

/// Joins standard input and output to the console of a guest; runs in dom0, one per guest.
pub fn bridge_console(tty: &str) -> Result<()> {
    let console =
        OpenOptions::new().read(true).write(true).open(tty).with_context(|| format!("opening {tty}"))?;
    make_raw(&console)?;
    let mut input = console.try_clone()?;
    // The process ends when the console closes; the copier of standard input ends with it.
    thread::spawn(move || _ = copy(&mut io::stdin().lock(), &mut input));
    let (mut from, mut out) = (console, io::stdout().lock());
    copy(&mut from, &mut out).with_context(|| format!("{tty} closed"))
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> Result<()> {
    let mut buffer = [0; 8192];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..n])?;
        to.flush()?;
    }
}

fn make_raw(tty: &File) -> Result<()> {
    let mut mode = tcgetattr(tty).context("reading the console's mode")?;
    cfmakeraw(&mut mode);
    tcsetattr(tty, SetArg::TCSANOW, &mode).context("making the console raw")
}

/// The guest's kernel no longer prints on the console it shares with us (see guest-init.sh), so its log comes as frames.
fn forward_kernel_log(outlet: &Outlet) {
    let Ok(log) = File::open("/dev/kmsg") else { return };
    let mut log = BufReader::with_capacity(8192, log);
    let mut line = Vec::new();
    while let Ok(1..) = log.read_until(b'\n', &mut line) {
        outlet.send(&Frame::new(Kind::KMSG, 0, std::mem::take(&mut line)));
    }
}

/// The port's device node appears once the driver has talked to QEMU.
fn wait_for_port(limit: Duration) -> Result<String> {
    let end = Instant::now() + limit;
    while Instant::now() < end {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == PORT_NAME {
                return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    bail!("no virtio-serial port named {PORT_NAME} within {limit:?}")
}

fn take(frame: Frame, outlet: &Arc<Outlet>, table: &Table) {
    let id = frame.id;
    let running = |then: &dyn Fn(&Running)| {
        if let Some(running) = table.lock().unwrap_or_else(PoisonError::into_inner).get(&id) {
            then(running);
        }
    };
    match frame.kind {
        Kind::PING => outlet.send(&Frame::new(Kind::PONG, id, "")),
        Kind::START => start(id, &frame.payload, outlet, table),
        Kind::STDIN => running(&|r| _ = r.input.send(Input::Data(frame.payload.clone()))),
        Kind::STDIN_END => running(&|r| _ = r.input.send(Input::End)),
        Kind::SIGNAL => {
            let number = frame.payload.get(..4).and_then(|b| b.try_into().ok()).map_or(9, i32::from_le_bytes);
            let signal = Signal::try_from(number).unwrap_or(Signal::SIGKILL);
            running(&|r| _ = killpg(r.pid, signal));
        }
        _ => {}
    }
}

fn start(id: u32, payload: &[u8], outlet: &Arc<Outlet>, table: &Table) {
    let begun = serde_json::from_slice::<Start>(payload)
        .context("reading the command")
        .and_then(|start| begin(&start).map(|child| (start, child)));
    match begun {
        Ok((start, (child, feed, streams))) => {
            let (input, inputs) = mpsc::channel();
            let pid = Pid::from_raw(child.id() as i32);
            table.lock().unwrap_or_else(PoisonError::into_inner).insert(id, Running { pid, input });
            if let Some(feed) = feed {
                thread::spawn(move || feed_input(feed, &inputs));
            }
            let (outlet, table) = (Arc::clone(outlet), Arc::clone(table));
            thread::spawn(move || follow(id, &start, child, &streams, &outlet, &table));
        }
        Err(error) => report(id, Exit { error: Some(format!("{error:#}")), ..Exit::default() }, outlet),
    }
}

fn report(id: u32, exit: Exit, outlet: &Outlet) {
    outlet.send(&Frame::new(Kind::EXIT, id, serde_json::to_vec(&exit).unwrap_or_default()));
}

type Begun = (Child, Option<File>, Vec<(Kind, File)>);

fn begin(start: &Start) -> Result<Begun> {
    let (program, arguments) = start.argv.split_first().context("an empty command")?;
    if let Some((rows, columns)) = start.terminal {
        let size = nix::pty::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = nix::pty::openpty(Some(&size), None).context("opening a pseudo-terminal")?;
        for fd in [&pty.master, &pty.slave] {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        let end = |fd: &OwnedFd| fd.try_clone().map(Stdio::from);
        // `setsid -c` makes the terminal the controlling one, which std cannot do without unsafe code.
        let child = Command::new("/bin/setsid")
            .arg("-c")
            .args(&start.argv)
            .env("TERM", "xterm")
            .stdin(end(&pty.slave)?)
            .stdout(end(&pty.slave)?)
            .stderr(end(&pty.slave)?)
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        let master = File::from(pty.master);
        return Ok((child, Some(master.try_clone()?), vec![(Kind::STDOUT, master)]));
    }
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(if start.stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let feed = child.stdin.take().map(|s| File::from(OwnedFd::from(s)));
    let mut streams = Vec::new();
    streams.extend(child.stdout.take().map(|s| (Kind::STDOUT, File::from(OwnedFd::from(s)))));
    streams.extend(child.stderr.take().map(|s| (Kind::STDERR, File::from(OwnedFd::from(s)))));
    Ok((child, feed, streams))
}

fn feed_input(mut to: File, inputs: &mpsc::Receiver<Input>) {
    while let Ok(Input::Data(bytes)) = inputs.recv() {
        if to.write_all(&bytes).is_err() {
            return;
        }
    }
}

/// Forwards output until the command itself has ended: a daemon it leaves behind may keep the pipes open.
fn follow(
    id: u32,
    start: &Start,
    mut child: Child,
    streams: &[(Kind, File)],
    outlet: &Outlet,
    table: &Table,
) {
    let pid = Pid::from_raw(child.id() as i32);
    // Closed on exec: another command's child that kept the write end would hide the end of this one.
    let Ok((ended, ended_tell)) = nix::unistd::pipe2(OFlag::O_CLOEXEC) else {
        _ = killpg(pid, Signal::SIGKILL);
        return report(id, Exit { error: Some("no pipe left".into()), ..Exit::default() }, outlet);
    };
    thread::spawn(move || {
        // WNOWAIT: the pid stays ours, so that a signal cannot hit a stranger.
        _ = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        drop(ended_tell);
    });
    for (_, stream) in streams {
        _ = fcntl(stream, FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
    }
    let mut deadline = start.limit_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
    let mut open: Vec<bool> = vec![true; streams.len()];
    let mut timed_out = false;
    loop {
        let mut watched: Vec<BorrowedFd<'_>> = vec![ended.as_fd()];
        watched.extend(streams.iter().zip(&open).filter(|(_, open)| **open).map(|((_, s), _)| s.as_fd()));
        let mut fds: Vec<PollFd<'_>> =
            watched.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let wait = deadline.map_or(PollTimeout::NONE, |end| {
            let left = end.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        _ = poll(&mut fds, wait);
        let over = fds[0].any().unwrap_or(false);
        for ((kind, stream), open) in streams.iter().zip(&mut open) {
            *open = *open && forward(id, *kind, stream, outlet);
        }
        if over {
            break;
        }
        if deadline.is_some_and(|end| Instant::now() >= end) {
            timed_out = true;
            deadline = None;
            _ = killpg(pid, Signal::SIGKILL);
        }
    }
    table.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    let exit = match child.wait() {
        Ok(status) => Exit { code: status.code(), signal: status.signal(), timed_out, error: None },
        Err(error) => Exit { error: Some(error.to_string()), ..Exit::default() },
    };
    report(id, exit, outlet);
}

/// Sends what can be read now; false at the end of the stream.
fn forward(id: u32, kind: Kind, mut stream: &File, outlet: &Outlet) -> bool {
    let mut buffer = vec![0; outlet.piece()];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(n) => outlet.send(&Frame::new(kind, id, &buffer[..n])),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
        }
    }
}
