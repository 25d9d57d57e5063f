//! Port CF8, which selects what port CFC reaches, and the reset control register in its midst.
//!
//! Xen keeps its own copy of what a guest writes to CF8, and uses it to send accesses to CFC to the server of the device. The write itself
//! it has carried out like any other. Left to the guest's device model, which is another process, each access to a function
//! of ours would wait for two.

use std::sync::atomic::Ordering;

use crate::platform::SharedMemory;

/// The first port, CONFIG_ADDRESS (PCI Local Bus 3.0, section 3.2.2.3.2).
pub const CONFIG_ADDRESS: u16 = 0xcf8;
/// How many ports there are.
pub const CONFIG_PORTS: u16 = 4;
/// The reset control register of the PIIX3, which lies at the second one.
const RESET_CONTROL: u16 = 0xcf9;
/// Its bits: what kind of reset it will be, and the one that begins it.
const HARD_RESET: u32 = 1 << 1;
const RESET: u32 = 1 << 2;

/// What a guest has written there. Where the memory is a file's, it outlives the service.
pub struct ConfigPorts(SharedMemory);

impl ConfigPorts {
    /// Bytes of memory that it needs, zeros at first: a page, the least that can be mapped.
    pub const BYTES: usize = 4096;
    const ADDRESS: usize = 0;
    const CONTROL: usize = 1;

    /// Over this memory.
    pub fn new(memory: SharedMemory) -> Self {
        assert!(memory.len() * 4 >= Self::BYTES, "too little memory");
        Self(memory)
    }

    /// What an access finds, and whether it resets the guest. Only whole registers are there; on the buses behind them nothing answers
    /// at these ports.
    pub fn access(&self, port: u16, bytes: u8, write: Option<u64>) -> (u64, bool) {
        let word = match (port, bytes) {
            (CONFIG_ADDRESS, 4) => &self.0[Self::ADDRESS],
            (RESET_CONTROL, 1) => &self.0[Self::CONTROL],
            _ => return (u64::MAX, false),
        };
        let Some(value) = write else { return (word.load(Ordering::Relaxed).into(), false) };
        let written = value as u32;
        let resets = port == RESET_CONTROL && written & RESET != 0;
        if !resets {
            word.store(if port == RESET_CONTROL { written & HARD_RESET } else { written }, Ordering::Relaxed);
        }
        (value, resets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_registers_keep_what_they_are_told_and_nothing_else_is_there() {
        let ports = ConfigPorts::new(SharedMemory::anonymous(ConfigPorts::BYTES).unwrap());
        assert_eq!(ports.access(0xcf8, 4, None), (0, false));
        assert_eq!(ports.access(0xcf8, 4, Some(0x8000_f8a8)), (0x8000_f8a8, false));
        for (port, bytes) in
            [(0xcf8, 1), (0xcf8, 2), (0xcf9, 2), (0xcfa, 1), (0xcfa, 2), (0xcfb, 1), (0xcf9, 4), (0xcf8, 0)]
        {
            assert!(!ports.access(port, bytes, Some(0)).1, "{port:x}/{bytes}");
            assert_eq!(ports.access(port, bytes, None), (u64::MAX, false), "{port:x}/{bytes}");
        }
        assert_eq!(ports.access(0xcf8, 4, None), (0x8000_f8a8, false));
    }

    #[test]
    fn the_reset_control_register_resets_by_its_third_bit_only() {
        let ports = ConfigPorts::new(SharedMemory::anonymous(ConfigPorts::BYTES).unwrap());
        for (value, resets) in [(0, false), (2, false), (4, true), (6, true), (0xfb, false), (0xff, true)] {
            assert_eq!(ports.access(0xcf9, 1, Some(value)).1, resets, "{value:x}");
        }
        assert_eq!(ports.access(0xcf9, 1, None), (2, false));
        assert_eq!(ports.access(0xcf8, 4, None), (0, false));
    }
}
