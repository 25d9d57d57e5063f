//! The stock igb of a PV guest has the PF and creates VFs by sysfs; the stock igbvf of two other guests use one each, and talk to the PF
//! through the card's own mailbox.

use anyhow::{Result, ensure};
use xpci_tests::host::pf::{DEVICE, create_vfs, load_igb};
use xpci_tests::host::state::{keep_running, kill_and_start, no_problems};
use xpci_tests::host::{
    PF, SOON, VFS, bring_up, guests, owner, ping, start_service, state, wait_for_state, xpci, xpci_fails,
};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{Guest, Lab, Process, checks};

use crate::machines::HOST;

const POLICY: &str = "match: {vendor: 8086}\npermit: [physical-function, untrusted-vf]\n\
                      virtual-functions: {by-guest: 3}\nmailbox: guest\n";
/// The addresses of the PF and of two VFs in their guests.
const PFS: &str = "10.9.9.1";
const ADDRESSES: [&str; 2] = ["10.9.9.11", "10.9.9.12"];
pub struct PfInAGuest<'a> {
    lab: &'a Lab,
    service: Process,
    /// The guest with the PF.
    special: Guest<'a>,
    /// Guests with a VF each.
    users: [Guest<'a>; 2],
}

impl<'a> Scene<'a> for PfInAGuest<'a> {
    const NAME: &'static str = "pf_in_a_guest";
    const MACHINE: &'static Machine = &HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        lab.dom0("modprobe xen-pciback && modprobe pci-pf-stub").ok()?;
        lab.push(POLICY.as_bytes(), "/etc/xpci/policies/pf.yaml")?;
        let service = start_service(lab)?;
        xpci(lab, "pci-assignable-add 01:00.0")?;
        let [special, user, other] = guests(lab, ["special", "user", "other"])?;
        Ok(Self { lab, service, special, users: [user, other] })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            the_stock_driver_finds_a_pf_that_can_have_vfs,
            vfs_that_the_guest_creates_are_held_on_the_host
                needs the_stock_driver_finds_a_pf_that_can_have_vfs,
            stock_drivers_in_other_guests_talk_to_the_pf_in_its_guest_and_to_each_other
                needs vfs_that_the_guest_creates_are_held_on_the_host,
            the_guests_exchange_data_objects_across_a_kill_of_the_service
                needs stock_drivers_in_other_guests_talk_to_the_pf_in_its_guest_and_to_each_other,
            the_service_is_killed_and_traffic_goes_on
                needs stock_drivers_in_other_guests_talk_to_the_pf_in_its_guest_and_to_each_other,
            a_reboot_of_the_guest_with_the_pf_leaves_vfs_with_their_guests
                needs stock_drivers_in_other_guests_talk_to_the_pf_in_its_guest_and_to_each_other,
            vfs_that_the_guest_removes_are_taken_from_their_guests
                needs stock_drivers_in_other_guests_talk_to_the_pf_in_its_guest_and_to_each_other,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        keep_running(self.lab, &mut self.service)
    }
}

fn the_stock_driver_finds_a_pf_that_can_have_vfs(scene: &mut PfInAGuest<'_>) -> Result<()> {
    let driver = scene.lab.dom0(&format!("basename $(readlink /sys/bus/pci/devices/{PF}/driver)")).ok()?;
    ensure!(driver.trim() == "pci-pf-stub", "{driver}");
    xpci(scene.lab, "pci-attach --persist special 01:00.0")?;
    load_igb(&scene.special, PFS)?;
    let total = scene.special.run(&format!("cat {DEVICE}/sriov_totalvfs")).ok()?;
    ensure!(total.trim() == "3", "{total}");
    Ok(())
}

fn vfs_that_the_guest_creates_are_held_on_the_host(scene: &mut PfInAGuest<'_>) -> Result<()> {
    let lab = scene.lab;
    create_vfs(&scene.special, 3)?;
    let seen = scene.special.run("ls /sys/bus/pci/devices").ok()?;
    ensure!(["0000:00:00.1", "0000:00:00.2", "0000:00:00.3"].iter().all(|vf| seen.contains(vf)), "{seen}");
    for vf in &VFS {
        wait_for_state(lab, vf, "held")?;
    }
    let listed = xpci(lab, "vf list 01:00.0")?;
    ensure!(listed.matches("untrusted: of a PF which domain").count() == 3, "{listed}");
    no_problems(lab)
}

fn stock_drivers_in_other_guests_talk_to_the_pf_in_its_guest_and_to_each_other(
    scene: &mut PfInAGuest<'_>,
) -> Result<()> {
    for ((user, vf), address) in scene.users.iter().zip(VFS).zip(ADDRESSES) {
        xpci(scene.lab, &format!("pci-attach {} {vf}", user.name()))?;
        bring_up(user, address)?;
        ping(user, PFS)?;
    }
    ping(&scene.users[0], ADDRESSES[1])?;
    ping(&scene.users[1], ADDRESSES[0])
}

/// The program of the lab's that uses a mailbox through sysfs, in a guest.
fn mailbox(guest: &Guest<'_>, words: &str) -> Result<String> {
    Ok(guest.run(&format!("/lab/mailbox 0000:00:00.0 {words}")).limit(SOON * 2).ok()?.trim().to_owned())
}

fn expect(guest: &Guest<'_>, words: &str, expected: &str) -> Result<()> {
    let found = mailbox(guest, words)?;
    ensure!(found == expected, "{words}: {found:?} instead of {expected:?}");
    Ok(())
}

fn the_guests_exchange_data_objects_across_a_kill_of_the_service(scene: &mut PfInAGuest<'_>) -> Result<()> {
    let (lab, pf, vf) = (scene.lab, &scene.special, &scene.users[0]);
    for guest in [pf, vf] {
        expect(guest, "discover", "0001:00\n5853:01\n5853:02")?;
    }
    expect(vf, "send 0 7 1 hello", "status 0")?;
    expect(pf, "receive", "vf 0 type 7 sequence 1 hello")?;
    // An object of which a part is written, a message that waits, and a response of which a part was read.
    expect(pf, "send 0 8 2 'to the vf'", "status 0")?;
    mailbox(vf, "write 0x15853 6 9 3")?;
    kill_and_start(lab, &mut scene.service)?;
    mailbox(vf, "write 3 0x636261")?;
    mailbox(vf, "go")?;
    expect(vf, "read", "00015853 00000004 00000000 00000003")?;
    kill_and_start(lab, &mut scene.service)?;
    expect(pf, "receive", "vf 0 type 9 sequence 3 abc")?;
    expect(vf, "receive", "vf 0 type 8 sequence 2 to the vf")?;
    let (_, said) = xpci_fails(lab, "mailbox receive 01:10.0")?;
    ensure!(said.contains("has the PF 0000:01:00.0"), "{said}");
    let user = vf.domid()?;
    let bell = format!("xenstore-read /local/domain/0/backend/xpci/{user}/0/mailbox-00-0");
    ensure!(lab.dom0(&bell).ok()?.trim() == "1", "the doorbell of the VF");
    no_problems(lab)
}

fn the_service_is_killed_and_traffic_goes_on(scene: &mut PfInAGuest<'_>) -> Result<()> {
    let flow = scene.users[0].spawn(&format!("ping -c 20 -i 1 -w 60 {PFS}"))?;
    kill_and_start(scene.lab, &mut scene.service)?;
    for address in [PF, VFS[0], VFS[1]] {
        ensure!(state(scene.lab, address)? == "attached", "{address}: {}", state(scene.lab, address)?);
    }
    let ended = flow.wait(SOON * 2)?;
    ensure!(ended.code == Some(0), "{ended:?}: {}", flow.output_so_far());
    let numvfs = scene.special.run(&format!("cat {DEVICE}/sriov_numvfs")).ok()?;
    ensure!(numvfs.trim() == "3", "{numvfs}");
    no_problems(scene.lab)
}

fn a_reboot_of_the_guest_with_the_pf_leaves_vfs_with_their_guests(scene: &mut PfInAGuest<'_>) -> Result<()> {
    let (lab, special) = (scene.lab, &scene.special);
    lab.dom0("xl reboot -F special").ok()?;
    special.wait_rebooted(SOON * 4)?;
    for (user, vf) in scene.users.iter().zip(VFS) {
        ensure!(state(lab, vf)? == "attached", "{}", state(lab, vf)?);
        ensure!(owner(lab, vf)? == format!("d{}", user.domid()?), "{}", owner(lab, vf)?);
    }
    load_igb(special, PFS)?;
    create_vfs(special, 3)?;
    // igbvf notices that the PF has started again, and starts again itself: what it sends before that is lost.
    let answers = format!("ping -c 1 -W 1 {PFS}");
    let answered =
        |user: &Guest<'_>| user.wait_for("the PF's driver to answer the VF again", SOON * 4, &answers);
    scene.users.iter().try_for_each(answered)?;
    ping(&scene.users[0], ADDRESSES[1])
}

fn vfs_that_the_guest_removes_are_taken_from_their_guests(scene: &mut PfInAGuest<'_>) -> Result<()> {
    create_vfs(&scene.special, 0)?;
    let gone = format!("[ ! -e /sys/bus/pci/devices/{} ]", VFS[0]);
    scene.lab.wait_for("the VFs to be gone", SOON, &gone)?;
    for user in &scene.users {
        user.wait_for("its VF to be gone", SOON, &format!("[ ! -e {DEVICE} ]"))?;
    }
    ensure!(state(scene.lab, PF)? == "attached", "{}", state(scene.lab, PF)?);
    no_problems(scene.lab)
}
