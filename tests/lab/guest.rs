//! A Linux guest: created through xl, spoken to over its console.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::command::Command;
use crate::lab::Lab;
use crate::link::{Link, Process};
use crate::wire::{Exit, Kind, LineDecoder, Start};

/// How a guest is virtualized.
#[derive(Debug, Clone, Copy)]
enum Mode {
    Pv,
    Hvm,
}

impl Mode {
    /// What its xl.cfg says of it, with the kernel's own arguments.
    fn lines(self) -> &'static str {
        match self {
            Self::Pv => "type=\"pv\"\nextra=\"console=hvc0 rdinit=/init iommu=soft swiotlb=32768\"\n",
            Self::Hvm => "type=\"hvm\"\nvga=\"none\"\nvnc=0\nextra=\"console=hvc0 rdinit=/init\"\n",
        }
    }
}

/// What a guest is made of.
#[derive(Debug, Clone)]
pub struct GuestConfig {
    name: String,
    mode: Mode,
    memory: u32,
    passthrough: bool,
    lines: Vec<String>,
}

impl GuestConfig {
    /// A PV guest with 320 MiB and passthrough enabled.
    pub fn pv(name: &str) -> Self {
        Self::new(name, Mode::Pv)
    }

    /// An HVM guest with Xen's PV drivers, of the same size, from the same kernel. For machines with
    /// [`Builder::hvm_guests`](crate::Builder::hvm_guests) and [`Builder::corrected_qemu`](crate::Builder::corrected_qemu).
    pub fn hvm(name: &str) -> Self {
        Self::new(name, Mode::Hvm)
    }

    fn new(name: &str, mode: Mode) -> Self {
        Self { name: name.to_owned(), mode, memory: 320, passthrough: true, lines: Vec::new() }
    }

    /// MiB of memory.
    #[must_use]
    pub fn memory(mut self, mib: u32) -> Self {
        self.memory = mib;
        self
    }

    /// Whether devices may be assigned to it.
    #[must_use]
    pub fn passthrough(mut self, enabled: bool) -> Self {
        self.passthrough = enabled;
        self
    }

    /// One more line of its xl.cfg.
    #[must_use]
    pub fn line(mut self, line: &str) -> Self {
        self.lines.push(line.to_owned());
        self
    }

    /// The xl.cfg.
    pub fn text(&self) -> String {
        let mut text = format!(
            "name=\"{}\"\n{}kernel=\"/guest/vmlinuz\"\nramdisk=\"/guest/initrd.cpio\"\nmemory={}\nvcpus=1\n\
             passthrough=\"{}\"\n",
            self.name,
            self.mode.lines(),
            self.memory,
            if self.passthrough { "enabled" } else { "disabled" }
        );
        for line in &self.lines {
            _ = writeln!(text, "{line}");
        }
        text
    }
}

/// A running guest. Dropping it leaves the domain alone; it ends with the lab.
pub struct Guest<'a> {
    lab: &'a Lab,
    name: String,
    console: Mutex<Option<Console>>,
}

struct Console {
    domid: u32,
    link: Arc<Link>,
    bridge: Arc<Process>,
}

impl Drop for Console {
    /// Ends the bridge in dom0, so that the next one is the console's only reader.
    fn drop(&mut self) {
        // It may have ended by itself, with the domain.
        _ = self.bridge.signal(nix::libc::SIGKILL);
    }
}

const BOOT_LIMIT: Duration = Duration::from_secs(240);

impl<'a> Guest<'a> {
    /// Creates the domains and waits until their agents answer: one boots while the next is created.
    pub(crate) fn start<const N: usize>(lab: &'a Lab, configs: &[GuestConfig; N]) -> Result<[Self; N]> {
        let guests = configs.each_ref().map(|config| Self::of(lab, config));
        for (guest, config) in guests.iter().zip(configs) {
            guest.create(config, "")?;
        }
        for guest in &guests {
            guest.reconnect(BOOT_LIMIT)?;
        }
        Ok(guests)
    }

    /// Creates the domain, paused: it is given functions before its firmware runs.
    pub(crate) fn start_paused(lab: &'a Lab, config: &GuestConfig) -> Result<Self> {
        let guest = Self::of(lab, config);
        guest.create(config, "-p")?;
        Ok(guest)
    }

    fn of(lab: &'a Lab, config: &GuestConfig) -> Self {
        Self { lab, name: config.name.clone(), console: Mutex::new(None) }
    }

    fn create(&self, config: &GuestConfig, options: &str) -> Result<()> {
        let path = format!("/guest/{}.cfg", self.name);
        self.lab.push(config.text().as_bytes(), &path)?;
        self.lab.dom0(&format!("xl create {options} {path}")).limit(BOOT_LIMIT).ok().map(drop)
    }

    /// Lets a paused one run, and waits until its agent answers.
    pub fn unpause(&self, limit: Duration) -> Result<()> {
        self.lab.dom0(&format!("xl unpause {}", self.name)).ok()?;
        self.reconnect(limit).map(drop)
    }

    /// Its name in xl.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its present domain id.
    pub fn domid(&self) -> Result<u32> {
        let text = self.lab.dom0(&format!("xl domid {}", self.name)).ok()?;
        text.trim().parse().with_context(|| format!("xl domid {} said {text:?}", self.name))
    }

    /// A shell command inside the guest.
    pub fn run(&self, script: &str) -> Command {
        Command::new(self.link(), script)
    }

    /// A command in the background.
    pub fn spawn(&self, script: &str) -> Result<Process> {
        self.link()?.start(&shell(script), None)
    }

    /// A command in the background that is given input as it goes.
    pub fn converse(&self, script: &str) -> Result<Process> {
        let mut start = shell(&format!("exec {script}"));
        start.stdin = true;
        self.link()?.start(&start, None)
    }

    /// Waits until a shell condition holds inside the guest.
    pub fn wait_for(&self, what: &str, limit: Duration, condition: &str) -> Result<()> {
        wait_for(self.run(&until(condition)), what, limit).with_context(|| format!("in guest {}", self.name))
    }

    fn link(&self) -> Result<Arc<Link>> {
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        console.as_ref().map(|c| Arc::clone(&c.link)).context("the guest is not connected")
    }

    /// The domain id that the console of this object belongs to.
    pub fn connected_domid(&self) -> Option<u32> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|c| c.domid)
    }

    /// Waits for another domain of this name (after a reboot by xl) and connects to it.
    pub fn wait_rebooted(&self, limit: Duration) -> Result<u32> {
        let old = self.connected_domid().unwrap_or(0);
        let condition = format!("id=$(xl domid {}) && [ \"$id\" != {old} ]", self.name);
        self.lab.wait_for("the guest's new domain", limit, &condition)?;
        self.reconnect(limit)
    }

    /// Connects to the agent of the domain that has this name now.
    pub fn reconnect(&self, limit: Duration) -> Result<u32> {
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        *console = None;
        let domid = self.domid()?;
        let node = format!("/local/domain/{domid}/console/tty");
        let condition = format!("xenstore-read {node}");
        self.lab.wait_for("the guest's console", limit, &condition)?;
        let tty = self.lab.dom0(&condition).ok()?;
        let mut start = shell(&format!("exec /lab/lab-agent console {}", tty.trim()));
        start.stdin = true;
        let bridge = Arc::new(self.lab.link().start(&start, None)?);
        let write = bridge.writer();
        let link = Link::new(move |frame| write(&frame.to_line()));
        let log = self.lab.log_file(&format!("guest-{}.log", self.name))?;
        let (of_thread, reader) = (Arc::downgrade(&link), Arc::clone(&bridge));
        thread::spawn(move || {
            let mut decoder = LineDecoder::default();
            let mut log = log;
            while let Some(bytes) = reader.next_output() {
                let frames = decoder.push(&bytes);
                let Some(link) = of_thread.upgrade() else { return };
                for frame in frames {
                    if frame.kind == Kind::KMSG {
                        _ = log.write_all(&frame.payload);
                    } else {
                        link.receive(frame);
                    }
                }
                // The log is a help for people, no part of the result.
                _ = log.write_all(&std::mem::take(&mut decoder.noise));
            }
            if let Some(link) = of_thread.upgrade() {
                let why = match reader.ended() {
                    Some(Exit { error: Some(error), .. }) => error,
                    _ => "the domain ended or rebooted".to_owned(),
                };
                link.dead(&format!("the guest's console closed: {why}"));
            }
        });
        let new = Console { domid, link, bridge };
        self.greet(&new.link, limit)?;
        *console = Some(new);
        Ok(domid)
    }

    /// Asks until the agent answers: the console drops what comes before anybody reads it.
    fn greet(&self, link: &Arc<Link>, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            link.send(Kind::PING, 0, "")?;
            let answer = link.control.wait(Some(Duration::from_millis(500)), |c| {
                c.exit.clone().map(Err).or((c.pongs > 0).then_some(Ok(())))
            });
            match answer {
                Some(Ok(())) => return Ok(()),
                Some(Err(exit)) => bail!("guest {}: {}", self.name, exit.error.unwrap_or_default()),
                None => self.lab.check()?,
            }
        }
        let log = self.lab.dom0(&format!("tail -n 25 /var/log/xen/console/guest-{}.log", self.name)).ok()?;
        bail!("the agent of guest {} did not answer within {limit:?}; its console says:\n{log}", self.name)
    }
}

/// A script for a shell, without limit.
pub(crate) fn shell(script: &str) -> Start {
    let argv = vec!["/bin/sh".into(), "-c".into(), script.to_owned()];
    Start { argv, limit_ms: None, terminal: None, stdin: false }
}

/// A script that ends when the condition holds; it asks ten times a second, inside the machine.
pub(crate) fn until(condition: &str) -> String {
    format!("until {{ {condition}\n}} >/dev/null 2>&1; do sleep 0.1; done")
}

pub(crate) fn wait_for(command: Command, what: &str, limit: Duration) -> Result<()> {
    command.limit(limit).ok().map(drop).with_context(|| format!("waiting for {what} (at most {limit:?})"))
}
