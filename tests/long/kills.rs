//! The service is killed at random moments, a thousand times, while two guests use a VF each: attach, detach, resets, drivers that set
//! interrupts up, errors, new policies. In between and at the end, what the service says is compared with Xen, sysfs, xenstore and the guests.
//!
//! `XPCI_ROUNDS` sets another number of kills, and `XPCI_SEED` repeats what a failed run did, as far as the times of two machines agree.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use xpci_tests::host::state::{keep_running, kill_and_start, make_held, make_used, no_problems};
use xpci_tests::host::{
    PF, SOON, VFS, builder, guest, inject_error, is_held, nothing_remains, owner, ping, prepare, set_mac,
    state, xpci,
};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Builder, Guest, Lab, Process, checks};

const ROUNDS: u64 = 1000;
/// After so many rounds everything is compared.
const COMPARED_AFTER: u64 = 50;
/// A command is killed within this time, which each of them can take here, or just after its end.
const MOMENTS: u64 = 1500;
const DOM0: &str = "10.9.9.1";
const ADDRESSES: [&str; 2] = ["10.9.9.11", "10.9.9.12"];
const MACS: [&str; 2] = ["52:54:00:aa:bb:01", "52:54:00:aa:bb:02"];
/// Uncorrectable Error Status: Completion Timeout. Correctable Error Status: Bad TLP.
const COMPLETION_TIMEOUT: u32 = 1 << 14;
const BAD_TLP: u32 = 1 << 6;

static MACHINE: Machine = Machine { name: "kills", builder: machine, clean: |_| Ok(()), end: None };

fn machine() -> Result<Builder> {
    Ok(builder())
}

pub struct Kills<'a> {
    lab: &'a Lab,
    service: Process,
    guests: [Guest<'a>; 2],
    _traffic: Vec<Process>,
}

impl<'a> Scene<'a> for Kills<'a> {
    const NAME: &'static str = "kills";
    const MACHINE: &'static Machine = &MACHINE;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        let service = prepare(lab)?;
        lab.dom0("modprobe aer_inject").ok()?;
        xpci(lab, &format!("vf create {PF} 2"))?;
        for (index, mac) in MACS.iter().enumerate() {
            set_mac(lab, index, mac)?;
        }
        xpci(lab, "pci-assignable-add 01:10.0 01:10.2")?;
        let guests = [guest(lab, "one")?, guest(lab, "two")?];
        let traffic = guests.iter().zip(ADDRESSES).map(|(guest, address)| traffic(guest, address));
        let _traffic = traffic.collect::<Result<Vec<Process>>>()?;
        Ok(Self { lab, service, guests, _traffic })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![a_service_killed_a_thousand_times_loses_nothing_and_leaves_nothing]
    }

    fn restore(&mut self) -> Result<()> {
        keep_running(self.lab, &mut self.service)?;
        VFS.iter().take(2).try_for_each(|vf| make_held(self.lab, vf))
    }
}

/// A guest that gives each interface that comes its address, and talks to dom0 over it.
fn traffic(guest: &Guest<'_>, address: &str) -> Result<Process> {
    guest.spawn(&format!(
        "modprobe igbvf; while :; do \
         for interface in $(ls /sys/bus/pci/devices/0000:00:00.0/net 2>/dev/null); do \
         ip addr add {address}/24 dev $interface; ip link set $interface up; done 2>/dev/null; \
         ping -c 5 -i 0.2 -W 1 {DOM0} >/dev/null 2>&1 || sleep 0.2; done"
    ))
}

/// What is begun before a kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    Attach,
    Detach,
    DetachByForce,
    /// The guest asks for a Function Level Reset. While a driver uses MSI-X, Linux would write its vectors to the table after that, which is
    /// read-only for a PV guest: its kernel crashes, with each backend.
    Reset,
    /// The guest's driver gives its MSI-X vectors back and sets them up again.
    Driver,
    CorrectableError,
    UncorrectableError,
    Reload,
    /// What an error has led to is ended.
    Clear,
}

impl Action {
    /// Those that make sense in a state.
    fn possible(state: &str) -> &'static [Self] {
        use Action::*;
        match state {
            "attached" => &[
                Detach,
                Detach,
                Detach,
                DetachByForce,
                Reset,
                Driver,
                Driver,
                CorrectableError,
                UncorrectableError,
                Reload,
            ],
            "quarantined" => &[Clear],
            _ => &[Attach, Attach, Attach, Attach, Reload],
        }
    }

    fn begin(self, lab: &Lab, guest: &Guest<'_>, vf: &str) -> Result<Option<Process>> {
        let name = guest.name();
        let device = "/sys/bus/pci/devices/0000:00:00.0";
        let begun = match self {
            Self::Attach => lab.spawn(&format!("xpci pci-attach {name} {vf}"))?,
            Self::Detach => lab.spawn(&format!("xpci pci-detach {name} {vf}"))?,
            Self::DetachByForce => lab.spawn(&format!("xpci pci-detach --force {name} {vf}"))?,
            Self::Reset => {
                guest.spawn(&format!("modprobe -r igbvf; echo 1 > {device}/reset; modprobe igbvf"))?
            }
            Self::Driver => guest.spawn("modprobe -r igbvf; modprobe igbvf")?,
            Self::CorrectableError => return inject_error(lab, vf, 0, BAD_TLP).map(|()| None),
            Self::UncorrectableError => return inject_error(lab, vf, COMPLETION_TIMEOUT, 0).map(|()| None),
            Self::Reload => lab.spawn("xpci policy reload")?,
            Self::Clear => lab.spawn(&format!("xpci quarantine clear {vf}"))?,
        };
        Ok(Some(begun))
    }
}

/// Xorshift (Marsaglia, 2003): the same sequence for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> Result<T> {
        let index = self.below(choices.len().max(1) as u64) as usize;
        choices.get(index).copied().context("nothing to choose from")
    }
}

fn setting(name: &str) -> Result<Option<u64>> {
    let Ok(text) = std::env::var(name) else { return Ok(None) };
    text.parse().map(Some).with_context(|| format!("{name} is {text}"))
}

impl Kills<'_> {
    /// Begins something with one of the functions and kills the service at a moment of it.
    fn round(&mut self, random: &mut Random) -> Result<Action> {
        let which = random.below(2) as usize;
        let (guest, vf) = (&self.guests[which], VFS[which]);
        let action = random.of(Action::possible(&state(self.lab, vf)?))?;
        let begun = action.begin(self.lab, guest, vf).with_context(|| format!("{action:?} of {vf}"))?;
        if let (Action::Attach, Some(begun), 0) = (action, &begun, random.below(2)) {
            // Else most attachments are undone, and little else is possible.
            begun.wait(SOON * 2).with_context(|| format!("{action:?} of {vf}"))?;
        }
        sleep(Duration::from_millis(random.below(MOMENTS)));
        kill_and_start(self.lab, &mut self.service)?;
        if let Some(begun) = begun {
            // Whether the command has succeeded is open; that it ends is not.
            begun.wait(SOON * 2).with_context(|| format!("{action:?} of {vf}"))?;
        }
        let under_way = "! xpci status | grep -qE ' (attaching|detaching|resetting) '";
        self.lab.wait_for(&format!("what became of {action:?} of {vf}"), SOON, under_way).map(|()| action)
    }

    /// What the service says of each function is what Xen says, and a guest uses what it has.
    fn compare(&self) -> Result<()> {
        for (guest, vf) in self.guests.iter().zip(VFS) {
            let (said, owner) = (state(self.lab, vf)?, owner(self.lab, vf)?);
            match said.as_str() {
                "attached" => {
                    ensure!(
                        owner == format!("d{}", guest.domid()?),
                        "{vf} is attached, and its owner {owner}"
                    );
                    let heard = format!("ping -c 1 -W 1 {DOM0}");
                    guest.wait_for(&format!("traffic of {vf}"), SOON, &heard)?;
                }
                _ => ensure!(is_held(self.lab, vf)?, "{vf} is {said}, and its owner {owner}"),
            }
        }
        Ok(())
    }

    /// Both functions leave and come back in good order.
    fn audit(&self) -> Result<()> {
        for vf in VFS.iter().take(2) {
            make_held(self.lab, vf)?;
        }
        for guest in &self.guests {
            guest.wait_for("its function to go", SOON, "[ ! -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
        }
        for guest in &self.guests {
            let nodes =
                format!("[ -z \"$(xenstore-list /local/domain/0/backend/xpci/{})\" ]", guest.domid()?);
            self.lab.wait_for("its nodes to go", SOON, &nodes)?;
            nothing_remains(self.lab, guest)?;
        }
        for ((guest, vf), address) in self.guests.iter().zip(VFS).zip(ADDRESSES) {
            make_used(self.lab, guest, vf, address)?;
            ping(guest, DOM0)?;
        }
        no_problems(self.lab)
    }
}

fn a_service_killed_a_thousand_times_loses_nothing_and_leaves_nothing(scene: &mut Kills<'_>) -> Result<()> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let seed = setting("XPCI_SEED")?.unwrap_or(since.as_secs());
    let rounds = setting("XPCI_ROUNDS")?.unwrap_or(ROUNDS);
    println!("   seed {seed}, {rounds} kills");
    // 0 would stay 0.
    let mut random = Random(seed.max(1));
    let mut counts: BTreeMap<Action, u64> = BTreeMap::new();
    for round in 1..=rounds {
        let when = || format!("seed {seed}, round {round}");
        *counts.entry(scene.round(&mut random).with_context(when)?).or_default() += 1;
        if round % COMPARED_AFTER == 0 {
            scene.compare().with_context(when)?;
            println!("   {round} kills: {counts:?}");
        }
    }
    scene.audit().with_context(|| format!("seed {seed}, after {rounds} rounds"))
}
