//! S1, S2, S3: VFs and hotplugged functions that come and go by every route, noticed by events alone: sysfs, Xen's own list and xpcid
//! agree each time, and no guest keeps anything of what is gone.

use anyhow::{Context, Result, ensure};
use xpci_tests::host::{
    PF, SERVICE, SOON, VFS, bring_up, builder, guest, is_held, known_to_xen, nothing_remains, owner, ping,
    prepare, set_mac, start_service, status, wait_for_state, xpci, xpci_fails,
};
use xpci_tests::{Devices, Guest, Lab, Process};

const NVME: &str = "0000:03:00.0";
const SLOT: &str = "0000:02:00.0";
/// More than fit below one device number: their functions need ARI.
const MANY: u16 = 64;

#[test]
fn functions_come_and_go_by_every_route() -> Result<()> {
    let devices = Devices::none().igb("igb0").device("virtio-net-pci,id=e0,vectors=0").nvme("nvme0", MANY);
    let forget = "target/release/examples/forget";
    let lab = builder().install(forget, "/usr/sbin/forget").devices(devices).boot()?;
    let service = prepare(&lab)?;
    let one = guest(&lab, "one")?;

    println!("S2: VFs by command");
    xpci(&lab, &format!("vf create {PF} 3"))?;
    in_step(&lab, 3)?;
    xpci(&lab, &format!("vf set-count {PF} 0"))?;
    in_step(&lab, 0)?;

    println!("S1: VFs by sysfs, behind xpcid's back");
    numvfs(&lab, 2)?;
    in_step(&lab, 2)?;
    attach_and_use(&lab, &one)?;

    println!("S1: drift made on purpose is found, shown and repaired");
    drift(&lab)?;
    ping(&one, "10.9.9.1")?;

    println!("S1: drift that is there when xpcid starts is repaired by itself, and said");
    let service = drift_at_start(&lab, service)?;
    ping(&one, "10.9.9.1")?;

    println!("S2: VFs in use are not disabled by command, and who uses them is named");
    let (exit, said) = xpci_fails(&lab, &format!("vf set-count {PF} 0"))?;
    ensure!(
        exit == 5 && said.contains(&format!("01:10.0 (attached domain {})", one.domid()?)),
        "{exit}: {said}"
    );

    println!("S2: the PF's driver is unloaded under the guest: its VF is withdrawn, nothing hangs");
    // Not while its vectors are bound: Xen panics then, whoever removes the function (docs/xen-answers.md).
    one.run("modprobe -r igbvf").ok()?;
    lab.dom0("modprobe -r igb").limit(SOON).ok()?;
    wait_for_state(&lab, VFS[0], "gone")?;
    one.wait_for("its function to go", SOON, "[ ! -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    nothing_remains(&lab, &one)?;
    ensure!(!known_to_xen(&lab, VFS[0])? && !known_to_xen(&lab, VFS[1])?, "Xen lists VFs that are gone");

    println!("the PF's driver comes back, and so do its VFs, for the same guest");
    lab.dom0(&format!(
        "modprobe igb && ip link set $(ls /sys/bus/pci/devices/{PF}/net) up && \
         ip addr add 10.9.9.1/24 dev $(ls /sys/bus/pci/devices/{PF}/net)"
    ))
    .ok()?;
    xpci(&lab, &format!("vf create {PF} 2"))?;
    wait_for_state(&lab, VFS[0], "host")?;
    in_step(&lab, 2)?;
    attach_and_use(&lab, &one)?;
    one.run("modprobe -r igbvf").ok()?;
    xpci(&lab, "pci-detach one 01:10.0")?;

    println!("S1: an assigned function is pulled out, and another device put into its slot");
    hot_unplug(&lab, &one)?;

    println!("S2: {MANY} VFs of an NVMe controller");
    many(&lab, &one)?;

    ensure!(service.ended().is_none(), "{}", service.output_so_far());
    ensure!(status(&lab)?["problems"].as_array().is_some_and(Vec::is_empty), "{}", status(&lab)?);
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
fn drift_at_start(lab: &Lab, service: Process) -> Result<Process> {
    lab.dom0(&format!("kill -9 {SERVICE}")).ok()?;
    service.wait(SOON)?;
    lab.dom0(&format!("forget {}", VFS[1])).ok()?;
    ensure!(!known_to_xen(lab, VFS[1])?, "Xen forgot it");
    let service = start_service(lab)?;
    let said = format!("xpci status | grep -q '^repaired: report {} to Xen'", VFS[1]);
    lab.wait_for("the repair", SOON, &said)?;
    ensure!(owner(lab, VFS[1])? == "d0", "{}", owner(lab, VFS[1])?);
    ensure!(xpci(lab, "sync --dry-run")?.contains("agree"), "all is in step");
    Ok(service)
}

fn attach_and_use(lab: &Lab, one: &Guest<'_>) -> Result<()> {
    set_mac(lab, 0, "52:54:00:aa:bb:01")?;
    xpci(lab, "pci-assignable-add 01:10.0")?;
    xpci(lab, "pci-attach one 01:10.0")?;
    bring_up(one, "10.9.9.11")?;
    ping(one, "10.9.9.1")
}

fn hot_unplug(lab: &Lab, one: &Guest<'_>) -> Result<()> {
    xpci(lab, "pci-assignable-add 02:00.0")?;
    xpci(lab, "pci-attach one 02:00.0")?;
    one.wait_for("the function", SOON, "[ -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    lab.monitor("device_del e0")?;
    wait_for_state(lab, SLOT, "gone")?;
    one.wait_for("its going", SOON, "[ ! -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    nothing_remains(lab, one)?;
    ensure!(!known_to_xen(lab, SLOT)?, "Xen lists what was pulled out");
    lab.monitor("device_add e1000e,id=e9,bus=rp2")?;
    lab.wait_for(
        "another device in the slot",
        SOON,
        &format!("grep -q 0x10d3 /sys/bus/pci/devices/{SLOT}/device"),
    )?;
    wait_for_state(lab, SLOT, "host")?;
    ensure!(owner(lab, SLOT)? == "d0", "{}", owner(lab, SLOT)?);
    xpci(lab, "pci-assignable-add 02:00.0")?;
    ensure!(is_held(lab, SLOT)?, "{}", owner(lab, SLOT)?);
    xpci(lab, "pci-attach one 02:00.0")?;
    one.wait_for("the other device", SOON, "grep -q 0x10d3 /sys/bus/pci/devices/0000:00:00.0/device")?;
    xpci(lab, "pci-detach one 02:00.0")?;
    xpci(lab, "pci-assignable-remove 02:00.0").map(drop)
}

fn many(lab: &Lab, one: &Guest<'_>) -> Result<()> {
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
