//! What an access to config space costs an HVM guest, and hotplug: through xpcid's ioreq server, and through QEMU's own passthrough.
//!
//! Both guests run the same program (`tests/guests`), each with a VF of the same PF, and are measured in turns in one boot.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xpci_tests::{BareGuest, Lab};

use crate::figures::{Better, Comparison};
use crate::hotplug;
use crate::report::Report;
use crate::scene::Peer;

/// The 82576's VF, as guests see it.
const IDENTITY: u32 = 0x10ca_8086;
/// Device Control and Device Status of PCI Express, for which both read hardware.
const REGISTER: u32 = 0xa8;
/// How often a register is read in one measurement: some seconds, so that notification the guest does not count.
const READS: u32 = 4000;
/// On a machine that does other things besides.
const LIMIT: Duration = Duration::from_secs(240);

/// What is measured, and the guest's order for it.
const FIGURES: [(&str, &str); 2] = [("HVM CFC, \u{b5}s", "reread"), ("HVM CF8+CFC, \u{b5}s", "repeat")];

/// Measures while each side holds its VF and none is attached.
pub fn measure(lab: &Lab, rounds: usize, report: &mut Report) -> Result<()> {
    let [mut ours, mut theirs] = [guest(lab, Peer::Ours)?, guest(lab, Peer::Theirs)?];
    for guest in [&mut ours, &mut theirs] {
        guest.start()?;
        select(guest)?;
        guest.pause()?;
    }
    let mut figures = FIGURES.map(|(name, ..)| Comparison::new(name, Better::Less));
    let outcome: Result<()> = (0..=rounds).try_for_each(|round| {
        for (figure, (name, order)) in figures.iter_mut().zip(FIGURES) {
            let mut seen = [0.0; 2];
            for peer in Peer::in_turns(round) {
                let guest = if peer == Peer::Ours { &ours } else { &theirs };
                seen[peer as usize] = microseconds_each(guest, order)?;
            }
            println!("{name}, round {round}: xpci {:.0}, QEMU {:.0}", seen[0], seen[1]);
            if round > 0 {
                figure.add(seen[0], seen[1]);
            }
        }
        Ok(())
    });
    report.add(figures);
    outcome?;
    hotplug::measure(lab, [&ours, &theirs], rounds, report)
}

/// A bare guest with its VF, not started yet.
fn guest(lab: &Lab, peer: Peer) -> Result<BareGuest<'_>> {
    let function = peer.function();
    match peer {
        Peer::Ours => {
            let guest = BareGuest::create(lab, "hvm-ours", &[])?;
            lab.dom0(&format!("xpci pci-attach hvm-ours {function}")).ok()?;
            Ok(guest)
        }
        Peer::Theirs => BareGuest::create(lab, "hvm-theirs", &[&format!("pci=[\"{function}\"]")]),
    }
}

/// Finds the VF, which each side puts where it likes.
fn select(guest: &BareGuest<'_>) -> Result<()> {
    for slot in 0..32 {
        guest.tell(&format!("slot {slot:x}"))?;
        if guest.number("r 0 4")? == IDENTITY {
            return Ok(());
        }
    }
    anyhow::bail!("the guest has no VF of the 82576");
}

/// The time of one read, while nothing else runs.
fn microseconds_each(guest: &BareGuest<'_>, order: &str) -> Result<f64> {
    guest.unpause()?;
    let begun = Instant::now();
    let answers = guest.begin(&[format!("{order} {REGISTER:x} {READS:x}")])?.answers(LIMIT)?;
    let took = begun.elapsed();
    guest.pause()?;
    let differences = answers.first().context("no answer")?;
    ensure!(differences == "0", "{differences} of {READS} reads of {REGISTER:#x} gave another value");
    Ok(took.as_secs_f64() * 1e6 / f64::from(READS))
}
