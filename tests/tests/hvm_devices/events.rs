//! MSI that the guest takes as an event, as Linux does where Xen offers `XENFEAT_hvm_pirqs`.

use anyhow::{Context, Result, ensure};
use xpci_tests::BareGuest;
use xpci_tests::host::come;
use xpci_tests::host::events::{arrives, events, message, offers_pirqs, xen};
use xpci_tests::host::state::kill_and_start;

use super::interrupts::{
    EDU_MSI, EDU_VECTOR, ENABLE_CAUSE, IGB_MSI, LINK, MASK, edu_raises, enable, igb_raises, set_message,
    write_message,
};
use super::{BAR0, EDU_SLOT, HvmDevices, IGB_SLOT, open};

fn name(one: &BareGuest<'_>, capability: u32, pirq: u32) -> Result<()> {
    write_message(one, capability, message(pirq))
}

fn free_number(one: &BareGuest<'_>) -> Result<u32> {
    ensure!(offers_pirqs(one)?, "Xen offers no physical interrupts");
    xen(one, "pirq")
}

/// edu sends its interrupt, which must come by this port.
fn edu_sends(one: &BareGuest<'_>, port: u32) -> Result<()> {
    let own = open(one, EDU_SLOT, BAR0)?;
    let before = events(one, port)?;
    edu_raises(one, own)?;
    arrives(one, port, before + 1)
}

/// edu's MSI has no mask. The service is killed between the steps; then the interrupt goes to another number, and to a vector.
pub fn msi_comes_as_an_event_where_its_message_names_an_interrupt(scene: &mut HvmDevices<'_>) -> Result<()> {
    let one = scene.one()?;
    open(one, EDU_SLOT, BAR0)?;
    let pirq = free_number(one)?;
    name(one, EDU_MSI, pirq)?;
    ensure!(enable(one, EDU_MSI, 1)? & 1 == 1, "MSI is not enabled");
    kill_and_start(scene.lab, &mut scene.service)?;
    let one = scene.one()?;
    let port = xen(one, &format!("bind {pirq:x}"))?;
    for round in 0..2 {
        edu_sends(one, port).with_context(|| format!("interrupt {round}"))?;
    }
    kill_and_start(scene.lab, &mut scene.service)?;
    let one = scene.one()?;
    edu_sends(one, port)?;
    println!("  bound again; another number");
    xen(one, &format!("close {port:x}"))?;
    let port = xen(one, &format!("bind {pirq:x}"))?;
    edu_sends(one, port)?;
    xen(one, &format!("close {port:x}"))?;
    enable(one, EDU_MSI, 0)?;
    let other = free_number(one)?;
    name(one, EDU_MSI, other)?;
    enable(one, EDU_MSI, 1)?;
    let port = xen(one, &format!("bind {other:x}"))?;
    edu_sends(one, port)?;
    println!("  by a vector");
    xen(one, &format!("close {port:x}"))?;
    enable(one, EDU_MSI, 0)?;
    set_message(one, EDU_MSI, EDU_VECTOR)?;
    enable(one, EDU_MSI, 1)?;
    let own = open(one, EDU_SLOT, BAR0)?;
    let before = one.number(&format!("count {EDU_VECTOR:x}"))?;
    edu_raises(one, own)?;
    come(one, EDU_VECTOR, before + 1)?;
    enable(one, EDU_MSI, 0).map(drop)
}

/// Linux leaves the mask in the register as it finds it: that binding the event channel ends it is Xen's part.
pub fn msi_whose_mask_is_left_set_comes_as_an_event(scene: &mut HvmDevices<'_>) -> Result<()> {
    let one = scene.one()?;
    let own = open(one, IGB_SLOT, BAR0)?;
    let raise = || igb_raises(one, own);
    one.tell(&format!("n {:x} 4 {LINK:x}", own + ENABLE_CAUSE))?;
    one.tell(&format!("w {:x} 4 1", IGB_MSI + MASK))?;
    let pirq = free_number(one)?;
    name(one, IGB_MSI, pirq)?;
    enable(one, IGB_MSI, 1)?;
    let port = xen(one, &format!("bind {pirq:x}"))?;
    let before = events(one, port)?;
    for count in 1..=2 {
        raise()?;
        arrives(one, port, before + count)?;
    }
    println!("  masked by its event channel");
    one.tell(&format!("emask {port:x}"))?;
    raise()?;
    ensure!(events(one, port)? == before + 2, "it comes through its mask");
    xen(one, &format!("eunmask {port:x}"))?;
    arrives(one, port, before + 3)?;
    xen(one, &format!("close {port:x}"))?;
    enable(one, IGB_MSI, 0)?;
    one.tell(&format!("w {:x} 4 0", IGB_MSI + MASK)).map(drop)
}
