//! The copy of an expansion ROM that an HVM guest reads.

use crate::platform::BarMemory;

/// The number of the ROM among a function's BARs.
const INDEX: u8 = 6;

/// The contents of an expansion ROM. Where there are none, as after the loss of their file, it reads all ones.
pub struct RomCopy(Vec<u8>);

impl RomCopy {
    /// Of contents that were checked.
    pub const fn new(contents: Vec<u8>) -> Self {
        Self(contents)
    }

    /// As memory of a function, with its BAR's number.
    pub fn into_memory(self) -> (u8, Box<dyn BarMemory>) {
        (INDEX, Box::new(self))
    }
}

impl BarMemory for RomCopy {
    /// At any offset.
    fn read(&self, offset: u64, bytes: u8) -> u64 {
        let at = |index: u8| usize::try_from(offset.checked_add(index.into())?).ok();
        let byte = |index: u8| at(index).and_then(|at| self.0.get(at)).copied().unwrap_or(0xff);
        (0..bytes.min(8)).rev().fold(0, |value, index| value << 8 | u64::from(byte(index)))
    }

    /// It is read-only memory.
    fn write(&self, _: u64, _: u8, _: u64) {}
}
