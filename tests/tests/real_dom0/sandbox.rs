//! What systemd takes from the service, and what that leaves it.

use anyhow::{Result, ensure};
use xpci_tests::host::{SOON, xpci_fails};

use super::RealDom0;
use super::machine::DISK;

fn refused(scene: &RealDom0<'_>, reason: &str) -> Result<()> {
    let (status, text) = xpci_fails(scene.lab, &format!("pci-assignable-add {DISK}"))?;
    ensure!(text.contains(reason), "status {status}, no {reason:?} in: {text}");
    Ok(())
}

pub fn systemd_rates_the_service_below_4(scene: &mut RealDom0<'_>) -> Result<()> {
    // systemd counts in tenths here.
    scene.lab.dom0("systemd-analyze security --threshold=39 --no-pager xpcid").limit(SOON).ok().map(drop)
}

/// Its view of the file system is its own, but follows dom0's.
pub fn the_service_sees_a_mount_made_after_its_start(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    lab.wait_for("the disk", SOON, "[ -b /dev/nvme0n1 ]")?;
    lab.dom0("mkdir -p /home/data && mount -t ext4 /dev/nvme0n1 /home/data").ok()?;
    let found = refused(scene, "/home/data");
    lab.dom0("umount /home/data").ok()?;
    found
}

/// That needs a capability: the process has more of them than the service.
pub fn the_service_sees_a_process_that_has_a_device_open(scene: &mut RealDom0<'_>) -> Result<()> {
    let lab = scene.lab;
    lab.wait_for("the controller's device file", SOON, "[ -c /dev/nvme0 ]")?;
    let _user = lab.spawn("sleep 1000 </dev/nvme0")?;
    lab.wait_for("the process", SOON, "ls -l /proc/*/fd/0 | grep -q /dev/nvme0")?;
    refused(scene, "/dev/nvme0")
}

/// The service has no capability to give its socket to a group, but is a member.
pub fn a_member_of_the_status_group_sees_the_status_and_changes_nothing(
    scene: &mut RealDom0<'_>,
) -> Result<()> {
    let lab = scene.lab;
    lab.push(b"status-group: games\n", "/etc/xpci/xpcid.yaml.d/status.yaml")?;
    lab.push(b"[Service]\nSupplementaryGroups=games\n", "/run/systemd/system/xpcid.service.d/lab.conf")?;
    lab.dom0("systemctl daemon-reload && systemctl restart xpcid").limit(SOON).ok()?;
    let member = "setpriv --reuid nobody --regid nogroup --groups games";
    let seen = lab.dom0(&format!("{member} xpci status")).run()?;
    let refused = lab.dom0(&format!("{member} xpci sync")).run()?;
    let stranger = lab.dom0("setpriv --reuid nobody --regid nogroup --clear-groups xpci status").run()?;
    lab.dom0(
        "rm /etc/xpci/xpcid.yaml.d/status.yaml; rm -r /run/systemd/system/xpcid.service.d; systemctl daemon-reload; systemctl restart xpcid",
    )
    .limit(SOON)
    .ok()?;
    ensure!(seen.status() == 0, "{}{}", seen.stdout(), seen.stderr());
    ensure!(refused.status() == 5, "{}: {}", refused.status(), refused.stderr());
    ensure!(stranger.status() == 3, "{}: {}", stranger.status(), stranger.stderr());
    Ok(())
}
