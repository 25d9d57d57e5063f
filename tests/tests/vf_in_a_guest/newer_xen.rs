//! The same spine on the newer Xen: attach, traffic, detach, nothing left; then an HVM guest. And what the lab promises of itself.

use anyhow::{Result, ensure};
use xpci_tests::host::events::offers_pirqs;
use xpci_tests::host::state::{keep_running, make_attached, make_held};
use xpci_tests::host::{PF, SOON, VFS, guest, is_held, nothing_remains, owner, prepare, set_mac, xpci};
use xpci_tests::scenes::{Check, Machine, Scene};
use xpci_tests::{BareGuest, Guest, Lab, Process, checks};

use super::{MACS, traffic};
use crate::beside_xl::xl_refuses;
use crate::hvm::events::two_vectors;
use crate::lab_smoke;
use crate::machines::NEWER_HOST;

pub struct NewerXen<'a> {
    lab: &'a Lab,
    service: Process,
    one: Guest<'a>,
}

impl<'a> Scene<'a> for NewerXen<'a> {
    const NAME: &'static str = "newer_xen";
    const MACHINE: &'static Machine = &NEWER_HOST;

    fn set_up(lab: &'a Lab) -> Result<Self> {
        lab_smoke::vfs(lab)?;
        let service = prepare(lab)?;
        xpci(lab, &format!("vf create {PF} 2"))?;
        xpci(lab, "pci-assignable-add 01:10.0")?;
        set_mac(lab, 0, MACS[0])?;
        Ok(Self { lab, service, one: guest(lab, "one")? })
    }

    fn checks() -> Vec<Check<Self>> {
        checks![
            xen_4_20_tells_its_version_and_passes_devices_through,
            dom0_runs_commands_and_tells_how_they_ended,
            dom0_takes_and_gives_files,
            a_device_is_pulled_out_and_put_back,
            the_stock_driver_uses_a_persistent_vf,
            a_persistent_function_is_listed_by_the_guests_uuid needs the_stock_driver_uses_a_persistent_vf,
            a_detached_function_is_held_and_nothing_of_it_remains,
            an_hvm_guest_finds_the_function_both_ways_and_reaches_its_registers,
            an_hvm_guest_takes_events_where_its_configuration_allows_that,
            a_function_that_is_given_back_is_dom0s,
            xl_refuses_what_xpcid_holds,
        ]
    }

    fn restore(&mut self) -> Result<()> {
        keep_running(self.lab, &mut self.service)?;
        self.lab.dom0("xl domid bare || exit 0; xl destroy bare").ok()?;
        make_held(self.lab, VFS[0])
    }
}

fn xen_4_20_tells_its_version_and_passes_devices_through(scene: &mut NewerXen<'_>) -> Result<()> {
    lab_smoke::version(scene.lab)
}

fn dom0_runs_commands_and_tells_how_they_ended(scene: &mut NewerXen<'_>) -> Result<()> {
    lab_smoke::commands(scene.lab)
}

fn dom0_takes_and_gives_files(scene: &mut NewerXen<'_>) -> Result<()> {
    lab_smoke::files(scene.lab)
}

fn a_device_is_pulled_out_and_put_back(scene: &mut NewerXen<'_>) -> Result<()> {
    lab_smoke::hotplug(scene.lab)
}

fn the_stock_driver_uses_a_persistent_vf(scene: &mut NewerXen<'_>) -> Result<()> {
    xpci(scene.lab, "pci-attach --persist one 01:10.0")?;
    traffic(scene.lab, &scene.one, 0, "10.9.9.11")
}

fn a_persistent_function_is_listed_by_the_guests_uuid(scene: &mut NewerXen<'_>) -> Result<()> {
    let lab = scene.lab;
    let vm = lab.dom0(&format!("xenstore-read /local/domain/{}/vm", scene.one.domid()?)).ok()?;
    let uuid = vm.trim().trim_start_matches("/vm/");
    let said = xpci(lab, &format!("pci-list --persistent {uuid}"))?;
    ensure!(said.contains(VFS[0]), "{uuid}: {said}");
    Ok(())
}

fn a_detached_function_is_held_and_nothing_of_it_remains(scene: &mut NewerXen<'_>) -> Result<()> {
    let lab = scene.lab;
    make_attached(lab, &scene.one, VFS[0], None)?;
    xpci(lab, "pci-detach one 01:10.0")?;
    ensure!(is_held(lab, VFS[0])?, "{}", owner(lab, VFS[0])?);
    nothing_remains(lab, &scene.one)
}

/// In short; the scene `hvm` has more, on Xen 4.17.
fn an_hvm_guest_finds_the_function_both_ways_and_reaches_its_registers(
    scene: &mut NewerXen<'_>,
) -> Result<()> {
    let lab = scene.lab;
    make_held(lab, VFS[0])?;
    xpci(lab, "hvm acpi-table /guest/mcfg.bin")?;
    let mut bare = BareGuest::create(lab, "bare", &["acpi_firmware=\"/guest/mcfg.bin\""])?;
    xpci(lab, "pci-attach bare 01:10.0@6")?;
    bare.start()?;
    bare.tell("slot 6")?;
    ensure!(bare.number("r 0 4")? == 0x10ca_8086, "the guest reads {}", bare.tell("r 0 4")?);
    let bar = bare.number("r 10 4")? & !0xf;
    let status = bare.number(&format!("m {:x} 4", bar + 8))?;
    ensure!(bar != 0 && status != u32::MAX && status & 2 != 0, "BAR 0 at {bar:x}, link status {status:x}");
    bare.tell("ecam fe000000")?;
    ensure!(bare.tell("same")? == "0", "both ways to config space differ");
    ensure!(bare.number("e 100 4")? == 0x1501_0001, "AER: {}", bare.tell("e 100 4")?);
    bare.destroy()?;
    lab.wait_for("the function to be held again", SOON, "xpci pci-assignable-list | grep -q 01:10.0")?;
    ensure!(is_held(lab, VFS[0])?, "{}", owner(lab, VFS[0])?);
    lab.dom0("[ -z \"$(ls /run/xpci/ioreq-servers)\" ] && [ -z \"$(ls /run/xpci/images)\" ]").ok().map(drop)
}

/// Xen 4.20 offers it only to guests with `hvm_pirq=1`.
fn an_hvm_guest_takes_events_where_its_configuration_allows_that(scene: &mut NewerXen<'_>) -> Result<()> {
    let lab = scene.lab;
    for (offered, line) in [(false, "vcpus=2"), (true, "hvm_pirq=1")] {
        make_held(lab, VFS[0])?;
        let mut bare = BareGuest::create(lab, "bare", &[line])?;
        xpci(lab, "pci-attach bare 01:10.0")?;
        bare.start()?;
        ensure!(offers_pirqs(&bare)? == offered, "with {line} Xen says otherwise");
        if offered {
            two_vectors(&bare)?;
        }
        bare.destroy()?;
        lab.wait_for("the function to be held again", SOON, "xpci pci-assignable-list | grep -q 01:10.0")?;
    }
    Ok(())
}

fn a_function_that_is_given_back_is_dom0s(scene: &mut NewerXen<'_>) -> Result<()> {
    make_held(scene.lab, VFS[0])?;
    xpci(scene.lab, "pci-assignable-remove 01:10.0")?;
    ensure!(owner(scene.lab, VFS[0])? == "d0", "{}", owner(scene.lab, VFS[0])?);
    Ok(())
}

fn xl_refuses_what_xpcid_holds(scene: &mut NewerXen<'_>) -> Result<()> {
    xl_refuses(scene.lab, "one", VFS[0])
}
