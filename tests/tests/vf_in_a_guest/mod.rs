//! A VF of the 82576 in PV guests, served by xpcid, on a real Xen.

mod dumps;
mod mailbox;
pub mod newer_xen;
mod policies;
mod saving;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::state::{keep_running, kill_and_start, make_held, make_used, no_problems, stop};
use xpci_tests::host::{
    PF, SOON, VFS, bring_up, guests, is_held, nothing_remains, owner, ping, prepare, set_mac, start_service,
    state, status, xpci, xpci_fails,
};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, GuestConfig, Lab, Process, checks};

use crate::machines::HOST;
use mailbox::dom0_exchanges_data_objects_with_the_guest_across_a_kill_of_the_service;
use policies::{
    a_policy_with_mistakes_changes_nothing,
    an_ignored_write_is_learned_proposed_and_put_in_force_under_traffic, igbvf_loses_no_write_that_matters,
    the_shipped_policy_of_the_82576s_vfs_applies, what_the_guest_has_seen_stays_until_detach,
};
use saving::{
    a_guest_moves_to_another_vf_and_leaves_its_own, a_guest_whose_move_fails_runs_on_with_its_vf,
    a_guest_whose_save_fails_runs_on_with_its_vf, a_saved_guest_is_restored_with_its_vf_and_its_traffic,
};

const MACS: [&str; 2] = ["52:54:00:aa:bb:01", "52:54:00:aa:bb:02"];
const ADDRESSES: [&str; 2] = ["10.9.9.11", "10.9.9.12"];

pub struct VfInAGuest<'a> {
    lab: &'a Lab,
    service: Process,
    one: Guest<'a>,
    two: Guest<'a>,
}

impl<'a> Scene<'a> for VfInAGuest<'a> {
    const NAME: &'static str = "vf_in_a_guest";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        let service = prepare(lab)?;
        xpci(lab, &format!("vf create {PF} 3"))?;
        for (index, mac) in MACS.iter().enumerate() {
            set_mac(lab, index, mac)?;
        }
        let [one, two] = guests(lab, ["one", "two"])?;
        Ok(Self { lab, service, one, two })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            a_guest_reads_of_its_vf_what_it_reads_through_xen_pciback,
            the_doctor_finds_what_a_real_dom0_has,
            xens_quarantine_domain_owns_a_held_function,
            the_stock_driver_uses_the_vf_with_its_mac_traffic_and_interrupts,
            a_function_is_where_the_command_puts_it,
            two_guests_use_a_vf_each_at_once,
            the_shipped_policy_of_the_82576s_vfs_applies,
            igbvf_loses_no_write_that_matters,
            an_ignored_write_is_learned_proposed_and_put_in_force_under_traffic,
            a_policy_with_mistakes_changes_nothing,
            what_the_guest_has_seen_stays_until_detach,
            no_guest_notices_that_the_service_is_killed_under_load,
            a_guest_resets_its_function_itself,
            xen_pcifront_is_removed_and_loaded_again,
            a_guest_that_was_paused_while_its_function_changed_uses_the_next_one,
            a_second_function_comes_and_goes_while_the_first_is_used,
            nothing_that_was_granted_remains_after_ten_detaches,
            dom0_exchanges_data_objects_with_the_guest_across_a_kill_of_the_service,
            a_guest_whose_save_fails_runs_on_with_its_vf,
            a_saved_guest_is_restored_with_its_vf_and_its_traffic,
            a_guest_whose_move_fails_runs_on_with_its_vf,
            a_guest_moves_to_another_vf_and_leaves_its_own,
            the_function_of_a_destroyed_guest_is_held_again,
            a_rebooted_guest_has_its_persistent_function_again,
            a_function_goes_back_to_the_driver_it_came_from,
            what_goes_wrong_says_what_to_do,
            a_service_that_stops_cleanly_keeps_what_it_held,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        let lab = self.lab;
        keep_running(lab, &mut self.service)?;
        lab.dom0("rm -rf /etc/xpci/policies").ok()?;
        xpci(lab, "policy reload")?;
        make_held(lab, VFS[0])?;
        make_held(lab, VFS[1])
    }
}

impl VfInAGuest<'_> {
    /// The first VF is used in the first guest.
    fn one_uses_it(&self) -> Result<()> {
        make_used(self.lab, &self.one, VFS[0], ADDRESSES[0])
    }
}

fn a_guest_reads_of_its_vf_what_it_reads_through_xen_pciback(scene: &mut VfInAGuest<'_>) -> Result<()> {
    let lab = scene.lab;
    let through_pciback = dumps::through_pciback(lab, VFS[0])?;
    make_held(lab, VFS[0])?;
    xpci(lab, "pci-attach one 01:10.0")?;
    dumps::compare(&through_pciback, &dumps::read(&scene.one)?)
}

fn xens_quarantine_domain_owns_a_held_function(scene: &mut VfInAGuest<'_>) -> Result<()> {
    xpci(scene.lab, "pci-assignable-add 01:10.2")?;
    ensure!(is_held(scene.lab, VFS[1])?, "{}", owner(scene.lab, VFS[1])?);
    Ok(())
}

fn the_stock_driver_uses_the_vf_with_its_mac_traffic_and_interrupts(
    scene: &mut VfInAGuest<'_>,
) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    make_held(lab, VFS[0])?;
    xpci(lab, "pci-attach one 01:10.0")?;
    ensure!(owner(lab, VFS[0])? == format!("d{}", one.domid()?), "{}", owner(lab, VFS[0])?);
    traffic(lab, one, 0, ADDRESSES[0])
}

fn a_function_is_where_the_command_puts_it(scene: &mut VfInAGuest<'_>) -> Result<()> {
    let (lab, two) = (scene.lab, &scene.two);
    make_held(lab, VFS[1])?;
    xpci(lab, &format!("pci-attach {} 1:10.2@3", two.domid()?))?;
    two.wait_for("the function at its slot", SOON, "[ -e /sys/bus/pci/devices/0000:00:03.0 ]")?;
    xpci(lab, "pci-detach two 01:10.2").map(drop)
}

fn two_guests_use_a_vf_each_at_once(scene: &mut VfInAGuest<'_>) -> Result<()> {
    let (lab, two) = (scene.lab, &scene.two);
    scene.one_uses_it()?;
    make_held(lab, VFS[1])?;
    xpci(lab, "pci-attach two 01:10.2")?;
    traffic(lab, two, 1, ADDRESSES[1])?;
    ping(&scene.one, ADDRESSES[1])
}

fn no_guest_notices_that_the_service_is_killed_under_load(scene: &mut VfInAGuest<'_>) -> Result<()> {
    scene.one_uses_it()?;
    let (lab, one) = (scene.lab, &scene.one);
    one.run("cp /sys/bus/pci/devices/0000:00:00.0/config /tmp/header").ok()?;
    let load = one.spawn(
        "n=0; while cmp -s -n 64 /sys/bus/pci/devices/0000:00:00.0/config /tmp/header; do n=$((n+1)); echo $n > /tmp/reads; done",
    )?;
    for round in 0..3 {
        one.wait_for("config reads", SOON, "[ -s /tmp/reads ]")?;
        kill_and_start(lab, &mut scene.service)?;
        one.run("rm -f /tmp/reads").ok()?;
        one.wait_for("config reads after the restart", SOON, "[ -s /tmp/reads ]")?;
        ensure!(load.ended().is_none(), "round {round}: a config read failed or gave another value");
        ping(one, "10.9.9.1").with_context(|| format!("round {round}"))?;
    }
    drop(load);
    ensure!(!one.run("dmesg").ok()?.contains("pciback not responding"), "the guest noticed");
    xpci(lab, "status").map(drop)
}

/// The guest writes Initiate Function Level Reset itself; its driver comes back afterwards.
fn a_guest_resets_its_function_itself(scene: &mut VfInAGuest<'_>) -> Result<()> {
    scene.one_uses_it()?;
    let (lab, one) = (scene.lab, &scene.one);
    one.run("modprobe -r igbvf").ok()?;
    one.run("setpci -s 00:00.0 CAP_EXP+8.w=8000:8000").ok()?;
    one.wait_for("the function to answer again", SOON, "[ \"$(setpci -s 00:00.0 0.w)\" = 8086 ]")?;
    lab.wait_for("the state after the reset", SOON, "xpci status | grep 01:10.0 | grep -q attached")?;
    ensure!(one.run("setpci -s 00:00.0 CAP_EXP+8.w").ok()?.trim().starts_with('0'), "the FLR bit reads 0");
    bring_up(one, ADDRESSES[0])?;
    ping(one, "10.9.9.1")
}

fn xen_pcifront_is_removed_and_loaded_again(scene: &mut VfInAGuest<'_>) -> Result<()> {
    scene.one_uses_it()?;
    let one = &scene.one;
    // Linux refuses while the driver has its device, so that is taken from it first.
    one.run("modprobe -r igbvf && echo pci-0 > /sys/bus/xen/drivers/pcifront/unbind").ok()?;
    one.wait_for("the function to go", SOON, "[ ! -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    one.run("modprobe -r xen-pcifront && modprobe xen-pcifront").ok()?;
    bring_up(one, ADDRESSES[0])?;
    ping(one, "10.9.9.1")
}

/// To its xenbus, the device of the function that it has lost was always there.
fn a_guest_that_was_paused_while_its_function_changed_uses_the_next_one(
    scene: &mut VfInAGuest<'_>,
) -> Result<()> {
    scene.one_uses_it()?;
    let (lab, one) = (scene.lab, &scene.one);
    scene.two.run("modprobe -r igbvf").ok()?;
    make_held(lab, VFS[1])?;
    lab.dom0("xl pause one").ok()?;
    let changed =
        xpci(lab, "pci-detach --force one 01:10.0").and_then(|_| xpci(lab, "pci-attach one 01:10.2"));
    lab.dom0("xl unpause one").ok()?;
    changed?;
    let next = format!("grep -q {} /sys/bus/pci/devices/0000:00:00.0/net/*/address", MACS[1]);
    one.wait_for("the driver on the next function", SOON, &next)?;
    bring_up(one, ADDRESSES[0])?;
    ping(one, "10.9.9.1")?;
    xpci(lab, "pci-detach one 01:10.2").map(drop)
}

fn a_second_function_comes_and_goes_while_the_first_is_used(scene: &mut VfInAGuest<'_>) -> Result<()> {
    scene.one_uses_it()?;
    let (lab, one) = (scene.lab, &scene.one);
    scene.two.run("modprobe -r igbvf").ok()?;
    make_held(lab, VFS[1])?;
    xpci(lab, "pci-attach one 01:10.2")?;
    one.wait_for("the second function", SOON, "[ -e /sys/bus/pci/devices/0000:00:01.0 ]")?;
    ping(one, "10.9.9.1")?;
    xpci(lab, "pci-detach one 01:10.2")?;
    one.wait_for("its going", SOON, "[ ! -e /sys/bus/pci/devices/0000:00:01.0 ]")?;
    ping(one, "10.9.9.1")
}

fn nothing_that_was_granted_remains_after_ten_detaches(scene: &mut VfInAGuest<'_>) -> Result<()> {
    scene.one_uses_it()?;
    let (lab, one) = (scene.lab, &scene.one);
    scene.two.run("modprobe -r igbvf").ok()?;
    make_held(lab, VFS[1])?;
    for _ in 0..10 {
        xpci(lab, "pci-detach one 01:10.0")?;
        ensure!(is_held(lab, VFS[0])?, "a detached function is held again");
        nothing_remains(lab, one)?;
        xpci(lab, "pci-attach one 01:10.0")?;
        bring_up(one, ADDRESSES[0])?;
    }
    ping(one, "10.9.9.1")
}

fn the_function_of_a_destroyed_guest_is_held_again(scene: &mut VfInAGuest<'_>) -> Result<()> {
    let lab = scene.lab;
    scene.one_uses_it()?;
    lab.dom0("xl destroy one").ok()?;
    let held = format!("xpci pci-assignable-list | grep -q {}", VFS[0]);
    lab.wait_for("the function to be held again", SOON, &held)?;
    ensure!(is_held(lab, VFS[0])?, "{}", owner(lab, VFS[0])?);
    Ok(())
}

fn a_rebooted_guest_has_its_persistent_function_again(scene: &mut VfInAGuest<'_>) -> Result<()> {
    let (lab, two) = (scene.lab, &scene.two);
    make_held(lab, VFS[1])?;
    xpci(lab, "pci-attach --persist two 01:10.2")?;
    lab.dom0("xl reboot -F two").ok()?;
    two.wait_rebooted(SOON * 2)?;
    bring_up(two, ADDRESSES[1])?;
    ping(two, "10.9.9.1")?;
    ensure!(owner(lab, VFS[1])? == format!("d{}", two.domid()?), "{}", owner(lab, VFS[1])?);
    two.run("modprobe -r igbvf").ok()?;
    xpci(lab, "pci-detach two 01:10.2")?;
    nothing_remains(lab, two)
}

fn a_function_goes_back_to_the_driver_it_came_from(scene: &mut VfInAGuest<'_>) -> Result<()> {
    let lab = scene.lab;
    make_held(lab, VFS[0])?;
    make_held(lab, VFS[1])?;
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

/// What xl, sysfs and xenstore say of a real host is what the checks look for.
fn the_doctor_finds_what_a_real_dom0_has(scene: &mut VfInAGuest<'_>) -> Result<()> {
    let said = scene.lab.dom0("xpci doctor; true").ok()?;
    for check in [
        "xen",
        "dom0",
        "xenstored",
        "iommu",
        "interrupt-remapping",
        "quarantine",
        "kernel",
        "holder",
        "xl-functions",
    ] {
        let good = said.lines().any(|line| line.starts_with(&format!("good         {check}: ")));
        ensure!(good, "{check} is not good: {said}");
    }
    Ok(())
}

fn what_goes_wrong_says_what_to_do(scene: &mut VfInAGuest<'_>) -> Result<()> {
    let lab = scene.lab;
    make_held(lab, VFS[0])?;
    xpci(lab, "pci-assignable-remove 01:10.0")?;
    lab.guest(&GuestConfig::pv("closed").passthrough(false))?;
    make_held(lab, VFS[1])?;
    for (command, exit, said) in [
        ("pci-attach closed 01:10.2", 5, "passthrough=\"enabled\""),
        ("pci-attach nobody 01:10.2", 4, "no domain 'nobody'"),
        ("pci-attach two 01:1f.7", 4, "no function 0000:01:1f.7"),
        ("pci-attach two 01:10.0", 5, "pci-assignable-add"),
        ("pci-detach two 01:1f.7", 4, "no function 0000:01:1f.7"),
        ("vf create 01:00.0 1", 5, "enabled already"),
        ("vf create 02:00.0 1", 5, "not a PF"),
        ("pci-attach two 01:10.9", 2, "function"),
    ] {
        let (status, text) = xpci_fails(lab, command)?;
        ensure!(status == exit && text.contains(said), "'{command}': {status}, {text}");
    }
    // What was refused left the function as it was.
    ensure!(state(lab, VFS[1])? == "held" && is_held(lab, VFS[1])?, "{}", status(lab)?);
    xpci(lab, "pci-assignable-remove 01:10.2").map(drop)
}

fn a_service_that_stops_cleanly_keeps_what_it_held(scene: &mut VfInAGuest<'_>) -> Result<()> {
    let lab = scene.lab;
    make_held(lab, VFS[0])?;
    stop(&scene.service)?;
    scene.service = start_service(lab)?;
    ensure!(state(lab, VFS[0])? == "held", "{}", status(lab)?);
    no_problems(lab)
}

/// The guest's stock driver uses the VF: the MAC set through the PF, packets both ways, MSI-X interrupts.
pub fn traffic(lab: &Lab, guest: &Guest<'_>, index: usize, address: &str) -> Result<()> {
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
