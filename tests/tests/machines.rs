//! The machines of the lab tests, and how a scene's machine is cleaned for the next one.

use crate::lab_smoke::a_panic_leaves_logs_and_no_qemu;
use crate::vf;
use anyhow::Result;
use xpci_tests::host::{SOON, VFS, builder, start_service};
use xpci_tests::scenes::Machine;
use xpci_tests::{Builder, Devices, Lab, XenVersion};

/// VFs of the NVMe controller: more than fit below one device number, so that their functions need ARI.
pub const MANY: u16 = 64;
/// A virtio-net without MSI-X, `e1`.
pub const WITHOUT_MSIX: &str = "0000:04:00.0";
/// A virtio-net that is for being pulled out, `e2` behind port `rp5`.
pub const REMOVABLE: &str = "0000:05:00.0";
/// QEMU's words for it.
pub const REMOVABLE_DEVICE: &str = "virtio-net-pci,id=e2,vectors=0,bus=rp5";

/// Xen 4.17 with everything that scenes without devices of their own need.
pub static HOST: Machine = Machine {
    name: "host",
    builder: host,
    clean,
    end: Some(("lab_smoke", "a_panic_leaves_logs_and_no_qemu", a_panic_leaves_logs_and_no_qemu)),
};
/// The same on Xen 4.20.
pub static NEWER_HOST: Machine = Machine { name: "newer-host", builder: newer_host, clean, end: None };

fn devices() -> Devices {
    let first = Devices::none().igb("igb0").device("virtio-net-pci,id=e0,aer=on").nvme("nvme0", MANY);
    first.device("virtio-net-pci,id=e1,vectors=0").device("virtio-net-pci,id=e2,vectors=0")
}

fn host() -> Result<Builder> {
    Ok(builder()
        .program("contract", "/usr/bin/contract")
        .program("forget", "/usr/sbin/forget")
        .guest_program("frontend")
        .guest_program("keep-page")
        .guest_program("mailbox")
        .hvm_guests()
        .devices(devices()))
}

fn newer_host() -> Result<Builder> {
    Ok(builder().xen(XenVersion::V4_20).hvm_guests().devices(devices()))
}

/// What takes the place of the policies that are shipped, for scenes that compare with the built-in rules.
const SHIPPED: &str = "/usr/share/xpci/policies";

/// Puts the shipped policies aside; `clean` brings them back.
pub fn without_policies(lab: &Lab) -> Result<()> {
    lab.dom0(&format!("mv {SHIPPED} {SHIPPED}.aside")).ok().map(drop)
}

/// Destroys all guests. One that ends by itself meanwhile makes `xl destroy` fail: what counts is that none is left.
pub fn destroy_guests(lab: &Lab) -> Result<()> {
    lab.wait_for(
        "guests to be gone",
        SOON,
        "xl list | awk 'NR > 2 {print $1}' | while read name; do xl destroy $name; done; [ $(xl list | wc -l) = 2 ]",
    )
}

/// Ends guests and the service, gives every function back to dom0 and forgets what the service has on disk.
pub fn clean(lab: &Lab) -> Result<()> {
    lab.wait_for("the end of xpcid", SOON, "! pidof xpcid")?;
    let service = start_service(lab)?;
    destroy_guests(lab)?;
    lab.wait_for(
        "functions to be held",
        SOON,
        "! xpci status | grep -qE '(attached|attaching|detaching|resetting)'",
    )?;
    lab.dom0(
        "xpci status | awk '$2 == \"quarantined\" {print $1}' | while read function; do xpci quarantine clear $function; done",
    )
    .ok()?;
    lab.dom0("held=$(xpci pci-assignable-list | grep -oE '^[0-9a-f]{4}:[0-9a-f:.]+'); [ -z \"$held\" ] || xpci pci-assignable-remove --force $held")
        .limit(SOON * 2)
        .ok()?;
    service.signal(15)?;
    service.wait(SOON)?;
    VFS.iter().try_for_each(|vf| vf::clear_unknown(lab, vf))?;
    lab.dom0(
        "for module in igbvf igb nvme 8021q aer_inject pci-stub pci-pf-stub; do modprobe -r $module; done",
    )
    .limit(SOON)
    .ok()?;
    lab.dom0(&format!(
        "rm -rf /etc/xpci /var/lib/xpci /run/xpci; [ ! -e {SHIPPED}.aside ] || mv {SHIPPED}.aside {SHIPPED}"
    ))
    .ok()
    .map(drop)
}
