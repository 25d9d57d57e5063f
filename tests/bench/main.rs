//! Measures xpci side by side with xl and the kernel's xen-pciback, in one boot of the lab.

mod errors;
mod figures;
mod hvm;
mod scene;
mod vfs;

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use xpci_tests::{Devices, Lab, XenVersion};

use figures::{Better, Comparison};
use scene::{Peer, Scene};

const USAGE: &str = "usage: bench [--rounds N] [--xen 4.17|4.20] [--only vfs|pv|hvm]";

struct Options {
    rounds: usize,
    xen: XenVersion,
    /// What is measured; everything unless told.
    only: Option<Part>,
}

/// Part of what is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// How fast VFs become assignable.
    Vfs,
    /// PV guests, and errors of their functions.
    Pv,
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
    fn parse(name: &str) -> Result<Self> {
        match name {
            "vfs" => Ok(Self::Vfs),
            "pv" => Ok(Self::Pv),
            "hvm" => Ok(Self::Hvm),
            _ => bail!("nothing to measure is called {name:?}; {USAGE}"),
        }
    }
}

fn main() -> Result<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    build()?;
    let wanted = |part| options.only.is_none_or(|only| only == part);
    let mut lab = Lab::builder()
        .xen(options.xen)
        .name("bench")
        .devices(Devices::none().igb("igb0").nvme("nvme0", 64))
        .install("target/release/xpcid", "/usr/sbin/xpcid")
        .install("target/release/xpci", "/usr/sbin/xpci");
    if wanted(Part::Hvm) {
        lab = lab.hvm_guests();
    }
    let lab = lab.boot()?;
    let _service = scene::serve(&lab)?;
    let mut comparisons = Vec::new();
    if wanted(Part::Vfs) {
        comparisons.extend(vfs::measure(&lab)?);
    }
    if options.only != Some(Part::Vfs) {
        scene::hold(&lab)?;
    }
    let mut errors = None;
    if wanted(Part::Pv) {
        let scene = Scene::set(&lab)?;
        comparisons.extend(measure(&scene, options.rounds)?);
        errors = Some(errors::measure(&lab, &scene, options.rounds)?);
        scene.end()?;
    }
    if wanted(Part::Hvm) {
        comparisons.extend(hvm::measure(&lab, options.rounds)?);
    }
    println!(
        "\nXen {} in QEMU without KVM, both peers in turns: median (least..most).\n\
         Only the ratios say something; the figures themselves are those of an emulated machine.\n",
        options.xen.name()
    );
    print!("{}", figures::table(&comparisons));
    if let Some(errors) = errors {
        print!("\nerrors, xpci alone:\n{errors}");
    }
    Ok(())
}

/// What is measured is what the source says now.
fn build() -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--bins", "-p", "toolstack", "-p", "xpci-tests"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .status()
        .context("running cargo")?;
    ensure!(status.success(), "cargo build: {status}");
    Ok(())
}

fn measure(scene: &Scene<'_>, rounds: usize) -> Result<Vec<Comparison>> {
    let mut reads = Comparison::new("config reads / s", Better::More);
    let mut attach = Comparison::new("attach, ms", Better::Less);
    let mut detach = Comparison::new("detach, ms", Better::Less);
    // The first round warms caches and pages in programs on both sides; it does not count.
    for round in 0..=rounds {
        let order = Peer::in_turns(round);
        let mut seen = [[0.0; 3]; 2];
        for peer in order {
            seen[peer as usize][0] = scene.attach(peer)?;
        }
        for peer in order {
            seen[peer as usize][1] = scene.reads_per_second(peer)?;
        }
        for peer in order {
            seen[peer as usize][2] = scene.detach(peer)?;
        }
        let [ours, theirs] = seen;
        println!("round {round}: xpci {ours:.0?}, xl {theirs:.0?} (attach ms, reads / s, detach ms)");
        if round > 0 {
            for (index, figure) in [&mut attach, &mut reads, &mut detach].into_iter().enumerate() {
                figure.add(ours[index], theirs[index]);
            }
        }
    }
    Ok(vec![reads, attach, detach])
}
