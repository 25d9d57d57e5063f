//! Functions that come and go while the guest runs. It drives the ACPI hotplug controller of its device model as an operating system does with
//! the methods of Xen's firmware: by the event, then the registers of what has come and what is to go, then that for ejecting.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use xpci_tests::host::state::{kill_and_start, make_held, no_problems};
use xpci_tests::host::{SOON, VFS, is_held, start_service, status, xpci, xpci_fails};
use xpci_tests::{BareGuest, Lab, Process};

use super::{BAR0, Hvm, SECOND, STATUS, interrupts};

/// Where a further function goes when nobody says where: the highest number that is free.
const NEXT: u32 = 0x1e;
const ID: u32 = 0x10ca_8086;
/// Registers of the controller, a bit for each device number.
const CAME: u32 = 0xae00;
const IS_TO_GO: u32 = 0xae04;
const EJECT: u32 = 0xae08;

fn id_at(one: &BareGuest<'_>, slot: u32) -> Result<u32> {
    one.tell(&format!("slot {slot:x}"))?;
    one.number("r 0 4")
}

/// Waits until the guest was notified once more.
fn notified(one: &BareGuest<'_>, before: u32) -> Result<()> {
    let end = Instant::now() + SOON;
    while one.number("hotplugs")? <= before {
        ensure!(Instant::now() < end, "no event; status {}", one.tell("i afe0 4")?);
    }
    Ok(())
}

fn bits(one: &BareGuest<'_>, register: u32) -> Result<u32> {
    one.number(&format!("i {register:x} 4"))
}

/// Attaches a function at a device number, and makes sure that the guest is notified and finds it there.
fn come(lab: &Lab, one: &BareGuest<'_>, function: &str, slot: u32) -> Result<()> {
    let before = one.number("hotplugs")?;
    ensure!(id_at(one, slot)? == u32::MAX, "something is at {slot:x}");
    xpci(lab, &format!("pci-attach one {function}@{slot:x}"))?;
    notified(one, before)?;
    ensure!(bits(one, CAME)? >> slot & 1 == 1, "what has come: {:x}", bits(one, CAME)?);
    ensure!(id_at(one, slot)? == ID, "{:x} has come", id_at(one, slot)?);
    Ok(())
}

/// Begins to detach a function, and waits until the guest is asked to let it go.
fn asked(lab: &Lab, one: &BareGuest<'_>, function: &str, slot: u32) -> Result<Process> {
    let before = one.number("hotplugs")?;
    let detach = lab.spawn(&format!("xpci pci-detach one {function}"))?;
    notified(one, before)?;
    ensure!(bits(one, IS_TO_GO)? >> slot & 1 == 1, "what is to go: {:x}", bits(one, IS_TO_GO)?);
    ensure!(id_at(one, slot)? == ID, "it is gone before the guest has ejected it");
    Ok(detach)
}

fn eject(one: &BareGuest<'_>, slot: u32) -> Result<()> {
    one.tell(&format!("o {EJECT:x} 4 {:x}", 1u32 << slot)).map(drop)
}

/// Has a function detached as an operating system lets it go.
fn go(lab: &Lab, one: &BareGuest<'_>, function: &str, slot: u32) -> Result<()> {
    let detach = asked(lab, one, function, slot)?;
    eject(one, slot)?;
    let code = detach.wait(SOON)?.code;
    let said = detach.output_so_far();
    ensure!(code == Some(0) && !said.contains("in time"), "{code:?}: {said}");
    is_gone(lab, one, function, slot)
}

/// The function is held, and neither it nor a device of QEMU's is in the guest.
fn is_gone(lab: &Lab, one: &BareGuest<'_>, function: &str, slot: u32) -> Result<()> {
    ensure!(is_held(lab, function)?, "{}", status(lab)?);
    ensure!(id_at(one, slot)? == u32::MAX, "{:x} answers at {slot:x}", id_at(one, slot)?);
    let devices = lab.dom0("xl qemu-monitor-command one 'info pci'").ok()?;
    ensure!(!devices.contains(&format!("device {slot:3},")), "{devices}");
    Ok(())
}

fn is_in(lab: &Lab, slot: u32) -> Result<bool> {
    let devices = lab.dom0("xl qemu-monitor-command one 'info pci'").ok()?;
    Ok(devices.contains(&format!("device {slot:3},")))
}

pub fn a_running_guest_is_notified_of_a_function_and_finds_it(scene: &mut Hvm<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    one.tell("acpi")?;
    ensure!(one.number("hotplugs")? == 0, "an event that nothing caused");
    ensure!(id_at(one, NEXT)? == u32::MAX, "something is there already");
    let said = xpci(lab, "pci-attach one 01:10.4")?;
    ensure!(said.contains("1e.0"), "{said}");
    notified(one, 0)?;
    ensure!(bits(one, CAME)? >> NEXT & 1 == 1, "what has come: {:x}", bits(one, CAME)?);
    ensure!(id_at(one, NEXT)? == ID, "{:x}", id_at(one, NEXT)?);
    // QEMU has a device there, of which the guest sees nothing.
    ensure!(is_in(lab, NEXT)?, "QEMU has no placeholder");
    let bar = one.number(&format!("r {BAR0:x} 4"))?;
    ensure!(bar == 0xc, "BAR 0 is placed at {bar:x}");
    Ok(())
}

/// The guest places its BARs: its firmware has run before.
pub fn a_function_that_came_while_the_guest_ran_works(scene: &mut Hvm<'_>) -> Result<()> {
    let one = scene.one()?;
    let (registers, table) = interrupts::set_up_at(one, NEXT, 0xf7f2_0000)?;
    let link = one.number(&format!("m {:x} 4", registers + STATUS))?;
    ensure!(link != u32::MAX && link & 2 != 0, "status {link:x}");
    ensure!(one.number(&format!("m {:x} 4", table + 8))? == 0x41, "the table is not the guest's");
    interrupts::again_at(one, NEXT)
}

pub fn the_guest_keeps_it_until_it_has_ejected_it(scene: &mut Hvm<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    let registers = 0xf7f2_0000 + STATUS;
    let detach = asked(lab, one, "01:10.4", NEXT)?;
    ensure!(one.number(&format!("m {registers:x} 4"))? != u32::MAX, "it has no registers any more");
    ensure!(detach.ended().is_none(), "{}", detach.output_so_far());
    eject(one, NEXT)?;
    let code = detach.wait(SOON)?.code;
    ensure!(code == Some(0), "{code:?}: {}", detach.output_so_far());
    ensure!(!detach.output_so_far().contains("in time"), "{}", detach.output_so_far());
    ensure!(one.number(&format!("m {registers:x} 4"))? == u32::MAX, "its registers are mapped still");
    is_gone(lab, one, VFS[2], NEXT)?;
    no_problems(lab)
}

pub fn another_one_comes_to_its_place(scene: &mut Hvm<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    begins(lab, one, NEXT)?;
    for _ in 0..2 {
        come(lab, one, VFS[2], NEXT)?;
        let (registers, _) = interrupts::set_up_at(one, NEXT, 0xf7f2_0000)?;
        let link = one.number(&format!("m {:x} 4", registers + STATUS))?;
        ensure!(link != u32::MAX && link & 2 != 0, "status {link:x}");
        go(lab, one, VFS[2], NEXT)?;
    }
    no_problems(lab)
}

/// The guest takes events, and has nothing at a device number.
fn begins(lab: &Lab, one: &BareGuest<'_>, slot: u32) -> Result<()> {
    make_held(lab, VFS[2])?;
    one.tell("acpi")?;
    ensure!(id_at(one, slot)? == u32::MAX, "something is at {slot:x}");
    Ok(())
}

pub fn a_function_from_before_the_guest_ran_is_ejected_likewise(scene: &mut Hvm<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    one.tell("acpi")?;
    go(lab, one, VFS[1], SECOND)?;
    come(lab, one, VFS[1], SECOND)?;
    go(lab, one, VFS[1], SECOND)
}

pub fn a_guest_that_does_not_eject_a_function_loses_it_after_the_limit(scene: &mut Hvm<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    begins(lab, one, NEXT)?;
    come(lab, one, VFS[2], NEXT)?;
    let detach = asked(lab, one, VFS[2], NEXT)?;
    let code = detach.wait(SOON)?.code;
    let said = detach.output_so_far();
    ensure!(code == Some(0) && said.contains("did not release it in time"), "{code:?}: {said}");
    is_gone(lab, one, VFS[2], NEXT)?;
    // It ejects it later: nothing is there any more.
    eject(one, NEXT)?;
    come(lab, one, VFS[2], NEXT)?;
    go(lab, one, VFS[2], NEXT)
}

pub fn a_function_taken_by_force_leaves_no_device_behind(scene: &mut Hvm<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    begins(lab, one, NEXT)?;
    come(lab, one, VFS[2], NEXT)?;
    let before = one.number("hotplugs")?;
    xpci(lab, "pci-detach --force one 01:10.4")?;
    is_gone(lab, one, VFS[2], NEXT)?;
    ensure!(one.number("hotplugs")? == before, "it was asked");
    Ok(())
}

pub fn a_service_that_is_killed_while_the_guest_is_asked_takes_the_function_at_its_next_start(
    scene: &mut Hvm<'_>,
) -> Result<()> {
    let lab = scene.lab;
    begins(lab, scene.one()?, NEXT)?;
    come(lab, scene.one()?, VFS[2], NEXT)?;
    let detach = asked(lab, scene.one()?, VFS[2], NEXT)?;
    scene.service.signal(9)?;
    scene.service.wait(SOON)?;
    ensure!(detach.wait(SOON)?.code != Some(0), "{}", detach.output_so_far());
    scene.service = start_service(lab)?;
    lab.wait_for("the function to be held", SOON, "xpci pci-assignable-list | grep -q 01:10.4")?;
    is_gone(lab, scene.one()?, VFS[2], NEXT)?;
    no_problems(lab)
}

pub fn a_function_that_came_stays_over_a_killed_service_and_is_ejected(scene: &mut Hvm<'_>) -> Result<()> {
    let lab = scene.lab;
    begins(lab, scene.one()?, NEXT)?;
    come(lab, scene.one()?, VFS[2], NEXT)?;
    interrupts::set_up_at(scene.one()?, NEXT, 0xf7f2_0000)?;
    kill_and_start(lab, &mut scene.service)?;
    interrupts::again_at(scene.one()?, NEXT)?;
    go(lab, scene.one()?, VFS[2], NEXT)
}

/// As xl's own hotplug does.
pub fn a_device_number_that_qemu_uses_meanwhile_is_refused(scene: &mut Hvm<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    begins(lab, one, 9)?;
    lab.dom0("xl qemu-monitor-command one 'device_add pci-testdev,id=theirs,addr=9'").ok()?;
    let (exit, said) = xpci_fails(lab, "pci-attach one 01:10.4@9")?;
    ensure!(exit == 5 && said.contains("an emulated device"), "{said}");
    eject(one, 9)?;
    come(lab, one, VFS[2], 9)?;
    // The other way round QEMU refuses.
    let said =
        lab.dom0("xl qemu-monitor-command one 'device_add pci-testdev,id=theirs,addr=9' 2>&1").run()?;
    ensure!(said.stdout().contains("not available"), "{}", said.stdout());
    go(lab, one, VFS[2], 9)
}

pub fn a_running_guest_without_acpi_is_refused(scene: &mut Hvm<'_>) -> Result<()> {
    let lab = scene.lab;
    make_held(lab, VFS[2])?;
    let mut old = BareGuest::create(lab, "old", &["acpi=0"])?;
    xpci(lab, "pci-attach old 01:10.4@9")?;
    old.start()?;
    ensure!(id_at(&old, 9)? == ID, "{:x}", id_at(&old, 9)?);
    let (exit, said) = xpci_fails(lab, "pci-detach old 01:10.4")?;
    ensure!(exit == 5 && said.contains("acpi=0") && said.contains("--force"), "{said}");
    xpci(lab, "pci-detach --force old 01:10.4")?;
    ensure!(id_at(&old, 9)? == u32::MAX, "a detached function answers");
    let (exit, said) = xpci_fails(lab, "pci-attach old 01:10.4")?;
    ensure!(exit == 5 && said.contains("acpi=0") && said.contains("xl create -p"), "{said}");
    old.destroy().context("the guest without ACPI")
}
