//! xl beside xpci: it refuses what xpcid holds. Where the settings let it, it takes that for its guest, and xpcid neither fights that nor
//! touches the function.

use anyhow::{Result, ensure};
use xpci_tests::host::state::{keep_running, make_held, stop};
use xpci_tests::host::{
    PF, SOON, VFS, guests, is_held, owner, prepare, start_service, state, wait_for_state, xpci, xpci_fails,
};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, Lab, Process, checks};

use crate::machines::HOST;

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
