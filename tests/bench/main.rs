//! Measures xpci side by side with xl and the kernel's xen-pciback: a boot of the lab for each part, both peers in turns in it.

mod errors;
mod figures;
mod hotplug;
mod hvm;
mod report;
mod scene;
mod storms;
mod vfs;

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use xpci_tests::{Devices, Lab, XenVersion};

use figures::{Better, Comparison};
use report::Report;
use scene::{Peer, Scene};

const USAGE: &str = "usage: bench [--rounds N] [--xen 4.17|4.20] [--only vfs|pv|errors|storms|hvm]";

struct Options {
    rounds: usize,
    xen: XenVersion,
    /// What is measured; everything by default.
    only: Option<Part>,
}

/// Part of what is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// How fast VFs become assignable.
    Vfs,
    /// PV guests.
    Pv,
    /// Errors of functions that PV guests have.
    Errors,
    /// Guests that ask for too much.
    Storms,
    /// HVM guests.
    Hvm,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self { rounds: 7, xen: XenVersion::V4_17, only: None };
        while let Some(option) = arguments.next() {
            let value = arguments.next().with_context(|| format!("{option} without a value; {USAGE}"))?;
            match option.as_str() {
                "--rounds" => {
                    options.rounds = value.parse().with_context(|| format!("{value:?}; {USAGE}"))?
                }
                "--xen" => options.xen = XenVersion::parse(&value)?,
                "--only" => options.only = Some(Part::parse(&value)?),
                _ => bail!("unknown option {option}; {USAGE}"),
            }
        }
        ensure!(options.rounds > 0, "no rounds, no figures; {USAGE}");
        Ok(options)
    }
}

impl Part {
    const ALL: [Self; 5] = [Self::Vfs, Self::Pv, Self::Errors, Self::Storms, Self::Hvm];

    const fn name(self) -> &'static str {
        match self {
            Self::Vfs => "vfs",
            Self::Pv => "pv",
            Self::Errors => "errors",
            Self::Storms => "storms",
            Self::Hvm => "hvm",
        }
    }

    fn parse(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|part| part.name() == name);
        found.with_context(|| format!("nothing to measure is called {name:?}; {USAGE}"))
    }

    /// In a boot of its own: what a part that fails leaves behind disturbs no other.
    fn measure(self, options: &Options, report: &mut Report) -> Result<()> {
        let mut lab = Lab::builder()
            .xen(options.xen)
            .corrected_qemu()
            .name(&format!("bench-{}", self.name()))
            .devices(Devices::none().igb("igb0").nvme("nvme0", 64).device("virtio-net-pci,id=e0,aer=on"))
            .program("xpcid", "/usr/sbin/xpcid")
            .program("xpci", "/usr/sbin/xpci");
        match self {
            Self::Hvm => lab = lab.hvm_guests(),
            Self::Storms => lab = lab.guest_program("frontend"),
            Self::Vfs | Self::Pv | Self::Errors => {}
        }
        let lab = lab.boot()?;
        let service = scene::serve(&lab)?;
        if self == Self::Vfs {
            return vfs::measure(&lab, report);
        }
        scene::hold(&lab)?;
        match self {
            Self::Vfs | Self::Pv => measure(&Scene::set(&lab)?, options.rounds, report),
            Self::Errors => errors::measure(&lab, &Scene::set(&lab)?, options.rounds, report),
            Self::Storms => storms::measure(&lab, &Scene::set(&lab)?, &service, options.rounds, report),
            Self::Hvm => hvm::measure(&lab, options.rounds, report),
        }
    }
}

fn main() -> Result<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    build()?;
    let mut report = Report::default();
    for part in Part::ALL {
        if options.only.is_none_or(|only| only == part) {
            let outcome = part.measure(&options, &mut report);
            report.end_of(part.name(), outcome);
        }
    }
    println!(
        "\nXen {} in QEMU without KVM, both peers in turns: median (least..most).\n\
         Only the ratios say something; the figures themselves are those of an emulated machine.\n",
        options.xen.name()
    );
    print!("{report}");
    report.into_outcome()
}

/// What is measured is what the source says now, in the profile of this program.
fn build() -> Result<()> {
    let me = std::env::current_exe().context("finding this program")?;
    let folder = me.parent().and_then(Path::file_name).context("this program is in no folder")?;
    // Cargo's name for the profile of the folder debug.
    let profile = if folder == "debug" { OsStr::new("dev") } else { folder };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--bins", "-p", "toolstack", "-p", "xpci-tests", "--profile"])
        .arg(profile)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .status()
        .context("running cargo")?;
    ensure!(status.success(), "cargo build: {status}");
    Ok(())
}

fn measure(scene: &Scene<'_>, rounds: usize, report: &mut Report) -> Result<()> {
    let mut figures = [
        Comparison::new("attach, ms", Better::Less),
        Comparison::new("config reads / s", Better::More),
        Comparison::new("detach, ms", Better::Less),
    ];
    // The first round warms caches and pages in programs on both sides; it does not count.
    let outcome = (0..=rounds).try_for_each(|round| {
        let seen = one_round(scene, round)?;
        if round > 0 {
            for (figure, [ours, theirs]) in figures.iter_mut().zip(seen) {
                figure.add(ours, theirs);
            }
        }
        Ok(())
    });
    report.add(figures);
    outcome
}

/// Attach, reads and detach of both peers.
fn one_round(scene: &Scene<'_>, round: usize) -> Result<[[f64; 2]; 3]> {
    let mut seen = [[0.0; 2]; 3];
    for (figure, of_peer) in seen.iter_mut().zip([Scene::attach, Scene::reads_per_second, Scene::detach]) {
        for peer in Peer::in_turns(round) {
            figure[peer as usize] = of_peer(scene, peer)?;
        }
    }
    println!("round {round}: {seen:.0?} (attach ms, reads / s, detach ms; of each xpci, xl)");
    Ok(seen)
}
