//! `make demo`: the main job of xpci, on a real Xen host inside QEMU, told to somebody who has never seen it.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::{PF, SOON, VFS, bring_up, builder, guest, is_held, prepare, set_mac, start_service};
use xpci_tests::{Guest, Lab};

const MAC: &str = "52:54:00:aa:bb:01";

/// Prints one line of the story.
fn say(text: &str) {
    // Whoever reads may have gone away.
    let _ = writeln!(io::stdout(), "{text}");
}

fn chapter(begun: Instant, title: &str) {
    say(&format!("\n[{:>3} s] {title}", begun.elapsed().as_secs()));
}

/// Runs a command in dom0, shows it and what it prints.
fn show(lab: &Lab, command: &str) -> Result<String> {
    say(&format!("    dom0# {command}"));
    shown(lab.dom0(command).limit(SOON).ok()?)
}

/// The same inside the guest.
fn show_in(guest: &Guest<'_>, command: &str) -> Result<String> {
    say(&format!("    guest# {command}"));
    shown(guest.run(command).limit(SOON).ok()?)
}

fn shown(output: String) -> Result<String> {
    for line in output.lines() {
        say(&format!("      {line}"));
    }
    Ok(output)
}

fn main() -> Result<()> {
    let begun = Instant::now();
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
    show(&lab, "xpci pci-assignable-list")?;
    ensure!(is_held(&lab, VFS[0])?, "a detached function must be held again");
    show(&lab, "xpci pci-assignable-remove 01:10.0")?;

    chapter(begun, "Done. 'make lab' gives you a shell in this dom0; README.md tells the rest.");
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

/// A reset that the guest provokes is carried out by the host, on this function alone.
fn contained_error(begun: Instant, lab: &Lab, web: &Guest<'_>) -> Result<()> {
    chapter(begun, "A contained error: the guest resets its function under its own driver");
    show_in(web, "setpci -s 00:00.0 CAP_EXP+8.w=8000:8000")?;
    web.wait_for("the function after its reset", SOON, "[ \"$(setpci -s 00:00.0 0.w)\" = 8086 ]")?;
    lab.wait_for("the end of the reset", SOON, "xpci status | grep 01:10.0 | grep -q attached")?;
    say("      xpcid had the host reset that function alone; the guest's driver lost its hardware for it:");
    let lost = web.run("ping -c 2 -w 4 10.9.9.1 | grep received").run()?;
    shown(lost.stdout())?;
    say("      dom0, the card and the sibling VFs did not notice; the guest loads its driver again:");
    show(lab, "cat /sys/class/net/eth0/carrier; xpci vf list")?;
    web.run("modprobe -r igbvf").ok()?;
    bring_up(web, "10.9.9.11")?;
    show_in(web, "ping -c 1 10.9.9.1 | grep received")
        .map(drop)
        .context("the guest's network after the reset")
}
