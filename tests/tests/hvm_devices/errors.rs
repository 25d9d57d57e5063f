//! Errors of HVM guests' functions, raised in hardware by QEMU: what a policy says is done, and what is left in the guest.

use anyhow::{Result, ensure};
use xpci_tests::host::errors::{raise, wait_for_history};
use xpci_tests::host::{is_held, owner, state, status, wait_for_state, xpci, xpci_fails};
use xpci_tests::{BareGuest, Lab};

use crate::{COMMAND, SOON, VIRTIO, VIRTIO_SLOTS};

const POLICY: &str = "/etc/xpci/policies/errors.yaml";
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
const NOBODY: (u32, u32) = (u32::MAX, 0xffff);

/// Each action of a policy. There is no protocol to tell an HVM guest of errors.
pub fn contained(lab: &Lab, one: BareGuest<'_>) -> Result<()> {
    let [first, second] = VIRTIO;
    let [own, other] = VIRTIO_SLOTS.map(|slot| crate::open(&one, slot, BAR4));
    let (own, other) = (own? + QUEUES, other? + QUEUES);
    let (slot, second_slot) = (VIRTIO_SLOTS[0], VIRTIO_SLOTS[1]);
    let healthy = seen(&one, slot, own)?;
    ensure!(healthy.0 == IDENTITY && healthy.1 == 3, "{healthy:x?}");

    println!("E2: reset: the function begins anew, and the guest keeps it");
    policy(lab, "non-fatal: reset")?;
    let decision = raise(lab, "e0", first, "COMP_TIME")?;
    ensure!(decision["action"] == "reset" && decision["domain"] == one.domid()?, "{decision}");
    wait_for_history(lab, first, "it was reset; its guest keeps it", 1)?;
    ensure!(state(lab, first)? == "attached", "{}", status(lab)?);
    ensure!(seen(&one, slot, own)? == (IDENTITY, 0xffff), "{:x?} after the reset", seen(&one, slot, own)?);
    ensure!(one.number(&format!("r {BAR4:x} 4"))? & !0xf == 0, "a BAR is placed: {}", one.tell("r 20 4")?);
    one.tell(&format!("w {BAR4:x} 4 {:x}", own - QUEUES))?;
    one.tell(&format!("w {COMMAND:x} 2 6"))?;
    ensure!(seen(&one, slot, own)? == healthy, "{:x?} when it is set up anew", seen(&one, slot, own)?);
    ensure!(
        seen(&one, second_slot, other)? == healthy,
        "the other one: {:x?}",
        seen(&one, second_slot, other)?
    );

    println!("E2: pause");
    policy(lab, "non-fatal: pause-guest")?;
    let decision = raise(lab, "e0", first, "COMP_TIME")?;
    ensure!(decision["action"] == "pause-guest", "{decision}");
    lab.wait_for("the guest to be paused", SOON, "xl list one | grep -qE ' --p--- '")?;
    lab.dom0("xl unpause one").ok()?;
    ensure!(seen(&one, slot, own)? == healthy, "{:x?} after a pause", seen(&one, slot, own)?);

    println!("E2: a guest that cannot be told is taken for failed: quarantine");
    policy(lab, "")?;
    let decision = raise(lab, "e0", first, "COMP_TIME")?;
    ensure!(decision["action"] == "tell-guest" && decision["severity"] == "non-fatal", "{decision}");
    quarantined(lab, &one, first, (slot, own))?;
    ensure!(
        seen(&one, second_slot, other)? == healthy,
        "the other one: {:x?}",
        seen(&one, second_slot, other)?
    );

    println!("E2: a fatal error: quarantine");
    let decision = raise(lab, "e1", second, "DLP")?;
    ensure!(decision["severity"] == "fatal" && decision["action"] == "quarantine", "{decision}");
    quarantined(lab, &one, second, (second_slot, other))?;
    one.destroy()?;

    println!("E2: what was quarantined comes back only when it is cleared; then unplug and destroy");
    let mut two = BareGuest::create(lab, "two", &[])?;
    for (function, slot) in VIRTIO.iter().zip(VIRTIO_SLOTS) {
        let attach = format!("pci-attach two {function}@{slot:x}");
        let (exit, said) = xpci_fails(lab, &attach)?;
        ensure!(exit == 5 && said.contains("quarantine clear"), "{exit}: {said}");
        xpci(lab, &format!("quarantine clear {function}"))?;
        xpci(lab, &attach)?;
    }
    two.start()?;
    let [own, other] = VIRTIO_SLOTS.map(|slot| crate::open(&two, slot, BAR4));
    let (own, other) = (own? + QUEUES, other? + QUEUES);
    ensure!(seen(&two, slot, own)? == healthy, "{:x?}", seen(&two, slot, own)?);
    policy(lab, "non-fatal: unplug")?;
    let decision = raise(lab, "e0", first, "COMP_TIME")?;
    ensure!(decision["action"] == "unplug", "{decision}");
    wait_for_state(lab, first, "held")?;
    ensure!(is_held(lab, first)? && seen(&two, slot, own)? == NOBODY, "{:x?}", seen(&two, slot, own)?);
    ensure!(seen(&two, second_slot, other)? == healthy, "{:x?}", seen(&two, second_slot, other)?);

    policy(lab, "non-fatal: destroy-guest")?;
    let nodes = format!("/local/domain/{}", two.domid()?);
    let decision = raise(lab, "e1", second, "COMP_TIME")?;
    ensure!(decision["action"] == "destroy-guest", "{decision}");
    lab.wait_for("the guest to be gone", SOON, &format!("! xl list two && ! xenstore-read {nodes}"))?;
    wait_for_state(lab, second, "held")?;
    ensure!(is_held(lab, second)?, "{}", owner(lab, second)?);
    lab.wait_for("its server's note to be removed", SOON, "[ -z \"$(ls /run/xpci/ioreq-servers)\" ]")?;
    lab.dom0("[ -z \"$(ls /run/xpci/images)\" ]").ok().map(drop)
}

/// Nobody has it, it can do nothing, and its guest reads all ones.
fn quarantined(lab: &Lab, one: &BareGuest<'_>, function: &str, place: (u32, u32)) -> Result<()> {
    wait_for_state(lab, function, "quarantined")?;
    ensure!(is_held(lab, function)?, "{}", owner(lab, function)?);
    let command = lab.dom0(&format!("setpci -s {function} 4.w")).ok()?;
    ensure!(u16::from_str_radix(command.trim(), 16)? & 4 == 0, "bus mastering: {command}");
    ensure!(seen(one, place.0, place.1)? == NOBODY, "the guest reads {:x?}", seen(one, place.0, place.1)?);
    Ok(())
}
