//! `make demo-pf`: a guest has the card, its driver creates VFs, and other guests use them, whatever ends meanwhile.

use std::time::Instant;

use anyhow::{Result, ensure};
use xpci_tests::host::pf::{self, DEVICE};
use xpci_tests::host::state::kill_and_start;
use xpci_tests::host::{PF, SOON, VFS, bring_up, builder, guest, guests, owner, start_service};
use xpci_tests::{Guest, Lab};

use crate::story::{chapter, say, show, show_in};

const POLICY: &str = "match: {vendor: 8086}\npermit: [physical-function, untrusted-vf]\n\
                      virtual-functions: {by-guest: 3}\n";
/// The addresses of the PF and of two VFs in their guests.
const PFS: &str = "10.9.9.1";
const ADDRESSES: [&str; 2] = ["10.9.9.11", "10.9.9.12"];

pub fn tell(begun: Instant) -> Result<()> {
    say("xpci demo: a guest has a whole network card. Its driver creates VFs, which other guests use.");
    say("Everything is real except the hardware: Xen, its dom0 and the guests run inside QEMU.");

    chapter(begun, "Booting Xen with a dom0, a network card with SR-IOV, and xpcid (half a minute or so)");
    let lab = builder().name("demo-pf").boot()?;
    lab.dom0("modprobe xen-pciback").ok()?;
    lab.push(POLICY.as_bytes(), "/etc/xpci/policies/card.yaml")?;
    let mut service = start_service(&lab)?;
    say("    The administrator permits it for this card:");
    show(&lab, "cat /etc/xpci/policies/card.yaml")?;

    chapter(begun, "The guest 'nic' gets the card: dom0 has no driver for it any more");
    show(&lab, "modprobe pci-pf-stub; xpci pci-assignable-add 01:00.0")?;
    let nic = guest(&lab, "nic")?;
    show(&lab, "xpci pci-attach --persist nic 01:00.0")?;
    pf::load_igb(&nic, PFS)?;
    show_in(&nic, "lspci -k")?;

    chapter(begun, "Its stock driver creates VFs, by sysfs as on any Linux; they appear on the host");
    let since = Instant::now();
    show_in(&nic, &format!("echo 3 > {DEVICE}/sriov_numvfs; lspci"))?;
    lab.wait_for("the VFs", SOON, &format!("[ $(xpci vf list {PF} | grep -c held) = 3 ]"))?;
    took("three VFs, held for guests", since);
    show(&lab, &format!("xpci vf list {PF}"))?;

    chapter(begun, "Two other guests get a VF each: their stock drivers talk to the card's in 'nic'");
    let users = guests(&lab, ["web", "db"])?;
    for ((user, vf), address) in users.iter().zip(VFS).zip(ADDRESSES) {
        show(&lab, &format!("xpci pci-attach {} {vf}", user.name()))?;
        bring_up(user, address)?;
    }
    pings(&users)?;
    show(&lab, "xpci status")?;

    chapter(begun, "xpcid is killed and started again while they talk; nobody notices");
    let flow = users[0].spawn(&format!("ping -c 20 -i 0.5 -w 60 {PFS}"))?;
    let since = Instant::now();
    kill_and_start(&lab, &mut service)?;
    took("the next one serves", since);
    flow.wait(SOON * 2)?;
    say(&format!("      {}", flow.output_so_far().lines().rev().nth(1).unwrap_or("no answer")));

    restarted(begun, &lab, &nic, &users)?;

    chapter(begun, "The VFs go as they came: they are taken from their guests first");
    show_in(&nic, &format!("echo 0 > {DEVICE}/sriov_numvfs"))?;
    let since = Instant::now();
    lab.wait_for("the VFs to be gone", SOON, &format!("[ ! -e /sys/bus/pci/devices/{} ]", VFS[0]))?;
    took("no VF left", since);
    show(&lab, "xpci pci-detach nic 01:00.0; xpci status")?;
    chapter(begun, "Done. docs/pf-in-a-guest.md has the rest.");
    Ok(())
}

fn took(what: &str, since: Instant) {
    say(&format!("      ({what} after {:.1} s)", since.elapsed().as_secs_f64()));
}

/// Each of the guests with VFs reaches the PF and the other one.
fn pings(users: &[Guest<'_>; 2]) -> Result<()> {
    for (user, other) in users.iter().zip(ADDRESSES.iter().rev()) {
        show_in(
            user,
            &format!("ping -c 3 -w 20 {PFS} | grep received; ping -c 3 -w 20 {other} | grep received"),
        )?;
    }
    Ok(())
}

/// The guest with the card restarts: VFs stay where they are, and their traffic comes back by itself.
fn restarted(begun: Instant, lab: &Lab, nic: &Guest<'_>, users: &[Guest<'_>; 2]) -> Result<()> {
    chapter(begun, "'nic' restarts: the VFs stay with their guests, and the next 'nic' gets the card again");
    let since = Instant::now();
    show(lab, "xl reboot -F nic")?;
    nic.wait_rebooted(SOON * 4)?;
    for (user, vf) in users.iter().zip(VFS) {
        let owner = owner(lab, vf)?;
        ensure!(owner == format!("d{}", user.domid()?), "{vf} is {owner}'s");
    }
    took("the next one runs", since);
    pf::load_igb(nic, PFS)?;
    show_in(nic, &format!("echo 3 > {DEVICE}/sriov_numvfs"))?;
    let answers = format!("ping -c 1 -W 1 {PFS}");
    for user in users {
        user.wait_for("the card's driver to answer again", SOON * 4, &answers)?;
    }
    took("traffic is back, without anybody's hand in 'web' and 'db',", since);
    pings(users)
}
