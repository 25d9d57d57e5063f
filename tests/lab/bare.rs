//! An HVM guest without an operating system (`tests/guests`), controlled over its serial port.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;
use crate::link::Process;
use crate::logs::workspace;
use crate::packages::run;

/// Bytes of its disk: the boot sector and the 64 sectors that it loads, and room that the BIOS likes a disk to have.
const DISK: usize = 1 << 20;
const SECTOR: usize = 512;
const LOADED: usize = 64 * SECTOR;
/// What an emulated machine on a busy host may take to get through firmware and BIOS, or to answer.
const LIMIT: Duration = Duration::from_secs(120);

/// Twice, so that what makes progress shows: the threads of its device model and of xpcid, its processors with their registers, its
/// event channels.
const EVIDENCE: &str = "for time in 1 2; do \
        for pid in $(pidof qemu-system-i386) $(pidof xpcid); do for task in /proc/$pid/task/*; do \
            echo $task $(cat $task/comm $task/wchan $task/syscall) $(grep ctxt $task/status); done; done; \
        xl vcpu-list NAME; xl debug-keys v; xl debug-keys e; xl dmesg | tail -n 150; \
    done; tail -n 20 /var/log/xen/qemu-dm-NAME.log";

/// A bare guest: created paused, so that it can be given functions before its firmware runs.
pub struct BareGuest<'a> {
    lab: &'a Lab,
    name: String,
    console: Option<Process>,
}

impl<'a> BareGuest<'a> {
    /// Creates it, paused; `lines` are added to its xl.cfg. One that resets itself is there to be looked at: it never should.
    pub fn create(lab: &'a Lab, name: &str, lines: &[&str]) -> Result<Self> {
        Self::create_and(lab, name, "preserve", lines)
    }

    /// Creates one that is restarted when it resets itself.
    pub fn create_restarted(lab: &'a Lab, name: &str, lines: &[&str]) -> Result<Self> {
        Self::create_and(lab, name, "restart", lines)
    }

    fn create_and(lab: &'a Lab, name: &str, on_reboot: &str, lines: &[&str]) -> Result<Self> {
        let path = format!("/guest/{name}.cfg");
        Self::describe(lab, name, &path, on_reboot, lines)?;
        lab.dom0(&format!("xl create -p {path}")).limit(LIMIT).ok()?;
        Ok(Self { lab, name: name.to_owned(), console: None })
    }

    /// One that dom0's next boot starts, as xl lets it: it runs at once.
    pub fn at_boot(lab: &'a Lab, name: &str, lines: &[&str]) -> Result<Self> {
        let path = format!("/etc/xen/{name}.cfg");
        Self::describe(lab, name, &path, "preserve", lines)?;
        lab.dom0(&format!("mkdir -p /etc/xen/auto && ln -s {path} /etc/xen/auto/")).ok()?;
        Ok(Self { lab, name: name.to_owned(), console: None })
    }

    /// Puts its disk and its xl.cfg into dom0; the disk lies beside the file for xl.
    fn describe(lab: &Lab, name: &str, path: &str, on_reboot: &str, lines: &[&str]) -> Result<()> {
        let image = format!("{}.img", path.strip_suffix(".cfg").unwrap_or(path));
        lab.push(&disk().context("building the bare guest")?, &image)?;
        let drive = format!("file={image},format=raw,if=ide,index=0");
        let mut text = format!(
            "name=\"{name}\"\ntype=\"hvm\"\nmemory=32\nvga=\"none\"\nvnc=0\nserial=\"pty\"\nboot=\"c\"\npassthrough=\"enabled\"\n\
             on_reboot=\"{on_reboot}\"\n\
             device_model_args_hvm=[\"-drive\",\"{drive}\"]\n"
        );
        for line in lines {
            _ = writeln!(text, "{line}");
        }
        lab.push(text.as_bytes(), path)
    }

    /// Its domain id.
    pub fn domid(&self) -> Result<u32> {
        let text = self.lab.dom0(&format!("xl domid {}", self.name)).ok()?;
        text.trim().parse().with_context(|| format!("xl domid {} said {text:?}", self.name))
    }

    /// Lets it run, and waits until it listens.
    pub fn start(&mut self) -> Result<()> {
        self.start_by(&format!("xl unpause {}", self.name))
    }

    /// Waits until it listens, which somebody else has started.
    pub fn find(&mut self) -> Result<()> {
        self.start_by("true")
    }

    /// Creates its next domain, which xl lets run at once, and waits until that listens.
    pub fn create_again(&mut self) -> Result<()> {
        self.console = None;
        self.lab.dom0(&format!("xl create /guest/{}.cfg", self.name)).limit(LIMIT).ok()?;
        self.start_by("true")
    }

    /// Has it reset its machine, upon which xl makes its next domain, and waits until that listens.
    pub fn reset(&mut self) -> Result<()> {
        let (name, before) = (&self.name, self.domid()?);
        self.begin(&["o cf9 1 6".to_owned()])?;
        let listens = format!(
            "now=$(xl domid {name}) && [ $now != {before} ] && xenstore-read /local/domain/$now/serial/0/tty"
        );
        self.lab.wait_for("the guest's next domain", LIMIT, &listens)?;
        self.console = None;
        self.start_by("true")
    }

    fn start_by(&mut self, command: &str) -> Result<()> {
        let node = format!("/local/domain/{}/serial/0/tty", self.domid()?);
        let tty = self.lab.dom0(&format!("xenstore-read {node}")).ok()?;
        let console = self.lab.converse(&format!("/lab/lab-agent console {}", tty.trim()))?;
        self.lab.dom0(command).ok()?;
        console
            .wait_output("ready\n", LIMIT)
            .with_context(|| format!("waiting for the bare guest {}{}", self.name, self.evidence()))?;
        self.console = Some(console);
        self.tell("slot 0").map(drop)
    }

    /// Its name in xl's commands.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Keeps it from running: while it waits for orders it looks at its serial port without a rest.
    pub fn pause(&self) -> Result<()> {
        self.lab.dom0(&format!("xl pause {}", self.name)).ok().map(drop)
    }

    /// Lets it run again.
    pub fn unpause(&self) -> Result<()> {
        self.lab.dom0(&format!("xl unpause {}", self.name)).ok().map(drop)
    }

    /// Gives it an order and returns its answer.
    pub fn tell(&self, order: &str) -> Result<String> {
        let answers = self.tell_all(&[order.to_owned()])?;
        answers.into_iter().next().context("no answer")
    }

    /// Gives it orders and returns the answers to all of them.
    pub fn tell_all(&self, orders: &[String]) -> Result<Vec<String>> {
        let pending = self.begin(orders)?;
        pending
            .answers(LIMIT)
            .with_context(|| format!("asking the bare guest {}{}", self.name, self.evidence()))
    }

    /// What Xen and dom0 know of a guest that does not answer: where its processors are, what waits for its device model.
    fn evidence(&self) -> String {
        match self.lab.dom0(&EVIDENCE.replace("NAME", &self.name)).run() {
            Ok(output) => format!("\n{}{}", output.stdout(), output.stderr()),
            Err(error) => {
                format!("; dom0 cannot be asked why: {error:#}; QEMU says:\n{}", self.lab.processors())
            }
        }
    }

    /// Gives it orders without waiting for the answers.
    pub fn begin(&self, orders: &[String]) -> Result<Pending<'_>> {
        let console = self.console.as_ref().context("the guest is not started")?;
        let heard = said(console).len();
        let text: String = orders.iter().flat_map(|order| [order.as_str(), "\n"]).collect();
        console.write(text.as_bytes())?;
        Ok(Pending { console, heard, count: orders.len() })
    }

    /// A read that must succeed, as a number.
    pub fn number(&self, order: &str) -> Result<u32> {
        let answer = self.tell(order)?;
        let number = u32::from_str_radix(&answer, 16);
        number.with_context(|| format!("'{order}' is answered {answer:?}"))
    }

    /// Ends its domain.
    pub fn destroy(self) -> Result<()> {
        self.lab.dom0(&format!("xl destroy {}", self.name)).limit(LIMIT).ok().map(drop)
    }
}

/// Answers that are awaited.
pub struct Pending<'a> {
    console: &'a Process,
    heard: usize,
    count: usize,
}

impl Pending<'_> {
    /// How many have come.
    pub fn come(&self) -> usize {
        said(self.console).len() - self.heard
    }

    /// Waits for all of them.
    pub fn answers(&self, limit: Duration) -> Result<Vec<String>> {
        let end = self.heard + self.count;
        self.console.wait_for(limit, |output| lines(output).count() >= end).with_context(|| {
            let came = said(self.console).split_off(self.heard);
            let ended = if self.console.ended().is_some() { "; its domain has ended" } else { "" };
            format!("{} of {} answers came: {came:?}{ended}", came.len(), self.count)
        })?;
        Ok(said(self.console).split_off(self.heard).into_iter().take(self.count).collect())
    }
}

/// Whole lines, but for those that ask for somebody to listen.
fn lines(output: &str) -> impl Iterator<Item = &str> {
    let whole = &output[..output.rfind('\n').map_or(0, |end| end + 1)];
    whole.lines().filter(|line| *line != "ready")
}

fn said(console: &Process) -> Vec<String> {
    lines(&console.output_so_far()).map(str::to_owned).collect()
}

/// The guest's disk, made from its sources by the C compiler that linking Rust programs needs anyway.
fn disk() -> Result<Vec<u8>> {
    let sources = workspace().join("tests/guests");
    let folder = tempfile::tempdir()?;
    let compiled = |name: &str, flags: &[&str]| -> Result<_> {
        let object = folder.path().join(name).with_extension("o");
        run(Command::new("gcc")
            .arg("-m32")
            .args(flags)
            .arg("-c")
            .arg(sources.join(name))
            .arg("-o")
            .arg(&object))?;
        Ok(object)
    };
    let linked = |object: &Path, place: &[&str]| -> Result<Vec<u8>> {
        let binary = object.with_extension("bin");
        run(Command::new("ld")
            .current_dir(&sources)
            .args(["-m", "elf_i386", "--oformat", "binary"])
            .args(place)
            .arg(object)
            .arg("-o")
            .arg(&binary))?;
        Ok(fs::read(binary)?)
    };
    let boot = linked(&compiled("boot.S", &[])?, &["-Ttext", "0x7c00"])?;
    let flags = [
        "-O2",
        "-ffreestanding",
        "-fno-pie",
        "-fno-stack-protector",
        "-fno-asynchronous-unwind-tables",
        "-mgeneral-regs-only",
        "-Wall",
        "-Wextra",
        "-Werror",
    ];
    let program = linked(&compiled("bare.c", &flags)?, &["-T", "bare.ld"])?;
    ensure!(boot.len() == SECTOR && program.len() <= LOADED, "{} bytes of program", program.len());
    let mut disk = vec![0; DISK];
    disk[..SECTOR].copy_from_slice(&boot);
    disk[SECTOR..SECTOR + program.len()].copy_from_slice(&program);
    Ok(disk)
}
