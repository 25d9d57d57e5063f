//! Functions that a guest has for good: it finds them again in its next domain, which xl lets run at once. P6.

use anyhow::{Result, ensure};
use xpci_tests::host::{SOON, VFS, state, status, xpci, xpci_fails};
use xpci_tests::{BareGuest, Lab};

const UUID: &str = "5f6e2a34-0d2b-4f0c-9f5e-3c1d7a9b1e57";
const SLOT: u32 = 6;

/// A guest that ends and is created again, or resets itself, has its function before its firmware looks for devices.
pub fn created_again(lab: &Lab) -> Result<()> {
    let mut guest = BareGuest::create(lab, "lasting", &[&format!("uuid=\"{UUID}\"")])?;
    xpci(lab, &format!("pci-attach --persist lasting 01:10.0@{SLOT}"))?;
    guest.start()?;
    has_it(&guest)?;
    lab.dom0("xl destroy lasting").limit(SOON).ok()?;
    lab.wait_for("the function to be held", SOON, "xpci pci-assignable-list | grep -q 01:10.0")?;
    let (exit, said) = xpci_fails(lab, "pci-assignable-remove 01:10.0")?;
    ensure!(exit == 5 && said.contains("guest 'lasting'") && said.contains(UUID), "{said}");
    guest.create_again()?;
    has_it(&guest)?;
    ensure!(state(lab, VFS[0])? == "attached", "{}", status(lab)?);
    guest.reset()?;
    has_it(&guest)?;
    let found = status(lab)?;
    ensure!(found["problems"].as_array().is_some_and(Vec::is_empty), "{found}");
    lab.dom0("[ -z \"$(ls /run/xpci/paused)\" ]").ok()?;
    let said = xpci(lab, "pci-list --persistent")?;
    ensure!(said.contains(VFS[0]) && said.contains("persistent for lasting"), "{said}");
    guest.destroy()?;
    lab.wait_for("the function to be held", SOON, "xpci pci-assignable-list | grep -q 01:10.0")?;
    xpci(lab, &format!("pci-detach --persistent {UUID} 01:10.0"))?;
    ensure!(xpci(lab, "pci-list --persistent")?.is_empty(), "it is persistent still");
    Ok(())
}

fn has_it(guest: &BareGuest<'_>) -> Result<()> {
    guest.tell(&format!("slot {SLOT:x}"))?;
    let id = guest.number("r 0 4")?;
    ensure!(id == 0x10ca_8086, "slot {SLOT:x} has {id:x}");
    // The firmware has placed it.
    let bar = guest.number("r 10 4")?;
    ensure!(bar & !0xf != 0, "BAR 0: {bar:x}");
    Ok(())
}
