//! The guest reads and writes all of a function's config space by itself and answers with a hash; the oracle does the same.
//!
//! Ports CFC to CFF take accesses of any alignment; of one that reaches over CFF the rest is not config space and reads all ones. One
//! bit is never written, Initiate Function Level Reset: a step of its own does that.

use anyhow::{Context, Result, ensure};
use xpci_tests::{BareGuest, Lab};

use crate::vf::{DEVICE_CONTROL, INITIATE_RESET, Model};

const MSIX_CONTROL: u32 = 0x72;
const SIZES: [usize; 3] = [1, 2, 4];
/// What is written, by what was read.
type Class = (&'static str, fn(u32) -> u32);
const CLASSES: [Class; 5] = [
    ("zeros", |_| 0),
    ("ones", |_| u32::MAX),
    ("the complement", |now| !now),
    ("alternating bits", |_| 0xa5a5_a5a5),
    ("what was read", |now| now),
];

/// Tells the oracle what firmware and BIOS have made of the header.
pub fn settle(one: &BareGuest<'_>, model: &mut Model) -> Result<()> {
    for at in [4, 0xc, 0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30, 0x3c] {
        let now = one.number(&format!("r {at:x} 4"))?;
        // Events are cleared by ones.
        model.oracle.write(at, 4, if at == 4 { now & 0xffff } else { now });
        let found = model.oracle.read(at, 4);
        ensure!(found == now, "at {at:#x} the guest reads {now:#x}, the oracle {found:#x}");
    }
    let place = DEVICE_CONTROL + 1;
    one.tell(&format!("spare {place:x} {:x}", INITIATE_RESET >> 8)).map(drop)
}

/// How far an access reaches: over CFF through the ports, not at all beyond config space through the window.
fn reach(at: usize, size: usize, ports: bool) -> usize {
    if ports { size.min(4 - at % 4) } else { size }
}

fn read(model: &Model, at: usize, size: usize, ports: bool) -> u32 {
    let reached = reach(at, size, ports);
    let value = u64::from(model.oracle.read(at, reached)) | u64::MAX << (8 * reached);
    value as u32 & mask(size)
}

fn mask(size: usize) -> u32 {
    u32::MAX >> (32 - 8 * size)
}

fn hash(values: impl Iterator<Item = u8>) -> u32 {
    values.fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

fn places(size: usize, ports: bool) -> impl Iterator<Item = usize> {
    // What the library's tests and the PV guest's do for every byte is done through the window up to the first extended capabilities.
    let (end, step) = match (ports, size) {
        (true, _) => (256, 1),
        (false, 4) => (4096, size),
        (false, _) => (512, size),
    };
    (0..end).step_by(step)
}

fn bytes_of(value: u32, size: usize) -> impl Iterator<Item = u8> {
    value.to_le_bytes().into_iter().take(size)
}

/// All reads, then all writes with reads; afterwards dom0 compares hardware.
pub fn all(lab: &Lab, address: &str, one: &BareGuest<'_>, model: &mut Model) -> Result<()> {
    for ports in [true, false] {
        let prefix = if ports { "" } else { "e" };
        for size in SIZES {
            let expected =
                hash(places(size, ports).flat_map(|at| bytes_of(read(model, at, size, ports), size)));
            let found = one.number(&format!("{prefix}sum {size}"))?;
            if found != expected {
                explain(one, model, size, ports)?;
            }
        }
        for (class, (name, value)) in CLASSES.iter().enumerate() {
            for size in SIZES {
                let expected = written(model, size, ports, *value);
                let found = one.number(&format!("{prefix}sweep {class} {size}"))?;
                if found != expected {
                    explain(one, model, size, ports).with_context(|| format!("{name}, {size} bytes"))?;
                }
            }
            // With MSI-X enabled hardware differs from what the oracle knows of it.
            one.tell(&format!("w {MSIX_CONTROL:x} 2 0"))?;
            model.oracle.write(MSIX_CONTROL as usize, 2, 0);
            model.compare(lab, address, name)?;
        }
    }
    Ok(())
}

fn written(model: &mut Model, size: usize, ports: bool, value: fn(u32) -> u32) -> u32 {
    let place = DEVICE_CONTROL as usize + 1;
    let mut found = Vec::new();
    for at in places(size, ports) {
        let mut value = value(read(model, at, size, ports));
        if (at..at + size).contains(&place) {
            value &= !((INITIATE_RESET >> 8) << (8 * (place - at)));
        }
        let reached = reach(at, size, ports);
        model.oracle.write(at, reached, value & mask(reached));
        found.extend(bytes_of(read(model, at, size, ports), size));
    }
    hash(found.into_iter())
}

/// Finds out where the guest reads something else than the oracle.
fn explain(one: &BareGuest<'_>, model: &Model, size: usize, ports: bool) -> Result<()> {
    let order = if ports { "r" } else { "e" };
    for at in places(size, ports) {
        let found = one.number(&format!("{order} {at:x} {size}"))?;
        let expected = read(model, at, size, ports);
        ensure!(found == expected, "{order} {at:#x}, {size} bytes: {found:#x}, not {expected:#x}");
    }
    anyhow::bail!(
        "a hash differs, but by now all {size}-byte reads are as expected: something changed on the way"
    );
}
