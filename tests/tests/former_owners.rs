//! A hostile PV guest keeps a page of its VF's BAR mapped, and reads it after it has lost the VF. Xen cannot revoke that; xpci
//! gives the VF to no other owner while the guest exists.

use anyhow::{Context, Result, ensure};
use xpci_tests::host::state::{keep_running, kill_and_start, make_held};
use xpci_tests::host::{PF, SOON, VFS, guests, map_bar, prepare, state, wait_for_state, xpci, xpci_fails};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, Lab, Process, checks};

use crate::machines::{HOST, without_policies};

/// Status of the VF (Intel 82576 data sheet, VTSTATUS): link, speed, never all ones.
const STATUS: &str = "8";

pub struct FormerOwners<'a> {
    lab: &'a Lab,
    service: Process,
    hostile: Guest<'a>,
    next: Guest<'a>,
    page: Option<Process>,
    /// What the guest read while it had the VF.
    seen: Option<String>,
}

impl<'a> Scene<'a> for FormerOwners<'a> {
    const NAME: &'static str = "former_owners";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        // The lab's own policy trusts guests; here the default is shown.
        without_policies(lab)?;
        let service = prepare(lab)?;
        xpci(lab, &format!("vf create {PF} 2"))?;
        xpci(lab, "pci-assignable-add 01:10.0")?;
        let [hostile, next] = guests(lab, ["hostile", "next"])?;
        Ok(Self { lab, service, hostile, next, page: None, seen: None })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            a_guest_maps_its_vf_and_reads_a_register,
            it_still_reads_the_register_after_detach needs a_guest_maps_its_vf_and_reads_a_register,
            another_guest_does_not_get_the_vf needs a_guest_maps_its_vf_and_reads_a_register,
            dom0_does_not_get_the_vf_back needs a_guest_maps_its_vf_and_reads_a_register,
            a_killed_service_knows_the_former_owner needs a_guest_maps_its_vf_and_reads_a_register,
            another_guest_gets_the_vf_when_the_hostile_one_has_ended
                needs a_guest_maps_its_vf_and_reads_a_register,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        keep_running(self.lab, &mut self.service)?;
        make_held(self.lab, VFS[0])
    }
}

impl FormerOwners<'_> {
    /// The register, as the hostile guest reads it through the page that it keeps.
    fn read(&self) -> Result<String> {
        let page = self.page.as_ref().context("no page is mapped")?;
        let before = page.output_so_far().len();
        page.write(format!("{STATUS}\n").as_bytes())?;
        page.wait_for(SOON, |output| output[before..].contains('\n'))?;
        Ok(page.output_so_far()[before..].trim().to_owned())
    }
}

fn refused(scene: &FormerOwners<'_>, command: &str) -> Result<()> {
    let (exit, said) = xpci_fails(scene.lab, command)?;
    ensure!(exit == 5 && said.contains("'hostile'"), "{command}: {exit}: {said}");
    ensure!(said.contains("--trust-former-owner"), "{command}: {said}");
    ensure!(state(scene.lab, VFS[0])? == "held", "{command}");
    Ok(())
}

fn a_guest_maps_its_vf_and_reads_a_register(scene: &mut FormerOwners<'_>) -> Result<()> {
    xpci(scene.lab, "pci-attach hostile 01:10.0")?;
    let page = map_bar(&scene.hostile, "0000:00:00.0")?;
    scene.page = Some(page);
    let seen = scene.read()?;
    ensure!(seen.len() == 8 && seen != "ffffffff", "{seen}");
    scene.seen = Some(seen);
    Ok(())
}

fn it_still_reads_the_register_after_detach(scene: &mut FormerOwners<'_>) -> Result<()> {
    xpci(scene.lab, "pci-detach --force hostile 01:10.0")?;
    wait_for_state(scene.lab, VFS[0], "held")?;
    // What Xen does; should it ever end the mapping, the program dies, and the rule can go.
    let seen = scene.read()?;
    ensure!(seen != "ffffffff", "the mapping reads all ones");
    Ok(())
}

fn another_guest_does_not_get_the_vf(scene: &mut FormerOwners<'_>) -> Result<()> {
    make_held(scene.lab, VFS[0])?;
    refused(scene, "pci-attach next 01:10.0")
}

fn dom0_does_not_get_the_vf_back(scene: &mut FormerOwners<'_>) -> Result<()> {
    make_held(scene.lab, VFS[0])?;
    refused(scene, "pci-assignable-remove 01:10.0")
}

fn a_killed_service_knows_the_former_owner(scene: &mut FormerOwners<'_>) -> Result<()> {
    make_held(scene.lab, VFS[0])?;
    kill_and_start(scene.lab, &mut scene.service)?;
    refused(scene, "pci-attach next 01:10.0")
}

fn another_guest_gets_the_vf_when_the_hostile_one_has_ended(scene: &mut FormerOwners<'_>) -> Result<()> {
    make_held(scene.lab, VFS[0])?;
    scene.lab.dom0("xl destroy hostile").ok()?;
    scene.lab.wait_for("the hostile guest's end", SOON, "! xl domid hostile")?;
    xpci(scene.lab, "pci-attach next 01:10.0")?;
    scene.next.wait_for("the VF", SOON, "[ -e /sys/bus/pci/devices/0000:00:00.0/resource ]")
}
