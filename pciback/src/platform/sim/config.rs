//! Registers that behave like hardware: bits that keep what is written, that a written 1 clears, and that never change.

use super::model::{self, Model};
use crate::config::Access;

const COMMAND: u16 = 0x04;
const BARS: u16 = 0x10;
const BARS_END: u16 = 0x28;
const ROM: u16 = 0x30;

/// The config space of one function.
#[derive(Debug, Clone)]
pub(super) struct Registers {
    bytes: Vec<u8>,
    writable: Vec<u8>,
    clear_on_one: Vec<u8>,
    initial: Vec<u8>,
}

impl Registers {
    pub fn new(model: &Model) -> Result<Self, String> {
        let bytes = model::rows(&model.config, model.size)?;
        let empty = vec![0; bytes.len()];
        let mut registers =
            Self { initial: bytes.clone(), bytes, writable: empty.clone(), clear_on_one: empty };
        for (masks, target) in
            [(&model.writable, &mut registers.writable), (&model.clear_on_one, &mut registers.clear_on_one)]
        {
            for (offset, mask) in masks {
                let (offset, mask) = (model::hex(offset)? as usize, model::hex(mask)? as u32);
                let place =
                    target.get_mut(offset..offset + 4).ok_or_else(|| format!("no register {offset:#x}"))?;
                place.copy_from_slice(&mask.to_le_bytes());
            }
        }
        Ok(registers)
    }

    pub fn size(&self) -> u16 {
        self.bytes.len() as u16
    }

    pub fn peek(&self, at: u16) -> u8 {
        self.bytes.get(usize::from(at)).copied().unwrap_or(0xff)
    }

    /// Sets what hardware itself sets, at power-up or later.
    pub fn poke(&mut self, at: u16, value: &[u8]) {
        for (index, byte) in value.iter().enumerate() {
            if let Some(place) = self.bytes.get_mut(usize::from(at) + index) {
                *place = *byte;
                self.initial[usize::from(at) + index] = *byte;
            }
        }
    }

    /// Lets the address bits of a BAR be written, as its size says, and sets where it is.
    pub fn place_bar(&mut self, index: usize, start: u64, size: u64, wide: bool) {
        let at = BARS + 4 * index as u16;
        let kept = u64::from(self.peek(at) & 0xf);
        let length = if wide { 8 } else { 4 };
        let mask = !(size - 1) & !0xf;
        self.poke(at, &(start | kept).to_le_bytes()[..length]);
        self.writable[usize::from(at)..usize::from(at) + length]
            .copy_from_slice(&mask.to_le_bytes()[..length]);
    }

    pub fn read(&self, access: Access) -> u32 {
        (0..access.width().bytes())
            .rev()
            .fold(0, |value, index| value << 8 | u32::from(self.peek(access.offset() + index)))
    }

    pub fn write(&mut self, access: Access, value: u32) {
        let written = value.to_le_bytes();
        for index in 0..access.width().bytes() {
            let (at, written) = (usize::from(access.offset() + index), written[usize::from(index)]);
            if at >= self.bytes.len() {
                return;
            }
            let (writable, clear) = (self.writable[at], self.clear_on_one[at]);
            let kept = self.bytes[at] & !writable & !(clear & written);
            self.bytes[at] = kept | written & writable;
        }
    }

    /// A reset as Linux does it: everything as it was at power-up, then Command, BARs and ROM put back.
    pub fn reset(&mut self) {
        let saved = [(COMMAND, COMMAND + 2), (BARS, BARS_END), (ROM, ROM + 4)];
        let before = self.bytes.clone();
        self.bytes.clone_from(&self.initial);
        for (start, end) in saved {
            let range = usize::from(start)..usize::from(end).min(self.bytes.len());
            self.bytes[range.clone()].copy_from_slice(&before[range]);
        }
    }
}
