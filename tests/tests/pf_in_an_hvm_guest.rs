//! The stock igb of a stock Linux that is an HVM guest has the PF and creates VFs by sysfs; the stock igbvf of a PV guest uses one of them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::pf::{create_vfs_at, load_igb_at};
use xpci_tests::host::state::{keep_running, kill_and_start, no_problems};
use xpci_tests::host::{
    PF, SOON, VFS, bring_up, guest, owner, ping, start_service, state, wait_for_state, xpci,
};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, GuestConfig, Lab, Process, checks};

use crate::machines::HOST;

const POLICY: &str = "match: {vendor: 8086}\npermit: [physical-function, untrusted-vf]\n\
                      virtual-functions: {by-guest: 3}\n";
/// Through decompression, the firmware's tables and all drivers, under an emulated Xen.
const BOOT_LIMIT: Duration = Duration::from_secs(400);
/// Where the PF is in its guest.
const DEVICE: &str = "/sys/bus/pci/devices/0000:00:05.0";
const FIRST_VF: &str = "/sys/bus/pci/devices/0000:00:05.1";
const PFS: &str = "10.9.9.1";
const USERS: &str = "10.9.9.11";

pub struct PfInAnHvmGuest<'a> {
    lab: &'a Lab,
    service: Process,
    /// The HVM guest with the PF, when it has booted.
    special: Option<Guest<'a>>,
    /// The PV guest with a VF.
    user: Guest<'a>,
}

impl<'a> Scene<'a> for PfInAnHvmGuest<'a> {
    const NAME: &'static str = "pf_in_an_hvm_guest";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        lab.dom0("modprobe xen-pciback && modprobe pci-pf-stub").ok()?;
        lab.push(POLICY.as_bytes(), "/etc/xpci/policies/pf.yaml")?;
        let service = start_service(lab)?;
        xpci(lab, "pci-assignable-add 01:00.0")?;
        xpci(lab, "hvm acpi-table /guest/mcfg.bin")?;
        let user = guest(lab, "user")?;
        Ok(Self { lab, service, special: None, user })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            the_stock_driver_of_an_hvm_guest_finds_a_pf_that_can_have_vfs,
            vfs_that_the_hvm_guest_creates_are_held_on_the_host
                needs the_stock_driver_of_an_hvm_guest_finds_a_pf_that_can_have_vfs,
            a_stock_driver_in_a_pv_guest_talks_to_the_pf_in_the_hvm_guest
                needs vfs_that_the_hvm_guest_creates_are_held_on_the_host,
            the_service_is_killed_and_traffic_between_them_goes_on
                needs a_stock_driver_in_a_pv_guest_talks_to_the_pf_in_the_hvm_guest,
            vfs_that_the_hvm_guest_removes_are_taken_from_their_guests
                needs a_stock_driver_in_a_pv_guest_talks_to_the_pf_in_the_hvm_guest,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        keep_running(self.lab, &mut self.service)
    }
}

impl<'a> PfInAnHvmGuest<'a> {
    fn special(&self) -> Result<&Guest<'a>> {
        self.special.as_ref().context("the guest with the PF is not there")
    }
}

fn the_stock_driver_of_an_hvm_guest_finds_a_pf_that_can_have_vfs(
    scene: &mut PfInAnHvmGuest<'_>,
) -> Result<()> {
    let lab = scene.lab;
    let config = GuestConfig::hvm("special").line("acpi_firmware=\"/guest/mcfg.bin\"");
    let special = lab.paused_guest(&config)?;
    xpci(lab, "pci-attach special 01:00.0@5")?;
    special.unpause(BOOT_LIMIT)?;
    ensure!(owner(lab, PF)? == format!("d{}", special.domid()?), "{}", owner(lab, PF)?);
    load_igb_at(&special, DEVICE, PFS)?;
    let total = special.run(&format!("cat {DEVICE}/sriov_totalvfs")).ok()?;
    ensure!(total.trim() == "3", "{total}");
    scene.special = Some(special);
    Ok(())
}

fn vfs_that_the_hvm_guest_creates_are_held_on_the_host(scene: &mut PfInAnHvmGuest<'_>) -> Result<()> {
    let (lab, special) = (scene.lab, scene.special()?);
    create_vfs_at(special, DEVICE, 2)?;
    let seen = special.run("ls /sys/bus/pci/devices").ok()?;
    let there = |number: u32| seen.contains(&format!("0000:00:05.{number}"));
    ensure!(there(1) && there(2) && !there(3), "{seen}");
    let class = special.run(&format!("cat {FIRST_VF}/class")).ok()?;
    ensure!(class.trim() == "0xff0000", "{class}");
    for vf in &VFS[..2] {
        wait_for_state(lab, vf, "held")?;
    }
    let listed = xpci(lab, "vf list 01:00.0")?;
    ensure!(listed.matches("untrusted: of a PF which domain").count() == 2, "{listed}");
    no_problems(lab)
}

fn a_stock_driver_in_a_pv_guest_talks_to_the_pf_in_the_hvm_guest(
    scene: &mut PfInAnHvmGuest<'_>,
) -> Result<()> {
    xpci(scene.lab, "pci-attach user 01:10.0")?;
    bring_up(&scene.user, USERS)?;
    ping(&scene.user, PFS)?;
    ping(scene.special()?, USERS)
}

fn the_service_is_killed_and_traffic_between_them_goes_on(scene: &mut PfInAnHvmGuest<'_>) -> Result<()> {
    let lab = scene.lab;
    let flow = scene.user.spawn(&format!("ping -c 20 -i 1 -w 60 {PFS}"))?;
    kill_and_start(lab, &mut scene.service)?;
    for address in [PF, VFS[0]] {
        ensure!(state(lab, address)? == "attached", "{address}: {}", state(lab, address)?);
    }
    let ended = flow.wait(SOON * 2)?;
    ensure!(ended.code == Some(0), "{ended:?}: {}", flow.output_so_far());
    let special = scene.special()?;
    // Of the VF too: the next process answers for it.
    let numvfs = special.run(&format!("cat {DEVICE}/sriov_numvfs && setpci -s 05.1 class_device.w")).ok()?;
    ensure!(numvfs.split_whitespace().eq(["2", "ff00"]), "{numvfs}");
    no_problems(lab)
}

fn vfs_that_the_hvm_guest_removes_are_taken_from_their_guests(scene: &mut PfInAnHvmGuest<'_>) -> Result<()> {
    let (lab, special) = (scene.lab, scene.special()?);
    create_vfs_at(special, DEVICE, 0)?;
    let gone = |function: &str| format!("[ ! -e /sys/bus/pci/devices/{function} ]");
    lab.wait_for("the VFs to be gone", SOON, &gone(VFS[0]))?;
    scene.user.wait_for("its VF to be gone", SOON, &gone("0000:00:00.0"))?;
    special.run(&gone("0000:00:05.1")).ok()?;
    ensure!(state(lab, PF)? == "attached", "{}", state(lab, PF)?);
    no_problems(lab)
}
