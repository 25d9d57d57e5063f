//! MSI-X of the VF in the bare guest, without an operating system: it writes the messages itself.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use xpci_tests::BareGuest;
use xpci_tests::host::{self, SOON, VFS, come, granted, start_service};

use super::{BAR0, BAR3, Hvm, SLOT};

/// Registers of the 82576's VF (Intel 82576 datasheet, section 7.10.2.9).
const MAILBOX: u32 = 0xc40;
const MAILBOX_MEMORY: u32 = 0x800;
pub const SET_CAUSE: u32 = 0x1520;
pub const ENABLE_CAUSE: u32 = 0x1524;
const AUTO_CLEAR: u32 = 0x152c;
const CAUSE: u32 = 0x1580;
const MISCELLANEOUS_VECTOR: u32 = 0x1740;
/// A vector of the guest's processor.
const VECTOR: u32 = 0x41;
const PENDING: u32 = 0x2000;

fn registers(one: &BareGuest<'_>, bar: u32) -> Result<u32> {
    Ok(one.number(&format!("r {bar:x} 4"))? & !0xf)
}

/// Places the VF's BARs and sets up its interrupts, whatever checks before have left; its registers and its table.
pub fn set_up(one: &BareGuest<'_>) -> Result<(u32, u32)> {
    set_up_at(one, SLOT, 0xf7f0_0000)
}

/// The same of a VF at any device number, with its BARs from this address on.
pub fn set_up_at(one: &BareGuest<'_>, slot: u32, address: u32) -> Result<(u32, u32)> {
    one.tell(&format!("slot {slot:x}"))?;
    // The sweeps left them anywhere.
    one.tell("w 14 4 0")?;
    one.tell("w 20 4 0")?;
    one.tell(&format!("w {BAR0:x} 4 {address:x}"))?;
    one.tell(&format!("w {BAR3:x} 4 {:x}", address + 0x1_0000))?;
    let (own, table) = (registers(one, BAR0)?, registers(one, BAR3)?);
    one.tell("w 4 2 6")?;
    one.tell("w 72 2 0")?;
    for entry in [table, table + 0x10] {
        for (at, value) in [(0, 0xfee0_0000), (4, 0), (8, VECTOR), (0xc, 0)] {
            one.tell(&format!("n {:x} 4 {value:x}", entry + at))?;
        }
    }
    one.tell("w 72 2 8000")?;
    ensure!(one.number("r 72 2")? == 0x8002, "Message Control {}", one.tell("r 72 2")?);
    // The PF's driver writes to the mailbox when it likes: that interrupts nobody but where it is what is looked at.
    for (at, value) in [(MISCELLANEOUS_VECTOR, 0), (AUTO_CLEAR, 7), (CAUSE, 7), (ENABLE_CAUSE, 1)] {
        one.tell(&format!("n {:x} 4 {value:x}", own + at))?;
    }
    Ok((own, table))
}

/// The VF's mailbox reaches the PF's driver in dom0, whose answer interrupts.
pub fn the_vfs_mailbox_interrupts_the_guest(scene: &mut Hvm<'_>) -> Result<()> {
    let (lab, one) = (scene.lab, scene.one()?);
    let (own, _) = set_up(one)?;
    come(one, VECTOR, 0)?;
    // The mailbox is entry 1's; QEMU counts from 1 here and takes entry 0, so both have the same message.
    one.tell(&format!("n {:x} 4 81", own + MISCELLANEOUS_VECTOR))?;
    // A request to the PF: reset (1). The answer is an interrupt.
    one.tell(&format!("n {:x} 4 1", own + MAILBOX_MEMORY))?;
    one.tell(&format!("n {:x} 4 1", own + MAILBOX))?;
    let end = Instant::now() + SOON;
    while one.number(&format!("count {VECTOR:x}"))? == 0 {
        ensure!(
            Instant::now() < end,
            "the PF's answer does not interrupt: {}",
            lab.dom0("dmesg | tail -5").ok()?
        );
    }
    // It acknowledges and answers, which may be one interrupt or two.
    let answer = |bits: u32| one.number(&format!("m {:x} 4", own + MAILBOX_MEMORY)).map(|word| word & bits);
    while answer(0x8000_0000)? == 0 {
        ensure!(Instant::now() < end, "the PF does not answer");
    }
    one.tell(&format!("n {:x} 4 0", own + MISCELLANEOUS_VECTOR))?;
    let count = settled_count(one)?;
    trigger(one, own)?;
    comes_again(one, count)
}

/// How many have come by the vector when no more come.
pub fn settled_count(one: &BareGuest<'_>) -> Result<u32> {
    host::settled_count(one, &format!("count {VECTOR:x}"), None)
}

/// Waits until one more has come.
fn comes_again(one: &BareGuest<'_>, before: u32) -> Result<()> {
    host::settled_count(one, &format!("count {VECTOR:x}"), Some(before)).map(drop)
}

/// The VF's registers, its table, and how many interrupts have come.
fn begin(one: &BareGuest<'_>) -> Result<(u32, u32, u32)> {
    let (own, table) = set_up(one)?;
    Ok((own, table, settled_count(one)?))
}

pub fn a_masked_vector_waits_and_its_pending_bit_shows_that(scene: &mut Hvm<'_>) -> Result<()> {
    let one = scene.one()?;
    let (own, table, count) = begin(one)?;
    one.tell(&format!("n {:x} 4 1", table + 0xc))?;
    ensure!(one.number(&format!("m {:x} 4", table + 0xc))? == 1, "the mask reads as clear");
    trigger(one, own)?;
    let pending = one.number(&format!("m {:x} 4", table + PENDING))?;
    ensure!(pending & 1 == 1, "pending bits {pending:x}");
    come(one, VECTOR, count)?;
    one.tell(&format!("n {:x} 4 0", table + 0xc))?;
    come(one, VECTOR, count + 1)?;
    ensure!(one.number(&format!("m {:x} 4", table + PENDING))? & 1 == 0, "still pending");
    Ok(())
}

pub fn a_masked_function_waits_likewise(scene: &mut Hvm<'_>) -> Result<()> {
    let one = scene.one()?;
    let (own, table, count) = begin(one)?;
    one.tell("w 72 2 c000")?;
    trigger(one, own)?;
    ensure!(one.number(&format!("m {:x} 4", table + PENDING))? & 1 == 1, "not pending");
    come(one, VECTOR, count)?;
    one.tell("w 72 2 8000")?;
    come(one, VECTOR, count + 1)
}

pub fn a_vector_stays_masked_over_disabling_and_enabling(scene: &mut Hvm<'_>) -> Result<()> {
    let one = scene.one()?;
    let (own, table, count) = begin(one)?;
    one.tell(&format!("n {:x} 4 1", table + 0xc))?;
    one.tell("w 72 2 0")?;
    one.tell("w 72 2 8000")?;
    ensure!(one.number(&format!("m {:x} 4", table + 0xc))? == 1, "the mask is lost");
    trigger(one, own)?;
    come(one, VECTOR, count)?;
    one.tell(&format!("n {:x} 4 0", table + 0xc))?;
    come(one, VECTOR, count + 1)
}

fn trigger(one: &BareGuest<'_>, own: u32) -> Result<()> {
    one.tell(&format!("n {:x} 4 1", own + SET_CAUSE)).map(drop)
}

/// What was set up keeps working.
pub fn again(one: &BareGuest<'_>) -> Result<()> {
    again_at(one, SLOT)
}

/// The same of a VF at any device number.
pub fn again_at(one: &BareGuest<'_>, slot: u32) -> Result<()> {
    one.tell(&format!("slot {slot:x}"))?;
    let (own, count) = (registers(one, BAR0)?, settled_count(one)?);
    trigger(one, own)?;
    comes_again(one, count)
}

/// The image is made what a process leaves that is killed when Xen has mapped an interrupt and nothing notes that yet.
pub fn an_interrupt_that_a_killed_service_did_not_note_is_unmapped_by_the_next(
    scene: &mut Hvm<'_>,
) -> Result<()> {
    let image = format!("/run/xpci/images/{}", VFS[0]);
    set_up(scene.one()?)?;
    let before = mapped(scene)?;
    scene.service.signal(9)?;
    scene.service.wait(SOON)?;
    let mut words = words(&scene.lab.pull(&image)?);
    make_pending(&mut words, 1).context("the image has no such vector")?;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    scene.lab.push(&bytes, &image)?;
    scene.service = start_service(scene.lab)?;
    wait_for_mapped(scene, before - 1).context("after the restart")?;
    // The write that was under way would be carried out again; here, it is one that sets up all vectors.
    scene.one()?.tell("w 72 2 0")?;
    scene.one()?.tell("w 72 2 8000")?;
    wait_for_mapped(scene, before).context("after MSI-X was enabled again")?;
    again(scene.one()?)
}

fn wait_for_mapped(scene: &Hvm<'_>, wanted: u32) -> Result<()> {
    let end = Instant::now() + SOON;
    loop {
        let now = mapped(scene)?;
        if now == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{now} interrupts are mapped, not {wanted}");
    }
}

/// How many interrupts of the host Xen has mapped for the guest.
fn mapped(scene: &Hvm<'_>) -> Result<u32> {
    let lines = granted(scene.lab, scene.one()?.domid()?)?;
    let line = lines.iter().find(|line| line.contains("Interrupts")).context("Xen reports no interrupts")?;
    let ranges = line.split_once('{').map_or("", |(_, ranges)| ranges).trim_end_matches('}');
    let mut count = 0;
    for range in ranges.split(',').map(str::trim).filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        count += last.parse::<u32>()? - first.parse::<u32>()? + 1;
    }
    Ok(count)
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
}

/// Replaces the note of a vector by one that it is about to be mapped. Word 9 says which of two slots counts, from words 3072 and 4096 on:
/// mode, pending entry, number of vectors, a reserved word, then entry and interrupt of each.
fn make_pending(words: &mut [u32], entry: u32) -> Option<()> {
    let slot = 3072 + (*words.get(9)? as usize & 1) * 1024;
    let count = *words.get(slot + 2)? as usize;
    let first = slot + 4;
    let found = (0..count).find(|index| words.get(first + 2 * index) == Some(&entry))?;
    let last = count.checked_sub(1)?;
    for word in 0..2 {
        *words.get_mut(first + 2 * found + word)? = *words.get(first + 2 * last + word)?;
    }
    *words.get_mut(slot + 1)? = entry;
    *words.get_mut(slot + 2)? = last as u32;
    Some(())
}
