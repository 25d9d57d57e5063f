//! Functions that a guest has persistently: it finds them again in its next domain, which xl lets run at once.

use anyhow::{Context, Result, ensure};
use xpci_tests::BareGuest;
use xpci_tests::host::state::{make_held, no_problems};
use xpci_tests::host::{SOON, VFS, state, status, xpci, xpci_fails};

use super::Hvm;

pub const UUID: &str = "5f6e2a34-0d2b-4f0c-9f5e-3c1d7a9b1e57";
const SLOT: u32 = 6;

/// A guest that ends and is created again has its function before its firmware looks for devices.
pub fn the_next_domain_has_its_persistent_function(scene: &mut Hvm<'_>) -> Result<()> {
    let lab = scene.lab;
    scene.one.take().map_or(Ok(()), BareGuest::destroy)?;
    make_held(lab, VFS[0])?;
    let mut guest = BareGuest::create_restarted(lab, "lasting", &[&format!("uuid=\"{UUID}\"")])?;
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
    scene.one = Some(guest);
    Ok(())
}

pub fn a_guest_that_resets_itself_has_its_persistent_function(scene: &mut Hvm<'_>) -> Result<()> {
    let lab = scene.lab;
    let mut guest = scene.one.take().context("the bare guest is gone")?;
    guest.reset()?;
    has_it(&guest)?;
    no_problems(lab)?;
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
