//! A guest that is saved and restored with its VF.

use anyhow::{Result, ensure};
use xpci_tests::host::state::no_problems;
use xpci_tests::host::{SOON, VFS, bring_up, is_held, owner, ping, xpci_fails};

use super::{ADDRESSES, VfInAGuest};

/// A place with room for the memory of a guest, and one with little.
const CHECKPOINT: &str = "/run/saved/one.save";
const SMALL: &str = "/run/small/one.save";

pub fn a_saved_guest_is_restored_with_its_vf_and_its_traffic(scene: &mut VfInAGuest<'_>) -> Result<()> {
    scene.one_uses_it()?;
    let (lab, one) = (scene.lab, &scene.one);
    lab.dom0("mkdir -p /run/saved && mount -t tmpfs -o size=400m saved /run/saved").ok()?;
    let said = lab.dom0(&format!("xpci save one {CHECKPOINT}")).limit(SOON * 4).ok()?;
    ensure!(said.contains(".xpci"), "{said}");
    ensure!(lab.dom0("xl domid one").run()?.status() != 0, "the domain is still there");
    ensure!(is_held(lab, VFS[0])?, "{}", owner(lab, VFS[0])?);
    let (code, text) = xpci_fails(lab, "pci-attach two 01:10.0")?;
    ensure!(code == 5 && text.contains("saved with it"), "{code}: {text}");
    lab.dom0(&format!("xpci restore {CHECKPOINT}")).limit(SOON * 4).ok()?;
    one.wait_rebooted(SOON * 2)?;
    ensure!(owner(lab, VFS[0])? == format!("d{}", one.domid()?), "{}", owner(lab, VFS[0])?);
    // The guest's igbvf is still loaded and takes the function by itself.
    bring_up(one, ADDRESSES[0])?;
    ping(one, "10.9.9.1")?;
    lab.dom0("umount /run/saved").ok()?;
    no_problems(lab)
}

pub fn a_guest_whose_save_fails_runs_on_with_its_vf(scene: &mut VfInAGuest<'_>) -> Result<()> {
    scene.one_uses_it()?;
    let (lab, one) = (scene.lab, &scene.one);
    let (code, text) = xpci_fails(lab, "save one /nowhere/one.save")?;
    ensure!(code == 5 && text.contains("/nowhere/one.save"), "{code}: {text}");
    ping(one, "10.9.9.1")?;
    lab.dom0("mkdir -p /run/small && mount -t tmpfs -o size=4m small /run/small").ok()?;
    let output = lab.dom0(&format!("xpci save one {SMALL}")).limit(SOON * 4).run()?;
    ensure!(output.status() == 1, "{}: {}", output.status(), output.stderr());
    ensure!(output.stderr().contains("has its functions again"), "{}", output.stderr());
    ensure!(lab.dom0(&format!("[ ! -e {SMALL}.xpci ]")).run()?.status() == 0, "what the guest had is left");
    ensure!(owner(lab, VFS[0])? == format!("d{}", one.domid()?), "{}", owner(lab, VFS[0])?);
    bring_up(one, ADDRESSES[0])?;
    ping(one, "10.9.9.1")?;
    lab.dom0("umount /run/small").ok()?;
    no_problems(lab)
}
