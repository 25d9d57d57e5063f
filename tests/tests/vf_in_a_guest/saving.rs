//! A guest that is saved and restored with its VF, or moves with it.

use anyhow::{Result, ensure};
use xpci_tests::host::state::{make_held, no_problems};
use xpci_tests::host::{SOON, VFS, bring_up, is_held, owner, ping, xpci, xpci_fails};

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

/// Within this host, as `xl migrate -s ''` does.
const MOVE: &str = "xpci migrate -s '' one 'xpci migrate-receive'";

pub fn a_guest_whose_move_fails_runs_on_with_its_vf(scene: &mut VfInAGuest<'_>) -> Result<()> {
    scene.one_uses_it()?;
    let (lab, one) = (scene.lab, &scene.one);
    make_held(lab, VFS[1])?;
    let before = one.domid()?;
    // That the guest is ready there is not heard any more.
    let receive = "xpci migrate-receive | head -n 1";
    let output = lab.dom0(&format!("xpci migrate -s '' one '{receive}'")).limit(SOON * 4).run()?;
    ensure!(output.status() == 1, "{}: {}", output.status(), output.stderr());
    ensure!(output.stderr().contains("runs on here and has its functions again"), "{}", output.stderr());
    ensure!(one.domid()? == before, "it is another domain");
    ensure!(owner(lab, VFS[0])? == format!("d{before}"), "{}", owner(lab, VFS[0])?);
    bring_up(one, ADDRESSES[0])?;
    ping(one, "10.9.9.1")?;
    lab.wait_for("no copy of the guest", SOON, "[ $(xl list | grep -c '^one ') = 1 ]")?;
    ensure!(is_held(lab, VFS[1])?, "{}", owner(lab, VFS[1])?);
    no_problems(lab)
}

pub fn a_guest_moves_to_another_vf_and_leaves_its_own(scene: &mut VfInAGuest<'_>) -> Result<()> {
    scene.one_uses_it()?;
    let (lab, one) = (scene.lab, &scene.one);
    make_held(lab, VFS[1])?;
    let before = one.domid()?;
    lab.dom0(MOVE).limit(SOON * 4).ok()?;
    one.wait_rebooted(SOON * 2)?;
    let now = one.domid()?;
    ensure!(owner(lab, VFS[1])? == format!("d{now}"), "{}", owner(lab, VFS[1])?);
    lab.wait_for("the domain that it was to end", SOON, &format!("! xl domname {before}"))?;
    ensure!(is_held(lab, VFS[0])?, "{}", owner(lab, VFS[0])?);
    // The guest's igbvf is still loaded and takes the other VF, with the guest's address, by itself.
    bring_up(one, ADDRESSES[0])?;
    ping(one, "10.9.9.1")?;
    no_problems(lab)?;
    // Two VFs have that address now: the second one gets its own again.
    xpci(lab, "pci-detach one 01:10.2")?;
    xpci(lab, "pci-assignable-remove --trust-former-owner 01:10.2")?;
    xpci(lab, "pci-assignable-add 01:10.2").map(drop)
}
