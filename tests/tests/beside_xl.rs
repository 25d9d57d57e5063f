//! xl beside xpci: it refuses what xpcid holds. Where the settings let it, it takes that for its guest, and xpcid neither fights that nor
//! touches the function.

use anyhow::{Result, ensure};
use xpci_tests::host::state::{keep_running, make_attached, make_held, no_problems, stop};
use xpci_tests::host::{
    PF, SOON, VFS, bring_up, guests, is_held, nothing_remains, owner, ping, prepare, start_service, state,
    wait_for_state, xpci, xpci_fails,
};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, GuestConfig, Lab, Process, checks};

use crate::machines::HOST;

/// A place with room for the memory of a guest.
const CHECKPOINTS: &str = "/run/checkpoints";
const ADDRESS: &str = "10.9.9.21";

pub struct BesideXl<'a> {
    lab: &'a Lab,
    service: Process,
    one: Guest<'a>,
    two: Guest<'a>,
}

impl<'a> Scene<'a> for BesideXl<'a> {
    const NAME: &'static str = "beside_xl";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        let service = prepare(lab)?;
        xpci(lab, &format!("vf create {PF} 2"))?;
        xpci(lab, &format!("pci-assignable-add {}", VFS[0]))?;
        let [one, two] = guests(lab, ["one", "two"])?;
        Ok(Self { lab, service, one, two })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            xl_refuses_what_xpcid_holds,
            a_guest_that_xl_saves_with_its_vf_is_named_until_it_is_started_anew,
            a_guest_that_runs_on_after_a_checkpoint_by_xl_keeps_its_vf,
            the_status_names_the_guest_for_which_xl_took_a_held_function,
            what_xls_guest_has_goes_to_nobody_and_stays_its needs the_status_names_the_guest_for_which_xl_took_a_held_function,
            what_xl_has_detached_is_held_again_when_it_is_cleared
                needs the_status_names_the_guest_for_which_xl_took_a_held_function,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        keep_running(self.lab, &mut self.service)
    }
}

fn xl_refuses_what_xpcid_holds(scene: &mut BesideXl<'_>) -> Result<()> {
    xl_refuses(scene.lab, "two", VFS[0])
}

/// xl gives the guest the function neither while xpcid holds it, nor because it was asked before.
pub fn xl_refuses(lab: &Lab, guest: &str, vf: &str) -> Result<()> {
    make_held(lab, vf)?;
    let node = format!("xenstore-read /libxl/pci/{}/domid", vf.replace([':', '.'], "-"));
    // Each time it refuses, xl removes what it goes by.
    for _ in 0..3 {
        lab.wait_for("what xl goes by", SOON, &node)?;
        let refused = lab.dom0(&format!("xl pci-attach {guest} {vf}")).limit(SOON).run()?;
        ensure!(
            refused.status() != 0 && refused.stderr().contains("is not assignable"),
            "{}",
            refused.stderr()
        );
        ensure!(is_held(lab, vf)?, "{}", owner(lab, vf)?);
    }
    xpci(lab, &format!("pci-assignable-remove {vf}"))?;
    lab.wait_for("xl to be free to take it", SOON, &format!("! {node}"))
}

/// The first guest uses the first VF.
fn one_uses_it(scene: &BesideXl<'_>) -> Result<()> {
    make_attached(scene.lab, &scene.one, VFS[0], None)?;
    bring_up(&scene.one, ADDRESS)?;
    ping(&scene.one, "10.9.9.1")
}

/// Runs with room for the memory of a guest.
fn with_room(lab: &Lab, body: impl FnOnce(&str) -> Result<()>) -> Result<()> {
    lab.dom0(&format!("mkdir -p {CHECKPOINTS} && mount -t tmpfs -o size=400m checkpoints {CHECKPOINTS}"))
        .ok()?;
    let done = body(&format!("{CHECKPOINTS}/one.save"));
    let ended = lab.dom0(&format!("umount {CHECKPOINTS}")).ok();
    done.and(ended.map(drop))
}

fn the_status_says(lab: &Lab, what: &str) -> Result<()> {
    lab.wait_for("the status to say so", SOON, &format!("xpci status | grep -qF \"{what}\""))
}

/// The restored guest is not let run: it would only hang.
fn a_guest_that_xl_saves_with_its_vf_is_named_until_it_is_started_anew(
    scene: &mut BesideXl<'_>,
) -> Result<()> {
    one_uses_it(scene)?;
    let lab = scene.lab;
    let said = format!("was suspended with {}, not by 'xpci save'", VFS[0]);
    with_room(lab, |checkpoint| {
        lab.dom0(&format!("xl save one {checkpoint}")).limit(SOON * 4).ok()?;
        the_status_says(lab, &said)?;
        let history = xpci(lab, &format!("aer history {}", VFS[0]))?;
        ensure!(history.contains("its guest was suspended with it"), "{history}");
        wait_for_state(lab, VFS[0], "held")?;
        ensure!(is_held(lab, VFS[0])?, "{}", owner(lab, VFS[0])?);
        lab.dom0(&format!("xl restore -p {checkpoint}")).limit(SOON * 4).ok()?;
        let restored = scene.one.domid()?;
        the_status_says(lab, &format!("'one' (domain {restored}) {said}, as an earlier domain"))?;
        lab.dom0("xl destroy one").ok().map(drop)
    })?;
    scene.one = lab.guest(&GuestConfig::pv("one"))?;
    lab.wait_for("no problem", SOON, &format!("! xpci status | grep -qF \"{said}\""))?;
    no_problems(lab)
}

fn a_guest_that_runs_on_after_a_checkpoint_by_xl_keeps_its_vf(scene: &mut BesideXl<'_>) -> Result<()> {
    one_uses_it(scene)?;
    // With MSI-X in use Linux would crash: it writes to the table, which Xen makes read-only for it.
    scene.one.run("modprobe -r igbvf").ok()?;
    let (lab, one) = (scene.lab, scene.one.domid()?);
    with_room(lab, |checkpoint| {
        lab.dom0(&format!("xl save -c one {checkpoint}")).limit(SOON * 4).ok()?;
        ensure!(scene.one.domid()? == one, "it is another domain");
        the_status_says(lab, "and runs on with its functions")?;
        ensure!(owner(lab, VFS[0])? == format!("d{one}"), "{}", owner(lab, VFS[0])?);
        // Its driver starts again, and it releases the function as ever.
        bring_up(&scene.one, ADDRESS)?;
        ping(&scene.one, "10.9.9.1")?;
        xpci(lab, &format!("pci-detach one {}", VFS[0]))?;
        nothing_remains(lab, &scene.one)?;
        // This is a checkpoint without functions, and takes the place of the other.
        lab.dom0(&format!("rm {checkpoint} && xl save -c one {checkpoint}")).limit(SOON * 4).ok()?;
        lab.wait_for("no problem", SOON, "! xpci status | grep -qF 'was suspended with'")
    })
}

fn the_status_names_the_guest_for_which_xl_took_a_held_function(scene: &mut BesideXl<'_>) -> Result<()> {
    let (lab, two) = (scene.lab, scene.two.domid()?);
    lab.push(b"keep-from-libxl: false\n", "/etc/xpci/xpcid.yaml")?;
    stop(&scene.service)?;
    scene.service = start_service(lab)?;
    make_held(lab, VFS[0])?;
    lab.dom0(&format!("xl pci-attach two {}", VFS[0])).limit(SOON).ok()?;
    ensure!(owner(lab, VFS[0])? == format!("d{two}"), "{}", owner(lab, VFS[0])?);
    let said = format!("{} belongs to 'two' (domain {two}), through xen-pciback", VFS[0]);
    lab.wait_for("the status to say so", SOON, &format!("xpci status | grep -qF \"{said}\""))
}

fn what_xls_guest_has_goes_to_nobody_and_stays_its(scene: &mut BesideXl<'_>) -> Result<()> {
    let (lab, two) = (scene.lab, scene.two.domid()?);
    let function = VFS[0];
    scene.two.wait_for("the function", SOON, "[ -e /sys/bus/pci/devices/0000:00:00.0 ]")?;
    // What its driver sets, and a reset would clear.
    let master = format!("setpci -s {function} COMMAND=4:4 && setpci -s {function} COMMAND");
    let before = lab.dom0(&master).ok()?;
    for command in [
        format!("pci-attach {} {function}", scene.one.domid()?),
        format!("pci-assignable-remove {function}"),
        format!("quarantine clear {function}"),
    ] {
        let (exit, said) = xpci_fails(lab, &command)?;
        ensure!(exit == 5 || exit == 6, "{command}: {exit}: {said}");
        ensure!(owner(lab, function)? == format!("d{two}"), "{command}: {}", owner(lab, function)?);
    }
    let after = lab.dom0(&format!("setpci -s {function} COMMAND")).ok()?;
    ensure!(before == after, "Command was {before}, and is {after}");
    Ok(())
}

fn what_xl_has_detached_is_held_again_when_it_is_cleared(scene: &mut BesideXl<'_>) -> Result<()> {
    let lab = scene.lab;
    ensure!(state(lab, VFS[0])? == "quarantined", "{}", state(lab, VFS[0])?);
    lab.dom0(&format!("xl pci-detach two {}", VFS[0])).limit(SOON).ok()?;
    xpci(lab, &format!("quarantine clear {}", VFS[0]))?;
    wait_for_state(lab, VFS[0], "held")?;
    ensure!(is_held(lab, VFS[0])?, "{}", owner(lab, VFS[0])?);
    Ok(())
}
