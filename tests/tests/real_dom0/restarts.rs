//! The service ends and starts again below a guest that uses its function.

use anyhow::{Context, Result, ensure};
use xpci_tests::host::state::no_problems;
use xpci_tests::host::{SOON, VFS, ping, state};
use xpci_tests::{Guest, Process};

use super::machine::NEWER;
use super::{NAME, RealDom0, wait_for_the_service};

/// A guest that reads its function's registers without a pause, and writes down what is not as it was.
struct Reader<'a> {
    guest: &'a Guest<'a>,
    process: Process,
    /// How often its kernel had complained before.
    complaints: String,
}

/// How often a guest's kernel has waited too long for an answer.
fn complaints(guest: &Guest<'_>) -> Result<String> {
    guest.run("dmesg | grep -c 'pciback not responding'; true").ok()
}

impl<'a> Reader<'a> {
    fn start(guest: &'a Guest<'a>) -> Result<Self> {
        guest.run("rm -f /tmp/stop").ok()?;
        let complaints = complaints(guest)?;
        let process = guest.spawn(
            "echo begun; count=0; while [ ! -e /tmp/stop ]; do id=$(setpci -s 0:0.0 DEVICE_ID); count=$((count + 1)); \
             [ $id = 10ca ] || echo \"read $id\"; done; echo \"end $count\"",
        )?;
        process.wait_output("begun", SOON)?;
        Ok(Self { guest, process, complaints })
    }

    /// All reads gave the right answer, and the kernel never had to wait too long for one.
    fn has_noticed_nothing(self) -> Result<()> {
        self.guest.run("touch /tmp/stop").ok()?;
        self.process.wait_output("end ", SOON)?;
        let said = self.process.output_so_far();
        ensure!(!said.contains("read "), "{said}");
        let count = said.trim().rsplit(' ').next().and_then(|count| count.parse::<u32>().ok());
        ensure!(count.is_some_and(|count| count > 0), "it read nothing: {said}");
        let (before, now) = (self.complaints.trim(), complaints(self.guest)?);
        ensure!(
            before == now.trim(),
            "the kernel waited too long {} times, {before} of them before",
            now.trim()
        );
        ping(self.guest, "10.9.9.1")
    }
}

/// The service's process, as systemd knows it.
fn process(scene: &RealDom0<'_>) -> Result<u32> {
    let said = scene.lab.dom0("systemctl show -P MainPID xpcid").ok()?;
    said.trim().parse().with_context(|| format!("xpcid has the process number {said:?}"))
}

fn wait_for_another_process(scene: &RealDom0<'_>, old: u32) -> Result<()> {
    let another = format!("pid=$(systemctl show -P MainPID xpcid) && [ $pid != 0 ] && [ $pid != {old} ]");
    scene.lab.wait_for("another process of the service", SOON, &another)?;
    wait_for_the_service(scene.lab)
}

pub fn a_guest_notices_nothing_of_an_upgrade(scene: &mut RealDom0<'_>) -> Result<()> {
    let (lab, old) = (scene.lab, process(scene)?);
    let reader = Reader::start(scene.guest()?)?;
    lab.dom0("dpkg -i /lab/xpci-newer.deb").limit(SOON * 2).ok()?;
    wait_for_another_process(scene, old)?;
    reader.has_noticed_nothing()?;
    let version = lab.dom0("dpkg-query -W -f '${Version}' xpci").ok()?;
    ensure!(version == NEWER, "{version}");
    ensure!(state(lab, VFS[0])? == "attached", "{}", state(lab, VFS[0])?);
    no_problems(lab)
}

/// More than systemd's default limit of five starts in ten seconds lets pass, the upgrade's among them.
pub fn a_guest_notices_nothing_of_five_kills_in_a_row(scene: &mut RealDom0<'_>) -> Result<()> {
    let reader = Reader::start(scene.guest()?)?;
    for _ in 0..5 {
        let old = process(scene)?;
        scene.lab.dom0(&format!("kill -9 {old}")).ok()?;
        wait_for_another_process(scene, old)?;
    }
    reader.has_noticed_nothing()?;
    no_problems(scene.lab)
}

/// Guests wait for a restart: what need not be done again is not done again. (Each start of a unit has an id of its own.)
pub fn a_restart_does_not_load_the_kernel_module_again(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    let start = || lab.dom0("systemctl show -P InvocationID modprobe@xen_pciback.service").ok();
    let before = start()?;
    ensure!(!before.trim().is_empty(), "modprobe@xen_pciback.service was never started");
    lab.dom0("systemctl restart xpcid").limit(SOON).ok()?;
    let now = start()?;
    ensure!(now == before, "it was started again: {before} became {now}");
    no_problems(lab)
}

pub fn a_service_that_hangs_is_restarted_by_the_watchdog(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    // The limit that is shipped is longer than this check shall take.
    lab.push(b"[Service]\nWatchdogSec=3s\n", "/run/systemd/system/xpcid.service.d/lab.conf")?;
    lab.dom0("systemctl daemon-reload && systemctl restart xpcid").limit(SOON).ok()?;
    let old = process(scene)?;
    lab.dom0(&format!("kill -STOP {old}")).ok()?;
    wait_for_another_process(scene, old)?;
    let said = lab.dom0("journalctl -u xpcid --no-pager -n 20").ok()?;
    ensure!(said.contains("Watchdog timeout"), "{said}");
    lab.dom0(
        "rm -r /run/systemd/system/xpcid.service.d && systemctl daemon-reload && systemctl restart xpcid",
    )
    .limit(SOON)
    .ok()?;
    no_problems(lab)
}

pub fn a_removal_is_refused_while_a_guest_has_a_function(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    let said = lab.dom0("dpkg -r xpci").limit(SOON).run()?;
    ensure!(
        said.status() != 0 && said.stderr().contains("guests still have PCI functions"),
        "{}",
        said.stderr()
    );
    wait_for_the_service(lab)?;
    ping(scene.guest()?, "10.9.9.1")
}

pub fn a_purge_leaves_nothing(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    lab.wait_for("the guest to be gone", SOON, &format!("xl destroy {NAME}; ! xl domid {NAME}"))?;
    lab.wait_for("its images to be gone", SOON, "[ -z \"$(ls /run/xpci/images)\" ]")?;
    lab.dom0("dpkg -P xpci").limit(SOON).ok()?;
    let left = lab
        .dom0("ls -d /var/lib/xpci /run/xpci /usr/sbin/xpci* /usr/share/xpci /etc/xpci/xpcid.yaml; systemctl is-active xpcid; true")
        .ok()?;
    ensure!(left == "inactive\n", "{left}");
    // What was held is xl's to give away.
    let kept = lab.dom0("xenstore-ls -f /libxl/pci | grep 'domid = \"0\"'; true").ok()?;
    ensure!(kept.is_empty(), "{kept}");
    Ok(())
}
