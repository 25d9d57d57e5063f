//! VFs and hotplugged functions that come and go by every route, noticed by events alone: sysfs, Xen's own list and xpcid
//! agree each time, and no guest keeps anything of what is gone.

use anyhow::{Context, Result, ensure};
use xpci_tests::host::state::{keep_running, no_problems};
use xpci_tests::host::{
    PF, SERVICE, SOON, VFS, bring_up, guest, is_held, known_to_xen, nothing_remains, owner, ping, prepare,
    set_mac, start_service, state, wait_for_state, xpci, xpci_fails,
};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, Lab, Process, checks};

use crate::machines::{HOST, MANY, REMOVABLE, REMOVABLE_DEVICE};

const NVME: &str = "0000:03:00.0";

pub struct Vfs<'a> {
    lab: &'a Lab,
    service: Process,
    one: Guest<'a>,
}

impl<'a> Scene<'a> for Vfs<'a> {
    const NAME: &'static str = "vfs";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        let service = prepare(lab)?;
        Ok(Self { lab, service, one: guest(lab, "one")? })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            vfs_come_and_go_by_command,
            vfs_that_sysfs_enables_are_noticed_and_can_be_attached,
            drift_made_on_purpose_is_found_shown_and_repaired,
            drift_at_the_start_of_the_service_is_repaired_and_said,
            vfs_in_use_are_not_disabled_and_their_user_is_named,
            a_vf_whose_pf_lost_its_driver_is_withdrawn_from_its_guest,
            vfs_come_back_with_the_pfs_driver_for_the_same_guest,
            a_function_that_is_pulled_out_is_gone_and_nothing_of_it_remains,
            another_device_in_its_slot_can_be_attached needs a_function_that_is_pulled_out_is_gone_and_nothing_of_it_remains,
            the_first_and_the_last_of_many_vfs_are_attached_and_given_back,
            the_service_knows_of_no_problem,
        ]
    }

    /// Two VFs, the first of them in the guest.
    fn restore(&mut self) -> Result<()> {
        keep_running(self.lab, &mut self.service)?;
        has_a_driver(self.lab)?;
        two_vfs_one_attached(self)
    }
}

/// The state that most checks begin with.
fn two_vfs_one_attached(scene: &mut Vfs<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    if state(lab, VFS[0])? == "attached" {
        return Ok(());
    }
    if xpci(lab, &format!("vf list {PF}"))?.lines().count() != 3 {
        xpci(lab, &format!("vf set-count {PF} 0"))?;
        numvfs(lab, 2)?;
    }
    attach_and_use(lab, one)
}

fn vfs_come_and_go_by_command(scene: &mut Vfs<'_>) -> Result<()> {
    let lab = scene.lab;
    xpci(lab, &format!("vf create {PF} 3"))?;
    in_step(lab, 3)?;
    xpci(lab, &format!("vf set-count {PF} 0"))?;
    in_step(lab, 0)
}

fn vfs_that_sysfs_enables_are_noticed_and_can_be_attached(scene: &mut Vfs<'_>) -> Result<()> {
    let lab = scene.lab;
    xpci(lab, &format!("vf set-count {PF} 0"))?;
    numvfs(lab, 2)?;
    in_step(lab, 2)?;
    attach_and_use(lab, &scene.one)
}

fn drift_made_on_purpose_is_found_shown_and_repaired(scene: &mut Vfs<'_>) -> Result<()> {
    two_vfs_one_attached(scene)?;
    drift(scene.lab)?;
    ping(&scene.one, "10.9.9.1")
}

fn drift_at_the_start_of_the_service_is_repaired_and_said(scene: &mut Vfs<'_>) -> Result<()> {
    two_vfs_one_attached(scene)?;
    drift_at_start(scene)?;
    ping(&scene.one, "10.9.9.1")
}

fn vfs_in_use_are_not_disabled_and_their_user_is_named(scene: &mut Vfs<'_>) -> Result<()> {
    two_vfs_one_attached(scene)?;
    let (exit, said) = xpci_fails(scene.lab, &format!("vf set-count {PF} 0"))?;
    let user = format!("01:10.0 (attached, 'one' (domain {}))", scene.one.domid()?);
    ensure!(exit == 5 && said.contains(&user), "{exit}: {said}");
    Ok(())
}

fn a_vf_whose_pf_lost_its_driver_is_withdrawn_from_its_guest(scene: &mut Vfs<'_>) -> Result<()> {
    two_vfs_one_attached(scene)?;
    let (lab, one) = (scene.lab, &scene.one);
    // Not while its vectors are bound: Xen panics then, whoever removes the function (docs/xen-answers.md).
    one.run("modprobe -r igbvf").ok()?;
    lab.dom0("modprobe -r igb").limit(SOON).ok()?;
    wait_for_state(lab, VFS[0], "gone")?;
    one.wait_for("its function to go", SOON, "[ ! -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    nothing_remains(lab, one)?;
    ensure!(!known_to_xen(lab, VFS[0])? && !known_to_xen(lab, VFS[1])?, "Xen lists VFs that are gone");
    Ok(())
}

/// The PF has its driver, and is up with its address.
fn has_a_driver(lab: &Lab) -> Result<()> {
    let interface = format!("$(ls /sys/bus/pci/devices/{PF}/net)");
    lab.dom0(&format!(
        "modprobe igb && ip link set {interface} up && \
         {{ ip addr show {interface} | grep -q 10.9.9.1/ || ip addr add 10.9.9.1/24 dev {interface}; }}"
    ))
    .ok()
    .map(drop)
}

fn vfs_come_back_with_the_pfs_driver_for_the_same_guest(scene: &mut Vfs<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    _ = one.run("modprobe -r igbvf").run()?;
    lab.dom0("modprobe -r igb").limit(SOON).ok()?;
    has_a_driver(lab)?;
    xpci(lab, &format!("vf create {PF} 2"))?;
    wait_for_state(lab, VFS[0], "host")?;
    in_step(lab, 2)?;
    attach_and_use(lab, one)?;
    one.run("modprobe -r igbvf").ok()?;
    xpci(lab, "pci-detach one 01:10.0").map(drop)
}

/// No guest has the first VF, so that other functions come to its place.
fn no_vf_attached(scene: &Vfs<'_>) -> Result<()> {
    _ = scene.one.run("modprobe -r igbvf").run()?;
    if state(scene.lab, VFS[0])? == "attached" {
        xpci(scene.lab, "pci-detach one 01:10.0")?;
    }
    Ok(())
}

fn numvfs(lab: &Lab, count: u16) -> Result<()> {
    lab.dom0(&format!("echo {count} > /sys/bus/pci/devices/{PF}/sriov_numvfs")).limit(SOON).ok().map(drop)
}

/// sysfs, Xen and xpcid say that the PF has this many VFs, and that they are dom0's.
fn in_step(lab: &Lab, count: usize) -> Result<()> {
    let listed = xpci(lab, &format!("vf list {PF}"))?;
    for (index, vf) in VFS.iter().enumerate() {
        let there = index < count;
        ensure!(listed.contains(vf) == there, "xpcid lists:\n{listed}");
        ensure!(
            lab.dom0(&format!("[ -e /sys/bus/pci/devices/{vf} ]")).run()?.status() == i32::from(!there),
            "{vf}"
        );
        ensure!(known_to_xen(lab, vf)? == there, "{vf}: Xen's list");
        ensure!(!there || owner(lab, vf)? == "d0", "{vf}: {}", owner(lab, vf)?);
    }
    Ok(())
}

/// Xen forgets a function that sysfs still has.
fn drift(lab: &Lab) -> Result<()> {
    ensure!(xpci(lab, "sync")?.contains("agree"), "nothing is to be done yet");
    lab.dom0(&format!("forget {}", VFS[1])).ok()?;
    ensure!(!known_to_xen(lab, VFS[1])?, "Xen forgot it");
    let planned = xpci(lab, "sync --dry-run")?;
    ensure!(planned.contains(&format!("report {} to Xen", VFS[1])), "{planned}");
    ensure!(!known_to_xen(lab, VFS[1])?, "a dry run does nothing");
    xpci(lab, "sync")?;
    ensure!(owner(lab, VFS[1])? == "d0", "{}", owner(lab, VFS[1])?);
    ensure!(xpci(lab, "sync")?.contains("agree"), "once is enough");
    Ok(())
}

/// Xen forgets a function while xpcid does not run.
fn drift_at_start(scene: &mut Vfs<'_>) -> Result<()> {
    let lab = scene.lab;
    lab.dom0(&format!("kill -9 {SERVICE}")).ok()?;
    scene.service.wait(SOON)?;
    lab.dom0(&format!("forget {}", VFS[1])).ok()?;
    ensure!(!known_to_xen(lab, VFS[1])?, "Xen forgot it");
    scene.service = start_service(lab)?;
    let said = format!("xpci status | grep -q '^repaired: report {} to Xen'", VFS[1]);
    lab.wait_for("the repair", SOON, &said)?;
    ensure!(owner(lab, VFS[1])? == "d0", "{}", owner(lab, VFS[1])?);
    ensure!(xpci(lab, "sync --dry-run")?.contains("agree"), "all is in step");
    Ok(())
}

fn attach_and_use(lab: &Lab, one: &Guest<'_>) -> Result<()> {
    set_mac(lab, 0, "52:54:00:aa:bb:01")?;
    xpci(lab, "pci-assignable-add 01:10.0")?;
    xpci(lab, "pci-attach one 01:10.0")?;
    bring_up(one, "10.9.9.11")?;
    ping(one, "10.9.9.1")
}

fn a_function_that_is_pulled_out_is_gone_and_nothing_of_it_remains(scene: &mut Vfs<'_>) -> Result<()> {
    no_vf_attached(scene)?;
    let (lab, one) = (scene.lab, &scene.one);
    xpci(lab, &format!("pci-assignable-add {REMOVABLE}"))?;
    xpci(lab, &format!("pci-attach one {REMOVABLE}"))?;
    one.wait_for("the function", SOON, "[ -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    lab.monitor("device_del e2")?;
    wait_for_state(lab, REMOVABLE, "gone")?;
    one.wait_for("its going", SOON, "[ ! -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    nothing_remains(lab, one)?;
    ensure!(!known_to_xen(lab, REMOVABLE)?, "Xen lists what was pulled out");
    Ok(())
}

fn another_device_in_its_slot_can_be_attached(scene: &mut Vfs<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, &scene.one);
    lab.monitor("device_add virtio-rng-pci,id=e9,bus=rp5")?;
    let there = format!("grep -q 0x1044 /sys/bus/pci/devices/{REMOVABLE}/device");
    lab.wait_for("another device in the slot", SOON, &there)?;
    wait_for_state(lab, REMOVABLE, "host")?;
    ensure!(owner(lab, REMOVABLE)? == "d0", "{}", owner(lab, REMOVABLE)?);
    xpci(lab, &format!("pci-assignable-add {REMOVABLE}"))?;
    ensure!(is_held(lab, REMOVABLE)?, "{}", owner(lab, REMOVABLE)?);
    xpci(lab, &format!("pci-attach one {REMOVABLE}"))?;
    one.wait_for("the other device", SOON, "grep -q 0x1044 /sys/bus/pci/devices/0000:00:00.0/device")?;
    xpci(lab, &format!("pci-detach one {REMOVABLE}"))?;
    xpci(lab, &format!("pci-assignable-remove {REMOVABLE}"))?;
    lab.monitor("device_del e9")?;
    lab.wait_for("its removal", SOON, &format!("[ ! -e /sys/bus/pci/devices/{REMOVABLE} ]"))?;
    lab.monitor(&format!("device_add {REMOVABLE_DEVICE}"))?;
    lab.wait_for("the first device again", SOON, &format!("[ -e /sys/bus/pci/devices/{REMOVABLE} ]"))
}

fn the_first_and_the_last_of_many_vfs_are_attached_and_given_back(scene: &mut Vfs<'_>) -> Result<()> {
    no_vf_attached(scene)?;
    let (lab, one) = (scene.lab, &scene.one);
    lab.dom0("modprobe nvme").ok()?;
    lab.wait_for("the controller's driver", SOON, &format!("[ -e /sys/bus/pci/drivers/nvme/{NVME} ]"))?;
    xpci(lab, &format!("vf create {NVME} {MANY}"))?;
    let listed = xpci(lab, &format!("vf list {NVME}"))?;
    let vfs: Vec<String> =
        listed.lines().skip(1).filter_map(|line| Some(line.split_whitespace().nth(2)?.to_owned())).collect();
    ensure!(vfs.len() == usize::from(MANY), "{} VFs: {listed}", vfs.len());
    let [first, .., last] = vfs.as_slice() else { anyhow::bail!("{listed}") };
    for vf in [first, last] {
        ensure!(known_to_xen(lab, vf)?, "{vf}: not in Xen's list");
        xpci(lab, &format!("pci-assignable-add {vf}"))?;
        xpci(lab, &format!("pci-attach one {vf}"))?;
    }
    one.wait_for("both", SOON, "[ -e /sys/bus/pci/devices/0000:00:01.0 ]")?;
    let ids = one.run("cat /sys/bus/pci/devices/0000:00:0[01].0/class").ok()?;
    ensure!(ids.lines().all(|class| class == "0x010802"), "{ids}");
    let (exit, said) = xpci_fails(lab, &format!("vf destroy {NVME}"))?;
    ensure!(exit == 5 && said.contains(first.as_str()) && said.contains(last.as_str()), "{exit}: {said}");
    for vf in [first, last] {
        xpci(lab, &format!("pci-detach one {vf}"))?;
        xpci(lab, &format!("pci-assignable-remove {vf}"))?;
    }
    xpci(lab, &format!("vf destroy {NVME}"))?;
    let left = xpci(lab, &format!("vf list {NVME}"))?;
    ensure!(left.is_empty() && !known_to_xen(lab, last)?, "{left}");
    lab.dom0(&format!("[ ! -e /sys/bus/pci/devices/{last} ]")).ok().context("sysfs")?;
    Ok(())
}

fn the_service_knows_of_no_problem(scene: &mut Vfs<'_>) -> Result<()> {
    ensure!(scene.service.ended().is_none(), "{}", scene.service.output_so_far());
    no_problems(scene.lab)
}
