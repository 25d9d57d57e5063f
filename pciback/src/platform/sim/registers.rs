//! Registers that behave like hardware: bits that keep what is written, that a written 1 clears, and that never change.

use std::sync::Arc;

use super::hardware::Masks;
use crate::config::Access;

/// A reset that a write to config space starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing but the register itself changes.
    None,
    /// Initiate Function Level Reset was written.
    FunctionLevelReset,
    /// Secondary Bus Reset was set in a bridge.
    SecondaryBusReset,
}

/// The config space of one function.
#[derive(Debug, Clone)]
pub(super) struct Registers {
    bytes: Vec<u8>,
    power_up: Arc<Vec<u8>>,
    masks: Arc<Masks>,
}

/// What Linux keeps of a function over a reset.
pub(super) struct Saved(Vec<(usize, Vec<u8>)>);

impl Registers {
    /// Registers as they are after power-up, with no BAR placed.
    pub fn new(power_up: Arc<Vec<u8>>, masks: Arc<Masks>) -> Self {
        Self { bytes: power_up.to_vec(), power_up, masks }
    }

    pub fn size(&self) -> u16 {
        self.bytes.len() as u16
    }

    pub fn masks(&self) -> &Masks {
        &self.masks
    }

    /// All of them.
    pub fn all(&self) -> &[u8] {
        &self.bytes
    }

    pub fn peek(&self, at: u16) -> u8 {
        self.bytes.get(usize::from(at)).copied().unwrap_or(0xff)
    }

    pub fn peek16(&self, at: u16) -> u16 {
        u16::from_le_bytes([self.peek(at), self.peek(at + 1)])
    }

    pub fn peek32(&self, at: u16) -> u32 {
        u32::from(self.peek16(at)) | u32::from(self.peek16(at + 2)) << 16
    }

    /// Sets what hardware itself sets, even bits that no write can set.
    pub fn poke(&mut self, at: u16, value: &[u8]) {
        for (place, byte) in self.bytes.iter_mut().skip(usize::from(at)).zip(value) {
            *place = *byte;
        }
    }

    /// Sets and clears bits of a word that software owns.
    pub fn change16(&mut self, at: u16, clear: u16, set: u16) {
        let value = self.peek16(at) & !clear | set;
        self.poke(at, &value.to_le_bytes());
    }

    /// Writes a BAR's address as firmware does; its low bits say what kind of BAR it is.
    pub fn place_bar(&mut self, at: u16, start: u64, low_bits: u8, wide: bool) {
        let kept = u64::from(self.peek(at) & low_bits);
        self.poke(at, &(start | kept).to_le_bytes()[..if wide { 8 } else { 4 }]);
    }

    pub fn read(&self, access: Access) -> u32 {
        (0..access.width().bytes())
            .rev()
            .fold(0, |value, index| value << 8 | u32::from(self.peek(access.offset() + index)))
    }

    pub fn write(&mut self, access: Access, value: u32) -> Effect {
        let mut effect = Effect::None;
        for (index, written) in (0..access.width().bytes()).zip(value.to_le_bytes()) {
            let at = usize::from(access.offset() + index);
            let Some(byte) = self.bytes.get_mut(at) else { break };
            let (writable, clear) = (self.masks.writable[at], self.masks.clear_on_one[at]);
            let before = *byte;
            *byte = *byte & !writable & !(clear & written) | written & writable;
            if self.masks.bus_reset == Some(at as u16) && !before & *byte & 0x40 != 0 {
                effect = Effect::SecondaryBusReset;
            }
            if self.masks.reset_trigger == Some(at as u16) && written & 0x80 != 0 {
                effect = Effect::FunctionLevelReset;
            }
        }
        effect
    }

    /// Everything as it was at power-up.
    pub fn reset(&mut self) {
        self.bytes.clone_from(&self.power_up);
    }

    /// What Linux reads before a reset that it starts: the header, and the controls of the capabilities it knows.
    pub fn save(&self) -> Saved {
        let ranges = self.masks.saved.iter().map(|range| {
            let range = usize::from(range.start)..usize::from(range.end).min(self.bytes.len());
            (range.start, self.bytes.get(range).unwrap_or_default().to_vec())
        });
        Saved(ranges.collect())
    }

    /// What Linux writes again after a reset. MSI and MSI-X are not part of it: under Xen a guest's vectors are Xen's.
    pub fn restore(&mut self, saved: &Saved) {
        for (start, bytes) in &saved.0 {
            self.poke(*start as u16, bytes);
        }
    }
}
