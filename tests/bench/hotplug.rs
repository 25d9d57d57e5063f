//! How long a function takes to come to a running HVM guest and to leave it: by xpci, and by xl and QEMU.
//!
//! The bare guest drives the ACPI hotplug controller of its device model as an operating system does, as soon as the event has come.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use xpci_tests::{BareGuest, Lab};

use crate::figures::{Better, Comparison};
use crate::report::Report;
use crate::scene::Peer;

/// Registers of the controller, a bit for each device number.
const CAME: u32 = 0xae00;
const IS_TO_GO: u32 = 0xae04;
const EJECT: u32 = 0xae08;
const LIMIT: Duration = Duration::from_secs(60);

/// A function that is held and that no guest has had yet.
const fn function(peer: Peer) -> &'static str {
    match peer {
        Peer::Ours => "01:10.2",
        Peer::Theirs => "01:10.6",
    }
}

/// Measures in turns; the other guest is paused.
pub fn measure(lab: &Lab, guests: [&BareGuest<'_>; 2], rounds: usize, report: &mut Report) -> Result<()> {
    for (peer, guest) in [Peer::Ours, Peer::Theirs].into_iter().zip(guests) {
        lab.dom0(&format!("{} pci-assignable-add {}", peer.command(), function(peer))).ok()?;
        guest.unpause()?;
        guest.tell("acpi")?;
        guest.pause()?;
    }
    let mut figures = ["HVM attach, ms", "HVM detach, ms"].map(|name| Comparison::new(name, Better::Less));
    let outcome: Result<()> = (0..=rounds).try_for_each(|round| {
        let (mut came, mut gone) = ([0.0; 2], [0.0; 2]);
        for peer in Peer::in_turns(round) {
            let guest = guests[peer as usize];
            guest.unpause()?;
            came[peer as usize] = attach(lab, guest, peer).with_context(|| format!("attach, {peer:?}"))?;
            gone[peer as usize] = detach(lab, guest, peer).with_context(|| format!("detach, {peer:?}"))?;
            guest.pause()?;
        }
        println!("HVM hotplug, round {round}: attach {came:.0?} ms, detach {gone:.0?} ms");
        if round > 0 {
            figures[0].add(came[0], came[1]);
            figures[1].add(gone[0], gone[1]);
        }
        Ok(())
    });
    report.add(figures);
    outcome
}

/// Milliseconds from the command until the guest has had the event.
fn attach(lab: &Lab, guest: &BareGuest<'_>, peer: Peer) -> Result<f64> {
    let before = guest.number("hotplugs")?;
    let begun = Instant::now();
    lab.dom0(&line(peer, "pci-attach", guest)).limit(LIMIT).ok()?;
    while guest.number("hotplugs")? <= before {
        ensure!(begun.elapsed() < LIMIT, "the guest was not notified");
    }
    let took = begun.elapsed();
    ensure!(guest.number(&format!("i {CAME:x} 4"))? != 0, "nothing has come");
    Ok(took.as_secs_f64() * 1000.0)
}

/// Milliseconds from the command until it has ended; the guest ejects the function when it sees that it is to go.
fn detach(lab: &Lab, guest: &BareGuest<'_>, peer: Peer) -> Result<f64> {
    let begun = Instant::now();
    let command = lab.spawn(&line(peer, "pci-detach", guest))?;
    let slots = loop {
        match guest.number(&format!("i {IS_TO_GO:x} 4"))? {
            0 if begun.elapsed() > LIMIT => bail!("the guest was not asked: {}", command.output_so_far()),
            0 => {}
            slots => break slots,
        }
    };
    guest.tell(&format!("o {EJECT:x} 4 {slots:x}"))?;
    let code = command.wait(LIMIT)?.code;
    ensure!(code == Some(0), "{code:?}: {}", command.output_so_far());
    Ok(begun.elapsed().as_secs_f64() * 1000.0)
}

fn line(peer: Peer, command: &str, guest: &BareGuest<'_>) -> String {
    format!("{} {command} {} {}", peer.command(), guest.name(), function(peer))
}
