//! The MSI-X table that an HVM guest sees: its own, in the image.

use super::bars;
use super::device::Device;
use crate::config::{Bar, MsixCapability};
use crate::platform::MsiMessage;
use crate::serve::GuestFunction;

/// Index of Message Data in an entry of the table.
const DATA: usize = 2;
/// Index of Vector Control in an entry of the table, and its Mask bit (PCI Express 6.0, section 7.7.2.9).
const CONTROL: usize = 3;
const MASKED: u32 = 1;

/// The place of an access in the table: entry and first word. `None`: it is not in the table. `Some(None)`: it is, but in no
/// way that the specification defines (section 7.7.2: aligned dwords and quadwords).
fn place(msix: &MsixCapability, bar: &Bar, offset: u64, bytes: u8) -> Option<Option<(u16, usize)>> {
    let part = bars::part_of(bar, msix.table())?;
    let at = offset.checked_sub(part.offset).filter(|at| *at < part.bytes)?;
    let defined = matches!(bytes, 4 | 8) && at.is_multiple_of(u64::from(bytes));
    Some(defined.then_some(((at / MsixCapability::ENTRY) as u16, (at % MsixCapability::ENTRY / 4) as usize)))
}

/// The message of an entry, and whether it is masked.
pub(super) fn message(function: &GuestFunction, entry: u16) -> (MsiMessage, bool) {
    let [address, address_high, data, control] = function.space.image().table_entry(entry);
    (MsiMessage { address, address_high, data }, control & MASKED != 0)
}

/// Notes the mask of an entry.
pub(super) fn set_mask(function: &mut GuestFunction, entry: u16, masked: bool) {
    function.space.image_mut().set_table_word(entry, CONTROL, masked.into());
}

/// What a reset makes of the table: every vector is masked.
pub(super) fn mask_table(function: &mut GuestFunction) {
    let entries = function.space.msix().map_or(0, |msix| msix.table_size);
    for entry in 0..entries {
        for (index, value) in [0, 0, 0, MASKED].into_iter().enumerate() {
            function.space.image_mut().set_table_word(entry, index, value);
        }
    }
}

impl Device {
    /// An access of the guest's to its table: what was read or written. `None`: it is no part of the table.
    pub(super) fn access_table(
        &self,
        function: &mut GuestFunction,
        bar: &Bar,
        offset: u64,
        bytes: u8,
        write: Option<u64>,
    ) -> Option<u64> {
        let Some((entry, first)) = place(&function.space.msix()?, bar, offset, bytes)? else {
            return Some(write.unwrap_or(u64::MAX));
        };
        let Some(value) = write else {
            let words = function.space.image().table_entry(entry);
            let high = if bytes == 8 { words[first + 1] } else { 0 };
            return Some(u64::from(words[first]) | u64::from(high) << 32);
        };
        for (index, word) in (first..).zip([value as u32, (value >> 32) as u32]).take(usize::from(bytes) / 4)
        {
            // Of Vector Control only the mask is not reserved.
            let word = if index == CONTROL { word & MASKED } else { word };
            function.space.image_mut().set_table_word(entry, index, word);
        }
        // The data is what is written last, and half of a message may name another interrupt.
        let complete = first + usize::from(bytes) / 4 > DATA || message(function, entry).0.pirq().is_none();
        // Pending bits are read where hardware has them, and writes of them do nothing.
        let mask_written = first + usize::from(bytes) / 4 > CONTROL;
        if complete && let Err(error) = self.bind_entry(function, entry, mask_written) {
            function.note_trouble(&error);
        }
        Some(value)
    }

    /// Notes the masks of bound vectors, which Xen took from the guest without asking us, as hardware has them. That of an interrupt
    /// that the guest takes as an event is no mask of the guest's.
    pub(super) fn keep_masks(&self, function: &mut GuestFunction) {
        let Some(msix) = function.space.msix() else { return };
        let vectors = function.vectors();
        for (entry, _) in vectors.entries.iter().filter(|(entry, _)| !vectors.chosen.contains(entry)) {
            if let Some(masked) = self.mask_in_hardware(&msix, *entry) {
                set_mask(function, *entry, masked);
            }
        }
    }

    /// Whether hardware masks an entry.
    pub(super) fn mask_in_hardware(&self, msix: &MsixCapability, entry: u16) -> Option<bool> {
        let at = u64::from(msix.table_offset) + MsixCapability::ENTRY * u64::from(entry) + 4 * CONTROL as u64;
        self.with_memory(msix.table_bar, |memory| memory.read(at, 4) as u32 & MASKED != 0)
    }
}
