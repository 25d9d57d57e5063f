//! `make demo`: the main job of xpci, a VF of dom0's for a guest.

use std::time::Instant;

use anyhow::{Result, ensure};
use xpci_tests::host::{
    PF, SOON, VFS, bring_up, builder, guest, inject_error, is_held, prepare, set_mac, start_service,
};
use xpci_tests::{Guest, Lab};

use crate::story::{chapter, say, show, show_in};

const MAC: &str = "52:54:00:aa:bb:01";
/// In Uncorrectable Error Status (PCI Express 6.0, section 7.8.4.2).
const COMPLETION_TIMEOUT: u32 = 1 << 14;

pub fn tell(begun: Instant) -> Result<()> {
    say("xpci demo: a PCI function of a Xen host is given to a guest, filtered, taken back.");
    say("Everything is real except the hardware: Xen, its dom0 and the guest run inside QEMU.");

    chapter(begun, "Booting Xen with a dom0, a network card with SR-IOV, and xpcid (half a minute or so)");
    let lab = builder().name("demo").boot()?;
    let service = prepare(&lab)?;
    show(&lab, "xl info | grep -E 'xen_version|virt_caps'")?;
    show(&lab, "lspci -s 01:00.0")?;

    chapter(begun, "VFs: the card makes three lightweight copies of itself");
    show(&lab, &format!("xpci vf create {PF} 3"))?;
    set_mac(&lab, 0, MAC)?;
    show(&lab, "xpci pci-assignable-add 01:10.0")?;
    ensure!(is_held(&lab, VFS[0])?, "Xen's quarantine domain must own a held function");

    chapter(begun, "A paravirtualized guest starts, with its stock kernel and drivers");
    let web = guest(&lab, "web")?;
    show(&lab, "xpci pci-attach web 01:10.0")?;
    bring_up(&web, "10.9.9.11")?;
    show(&lab, "xpci status")?;

    chapter(
        begun,
        "The guest uses the VF: its driver, its MAC address, packets to dom0, interrupts through Xen",
    );
    show_in(&web, "lspci -k")?;
    show_in(&web, "ip addr show eth0 | grep -E 'ether|inet '")?;
    show_in(&web, "ping -c 3 10.9.9.1")?;
    show_in(&web, "grep pcifront /proc/interrupts")?;

    filtered_write(begun, &lab, &web)?;

    chapter(begun, "xpcid is killed and started again; the guest goes on and notices nothing");
    service.signal(9)?;
    service.wait(SOON)?;
    let _service = start_service(&lab)?;
    show_in(&web, "lspci; ping -c 1 10.9.9.1 | grep received")?;

    contained_error(begun, &lab, &web)?;

    chapter(begun, "The VF is taken back: reset, held again, ready for the next guest");
    show(&lab, "xpci pci-detach web 01:10.0")?;
    show(&lab, "xpci pci-assignable-list -l")?;
    ensure!(is_held(&lab, VFS[0])?, "a detached function must be held again");
    show(&lab, "xpci pci-assignable-remove 01:10.0")?;

    chapter(begun, "Done. 'make lab' gives you a shell in this dom0; README.md has the rest.");
    Ok(())
}

/// What the guest writes to guarded registers stays with the guest.
fn filtered_write(begun: Instant, lab: &Lab, web: &Guest<'_>) -> Result<()> {
    chapter(
        begun,
        "A filtered write: the guest overwrites a BAR, the address where the card's registers lie",
    );
    let host = "setpci -s 01:00.0 ECAP0010+24.l";
    let before = show(lab, host)?;
    let bar = show_in(web, "setpci -s 00:00.0 10.l")?;
    show_in(web, "setpci -s 00:00.0 10.l=ffffffff; setpci -s 00:00.0 10.l")?;
    say("      The guest sees how large its BAR is, as the PCI specification wants, on a virtual register;");
    say("      the card's own did not move:");
    let after = show(lab, host)?;
    ensure!(before == after, "a physical BAR moved: {before} {after}");
    web.run(&format!("setpci -s 00:00.0 10.l={}", bar.trim())).ok()?;
    show_in(web, "ping -c 1 10.9.9.1 | grep received")?;
    Ok(())
}

/// The guest is notified of an error of its function, and recovers; no other guest is affected.
fn contained_error(begun: Instant, lab: &Lab, web: &Guest<'_>) -> Result<()> {
    chapter(begun, "A contained error: the VF reports a Completion Timeout to the host");
    lab.dom0("modprobe aer_inject").ok()?;
    inject_error(lab, VFS[0], COMPLETION_TIMEOUT, 0)?;
    lab.wait_for("the guest's recovery", SOON, "xpci aer history 01:10.0 | grep -q 'has recovered'")?;
    say(
        "      xpcid traced it to the guest, told the guest's driver, and reset that VF alone when it asked for it:",
    );
    show(lab, "xpci aer history 01:10.0")?;
    web.wait_for("its network", SOON, "ping -c 1 -w 2 10.9.9.1")?;
    say("      The driver has begun again by itself; dom0, the card and the sibling VFs did not notice:");
    show_in(web, "dmesg | grep -i igbvf | tail -n 3; ping -c 1 10.9.9.1 | grep received")?;
    show(lab, "cat /sys/class/net/eth0/carrier; xpci vf list").map(drop)
}
