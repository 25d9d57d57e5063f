//! Errors of HVM guests' functions, raised in hardware by QEMU: what a policy says is done, and what is left in the guest.

use anyhow::{Context, Result, ensure};
use xpci_tests::host::errors::{raise, wait_for_history};
use xpci_tests::host::state::make_held;
use xpci_tests::host::{SOON, is_held, owner, state, status, wait_for_state, xpci, xpci_fails};
use xpci_tests::{BareGuest, Lab};

use super::{COMMAND, HvmDevices, VIRTIO, VIRTIO_SLOTS};

pub const POLICY: &str = "/etc/xpci/policies/errors.yaml";
/// BAR 4 of a virtio device has its registers; the first ones are those of Virtio 1.2, section 4.1.4.3: how many queues.
const BAR4: u32 = 0x20;
const QUEUES: u32 = 0x12;

fn policy(lab: &Lab, wishes: &str) -> Result<()> {
    lab.push(format!("errors: {{{wishes}}}\n").as_bytes(), POLICY)?;
    xpci(lab, "policy reload").map(drop)
}

/// What the guest reads of a function: its identity, and a register.
fn seen(one: &BareGuest<'_>, slot: u32, register: u32) -> Result<(u32, u32)> {
    one.tell(&format!("slot {slot:x}"))?;
    Ok((one.number("r 0 4")?, one.number(&format!("m {register:x} 2"))?))
}

const IDENTITY: u32 = 0x1041_1af4;
const NO_ANSWER: (u32, u32) = (u32::MAX, 0xffff);

/// Where the registers of both virtio functions are in the guest, with decoding on, and what a healthy one reads.
struct Places {
    own: u32,
    other: u32,
}

const SLOT: u32 = VIRTIO_SLOTS[0];
const SECOND: u32 = VIRTIO_SLOTS[1];
const HEALTHY: (u32, u32) = (IDENTITY, 3);

fn places(one: &BareGuest<'_>) -> Result<Places> {
    let [own, other] = VIRTIO_SLOTS.map(|slot| super::open(one, slot, BAR4));
    Ok(Places { own: own? + QUEUES, other: other? + QUEUES })
}

fn is_healthy(one: &BareGuest<'_>, slot: u32, register: u32) -> Result<()> {
    let found = seen(one, slot, register)?;
    ensure!(found == HEALTHY, "slot {slot:x} reads {found:x?}");
    Ok(())
}

/// The guest keeps it, and sets it up again.
pub fn reset_lets_the_function_begin_anew_in_its_guest(scene: &mut HvmDevices<'_>) -> Result<()> {
    let (lab, one, [first, _]) = (scene.lab, scene.one()?, VIRTIO);
    let Places { own, other } = places(one)?;
    is_healthy(one, SLOT, own)?;
    policy(lab, "non-fatal: reset")?;
    let decision = raise(lab, "e0", first, "COMP_TIME")?;
    ensure!(decision["action"] == "reset" && decision["domain"] == one.domid()?, "{decision}");
    wait_for_history(lab, first, "it was reset; its guest keeps it", 1)?;
    ensure!(state(lab, first)? == "attached", "{}", status(lab)?);
    ensure!(seen(one, SLOT, own)? == (IDENTITY, 0xffff), "{:x?} after the reset", seen(one, SLOT, own)?);
    ensure!(one.number(&format!("r {BAR4:x} 4"))? & !0xf == 0, "a BAR is placed: {}", one.tell("r 20 4")?);
    one.tell(&format!("w {BAR4:x} 4 {:x}", own - QUEUES))?;
    one.tell(&format!("w {COMMAND:x} 2 6"))?;
    is_healthy(one, SLOT, own).context("when it is set up anew")?;
    is_healthy(one, SECOND, other).context("the other one")
}

pub fn pause_guest_pauses_it(scene: &mut HvmDevices<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    let own = places(one)?.own;
    policy(lab, "non-fatal: pause-guest")?;
    let decision = raise(lab, "e0", VIRTIO[0], "COMP_TIME")?;
    ensure!(decision["action"] == "pause-guest", "{decision}");
    lab.wait_for("the guest to be paused", SOON, "xl list one | grep -qE ' --p--- '")?;
    lab.dom0("xl unpause one").ok()?;
    is_healthy(one, SLOT, own).context("after a pause")
}

/// There is no protocol to notify an HVM guest of errors: its function is quarantined.
pub fn a_guest_that_cannot_be_told_loses_its_function(scene: &mut HvmDevices<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    let Places { own, other } = places(one)?;
    policy(lab, "")?;
    let decision = raise(lab, "e0", VIRTIO[0], "COMP_TIME")?;
    ensure!(decision["action"] == "tell-guest" && decision["severity"] == "non-fatal", "{decision}");
    quarantined(lab, one, VIRTIO[0], (SLOT, own))?;
    is_healthy(one, SECOND, other).context("the other one")
}

pub fn a_fatal_error_quarantines_the_function(scene: &mut HvmDevices<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    let other = super::open(one, SECOND, BAR4)? + QUEUES;
    policy(lab, "")?;
    let decision = raise(lab, "e1", VIRTIO[1], "DLP")?;
    ensure!(decision["severity"] == "fatal" && decision["action"] == "quarantine", "{decision}");
    quarantined(lab, one, VIRTIO[1], (SECOND, other))
}

pub fn what_was_quarantined_comes_back_only_when_it_is_cleared(scene: &mut HvmDevices<'_>) -> Result<()> {
    let lab = scene.lab;
    scene.one.take().context("the bare guest is gone")?.destroy()?;
    make_held(lab, VIRTIO[0])?;
    let mut two = BareGuest::create(lab, "two", &[])?;
    let attach = |function: &str, slot: u32| format!("pci-attach two {function}@{slot:x}");
    let (exit, said) = xpci_fails(lab, &attach(VIRTIO[1], SECOND))?;
    ensure!(exit == 5 && said.contains("quarantine clear"), "{exit}: {said}");
    xpci(lab, &format!("quarantine clear {}", VIRTIO[1]))?;
    for (function, slot) in VIRTIO.iter().zip(VIRTIO_SLOTS) {
        xpci(lab, &attach(function, slot))?;
    }
    two.start()?;
    let Places { own, other } = places(&two)?;
    is_healthy(&two, SLOT, own)?;
    is_healthy(&two, SECOND, other)?;
    scene.one = Some(two);
    Ok(())
}

pub fn unplug_takes_the_function_from_its_guest(scene: &mut HvmDevices<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    let Places { own, other } = places(one)?;
    policy(lab, "non-fatal: unplug")?;
    let decision = raise(lab, "e0", VIRTIO[0], "COMP_TIME")?;
    ensure!(decision["action"] == "unplug", "{decision}");
    wait_for_state(lab, VIRTIO[0], "held")?;
    ensure!(is_held(lab, VIRTIO[0])? && seen(one, SLOT, own)? == NO_ANSWER, "{:x?}", seen(one, SLOT, own)?);
    is_healthy(one, SECOND, other).context("the other one")
}

pub fn destroy_guest_destroys_it_and_its_function_is_held_again(scene: &mut HvmDevices<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    policy(lab, "non-fatal: destroy-guest")?;
    let domain = one.domid()?;
    let decision = raise(lab, "e1", VIRTIO[1], "COMP_TIME")?;
    ensure!(decision["action"] == "destroy-guest", "{decision}");
    let gone = format!("! xl list {domain} && ! xenstore-read /local/domain/{domain}");
    lab.wait_for("the guest to be gone", SOON, &gone)?;
    scene.one = None;
    wait_for_state(lab, VIRTIO[1], "held")?;
    ensure!(is_held(lab, VIRTIO[1])?, "{}", owner(lab, VIRTIO[1])?);
    lab.wait_for("its server's note to be removed", SOON, "[ -z \"$(ls /run/xpci/ioreq-servers)\" ]")?;
    lab.dom0("[ -z \"$(ls /run/xpci/images)\" ]").ok().map(drop)
}

/// It is attached to no guest, it can do nothing, and its guest reads all ones.
fn quarantined(lab: &Lab, one: &BareGuest<'_>, function: &str, place: (u32, u32)) -> Result<()> {
    wait_for_state(lab, function, "quarantined")?;
    ensure!(is_held(lab, function)?, "{}", owner(lab, function)?);
    let command = lab.dom0(&format!("setpci -s {function} 4.w")).ok()?;
    ensure!(u16::from_str_radix(command.trim(), 16)? & 4 == 0, "bus mastering: {command}");
    ensure!(seen(one, place.0, place.1)? == NO_ANSWER, "the guest reads {:x?}", seen(one, place.0, place.1)?);
    Ok(())
}
