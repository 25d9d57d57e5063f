//! A VF of the 82576 in PV guests, served by xpcid, on a real Xen: P1, P2, P4, F1-F4, S3, S8, T1, T2, T3.
//!
//! One boot; the steps build on each other, and each says what it shows.

mod dumps;
mod policies;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::{
    PF, SOON, VFS, bring_up, builder, guest, is_held, nothing_remains, owner, ping, prepare, set_mac,
    start_service, state, status, xpci, xpci_fails,
};
use xpci_tests::{BareGuest, Guest, Lab, XenVersion};

const MACS: [&str; 2] = ["52:54:00:aa:bb:01", "52:54:00:aa:bb:02"];

#[test]
fn on_xen_4_17() -> Result<()> {
    let lab = builder().boot()?;
    let mut service = prepare(&lab)?;
    println!("VFs by command, and the kernel's own backend for comparison");
    xpci(&lab, &format!("vf create {PF} 3"))?;
    let seen_through_pciback = dumps::through_pciback(&lab, VFS[0])?;

    println!("P1, S3: a VF in a guest: identity, MAC, traffic, interrupts");
    xpci(&lab, "pci-assignable-add 01:10.0 01:10.2")?;
    ensure!(is_held(&lab, VFS[0])?, "Xen's quarantine domain owns a held function");
    for (index, mac) in MACS.iter().enumerate() {
        set_mac(&lab, index, mac)?;
    }
    let one = guest(&lab, "one")?;
    xpci(&lab, "pci-attach one 01:10.0")?;
    ensure!(owner(&lab, VFS[0])? == format!("d{}", one.domid()?), "{}", owner(&lab, VFS[0])?);
    let seen_through_xpcid = dumps::read(&one)?;
    dumps::compare(&seen_through_pciback, &seen_through_xpcid)?;
    traffic(&lab, &one, 0, "10.9.9.11")?;

    println!("two guests with a VF each, at once");
    let two = guest(&lab, "two")?;
    xpci(&lab, &format!("pci-attach {} 1:10.2@3", two.domid()?))?;
    two.wait_for("the function at its slot", SOON, "[ -e /sys/bus/pci/devices/0000:00:03.0 ]")?;
    xpci(&lab, "pci-detach two 01:10.2")?;
    xpci(&lab, "pci-attach two 01:10.2")?;
    traffic(&lab, &two, 1, "10.9.9.12")?;
    ping(&one, "10.9.9.12")?;

    println!("F1, F2: the shipped policy of the 82576's VFs, and what it keeps from hardware");
    policies::of_a_connected_guest(&lab, &one)?;

    println!("T3: the service is killed three times under load; no guest notices");
    one.run("cp /sys/bus/pci/devices/0000:00:00.0/config /tmp/header").ok()?;
    let load = one.spawn(
        "n=0; while cmp -s -n 64 /sys/bus/pci/devices/0000:00:00.0/config /tmp/header; do n=$((n+1)); echo $n > /tmp/reads; done",
    )?;
    for round in 0..3 {
        one.wait_for("config reads", SOON, "[ -s /tmp/reads ]")?;
        service.signal(9)?;
        service.wait(SOON)?;
        service = start_service(&lab)?;
        one.run("rm -f /tmp/reads").ok()?;
        one.wait_for("config reads after the restart", SOON, "[ -s /tmp/reads ]")?;
        ensure!(load.ended().is_none(), "round {round}: a config read failed or gave another value");
        ping(&one, "10.9.9.1").with_context(|| format!("round {round}"))?;
    }
    drop(load);
    ensure!(!one.run("dmesg").ok()?.contains("pciback not responding"), "the guest noticed");
    xpci(&lab, "status")?;

    println!("P4: a function level reset that the guest asks for");
    function_level_reset(&lab, &one)?;

    println!("the guest's xen-pcifront is removed and loaded again");
    // Linux refuses while the driver has its device, so that is taken from it first.
    one.run("modprobe -r igbvf && echo pci-0 > /sys/bus/xen/drivers/pcifront/unbind").ok()?;
    one.wait_for("the function to go", SOON, "[ ! -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    one.run("modprobe -r xen-pcifront && modprobe xen-pcifront").ok()?;
    bring_up(&one, "10.9.9.11")?;
    ping(&one, "10.9.9.1")?;

    println!("hot attach and detach of a second function to a connected guest");
    two.run("modprobe -r igbvf").ok()?;
    xpci(&lab, "pci-detach two 01:10.2")?;
    xpci(&lab, "pci-attach one 01:10.2")?;
    one.wait_for("the second function", SOON, "[ -e /sys/bus/pci/devices/0000:00:01.0 ]")?;
    ping(&one, "10.9.9.1")?;
    xpci(&lab, "pci-detach one 01:10.2")?;
    one.wait_for("its going", SOON, "[ ! -e /sys/bus/pci/devices/0000:00:01.0 ]")?;
    ping(&one, "10.9.9.1")?;

    println!("detach and attach again, ten times; nothing that was granted remains");
    for _ in 0..10 {
        xpci(&lab, "pci-detach one 01:10.0")?;
        ensure!(is_held(&lab, VFS[0])?, "a detached function is held again");
        nothing_remains(&lab, &one)?;
        xpci(&lab, "pci-attach one 01:10.0")?;
        bring_up(&one, "10.9.9.11")?;
    }
    ping(&one, "10.9.9.1")?;

    println!(
        "a guest is destroyed while it has a function, another one rebooted: it has its function for good"
    );
    xpci(&lab, "pci-attach --persist two 01:10.2")?;
    lab.dom0("xl destroy one").ok()?;
    lab.dom0("xl reboot -F two").ok()?;
    let held = format!("xpci pci-assignable-list | grep -q {}", VFS[0]);
    lab.wait_for("the function to be held again", SOON, &held)?;
    ensure!(is_held(&lab, VFS[0])?, "{}", owner(&lab, VFS[0])?);
    two.wait_rebooted(SOON * 2)?;
    bring_up(&two, "10.9.9.12")?;
    ping(&two, "10.9.9.1")?;
    ensure!(owner(&lab, VFS[1])? == format!("d{}", two.domid()?), "{}", owner(&lab, VFS[1])?);
    two.run("modprobe -r igbvf").ok()?;
    xpci(&lab, "pci-detach two 01:10.2")?;
    nothing_remains(&lab, &two)?;

    println!("S8: back to dom0 and the driver it came from");
    back_to_dom0(&lab)?;

    println!("what goes wrong says what to do");
    mistakes(&lab)?;

    println!("the service stops cleanly and keeps what it had");
    xpci(&lab, "pci-assignable-add 01:10.0")?;
    service.signal(15)?;
    ensure!(service.wait(SOON)?.code == Some(0), "exit status of a stopped service");
    let _service = start_service(&lab)?;
    ensure!(state(&lab, VFS[0])? == "held", "{}", status(&lab)?);
    ensure!(status(&lab)?["problems"].as_array().is_some_and(Vec::is_empty), "{}", status(&lab)?);
    Ok(())
}

/// The same spine on the newer Xen: attach, traffic, detach, nothing left; then an HVM guest.
#[test]
fn on_xen_4_20() -> Result<()> {
    let lab = builder().xen(XenVersion::V4_20).hvm_guests().boot()?;
    let _service = prepare(&lab)?;
    xpci(&lab, &format!("vf create {PF} 2"))?;
    xpci(&lab, "pci-assignable-add 01:10.0")?;
    set_mac(&lab, 0, MACS[0])?;
    let one = guest(&lab, "one")?;
    xpci(&lab, "pci-attach --persist one 01:10.0")?;
    traffic(&lab, &one, 0, "10.9.9.11")?;
    let vm = lab.dom0(&format!("xenstore-read /local/domain/{}/vm", one.domid()?)).ok()?;
    let uuid = vm.trim().trim_start_matches("/vm/");
    let said = xpci(&lab, &format!("pci-list --persistent {uuid}"))?;
    ensure!(said.contains(VFS[0]), "{uuid}: {said}");
    xpci(&lab, "pci-detach one 01:10.0")?;
    ensure!(is_held(&lab, VFS[0])?, "{}", owner(&lab, VFS[0])?);
    nothing_remains(&lab, &one)?;
    hvm(&lab)?;
    xpci(&lab, "pci-assignable-remove 01:10.0")?;
    ensure!(owner(&lab, VFS[0])? == "d0", "{}", owner(&lab, VFS[0])?);
    Ok(())
}

/// P5, P6 in short: an HVM guest finds the function both ways and reaches its registers. `tests/hvm` has more, on Xen 4.17.
fn hvm(lab: &Lab) -> Result<()> {
    xpci(lab, "hvm acpi-table /guest/mcfg.bin")?;
    let mut bare = BareGuest::create(lab, "bare", &["acpi_firmware=\"/guest/mcfg.bin\""])?;
    xpci(lab, "pci-attach bare 01:10.0@6")?;
    bare.start()?;
    bare.tell("slot 6")?;
    ensure!(bare.number("r 0 4")? == 0x10ca_8086, "the guest reads {}", bare.tell("r 0 4")?);
    let bar = bare.number("r 10 4")? & !0xf;
    let status = bare.number(&format!("m {:x} 4", bar + 8))?;
    ensure!(bar != 0 && status != u32::MAX && status & 2 != 0, "BAR 0 at {bar:x}, link status {status:x}");
    bare.tell("ecam fe000000")?;
    ensure!(bare.tell("same")? == "0", "both ways to config space differ");
    ensure!(bare.number("e 100 4")? == 0x1501_0001, "AER: {}", bare.tell("e 100 4")?);
    bare.destroy()?;
    lab.wait_for("the function to be held again", SOON, "xpci pci-assignable-list | grep -q 01:10.0")?;
    ensure!(is_held(lab, VFS[0])?, "{}", owner(lab, VFS[0])?);
    lab.dom0("[ -z \"$(ls /run/xpci/ioreq-servers)\" ] && [ -z \"$(ls /run/xpci/images)\" ]").ok().map(drop)
}

/// The guest's stock driver uses the VF: the MAC set through the PF, packets both ways, MSI-X interrupts.
fn traffic(lab: &Lab, guest: &Guest<'_>, index: usize, address: &str) -> Result<()> {
    bring_up(guest, address)?;
    let mac = guest.run("cat /sys/bus/pci/devices/0000:00:00.0/net/*/address").ok()?;
    ensure!(mac.trim() == MACS[index], "MAC {mac}");
    ping(guest, "10.9.9.1")?;
    lab.dom0(&format!("ping -c 3 -w 20 {address}")).limit(SOON).ok()?;
    let interrupts = guest.run("grep pcifront-msi-x /proc/interrupts").ok()?;
    let counted = |line: &str| line.split_whitespace().nth(1).and_then(|count| count.parse::<u64>().ok());
    let total: u64 = interrupts.lines().filter_map(counted).sum();
    ensure!(interrupts.lines().count() == 3 && total >= 6, "interrupts: {interrupts}");
    Ok(())
}

/// The guest writes Initiate Function Level Reset itself; its driver comes back afterwards, the sibling never notices.
fn function_level_reset(lab: &Lab, one: &Guest<'_>) -> Result<()> {
    one.run("modprobe -r igbvf").ok()?;
    one.run("setpci -s 00:00.0 CAP_EXP+8.w=8000:8000").ok()?;
    one.wait_for("the function to answer again", SOON, "[ \"$(setpci -s 00:00.0 0.w)\" = 8086 ]")?;
    lab.wait_for("the state after the reset", SOON, "xpci status | grep 01:10.0 | grep -q attached")?;
    ensure!(one.run("setpci -s 00:00.0 CAP_EXP+8.w").ok()?.trim().starts_with('0'), "the FLR bit reads 0");
    bring_up(one, "10.9.9.11")?;
    ping(one, "10.9.9.1")
}

fn back_to_dom0(lab: &Lab) -> Result<()> {
    xpci(lab, "pci-assignable-remove 01:10.0 01:10.2")?;
    ensure!(owner(lab, VFS[0])? == "d0", "{}", owner(lab, VFS[0])?);
    lab.dom0(&format!("modprobe igbvf && echo {} > /sys/bus/pci/drivers/igbvf/bind", VFS[0])).run()?;
    lab.wait_for("igbvf on the VF", SOON, &format!("[ -e /sys/bus/pci/drivers/igbvf/{} ]", VFS[0]))?;
    xpci(lab, "pci-assignable-add 01:10.0")?;
    lab.dom0(&format!("[ ! -e /sys/bus/pci/drivers/igbvf/{} ]", VFS[0])).ok()?;
    xpci(lab, "pci-assignable-remove 01:10.0")?;
    lab.dom0(&format!("[ -e /sys/bus/pci/drivers/igbvf/{} ]", VFS[0])).ok()?;
    ensure!(owner(lab, VFS[0])? == "d0", "{}", owner(lab, VFS[0])?);
    Ok(())
}

fn mistakes(lab: &Lab) -> Result<()> {
    lab.guest(&xpci_tests::GuestConfig::pv("closed").passthrough(false))?;
    xpci(lab, "pci-assignable-add 01:10.2")?;
    for (command, exit, said) in [
        ("pci-attach closed 01:10.2", 5, "passthrough=\"enabled\""),
        ("pci-attach nobody 01:10.2", 4, "no domain 'nobody'"),
        ("pci-attach two 01:1f.7", 4, "no function 0000:01:1f.7"),
        ("pci-attach two 01:10.0", 5, "pci-assignable-add"),
        ("pci-detach two 01:10.2", 4, "does not have"),
        ("vf create 01:00.0 1", 5, "enabled already"),
        ("vf create 02:00.0 1", 5, "no PF"),
        ("pci-attach two 01:10.9", 2, "function"),
    ] {
        let (status, text) = xpci_fails(lab, command)?;
        ensure!(status == exit && text.contains(said), "'{command}': {status}, {text}");
    }
    // What was refused left the function as it was.
    ensure!(state(lab, VFS[1])? == "held" && is_held(lab, VFS[1])?, "{}", status(lab)?);
    xpci(lab, "pci-assignable-remove 01:10.2").map(drop)
}
