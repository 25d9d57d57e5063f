//! The VF as dom0 reads it, and the oracle for it.

use std::fmt::Write as _;
use std::ops::Range;

use anyhow::{Context, Result, ensure};
use xpci_test_support::meaning;
use xpci_test_support::oracle::Oracle;
use xpci_tests::Lab;

pub const DEVICE_CONTROL: u32 = 0xa8;
/// Initiate Function Level Reset, as a bit of Device Control.
pub const INITIATE_RESET: u32 = 1 << 15;
const BUS_MASTER: u8 = 1 << 2;
const IDENTITY: [u8; 4] = [0x86, 0x80, 0xca, 0x10];
const MSIX: Range<usize> = 0x70..0x7c;
/// The header and the capabilities: MSI-X, PCI Express, AER, ARI.
const LISTED: [Range<usize>; 5] = [0..0x40, MSIX, 0xa0..0xdc, 0x100..0x148, 0x150..0x158];

/// All of a function's config space, as dom0's kernel reads it.
pub fn config(lab: &Lab, address: &str) -> Result<Vec<u8>> {
    let bytes = lab.pull(&format!("/sys/bus/pci/devices/{address}/config"))?;
    ensure!(bytes.len() == 4096, "{address}: {} bytes of config space", bytes.len());
    Ok(bytes)
}

/// Which bits of a VF keep what is written: asked of a sibling that no guest has, by writing the complement of all of it and
/// putting it back. Not asked: the reset bit; MSI-X, which Xen watches; and the header but Command, from which nothing of a
/// guest's passes.
pub fn writable(lab: &Lab, sibling: &str) -> Result<Vec<u8>> {
    let before = config(lab, sibling)?;
    let places: Vec<usize> =
        [4].into_iter().chain(0x40..4096).filter(|at| at % 4 == 0 && !MSIX.contains(at)).collect();
    let mut command = format!("setpci -s {sibling}");
    for &at in &places {
        let now = dword(&before, at);
        let other = if at == DEVICE_CONTROL as usize { !now & !INITIATE_RESET } else { !now };
        write!(command, " {at:x}.l={other:x} {at:x}.l {at:x}.l={now:x}")?;
    }
    let answers = lab.dom0(&command).ok()?;
    ensure!(config(lab, sibling)? == before, "{sibling} is not as it was");
    let mut writable = vec![0; 4096];
    for (at, answer) in places.iter().zip(answers.lines()) {
        let changed =
            u32::from_str_radix(answer.trim(), 16).with_context(|| answer.to_owned())? ^ dword(&before, *at);
        writable[*at..at + 4].copy_from_slice(&changed.to_le_bytes());
    }
    Ok(writable)
}

/// Clears what guests have written where no capability of a VF is, if there is the VF: QEMU's keep it over resets, and over their removal.
pub fn clear_unknown(lab: &Lab, address: &str) -> Result<()> {
    let config = format!("/sys/bus/pci/devices/{address}/config");
    let ends = LISTED.iter().skip(1).map(|next| next.start).chain([4096]);
    let gaps = LISTED.iter().map(|listed| listed.end).zip(ends);
    let mut command = format!("[ ! -e {config} ] || {{ true");
    for (start, end) in gaps.filter(|(start, end)| start < end) {
        let (seek, count) = (start / 4, (end - start) / 4);
        write!(
            command,
            " && dd status=none if=/dev/zero of={config} bs=4 seek={seek} count={count} conv=notrunc"
        )?;
    }
    lab.dom0(&format!("{command}; }}")).ok().map(drop)
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |bytes: &[u8; 4]| u32::from_le_bytes(*bytes))
}

/// Where BAR 0 and BAR 3 are, and how large: 64-bit and prefetchable, as the host's kernel says.
pub fn bars(lab: &Lab, address: &str) -> Result<[(u64, u64); 2]> {
    let text = lab.dom0(&format!("cat /sys/bus/pci/devices/{address}/resource")).ok()?;
    let mut found = Vec::new();
    for line in text.lines() {
        let numbers: Vec<u64> = line
            .split_whitespace()
            .map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16))
            .collect::<Result<_, _>>()
            .with_context(|| line.to_owned())?;
        let [start, end, flags] = numbers[..] else { continue };
        if flags != 0 {
            // IORESOURCE_MEM, IORESOURCE_PREFETCH, IORESOURCE_MEM_64.
            ensure!(flags & 0x10_2200 == 0x10_2200, "a BAR of another kind: {line}");
            found.push((start, end - start + 1));
        }
    }
    found.try_into().map_err(|found| anyhow::anyhow!("not two BARs: {found:x?}"))
}

/// The oracle, and what it was made from.
pub struct Model {
    pub oracle: Oracle,
    bytes: Vec<u8>,
    writable: Vec<u8>,
    bars: [(u64, u64); 2],
}

impl Model {
    pub fn new(bytes: Vec<u8>, writable: Vec<u8>, bars: [(u64, u64); 2]) -> Self {
        let oracle = oracle(&bytes, &writable, bars);
        Self { oracle, bytes, writable, bars }
    }

    /// What a read is answered, as the frontend prints it.
    pub fn read(&self, at: u32, size: u32) -> String {
        format!("0 {:x}", self.oracle.read(at as usize, size as usize))
    }

    /// The frontend left, and the next one finds bus mastering off.
    pub fn left(&mut self) {
        self.oracle.bytes[4] &= !BUS_MASTER;
    }

    /// The function was reset for its guest: it is as the guest found it at first. What no capability tells of is as hardware
    /// has it now.
    pub fn reset(&mut self, hardware: Vec<u8>) -> Result<()> {
        for range in LISTED {
            ensure!(
                hardware[range.clone()] == self.bytes[range.clone()],
                "after a reset hardware at {range:x?} is {:02x?}",
                &hardware[range.clone()]
            );
        }
        self.oracle = oracle(&self.bytes, &self.writable, self.bars);
        self.oracle.bytes = hardware;
        Ok(())
    }

    /// What dom0 reads is what the oracle has of hardware: what passes is there, everything else is as it was.
    pub fn compare(&self, lab: &Lab, address: &str, after: &str) -> Result<()> {
        let found = config(lab, address)?;
        for (at, (found, wanted)) in found.iter().zip(&self.oracle.bytes).enumerate() {
            ensure!(found == wanted, "after {after}: hardware at {at:#x} is {found:#04x}, not {wanted:#04x}");
        }
        Ok(())
    }
}

fn oracle(bytes: &[u8], writable: &[u8], bars: [(u64, u64); 2]) -> Oracle {
    // No error is pending in the lab, so what ones would clear is 0 and stays 0.
    let mut oracle = Oracle::new(bytes.to_vec(), writable.to_vec(), vec![0; bytes.len()]);
    meaning::network_vf(&mut oracle, IDENTITY, bars);
    oracle
}
