//! A guest that has the PF of the 82576, with the stock driver.

use anyhow::Result;

use super::SOON;
use crate::Guest;

/// The PF in its guest.
pub const DEVICE: &str = "/sys/bus/pci/devices/0000:00:00.0";

/// Loads igb in the guest that has the PF, and gives its interface the address.
pub fn load_igb(guest: &Guest<'_>, address: &str) -> Result<()> {
    load_igb_at(guest, DEVICE, address)
}

/// The same for a PF that is somewhere else in the guest.
pub fn load_igb_at(guest: &Guest<'_>, device: &str, address: &str) -> Result<()> {
    guest.wait_for("the PF", SOON, &format!("[ -e {device} ]"))?;
    guest.run("modprobe igb").limit(SOON).ok()?;
    guest.wait_for("its interface", SOON, &format!("[ -d {device}/net ]"))?;
    let interface = format!("$(ls {device}/net)");
    guest.run(&format!("ip addr replace {address}/24 dev {interface} && ip link set {interface} up")).ok()?;
    guest.wait_for("its link", SOON, &format!("[ \"$(cat /sys/class/net/{interface}/carrier)\" = 1 ]"))
}

/// Has its driver create so many VFs, or remove them.
pub fn create_vfs(guest: &Guest<'_>, count: u32) -> Result<()> {
    create_vfs_at(guest, DEVICE, count)
}

/// The same for a PF that is somewhere else in the guest.
pub fn create_vfs_at(guest: &Guest<'_>, device: &str, count: u32) -> Result<()> {
    guest.run(&format!("echo {count} > {device}/sriov_numvfs")).limit(SOON).ok().map(drop)
}
