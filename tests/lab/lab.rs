//! Booting the lab and driving its dom0.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::command::Command;
use crate::debian;
use crate::guest::{Guest, GuestConfig, shell, until, wait_for};
use crate::image::{self, Images, Programs};
use crate::link::{Link, Process};
use crate::logs;
use crate::machine::{self, Devices, Emulator};
use crate::packages::XenVersion;
use crate::qemu::{Qemu, Witness};
use crate::qmp::Qmp;
use crate::udev;
use crate::wire::{Frame, Start};

/// What to boot.
#[must_use = "nothing happens before boot()"]
pub struct Builder {
    version: XenVersion,
    devices: Devices,
    install: Vec<(PathBuf, String)>,
    programs: Vec<(String, String)>,
    guest_programs: Vec<String>,
    hvm_guests: bool,
    corrected_qemu: bool,
    udev: bool,
    debian: bool,
    name: String,
    time_limit: Duration,
}

impl Builder {
    /// Which Xen; 4.17 by default.
    pub fn xen(mut self, version: XenVersion) -> Self {
        self.version = version;
        self
    }

    /// The PCI devices, if others than [`Devices::default`].
    pub fn devices(mut self, devices: Devices) -> Self {
        self.devices = devices;
        self
    }

    /// Puts a file of this machine into dom0; a program gets the libraries it needs. A relative path is taken from
    /// the workspace's root.
    pub fn install(mut self, from: impl AsRef<Path>, to: &str) -> Self {
        self.install.push((logs::workspace().join(from), to.to_owned()));
        self
    }

    /// Puts a program or example of this workspace into dom0: the one built beside the running program, in the same profile.
    pub fn program(mut self, name: &str, to: &str) -> Self {
        self.programs.push((name.to_owned(), to.to_owned()));
        self
    }

    /// Puts a program of this package into /lab of every guest, with the libraries it needs.
    pub fn guest_program(mut self, name: &str) -> Self {
        self.guest_programs.push(name.to_owned());
        self
    }

    /// Puts what HVM guests need into dom0: QEMU as their device model, and their firmware.
    pub fn hvm_guests(mut self) -> Self {
        self.hvm_guests = true;
        self
    }

    /// Has the machine made by a QEMU of the lab's own, which is built the first time, instead of the host's.
    pub fn corrected_qemu(mut self) -> Self {
        self.corrected_qemu = true;
        self
    }

    /// Puts udev with the product's rules into dom0, where a test can start it.
    pub fn udev(mut self) -> Self {
        self.udev = true;
        self
    }

    /// Makes dom0 a real Debian with systemd, of the release that has this lab's Xen; what is put into it comes below /lab. It can be
    /// rebooted, and keeps its disk then.
    pub fn debian(mut self) -> Self {
        self.debian = true;
        self
    }

    /// Name of the folder for logs; the running test's name by default.
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// QEMU is killed after this time, in any case; half an hour by default.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = limit;
        self
    }

    /// Boots, and waits until dom0 runs commands and Xen's services are up.
    pub fn boot(self) -> Result<Lab> {
        let begun = Instant::now();
        let emulator = if self.corrected_qemu {
            Emulator::corrected().context("preparing a QEMU with corrections")?
        } else {
            Emulator::of_the_host()
        };
        machine::check_qemu(&emulator)?;
        let images = image::images(self.version)
            .with_context(|| format!("preparing the Xen {} lab", self.version.name()))?;
        let root = if self.debian {
            Some(debian::root(&images.trees).context("making a Debian for dom0")?)
        } else {
            None
        };
        let logs = logs::folder(&self.name)?;
        let folder =
            tempfile::Builder::new().prefix("xpci-lab-").tempdir().context("creating the lab's folder")?;
        self.write_initramfs(&images, &folder.path().join("dom0.cpio")).context("making dom0's initramfs")?;
        let command = machine::command(&emulator, &images, root.as_deref(), &self.devices, folder.path())?;
        let qemu = Qemu::start(command, &logs, self.time_limit)?;
        let booted = connect(&qemu, folder.path()).and_then(|(agent, monitor)| {
            let link = serve(agent, qemu.witness())?;
            match services_come_up(&link).and_then(|()| Qmp::new(monitor)) {
                Ok(qmp) => Ok((link, qmp)),
                // A link that is dead has said why.
                Err(error) if link.is_dead() => Err(error),
                Err(error) => Err(error.context(qemu.witness().account())),
            }
        });
        let (link, qmp) = booted
            .with_context(|| format!("booting Xen {}; logs in {}", self.version.name(), logs.display()))?;
        // QEMU has read it; a killed harness should leave no more than two sockets behind.
        fs::remove_file(folder.path().join("dom0.cpio"))?;
        let boot_time = begun.elapsed();
        println!(
            "lab: Xen {} up in {:.1} s, logs in {}",
            self.version.name(),
            boot_time.as_secs_f32(),
            logs.display()
        );
        Ok(Lab { version: self.version, link, qmp, qemu, logs, boot_time, folder })
    }

    fn write_initramfs(&self, images: &Images, to: &Path) -> Result<()> {
        // The kernel unpacks one archive after the other.
        let guest = to.with_file_name("guest.cpio");
        fs::copy(&images.guest, &guest)?;
        let agent = built("lab-agent")?;
        append(&guest, |archive| {
            let mut programs = Programs::new(&images.trees);
            programs.add(archive, "/lab/lab-agent", &agent)?;
            self.guest_programs
                .iter()
                .try_for_each(|name| programs.add(archive, &format!("/lab/{name}"), &built(name)?))
        })?;
        if self.debian {
            self.write_debian(images, to, &agent, &guest)?;
            return Ok(fs::remove_file(guest)?);
        }
        fs::copy(&images.dom0, to)?;
        append(to, |archive| {
            let mut programs = Programs::new(&images.trees);
            programs.add(archive, "/lab/lab-agent", &agent)?;
            archive.copy("/guest/vmlinuz", &images.kernel, 0o644)?;
            archive.copy("/guest/initrd.cpio", &guest, 0o644)?;
            for (from, path) in &self.install {
                programs.add(archive, path, from)?;
            }
            for (name, path) in &self.programs {
                programs.add(archive, path, &built(name)?)?;
            }
            if self.udev {
                udev::add(archive, &images.trees)?;
            }
            if self.hvm_guests { image::device_model(archive, &images.trees) } else { Ok(()) }
        })?;
        Ok(fs::remove_file(guest)?)
    }

    /// With the lab's own files only: libraries are the Debian's.
    fn write_debian(&self, images: &Images, to: &Path, agent: &Path, guest: &Path) -> Result<()> {
        let mut files = self.install.clone();
        for (name, path) in &self.programs {
            files.push((built(name)?, path.clone()));
        }
        for (from, path) in
            [(agent, "lab-agent"), (&images.kernel, "guest/vmlinuz"), (guest, "guest/initrd.cpio")]
        {
            files.push((from.to_owned(), format!("/lab/{path}")));
        }
        debian::initramfs(to, &images.trees, &files)
    }
}

/// How long Xen may take to write, over a serial line, what its debug keys ask for.
const KEYS_LIMIT: Duration = Duration::from_secs(20);
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// Guests are shut down first.
const REBOOT_LIMIT: Duration = Duration::from_secs(300);

fn append(
    to: &Path,
    fill: impl FnOnce(&mut crate::cpio::Archive<io::BufWriter<File>>) -> Result<()>,
) -> Result<()> {
    let file = OpenOptions::new().append(true).open(to)?;
    let mut archive = crate::cpio::Archive::new(io::BufWriter::new(file));
    fill(&mut archive)?;
    archive.finish()?;
    Ok(())
}

/// A program or example of this workspace, built in the same profile as the caller, from what the sources are now.
pub fn built(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe().context("finding this program")?;
    let places = me.ancestors().skip(1).take(2).flat_map(|d| [d.join(name), d.join("examples").join(name)]);
    let found = places.into_iter().find(|place| place.exists());
    let program = found.with_context(|| {
        format!("no {name} beside {}; `make lab-test` builds all that the lab needs", me.display())
    })?;
    crate::fresh::check(&program)?;
    Ok(program)
}

fn services_come_up(link: &Arc<Link>) -> Result<()> {
    let lab_ready = Command::new(Ok(Arc::clone(link)), &until("[ -e /run/lab-ready ]"));
    link.control
        .wait(Some(BOOT_LIMIT), |c| (c.pongs > 0 || c.exit.is_some()).then_some(()))
        .with_context(|| format!("dom0's agent did not report within {BOOT_LIMIT:?}"))?;
    wait_for(lab_ready, "Xen's services in dom0", BOOT_LIMIT)?;
    let state = Command::new(Ok(Arc::clone(link)), "cat /run/lab-ready").ok()?;
    if state.trim() != "ok" {
        bail!("Xen's services in dom0 did not start");
    }
    Ok(())
}

/// QEMU makes its sockets right after its start.
fn connect(qemu: &Qemu, folder: &Path) -> Result<(UnixStream, UnixStream)> {
    let end = Instant::now() + Duration::from_secs(60);
    let mut last = None;
    while Instant::now() < end {
        qemu.check()?;
        match (UnixStream::connect(folder.join("agent")), UnixStream::connect(folder.join("qmp"))) {
            (Ok(agent), Ok(monitor)) => return Ok((agent, monitor)),
            (Err(error), _) | (_, Err(error)) => last = Some(error),
        }
        // There is no event for a socket that does not exist yet.
        thread::sleep(Duration::from_millis(20));
    }
    bail!("QEMU made no sockets ({last:?}): {}", qemu.witness().account())
}

fn serve(stream: UnixStream, witness: Witness) -> Result<Arc<Link>> {
    let mut from = stream.try_clone()?;
    let to = Mutex::new(stream);
    let link = Link::new(move |frame: &Frame| {
        let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
        to.write_all(&frame.to_bytes()).context("dom0's agent cannot be reached")
    });
    let of_thread = Arc::downgrade(&link);
    thread::Builder::new().name("dom0-agent".into()).spawn(move || {
        let why = loop {
            match (Frame::read(&mut from), of_thread.upgrade()) {
                (Ok(Some(frame)), Some(link)) => link.receive(frame),
                (Ok(None), _) => break "its socket closed".to_owned(),
                (Err(error), _) => break format!("{error:#}"),
                (_, None) => return,
            }
        };
        if let Some(link) = of_thread.upgrade() {
            link.dead(&format!("dom0 is gone ({why}): {}", witness.account_of_end()));
        }
    })?;
    Ok(link)
}

/// A booted machine. Dropping it collects logs and ends QEMU.
pub struct Lab {
    version: XenVersion,
    link: Arc<Link>,
    qmp: Qmp,
    qemu: Qemu,
    logs: PathBuf,
    boot_time: Duration,
    folder: TempDir,
}

impl Lab {
    /// A machine to be described.
    pub fn builder() -> Builder {
        Builder {
            version: XenVersion::V4_17,
            devices: Devices::default(),
            install: Vec::new(),
            programs: Vec::new(),
            guest_programs: Vec::new(),
            hvm_guests: false,
            corrected_qemu: false,
            udev: false,
            debian: false,
            name: thread::current().name().unwrap_or("lab").replace("::", "-"),
            time_limit: Duration::from_secs(1800),
        }
    }

    /// A shell command in dom0.
    pub fn dom0(&self, script: &str) -> Command {
        Command::new(Ok(Arc::clone(&self.link)), script)
    }

    /// A command in dom0 in the background. Its output is also in the logs, under its program's name.
    pub fn spawn(&self, script: &str) -> Result<Process> {
        let program =
            script.split_whitespace().next().unwrap_or("command").rsplit('/').next().unwrap_or("command");
        self.link.start(&shell(&format!("exec {script}")), Some(self.log_file(&format!("{program}.log"))?))
    }

    /// A command in dom0 in the background that is given input as it goes.
    pub fn converse(&self, script: &str) -> Result<Process> {
        let mut start = shell(&format!("exec {script}"));
        start.stdin = true;
        self.link.start(&start, None)
    }

    /// Starts an interactive bash on a terminal of this size.
    pub fn shell(&self, rows: u16, columns: u16) -> Result<Process> {
        let argv = vec!["/bin/bash".into(), "-l".into()];
        self.link.start(&Start { argv, limit_ms: None, terminal: Some((rows, columns)), stdin: true }, None)
    }

    /// Starts a guest and waits until it runs commands.
    pub fn guest(&self, config: &GuestConfig) -> Result<Guest<'_>> {
        let [guest] = self.guests(std::array::from_ref(config))?;
        Ok(guest)
    }

    /// Starts guests, which boot side by side, and waits until they run commands.
    pub fn guests<const N: usize>(&self, configs: &[GuestConfig; N]) -> Result<[Guest<'_>; N]> {
        Guest::start(self, configs)
    }

    /// Creates a guest that waits to be let run.
    pub fn paused_guest(&self, config: &GuestConfig) -> Result<Guest<'_>> {
        Guest::start_paused(self, config)
    }

    /// Reboots a dom0 that is a real Debian, as its administrator does, and waits until it has started again.
    pub fn reboot(&self) -> Result<()> {
        self.link.control.lock().pongs = 0;
        self.link.start(&shell("systemctl reboot"), None).and_then(|_asked| {
            // Only an agent that has just started says this unasked.
            let came = self
                .link
                .control
                .wait(Some(REBOOT_LIMIT), |c| (c.pongs > 0 || c.exit.is_some()).then_some(()));
            came.with_context(|| {
                format!("dom0 did not come back within {REBOOT_LIMIT:?}: {}", self.qemu.witness().account())
            })
        })?;
        self.link.end_all("dom0 was rebooted");
        services_come_up(&self.link)
    }

    /// Waits until a shell condition holds in dom0.
    pub fn wait_for(&self, what: &str, limit: Duration, condition: &str) -> Result<()> {
        wait_for(self.dom0(&until(condition)), what, limit)
            .with_context(|| format!("console:\n{}", self.qemu.last_lines()))
    }

    /// Writes a file in dom0.
    pub fn push(&self, bytes: &[u8], path: &str) -> Result<()> {
        let script = format!("mkdir -p \"$(dirname '{path}')\" && cat > '{path}'");
        self.dom0(&script).input(bytes).ok().map(drop)
    }

    /// Reads a file of dom0.
    pub fn pull(&self, path: &str) -> Result<Vec<u8>> {
        let output = self.dom0(&format!("cat '{path}'")).run()?;
        let bytes = output.bytes.clone();
        output.ok().map(|_| bytes)
    }

    /// A line of QEMU's human monitor; its complaints are errors.
    pub fn monitor(&self, line: &str) -> Result<String> {
        self.explained(self.qmp.human(line))
    }

    /// What QEMU and Xen know of a machine whose dom0 does not answer: what its processors do and what waits for them.
    pub fn processors(&self) -> String {
        let lines = ["info status", "info registers -a", "info lapic 0", "info lapic 1"];
        let said = lines.map(|line| {
            let answer = self.monitor(line).unwrap_or_else(|error| format!("{line}: {error:#}"));
            answer.lines().filter(|line| tells_why_it_waits(line)).collect::<Vec<_>>().join("\n")
        });
        let console = || fs::read(self.logs().join("console.log")).unwrap_or_default();
        let before = console().len();
        // Domains, event channels, run queues and timers. Xen writes a line for each key first, and 's' comes last.
        let xen = match self.qemu.press("qeras", "'s' pressed", KEYS_LIMIT) {
            Ok(()) => String::from_utf8_lossy(console().get(before..).unwrap_or_default()).into_owned(),
            Err(error) => format!("Xen does not answer its debug keys: {error:#}"),
        };
        format!("{}\n{xen}", said.join("\n"))
    }

    /// QEMU's own monitor protocol.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        self.explained(self.qmp.execute(command, arguments))
    }

    /// Waits for an event of QEMU's, such as `DEVICE_DELETED`.
    pub fn wait_event(&self, name: &str, limit: Duration) -> Result<Value> {
        self.explained(self.qmp.wait_event(name, limit))
    }

    /// Waits for a text on the serial console.
    pub fn wait_console(&self, text: &str, limit: Duration) -> Result<()> {
        self.qemu.wait_console(text, limit)
    }

    /// Which Xen it is.
    pub fn version(&self) -> XenVersion {
        self.version
    }

    /// From the start of QEMU's preparation to the first command.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// Where its logs are.
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// QEMU's process id.
    pub fn qemu_pid(&self) -> i32 {
        self.qemu.pid()
    }

    /// The folder of its sockets.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// An error of the monitor, with QEMU's end if that is the reason.
    fn explained<T>(&self, result: Result<T>) -> Result<T> {
        match self.check() {
            Err(end) => result.map_err(|error| error.context(end)),
            Ok(()) => result,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.qemu.check()
    }

    pub(crate) fn log_file(&self, name: &str) -> Result<File> {
        let path = self.logs.join(name);
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Always: a test that fails by returning an error cannot be recognized here.
        logs::collect(self);
        if thread::panicking() {
            println!("lab: logs are in {}", self.logs.display());
        }
    }
}

/// Whether this line of QEMU's about a processor says where it is and what it waits for, not what else its registers hold.
fn tells_why_it_waits(line: &str) -> bool {
    let beginnings = ["XMM", "YMM", "FPR", "FCW", "ES =", "DS =", "FS =", "LDT", "GDT", "IDT", "DR", "CCS"];
    !line.trim().is_empty() && !beginnings.iter().any(|beginning| line.starts_with(beginning))
}
