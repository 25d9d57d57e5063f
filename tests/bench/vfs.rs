//! From writing sriov_numvfs to "all VFs assignable", by xpci and by xl, on the same PF in turns.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xpci_tests::Lab;

use crate::figures::{Better, Comparison};
use crate::report::Report;
use crate::scene::{Peer, microseconds};

/// xl takes some hundred milliseconds for each VF.
const LIMIT: Duration = Duration::from_secs(180);

/// A PF and how many VFs it shall have.
struct Set {
    pf: &'static str,
    vfs: u16,
    name: &'static str,
    driver: &'static str,
    /// How many rounds, besides the first, which does not count.
    rounds: usize,
}

const SETS: [Set; 2] = [
    Set { pf: "0000:01:00.0", vfs: 7, name: "7 VFs, ms", driver: "igb", rounds: 3 },
    Set { pf: "0000:02:00.0", vfs: 64, name: "64 VFs, ms", driver: "nvme", rounds: 2 },
];

/// Measures while xpcid runs and no PF has VFs.
pub fn measure(lab: &Lab, report: &mut Report) -> Result<()> {
    SETS.iter().try_for_each(|set| {
        let mut figure = Comparison::new(set.name, Better::Less);
        let outcome = set.measure(lab, &mut figure);
        report.add([figure]);
        outcome
    })
}

impl Set {
    fn measure(&self, lab: &Lab, figure: &mut Comparison) -> Result<()> {
        let directory = format!("/sys/bus/pci/devices/{}", self.pf);
        lab.dom0(&format!("modprobe {}", self.driver)).ok()?;
        lab.wait_for("the PF's driver", LIMIT, &format!("[ -e {directory}/driver ]"))?;
        for round in 0..=self.rounds {
            let mut seen = [0.0; 2];
            for peer in Peer::in_turns(round) {
                seen[peer as usize] = self.made_assignable(lab, peer)?;
                self.taken_down(lab, peer)?;
            }
            let [ours, theirs] = seen;
            println!("{}, round {round}: xpci {ours:.0}, xl {theirs:.0}", self.name);
            if round > 0 {
                figure.add(ours, theirs);
            }
        }
        Ok(())
    }

    /// The VFs' addresses in dom0's shell.
    fn vfs(&self) -> String {
        format!("$(for vf in /sys/bus/pci/devices/{}/virtfn*; do basename $(readlink $vf); done)", self.pf)
    }

    /// Milliseconds from the beginning to the last VF.
    fn made_assignable(&self, lab: &Lab, peer: Peer) -> Result<f64> {
        let Self { pf, vfs, .. } = self;
        let addresses = self.vfs();
        let line = match peer {
            Peer::Ours => format!("xpci vf create {pf} {vfs} && xpci pci-assignable-add {addresses}"),
            // Kept from native drivers as xpci does it; with this still off the kernel would refuse xl's bind.
            Peer::Theirs => format!(
                "cd /sys/bus/pci/devices/{pf} && echo 0 > sriov_drivers_autoprobe && echo {vfs} > sriov_numvfs && \
                 echo 1 > sriov_drivers_autoprobe && for vf in {addresses}; do xl pci-assignable-add $vf || exit; done"
            ),
        };
        let took = microseconds(lab, &line, LIMIT)? / 1000.0;
        let listed = lab.dom0("xl pci-assignable-list | wc -l").ok()?;
        let listed: u16 = listed.trim().parse().with_context(|| listed.clone())?;
        ensure!(listed == *vfs, "{listed} of {vfs} VFs are assignable");
        Ok(took)
    }

    fn taken_down(&self, lab: &Lab, peer: Peer) -> Result<()> {
        let addresses = self.vfs();
        let line = match peer {
            Peer::Ours => format!("xpci pci-assignable-remove {addresses} && xpci vf destroy {}", self.pf),
            Peer::Theirs => format!(
                "for vf in {addresses}; do xl pci-assignable-remove $vf || exit; done; \
                 echo 0 > /sys/bus/pci/devices/{}/sriov_numvfs",
                self.pf
            ),
        };
        lab.dom0(&line).limit(LIMIT).ok().map(drop)
    }
}
