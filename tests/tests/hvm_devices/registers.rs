//! BARs that are no whole pages of memory: I/O ports, which Xen passes through, and memory whose accesses xpcid carries out.

use anyhow::{Result, ensure};
use xpci_tests::BareGuest;

use super::{BAR0, COMMAND, HvmDevices, IGB_SLOT, RTL_SLOT, granted_of, open};

/// The 82576's STATUS, and its window in I/O space: IOADDR and IODATA (datasheet, section 8.2.3; BAR 2 in QEMU).
const STATUS: u32 = 8;
const BAR2: u32 = 0x18;
const IO_DATA: u32 = 4;
/// The RTL8139's memory, and registers of different widths (datasheet, section 6).
const BAR1: u32 = 0x14;
const MULTICAST: u32 = 8;
const COMMAND_REGISTER: u32 = 0x37;
const INTERRUPT_MASK: u32 = 0x3c;
const TRANSMIT_CONFIGURATION: u32 = 0x40;
const TIMER_INTERRUPT: u32 = 0x54;

/// I/O BARs are where the guest puts them, while it wants them.
pub fn an_io_bar_is_where_the_guest_puts_it(scene: &mut HvmDevices<'_>) -> Result<()> {
    let one = scene.one()?;
    let own = open(one, IGB_SLOT, BAR0)?;
    let ports = open(one, IGB_SLOT, BAR2)?;
    let status = one.number(&format!("m {:x} 4", own + STATUS))?;
    ensure!(status != u32::MAX && status != 0, "status {status:x}");
    let through = |ports: u32| -> Result<u32> {
        one.tell(&format!("o {ports:x} 4 {STATUS:x}"))?;
        one.number(&format!("i {:x} 4", ports + IO_DATA))
    };
    ensure!(through(ports)? == status, "{:x} through the ports, {status:x} in memory", through(ports)?);
    ensure!(one.number(&format!("i {ports:x} 1"))? == STATUS, "the address through one byte");
    let elsewhere = 0xe120;
    one.tell(&format!("w {BAR2:x} 4 {elsewhere:x}"))?;
    ensure!(one.number(&format!("r {BAR2:x} 4"))? == elsewhere | 1, "{}", one.tell("r 18 4")?);
    ensure!(through(elsewhere)? == status, "{:x} at the new place", through(elsewhere)?);
    ensure!(through(ports)? == u32::MAX, "the old place answers");
    one.tell(&format!("w {BAR2:x} 4 ffffffff"))?;
    ensure!(one.number(&format!("r {BAR2:x} 4"))? == 0xffff_ffe1, "its size: {}", one.tell("r 18 4")?);
    ensure!(through(elsewhere)? == u32::MAX, "a BAR that is sized decodes");
    one.tell(&format!("w {BAR2:x} 4 {ports:x}"))?;
    ensure!(through(ports)? == status, "after moving back");
    one.tell(&format!("w {COMMAND:x} 2 6"))?;
    ensure!(through(ports)? == u32::MAX, "the ports answer though decoding is off");
    ensure!(one.number(&format!("m {:x} 4", own + STATUS))? == status, "memory decodes no more");
    one.tell(&format!("w {COMMAND:x} 2 5"))?;
    ensure!(one.number(&format!("m {:x} 4", own + STATUS))? == u32::MAX, "memory decodes still");
    ensure!(through(ports)? == status, "after switching on again");
    one.tell(&format!("w {COMMAND:x} 2 7")).map(drop)
}

/// Each access reaches the function, in its width and at its place: not those of the function that begins the host's page.
pub fn each_access_to_a_bar_of_less_than_a_page_reaches_its_function(
    scene: &mut HvmDevices<'_>,
) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    let own = open(one, RTL_SLOT, BAR1)?;
    let memory = granted_of(lab, one, "I/O Memory")?;
    println!("  {memory}");
    bar_of_every_width(one, own)?;

    println!("  moved to where it begins no page in the guest, and behind its old place nothing answers");
    let elsewhere = 0xf7f4_0300;
    one.tell(&format!("w {BAR1:x} 4 {elsewhere:x}"))?;
    ensure!(one.number(&format!("m {:x} 2", own + INTERRUPT_MASK))? == 0xffff, "the old place answers");
    bar_of_every_width(one, elsewhere)?;
    for beside in [elsewhere - 0x100, elsewhere + 0x100] {
        ensure!(one.number(&format!("m {beside:x} 4"))? == u32::MAX, "it answers beside its BAR");
    }
    one.tell(&format!("w {COMMAND:x} 2 5"))?;
    ensure!(one.number(&format!("m {elsewhere:x} 4"))? == u32::MAX, "it answers though decoding is off");
    one.tell(&format!("w {COMMAND:x} 2 7"))?;

    println!("  the same registers through its I/O BAR");
    let ports = open(one, RTL_SLOT, BAR0)?;
    for (at, size) in [(MULTICAST, 1), (INTERRUPT_MASK, 2), (TIMER_INTERRUPT, 4)] {
        let (through, direct) = (
            one.number(&format!("i {:x} {size}", ports + at))?,
            one.number(&format!("m {:x} {size}", elsewhere + at))?,
        );
        ensure!(through == direct, "at {at:#x}: {through:x} through the ports, {direct:x} in memory");
    }
    one.tell(&format!("w {BAR1:x} 4 {own:x}")).map(drop)
}

fn bar_of_every_width(one: &BareGuest<'_>, own: u32) -> Result<()> {
    let read = |at: u32, size: u32| one.number(&format!("m {:x} {size}", own + at));
    let write =
        |at: u32, size: u32, value: u32| one.tell(&format!("n {:x} {size} {value:x}", own + at)).map(drop);
    // Registers of one byte.
    for (index, value) in [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88].into_iter().enumerate() {
        write(MULTICAST + index as u32, 1, value)?;
    }
    ensure!(read(MULTICAST + 2, 1)? == 0x33 && read(MULTICAST + 4, 2)? == 0x6655, "bytes and a word");
    ensure!(read(MULTICAST, 4)? == 0x4433_2211, "a double word: {:x}", read(MULTICAST, 4)?);
    let all = one.tell(&format!("m8 {:x}", own + MULTICAST))?;
    ensure!(all == "8877665544332211", "a quad word: {all}");
    one.tell(&format!("n8 {:x} 1020304 5060708", own + MULTICAST))?;
    ensure!(
        read(MULTICAST, 4)? == 0x0506_0708 && read(MULTICAST + 4, 4)? == 0x0102_0304,
        "a quad word written"
    );
    // Registers that exist in one width only: as anything else they read 0.
    write(INTERRUPT_MASK, 2, 0x4000)?;
    ensure!(read(INTERRUPT_MASK, 2)? == 0x4000, "the mask {:x}", read(INTERRUPT_MASK, 2)?);
    ensure!(read(INTERRUPT_MASK, 4)? == 0, "a double word became two words: {:x}", read(INTERRUPT_MASK, 4)?);
    ensure!(read(INTERRUPT_MASK + 1, 1)? == 0, "a byte became a word");
    write(INTERRUPT_MASK, 2, 0)?;
    write(TIMER_INTERRUPT, 4, 0xffff_1234)?;
    ensure!(read(TIMER_INTERRUPT, 4)? == 0xffff_1234, "the timer {:x}", read(TIMER_INTERRUPT, 4)?);
    write(TIMER_INTERRUPT, 4, 0)?;
    // Of an RTL8139C+, which QEMU's is, in the upper byte.
    ensure!(
        read(TRANSMIT_CONFIGURATION, 4)? >> 24 == 0x74,
        "its version {:x}",
        read(TRANSMIT_CONFIGURATION, 4)?
    );
    ensure!(read(COMMAND_REGISTER, 1)? & 1 == 1, "its buffer is not empty: {:x}", read(COMMAND_REGISTER, 1)?);
    // An unaligned access reaches no register.
    ensure!(read(MULTICAST + 1, 2)? == 0xffff, "an unaligned word: {:x}", read(MULTICAST + 1, 2)?);
    Ok(())
}
