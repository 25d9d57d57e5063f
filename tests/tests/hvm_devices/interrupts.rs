//! MSI and interrupt lines, counted by the guest.

use anyhow::{Context, Result, ensure};
use xpci_tests::BareGuest;
use xpci_tests::host::{SOON, come, start_service};

use super::{BAR0, EDU_SLOT, HvmDevices, IGB_SLOT, INTERRUPT_LINE, RTL_SLOT, granted_of, open};

/// Registers of edu (QEMU's docs/specs/edu.rst): raise an interrupt, end it; and where its MSI capability is.
const RAISE: u32 = 0x60;
const LOWER: u32 = 0x64;
pub const EDU_MSI: u32 = 0x40;
/// Registers of the 82576: causes of interrupts, to be cleared, set and enabled; that of a link that changed. At the places of its
/// predecessors (datasheet, section 8.1.3): QEMU has not all of them at its own.
const CAUSE: u32 = 0xc0;
const SET_CAUSE: u32 = 0xc8;
pub const ENABLE_CAUSE: u32 = 0xd0;
pub const LINK: u32 = 1 << 2;
pub const IGB_MSI: u32 = 0x50;
/// Of MSI with 64-bit addresses, from its begin (PCI Express 6.0, section 7.7.1).
const CONTROL: u32 = 2;
const ADDRESS: u32 = 4;
const UPPER: u32 = 8;
const DATA: u32 = 0xc;
pub const MASK: u32 = 0x10;
const PENDING: u32 = 0x14;
/// Registers of the RTL8139.
const INTERRUPT_MASK: u32 = 0x3c;
const INTERRUPT_STATUS: u32 = 0x3e;
const TIMER: u32 = 0x48;
const TIMER_INTERRUPT: u32 = 0x54;
const TIMED_OUT: u32 = 1 << 14;

/// Vectors of the guest's processor; those of the interrupt controllers' lines are from 40 on.
pub const EDU_VECTOR: u32 = 0x41;
const SECOND_VECTOR: u32 = 0x43;
const IGB_VECTOR: u32 = 0x44;
const LINES: u32 = 0x40;

pub fn set_message(one: &BareGuest<'_>, capability: u32, vector: u32) -> Result<()> {
    write_message(one, capability, [0xfee0_0000, 0, vector])
}

/// Writes address, upper address and data.
pub fn write_message(one: &BareGuest<'_>, capability: u32, [address, upper, data]: [u32; 3]) -> Result<()> {
    for (at, size, value) in [(ADDRESS, 4, address), (UPPER, 4, upper), (DATA, 2, data)] {
        one.tell(&format!("w {:x} {size} {value:x}", capability + at))?;
    }
    Ok(())
}

/// edu, whose registers are there, sends its interrupt.
pub fn edu_raises(one: &BareGuest<'_>, own: u32) -> Result<()> {
    one.tell(&format!("n {:x} 4 1", own + RAISE))?;
    one.tell(&format!("n {:x} 4 1", own + LOWER)).map(drop)
}

/// The 82576, whose registers are there, sends the interrupt of a link that changed.
pub fn igb_raises(one: &BareGuest<'_>, own: u32) -> Result<()> {
    one.tell(&format!("n {:x} 4 ffffffff", own + CAUSE))?;
    one.tell(&format!("n {:x} 4 {LINK:x}", own + SET_CAUSE)).map(drop)
}

pub fn enable(one: &BareGuest<'_>, capability: u32, on: u32) -> Result<u32> {
    one.tell(&format!("w {:x} 2 {on:x}", capability + CONTROL))?;
    one.number(&format!("r {:x} 2", capability + CONTROL))
}

/// One vector, enabled, sent elsewhere, disabled.
pub fn msi_comes_by_the_vector_that_its_message_names(scene: &mut HvmDevices<'_>) -> Result<()> {
    let one = scene.one()?;
    let own = open(one, EDU_SLOT, BAR0)?;
    let raise = || edu_raises(one, own);
    ensure!(one.number(&format!("m {own:x} 4"))? == 0x0100_00ed, "edu's identification");
    ensure!(one.number(&format!("r {EDU_MSI:x} 1"))? == 5, "no MSI at {EDU_MSI:#x}");
    set_message(one, EDU_MSI, EDU_VECTOR)?;
    let control = enable(one, EDU_MSI, 1)?;
    ensure!(control & 1 == 1 && control & 0x100 == 0, "Message Control {control:x}");
    come(one, EDU_VECTOR, 0)?;
    for count in 1..=3 {
        raise()?;
        come(one, EDU_VECTOR, count)?;
    }
    // Another message while it is enabled, as a system writes that moves the interrupt to another vector.
    set_message(one, EDU_MSI, SECOND_VECTOR)?;
    raise()?;
    come(one, SECOND_VECTOR, 1)?;
    come(one, EDU_VECTOR, 3)?;
    ensure!(enable(one, EDU_MSI, 0)? & 1 == 0, "MSI stays enabled");
    ensure!(enable(one, EDU_MSI, 1)? & 1 == 1, "MSI cannot be enabled again");
    raise()?;
    come(one, SECOND_VECTOR, 2)?;
    enable(one, EDU_MSI, 0).map(drop)
}

/// A masked vector waits, its pending bit shows that, and it comes once when it is unmasked.
pub fn msi_that_is_masked_waits_and_comes_once(scene: &mut HvmDevices<'_>) -> Result<()> {
    let one = scene.one()?;
    let own = open(one, IGB_SLOT, BAR0)?;
    let raise = || igb_raises(one, own);
    let mask = |bits: u32| one.tell(&format!("w {:x} 4 {bits:x}", IGB_MSI + MASK)).map(drop);
    let pending = || one.number(&format!("r {:x} 4", IGB_MSI + PENDING));
    one.tell(&format!("n {:x} 4 {LINK:x}", own + ENABLE_CAUSE))?;
    set_message(one, IGB_MSI, IGB_VECTOR)?;
    mask(0)?;
    let control = enable(one, IGB_MSI, 1)?;
    ensure!(control & 0x101 == 0x101, "Message Control {control:x}");
    for count in 1..=2 {
        raise()?;
        come(one, IGB_VECTOR, count)?;
    }
    mask(1)?;
    ensure!(one.number(&format!("r {:x} 4", IGB_MSI + MASK))? == 1, "the mask reads as clear");
    raise()?;
    ensure!(pending()? == 1, "pending bits {:x}", pending()?);
    come(one, IGB_VECTOR, 2)?;
    mask(0)?;
    come(one, IGB_VECTOR, 3)?;
    ensure!(pending()? == 0, "pending bits {:x}", pending()?);

    println!("  masked before it is enabled, and while the message changes");
    enable(one, IGB_MSI, 0)?;
    mask(1)?;
    enable(one, IGB_MSI, 1)?;
    raise()?;
    ensure!(pending()? == 1, "pending bits {:x}", pending()?);
    come(one, IGB_VECTOR, 3)?;
    set_message(one, IGB_MSI, SECOND_VECTOR)?;
    let before = one.number(&format!("count {SECOND_VECTOR:x}"))?;
    mask(0)?;
    come(one, SECOND_VECTOR, before + 1)?;
    come(one, IGB_VECTOR, 3)?;
    enable(one, IGB_MSI, 0).map(drop)
}

/// The vector of the interrupt line that the firmware gave a function.
fn line(one: &BareGuest<'_>) -> Result<u32> {
    let line = one.number(&format!("r {INTERRUPT_LINE:x} 1"))?;
    ensure!((1..16).contains(&line), "interrupt line {line:x}");
    ensure!(one.number(&format!("r {:x} 1", INTERRUPT_LINE + 1))? == 1, "no interrupt pin");
    Ok(LINES + line)
}

/// Level by level: asserted until the guest's handler has told the function, and again when it is asserted again.
pub fn an_asserted_line_interrupts_until_the_function_is_told(scene: &mut HvmDevices<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    println!("interrupt lines: {}", granted_of(lab, one, "Interrupts")?);
    one.tell("pic")?;
    let own = open(one, EDU_SLOT, BAR0)?;
    let vector = line(one)?;
    one.tell(&format!("end {vector:x} {:x} 4 1", own + LOWER))?;
    let before = one.number(&format!("count {vector:x}"))?;
    for count in 1..=3 {
        one.tell(&format!("n {:x} 4 1", own + RAISE))?;
        come(one, vector, before + count)?;
    }
    ensure!(one.number(&format!("m {:x} 4", own + 0x24))? == 0, "edu's interrupt has not ended");

    println!("  of a function whose registers xpcid reads and writes");
    let own = open(one, RTL_SLOT, 0x14)?;
    let vector = line(one)?;
    one.tell(&format!("end {vector:x} {:x} 2 {TIMED_OUT:x}", own + INTERRUPT_STATUS))?;
    let before = one.number(&format!("count {vector:x}"))?;
    one.tell(&format!("n {:x} 4 1000", own + TIMER_INTERRUPT))?;
    one.tell(&format!("n {:x} 2 {TIMED_OUT:x}", own + INTERRUPT_MASK))?;
    for count in 1..=3 {
        one.tell(&format!("n {:x} 4 0", own + TIMER))?;
        come(one, vector, before + count)?;
    }
    one.tell(&format!("n {:x} 2 0", own + INTERRUPT_MASK)).map(drop)
}

pub fn messages_and_lines_come_while_the_service_is_dead_and_afterwards(
    scene: &mut HvmDevices<'_>,
) -> Result<()> {
    let one = scene.one.as_ref().context("the bare guest is gone")?;
    one.tell("pic")?;
    let igb = open(one, IGB_SLOT, BAR0)?;
    one.tell(&format!("n {:x} 4 {LINK:x}", igb + ENABLE_CAUSE))?;
    one.tell(&format!("w {:x} 4 0", IGB_MSI + MASK))?;
    set_message(one, IGB_MSI, IGB_VECTOR)?;
    enable(one, IGB_MSI, 1)?;
    let edu = open(one, EDU_SLOT, BAR0)?;
    let vector = line(one)?;
    one.tell(&format!("end {vector:x} {:x} 4 1", edu + LOWER))?;
    let mut messages = one.number(&format!("count {IGB_VECTOR:x}"))?;
    let mut levels = one.number(&format!("count {vector:x}"))?;
    let mut both = || -> Result<()> {
        igb_raises(one, igb)?;
        one.tell(&format!("n {:x} 4 1", edu + RAISE))?;
        (messages, levels) = (messages + 1, levels + 1);
        come(one, IGB_VECTOR, messages)?;
        come(one, vector, levels)
    };
    both()?;
    scene.service.signal(9)?;
    scene.service.wait(SOON)?;
    both()?;
    scene.service = start_service(scene.lab)?;
    both()?;
    one.tell(&format!("slot {IGB_SLOT:x}"))?;
    enable(one, IGB_MSI, 0).map(drop)
}
