//! Two PV guests in one lab, one served by xpci, the other by xen-pciback, each with a VF of the same PF.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xpci_tests::{Guest, GuestConfig, Lab, Process};

const SOON: Duration = Duration::from_secs(60);
const PF: &str = "0000:01:00.0";
/// How often a guest reads all of its config space in one measurement: about two seconds, for a clock of 10 ms.
const PASSES: u32 = 2;
/// On a machine that does other things besides, a read can take several milliseconds, and a guest looks at a function for a minute.
const BUSY_LIMIT: Duration = Duration::from_secs(240);

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// xpci.
    Ours = 0,
    /// xl and the kernel's xen-pciback.
    Theirs = 1,
}

impl Peer {
    pub const fn command(self) -> &'static str {
        match self {
            Self::Ours => "xpci",
            Self::Theirs => "xl",
        }
    }

    const fn guest(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Theirs => "theirs",
        }
    }

    /// Who goes first takes turns.
    pub const fn in_turns(round: usize) -> [Self; 2] {
        if round.is_multiple_of(2) { [Self::Ours, Self::Theirs] } else { [Self::Theirs, Self::Ours] }
    }

    pub const fn function(self) -> &'static str {
        match self {
            Self::Ours => "01:10.0",
            Self::Theirs => "01:10.4",
        }
    }
}

/// How long a line of shell takes in dom0, in microseconds.
pub fn microseconds(lab: &Lab, line: &str, limit: Duration) -> Result<f64> {
    // bash's clock needs no process of its own.
    let script = format!(
        "bash -c 'a=$EPOCHREALTIME; {{ {line}; }} >&2 || exit; b=$EPOCHREALTIME; echo $((${{b/./}} - ${{a/./}}))'"
    );
    let took = lab.dom0(&script).limit(limit).ok()?;
    let took: u32 = took.trim().parse().with_context(|| format!("{line} took {took:?}"))?;
    Ok(f64::from(took))
}

/// Starts the service in a fresh lab.
pub fn serve(lab: &Lab) -> Result<Process> {
    lab.dom0("modprobe xen-pciback").ok()?;
    let service = lab.spawn("xpcid")?;
    lab.wait_for("the service", SOON, "[ -S /run/xpci/control ]")?;
    Ok(service)
}

/// Two PV guests, none of which has its function yet.
pub struct Scene<'a> {
    lab: &'a Lab,
    guests: [Guest<'a>; 2],
}

/// Makes VFs while xpcid runs and the PF has none; each side holds one.
pub fn hold(lab: &Lab) -> Result<()> {
    lab.dom0("modprobe igb").ok()?;
    let vfs = format!("/sys/bus/pci/devices/{PF}");
    lab.wait_for("the PF's driver", SOON, &format!("[ -e {vfs}/driver ]"))?;
    lab.dom0(&format!("echo 4 > {vfs}/sriov_numvfs")).ok()?;
    lab.wait_for("its VFs", SOON, &format!("[ -e {vfs}/virtfn3 ]"))?;
    for peer in [Peer::Ours, Peer::Theirs] {
        lab.dom0(&format!("{} pci-assignable-add {}", peer.command(), peer.function())).ok()?;
    }
    Ok(())
}

impl<'a> Scene<'a> {
    /// Starts the guests.
    pub fn set(lab: &'a Lab) -> Result<Self> {
        let guests = lab.guests(&[Peer::Ours, Peer::Theirs].map(|peer| GuestConfig::pv(peer.guest())))?;
        Ok(Self { lab, guests })
    }

    /// Milliseconds until the guest's frontend has connected, which xl's command does not wait for. Returns when the guest has the
    /// function.
    pub fn attach(&self, peer: Peer) -> Result<f64> {
        let state = format!("/local/domain/{}/device/pci/0/state", self.guest(peer).domid()?);
        let connected = format!("until [ \"$(xenstore-read {state} 2>/dev/null)\" = 4 ]; do :; done");
        let took = self.timed(&format!("{} && {connected}", Self::line(peer, "pci-attach")))?;
        self.guest(peer).wait_for("the function", BUSY_LIMIT, "[ -e /sys/bus/pci/devices/*/config ]")?;
        Ok(took)
    }

    /// Milliseconds that the command takes in dom0. Returns when the guest has lost the function.
    pub fn detach(&self, peer: Peer) -> Result<f64> {
        let took = self.timed(&Self::line(peer, "pci-detach"))?;
        self.guest(peer).wait_for("its removal", BUSY_LIMIT, "[ ! -e /sys/bus/pci/devices/*/config ]")?;
        Ok(took)
    }

    fn line(peer: Peer, command: &str) -> String {
        format!("{} {command} {} {}", peer.command(), peer.guest(), peer.function())
    }

    fn timed(&self, line: &str) -> Result<f64> {
        Ok(microseconds(self.lab, line, BUSY_LIMIT)? / 1000.0)
    }

    /// How many dwords of config space the guest reads in a second.
    pub fn reads_per_second(&self, peer: Peer) -> Result<f64> {
        self.copy_config(peer)?;
        self.reads_per_second_in(peer, PASSES)
    }

    /// Has the guest keep what it reads of all of its config space.
    pub fn copy_config(&self, peer: Peer) -> Result<()> {
        let copy = self.guest(peer).run("cat /sys/bus/pci/devices/*/config > /tmp/copy");
        copy.limit(BUSY_LIMIT).ok().map(drop)
    }

    /// The same when it reads its config space so often, and has a copy.
    pub fn reads_per_second_in(&self, peer: Peer, passes: u32) -> Result<f64> {
        // One process reads everything, and reading as much from memory shows what of it is not config space. The kernel
        // reads the attribute in dwords, one request each.
        let script = format!(
            "config=$(echo /sys/bus/pci/devices/*/config); wc -c < /tmp/copy\n\
             files=; copies=; for i in $(seq {passes}); do files=\"$files $config\"; copies=\"$copies /tmp/copy\"; done\n\
             read a rest < /proc/uptime; cat $copies > /dev/null; read b rest < /proc/uptime\n\
             cat $files > /dev/null; read c rest < /proc/uptime; echo $a $b $c"
        );
        let output = self.guest(peer).run(&script).limit(BUSY_LIMIT).ok()?;
        let numbers: Vec<f64> = output
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()
            .with_context(|| format!("the guest's figures: {output:?}"))?;
        let &[bytes, begun, between, ended] = numbers.as_slice() else {
            anyhow::bail!("the guest's figures: {output:?}");
        };
        let seconds = (ended - between) - (between - begun);
        ensure!(bytes >= 64.0 && seconds > 0.1, "too short to be measured: {output:?}");
        Ok(bytes / 4.0 * f64::from(passes) / seconds)
    }

    pub fn guest(&self, peer: Peer) -> &Guest<'a> {
        &self.guests[peer as usize]
    }
}
