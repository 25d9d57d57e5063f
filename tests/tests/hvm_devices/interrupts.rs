//! MSI, counted by the guest.

use anyhow::{Result, ensure};
use xpci_tests::BareGuest;

use crate::{BAR0, EDU_SLOT, come, open};

/// Registers of edu (QEMU's docs/specs/edu.rst): raise an interrupt, end it; and where its MSI capability is.
const RAISE: u32 = 0x60;
const LOWER: u32 = 0x64;
const EDU_MSI: u32 = 0x40;
/// Of MSI with 64-bit addresses, from its begin (PCI Express 6.0, section 7.7.1).
const CONTROL: u32 = 2;
const ADDRESS: u32 = 4;
const UPPER: u32 = 8;
const DATA: u32 = 0xc;
/// Vectors of the guest's processor.
const EDU_VECTOR: u32 = 0x41;
const SECOND_VECTOR: u32 = 0x43;

fn set_message(one: &BareGuest<'_>, capability: u32, vector: u32) -> Result<()> {
    for (at, size, value) in [(ADDRESS, 4, 0xfee0_0000), (UPPER, 4, 0), (DATA, 2, vector)] {
        one.tell(&format!("w {:x} {size} {value:x}", capability + at))?;
    }
    Ok(())
}

fn enable(one: &BareGuest<'_>, capability: u32, on: u32) -> Result<u32> {
    one.tell(&format!("w {:x} 2 {on:x}", capability + CONTROL))?;
    one.number(&format!("r {:x} 2", capability + CONTROL))
}

/// One vector, enabled, sent elsewhere, disabled.
pub fn msi(one: &BareGuest<'_>) -> Result<()> {
    println!("MSI of a function without a mask");
    let own = open(one, EDU_SLOT, BAR0)?;
    let raise = || -> Result<()> {
        one.tell(&format!("n {:x} 4 1", own + RAISE))?;
        one.tell(&format!("n {:x} 4 1", own + LOWER)).map(drop)
    };
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
