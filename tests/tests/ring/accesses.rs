//! Lists of accesses, each with the answer that the oracle has for it.
//!
//! What is written where:
//! - Every offset at every width gets zeros, ones, the complement of what it reads, alternating bits, and what it reads. Between
//!   the capabilities that reaches registers of the VF that are not described; those of QEMU's 82576 keep what is written
//!   and do nothing.
//! - Single bits go to the header and the capabilities (up to 0x160): what lies behind treats all bits alike.
//! - One bit is left out of all this, Initiate Function Level Reset in Device Control: hardware would answer nobody for a while,
//!   and what comes after it is not in the oracle. A step of its own writes it.
//! - Events that ones clear (Status, Device Status, AER) are written as well, but none is pending in the lab, so that clearing
//!   shows nothing here; composed devices have them pending.
//! - Registers that change by themselves: none. The link's state is the VF's PF's, which is not touched.

use anyhow::Result;
use xpci_tests::{Guest, Lab};

use super::script::Script;
use crate::vf::{DEVICE_CONTROL, INITIATE_RESET, Model};

const MSIX_CONTROL: usize = 0x72;
const SIZES: [u32; 3] = [1, 2, 4];
const INVALID_OFFSET: &str = "-2 ffffffff";

fn aligned() -> impl Iterator<Item = (u32, u32)> {
    SIZES.into_iter().flat_map(|size| (0..4096).step_by(size as usize).map(move |at| (at, size)))
}

/// The value without the bit that starts a reset.
fn harmless(at: u32, size: u32, value: u32) -> u32 {
    let place = DEVICE_CONTROL + 1;
    if (at..at + size).contains(&place) {
        value & !((INITIATE_RESET >> 8) << (8 * (place - at)))
    } else {
        value
    }
}

fn mask(size: u32) -> u32 {
    u32::MAX >> (32 - 8 * size)
}

impl Model {
    fn write(&mut self, script: &mut Script, at: u32, size: u32, value: u32) {
        let value = harmless(at, size, value);
        self.oracle.write(at as usize, size as usize, value);
        // The page has the value that was written: the backend has no other answer.
        script.say(format_args!("w {at:x} {size} {value:x}"), format_args!("0 {value:x}"));
    }

    fn look(&self, script: &mut Script, at: u32, size: u32) {
        script.say(format_args!("r {at:x} {size}"), self.read(at, size));
    }
}

/// Everything is read, at every width.
pub fn read_all(guest: &Guest<'_>, model: &mut Model, what: &str) -> Result<()> {
    let mut script = Script::new();
    for (at, size) in aligned() {
        model.look(&mut script, at, size);
    }
    script.run(guest, what)?;
    model.left();
    Ok(())
}

/// Each class of values is written to every offset at every width and read back; after each class dom0 compares hardware.
pub fn write_all(lab: &Lab, address: &str, guest: &Guest<'_>, model: &mut Model) -> Result<()> {
    type Class = (&'static str, fn(u32, u32) -> u32);
    let classes: [Class; 5] = [
        ("zeros", |_, _| 0),
        ("ones", |_, size| mask(size)),
        ("the complement", |now, size| !now & mask(size)),
        ("alternating bits", |_, size| 0xa5a5_a5a5 & mask(size)),
        ("what was read", |now, _| now),
    ];
    for (name, value) in classes {
        for size in SIZES {
            let mut script = Script::new();
            for at in (0..4096).step_by(size as usize) {
                let now = model.oracle.read(at as usize, size as usize);
                model.write(&mut script, at, size, value(now, size));
                model.look(&mut script, at, size);
            }
            let what = format!("{name} in {size} bytes");
            script.run(guest, &what)?;
            model.left();
            model.compare(lab, address, &what)?;
        }
    }
    Ok(())
}

/// Each bit alone, where there are registers: the first 256 bytes and the extended capabilities.
pub fn single_bits(lab: &Lab, address: &str, guest: &Guest<'_>, model: &mut Model) -> Result<()> {
    for size in SIZES {
        let mut script = Script::new();
        for at in (0..0x160).step_by(size as usize) {
            for bit in 0..8 * size {
                model.write(&mut script, at, size, 1 << bit);
                model.look(&mut script, at, size);
            }
        }
        let what = format!("single bits in {size} bytes");
        script.run(guest, &what)?;
        model.left();
        model.compare(lab, address, &what)?;
    }
    Ok(())
}

/// Ones into all BARs and the ROM in one order, at one width; read in another order; put back in a third.
pub fn size_bars(lab: &Lab, address: &str, guest: &Guest<'_>, model: &mut Model) -> Result<()> {
    let registers = [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30u32];
    let mut script = Script::new();
    for round in 0..60usize {
        // Steps that have no divisor in common with 7 visit each register once.
        let order =
            |step: usize| (0..7).map(move |n| registers[(round + n * (1 + (round / 7 + step) % 6)) % 7]);
        let size = SIZES[round % 3];
        let pieces = |register: u32| (0..4 / size).map(move |piece| register + piece * size);
        let begun: Vec<u32> = registers.iter().map(|at| model.oracle.read(*at as usize, 4)).collect();
        for at in order(0).flat_map(pieces) {
            model.write(&mut script, at, size, mask(size));
        }
        for at in order(2) {
            model.look(&mut script, at, 4);
        }
        for register in order(4) {
            let place = registers.iter().position(|at| *at == register).unwrap_or(0);
            for at in pieces(register) {
                model.write(&mut script, at, size, begun[place] >> (8 * (at - register)) & mask(size));
            }
            model.look(&mut script, register, 4);
        }
    }
    script.run(guest, "BARs sized in any order")?;
    model.left();
    model.compare(lab, address, "sizing BARs")
}

/// Requests that ask for nothing that exists, or in no way that exists; after each the function answers.
pub fn invalid(lab: &Lab, address: &str, guest: &Guest<'_>, model: &mut Model) -> Result<()> {
    let mut script = Script::new();
    for (at, size) in (0..4096).flat_map(|at| [(at, 2), (at, 4)]).filter(|(at, size)| at % size != 0) {
        script.say(format_args!("r {at:x} {size}"), INVALID_OFFSET);
        script.say(format_args!("w {at:x} {size} {:x}", u32::MAX), INVALID_OFFSET);
    }
    model.look(&mut script, 0, 4);
    let far = [0x1000, 0x1001, 0x1ffc, 0x8000, 0xffff, 0x1_0000, 0x1_0010, 0x7fff_fffc, 0x8000_0000];
    // -1, -2, -4 and the last offsets as frontends with signed numbers would send them.
    let negative = [u32::MAX, u32::MAX - 1, u32::MAX - 3, 0u32.wrapping_sub(4096)];
    for at in far.into_iter().chain(negative) {
        for size in SIZES {
            script.say(format_args!("r {at:x} {size}"), INVALID_OFFSET);
            script.say(format_args!("w {at:x} {size} 0"), INVALID_OFFSET);
        }
    }
    for at in [0, 4, 0x10, 0xffc, 0xfff, 0x1000, u32::MAX] {
        for size in [0, 3, 5, 6, 7, 8, 16, 0x1000, 0x1_0001, 0x1_0004, 0x8000_0000, u32::MAX] {
            script.say(format_args!("r {at:x} {size:x}"), INVALID_OFFSET);
            script.say(format_args!("w {at:x} {size:x} {:x}", u32::MAX), INVALID_OFFSET);
        }
    }
    model.look(&mut script, 0, 4);
    // Commands: those towards the guest, one of an older protocol, and none.
    for command in [6, 7, 8, 9, 10, 11, 0x100, 0x1_0000, 0x8000_0000, u32::MAX] {
        script.say(format_args!("op {command:x} 0 0 0 4 2 ffff 0"), "-4 ffffffff");
        script.say(format_args!("op {command:x} 0 0 1 4 2 ffff 0"), "-1 ffffffff");
    }
    let devices = [1, 8, 0xff, 0x100, 0x1_0000, u32::MAX].map(|devfn| (0, 0, devfn));
    let buses = [1, 0xff, 0x100, u32::MAX].map(|bus| (0, bus, 0));
    let segments = [1, 0x1_0000, u32::MAX].map(|segment| (segment, 0, 0));
    for (segment, bus, devfn) in devices.into_iter().chain(buses).chain(segments) {
        for command in 0..6 {
            script.say(format_args!("op {command} {segment:x} {bus:x} {devfn:x} 4 2 ffff 0"), "-1 ffffffff");
        }
    }
    model.look(&mut script, 0, 4);
    // MSI, which the function does not have, and lists of MSI-X entries that make no sense.
    script.say("op 2 0 0 0 0 0 0 0", "-5 ffffffff");
    script.say("op 3 0 0 0 0 0 0 0", "0 0");
    script.say("op 5 0 0 0 0 0 0 0", "0 0");
    // What is disabled reads as disabled, though the guest itself had written the bit.
    let control = model.oracle.read(MSIX_CONTROL, 2);
    model.oracle.write(MSIX_CONTROL, 2, control & 0x7fff);
    model.look(&mut script, MSIX_CONTROL as u32, 2);
    for count in [0, 0x81, 0xffff, 0x1_0001, u32::MAX] {
        script.say(format_args!("op 4 0 0 0 0 0 {count:x} 0"), "-5 ffffffff");
    }
    script.say("op 4 0 0 0 0 0 2 0 0 0", "-5 ffffffff 0 0");
    script.say("op 4 0 0 0 0 0 1 0 3", "-5 ffffffff 0");
    script.say("op 4 0 0 0 0 0 3 0 0 1 ffff", "-5 ffffffff 0 0 0");
    // A claim of the frontend's own choice is nothing to the backend, twice the same either.
    for value in [0x5555_5555, 0x0aaa_aaaa, 0x5555_5555] {
        model.oracle.write(0x0c, 4, value);
        script.say(format_args!("op 1 0 0 0 c 4 {value:x} 77"), format_args!("0 {value:x}"));
        model.look(&mut script, 0x0c, 4);
    }
    script.run(guest, "requests that make no sense")?;
    model.left();
    model.compare(lab, address, "requests that make no sense")
}
