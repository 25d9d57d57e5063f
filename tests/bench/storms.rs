//! What a guest's storm of requests costs another guest, and the service's memory and log.
//!
//! A guest that only computes takes processor time from the other one too: on two processors that alone is a large part of what a storm
//! takes. So the other guest's reads during a storm are compared with those while the same guest computes, both in turns.

use anyhow::{Context, Result, ensure};
use xpci_tests::host::frontend::{CONNECT, PROGRAM, Step};
use xpci_tests::host::{SERVICE, SOON};
use xpci_tests::{Lab, Process};

use crate::figures::shown;
use crate::report::Report;
use crate::scene::{Peer, Scene};

/// Who reads and is measured, and who storms. Both have their functions from xpcid.
const MEASURED: Peer = Peer::Ours;
const STORMING: Peer = Peer::Theirs;
/// What the storming guest has, a VF of the same PF as the other guest's.
const FUNCTION: &str = "0000:01:10.2";
/// More rounds would take more than six minutes.
const MOST_ROUNDS: usize = 3;
/// Where a storm counts what it has done.
const DONE: &str = "/tmp/done";
/// The orders of a storm of the frontend.
const ORDERS: &str = "/tmp/orders";
/// How many bytes of orders wait for the frontend: a pipe of Linux. They count as done too early.
const PIPE: usize = 64 << 10;
/// Where a stock guest's frontend is bound and unbound.
const PCIFRONT: &str = "/sys/bus/xen/drivers/pcifront";

/// What a guest does without end.
struct Storm {
    /// What of it is counted.
    name: &'static str,
    by: By,
    /// How many of that one turn of its loop does.
    each: usize,
}

/// What drives a storm.
enum By {
    /// A stock Linux: a line of shell, over and over.
    Linux(String),
    /// The frontend of our own in the place of Linux's: its orders, one a line, over and over.
    Frontend(String),
}

/// What is measured, in one boot.
struct Bench<'a> {
    lab: &'a Lab,
    scene: &'a Scene<'a>,
    service: &'a Process,
    computing: Storm,
}

/// Measures while no guest has a function.
pub fn measure(
    lab: &Lab,
    scene: &Scene<'_>,
    service: &Process,
    rounds: usize,
    report: &mut Report,
) -> Result<()> {
    let name = scene.guest(STORMING).name();
    lab.dom0(&format!("xpci pci-assignable-add {FUNCTION} && xpci pci-attach {name} {FUNCTION}")).ok()?;
    scene.attach(MEASURED)?;
    let there = "[ -e /sys/bus/pci/devices/*/config ]";
    scene.guest(STORMING).wait_for("the function", SOON, there)?;
    let bench = Bench { lab, scene, service, computing: computing() };
    scene.copy_config(MEASURED)?;
    // The first one warms caches and pages in programs; it does not count.
    bench.reads_during(&bench.computing)?;
    report.note(format!("{:<18}{:<20}{:<18}{:<7}{}", "storm", "reads, ratio", "xpcid, KiB", "lines", "done"));
    for storm in storms() {
        report.note(bench.storm(&storm, rounds.min(MOST_ROUNDS))?);
    }
    Ok(())
}

/// Those of Linux first: the frontend takes the place of xen-pcifront.
fn storms() -> Vec<Storm> {
    let storm = |name, by, each| Storm { name, by, each };
    let setpci =
        |write: &str, times| By::Linux(format!("setpci -s 00:00.0 {}", [write].repeat(times).join(" ")));
    let frontend = |orders: &[&str], times| By::Frontend(format!("{}\n", orders.join("\n")).repeat(times));
    let [away, back] = [Step::Go(6), Step::Go(3)].map(|step| step.order().0);
    vec![
        storm("config reads", By::Linux("cat /sys/bus/pci/devices/*/config".to_owned()), 1024),
        // The header of the AER capability, of which no bit is writable.
        storm("blocked writes", setpci("100.l=0", 500), 500),
        // Initiate Function Level Reset in Device Control; what comes before the reset has ended counts too.
        storm("FLR writes", setpci("a8.w=8000", 100), 100),
        storm("new rings", By::Linux(new_ring()), 1),
        storm("events", frontend(&["kick"], 1000), 1000),
        storm("state changes", frontend(&[&away, &back], 100), 200),
        storm("failing requests", frontend(&NONSENSE, 20), 20 * NONSENSE.len()),
    ]
}

/// An offset across dwords, impossible sizes, no such bus, no such command, MSI that the VF does not have, too many MSI-X vectors.
const NONSENSE: [&str; 6] = [
    "r fff 2",
    "w 0 3 0",
    "op 0 0 1 0 4 2 0 0",
    "op ff 0 0 0 4 2 0 0",
    "op 2 0 0 0 0 0 0 0",
    "op 4 0 0 0 0 0 81 0",
];

/// Nothing that leaves the guest.
fn computing() -> Storm {
    let by = By::Linux("i=0; while [ $i -lt 10000 ]; do i=$((i+1)); done".to_owned());
    Storm { name: "additions", by, each: 10_000 }
}

/// Linux's frontend leaves its ring, wherever the last turn was stopped, and makes another one until it finds the function.
fn new_ring() -> String {
    format!(
        "{{ [ ! -e {PCIFRONT}/pci-0 ] || echo pci-0 > {PCIFRONT}/unbind; }} && echo pci-0 > {PCIFRONT}/bind && \
         until [ -e /sys/bus/pci/devices/*/config ]; do :; done"
    )
}

impl Storm {
    /// It ends only by failing, or when it is killed.
    fn script(&self) -> String {
        let each = self.each;
        let forever =
            |turn: &str| format!("n=0; while :; do {turn} || exit; n=$((n+{each})); echo $n > {DONE}; done");
        match &self.by {
            By::Linux(turn) => format!("{{ {}; }} > /dev/null", forever(&format!("{{ {turn}; }}"))),
            By::Frontend(_) => {
                let connect: String = CONNECT.iter().map(|step| step.order().0 + "\\n").collect();
                let orders = forever(&format!("cat {ORDERS}"));
                format!("{{ printf '{connect}'; {orders}; }} | {PROGRAM} > /dev/null")
            }
        }
    }

    /// How many are counted when the first turn is over.
    fn begun(&self) -> usize {
        let turns = match &self.by {
            By::Linux(_) => 1,
            By::Frontend(orders) => 2 + PIPE / orders.len(),
        };
        turns * self.each
    }
}

impl Bench<'_> {
    /// One kind of storm in all its rounds, as a line of the report.
    fn storm(&self, storm: &Storm, rounds: usize) -> Result<String> {
        self.prepare(storm).with_context(|| storm.name)?;
        let (memory, lines) = (self.memory()?, self.lines());
        let (mut ratios, mut done) = (Vec::new(), 0);
        for round in 0..rounds {
            let (quiet, stormy, more) = self.pair(storm, round).with_context(|| storm.name)?;
            println!(
                "{}, round {round}: {stormy:.0} reads / s, {quiet:.0} while the guest computes",
                storm.name
            );
            ratios.push(stormy / quiet);
            done += more;
        }
        let memory = format!("{memory} -> {}", self.memory()?);
        let lines = self.lines() - lines;
        Ok(format!("{:<18}{:<20}{memory:<18}{lines:<7}{done}", storm.name, shown(&ratios, 2)))
    }

    /// Reads a second while the guest computes and while it storms, in turns, and what the storm did meanwhile.
    fn pair(&self, storm: &Storm, round: usize) -> Result<(f64, f64, usize)> {
        let quiet = || self.reads_during(&self.computing).map(|(reads, _)| reads);
        let stormy = || self.reads_during(storm);
        let (quiet, (stormy, done)) = if round.is_multiple_of(2) {
            (quiet()?, stormy()?)
        } else {
            let stormy = stormy()?;
            (quiet()?, stormy)
        };
        Ok((quiet, stormy, done))
    }

    /// Gives the guest the frontend that the storm needs.
    fn prepare(&self, storm: &Storm) -> Result<()> {
        let By::Frontend(orders) = &storm.by else { return Ok(()) };
        let guest = self.scene.guest(STORMING);
        // Linux refuses while the driver has its device, so that is taken from it first, if it has it.
        let loaded = "/sys/module/xen_pcifront";
        guest
            .run(&format!(
                "[ ! -e {loaded} ] || {{ echo pci-0 > {PCIFRONT}/unbind; modprobe -r xen-pcifront; }}"
            ))
            .ok()?;
        guest.run("modprobe xen-gntalloc && modprobe xen-evtchn").ok()?;
        guest.run(&format!("cat > {ORDERS}")).input(orders.as_str()).ok().map(drop)
    }

    /// Reads a second of the one guest while the other one does this, and how much of it that did meanwhile.
    fn reads_during(&self, storm: &Storm) -> Result<(f64, usize)> {
        let guest = self.scene.guest(STORMING);
        guest.run(&format!("echo 0 > {DONE}")).ok()?;
        let process = guest.spawn(&storm.script())?;
        let begun = format!("read n < {DONE} && [ $n -ge {} ]", storm.begun());
        guest.wait_for("the storm", SOON * 2, &begun)?;
        let before = self.done()?;
        let reads = self.scene.reads_per_second_in(MEASURED, 1)?;
        let done = self.done()? - before;
        ensure!(process.ended().is_none(), "the storm ended: {}", process.output_so_far());
        ensure!(done > 0, "the storm stood still while the other guest was measured");
        process.signal(9)?;
        process.wait(SOON)?;
        // A reset may still be under way.
        let attached = format!("xpci status | grep '^{FUNCTION}' | grep -qw attached");
        self.lab.wait_for("the end of what the storm began", SOON, &attached)?;
        Ok((reads, done))
    }

    /// What the storm has counted; its file is empty for a moment each time that it is written.
    fn done(&self) -> Result<usize> {
        let text =
            self.scene.guest(STORMING).run(&format!("until read n < {DONE}; do :; done; echo $n")).ok()?;
        text.trim().parse().with_context(|| format!("the storm counts {text:?}"))
    }

    /// The service's resident memory, in KiB.
    fn memory(&self) -> Result<u64> {
        let text = self.lab.dom0(&format!("awk '/VmRSS/ {{print $2}}' /proc/{SERVICE}/status")).ok()?;
        text.trim().parse().with_context(|| format!("xpcid's memory is {text:?}"))
    }

    /// How many lines the service has written to its log.
    fn lines(&self) -> usize {
        self.service.output_so_far().lines().count()
    }
}
