//! The MSI-X table that an HVM guest sees: its own, in the image.

use super::bars;
use super::device::Device;
use crate::config::{Bar, MsixCapability};
use crate::serve::GuestFunction;

/// Index of Vector Control in an entry of the table, and its Mask bit (PCI Express 6.0, section 7.7.2.9).
const CONTROL: usize = 3;
pub(super) const MASKED: u32 = 1;

/// The place of an access in the table: entry and first word. `None`: it is not in the table. `Some(None)`: it is, but in no
/// way that the specification defines (section 7.7.2: aligned dwords and quadwords).
fn place(msix: &MsixCapability, bar: &Bar, offset: u64, bytes: u8) -> Option<Option<(u16, usize)>> {
    let part = bars::table_part(bar, msix)?;
    let at = offset.checked_sub(part.offset).filter(|at| *at < part.bytes)?;
    let defined = matches!(bytes, 4 | 8) && at.is_multiple_of(u64::from(bytes));
    Some(defined.then_some(((at / bars::ENTRY) as u16, (at % bars::ENTRY / 4) as usize)))
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
        // Pending bits are read where hardware has them, and writes of them do nothing.
        if let Err(error) = self.bind_if_unmasked(function, entry) {
            function.note_trouble(&error);
        }
        Some(value)
    }

    /// Notes the masks of bound vectors, which Xen took from the guest without asking us, as hardware has them.
    pub(super) fn keep_masks(&self, function: &mut GuestFunction) {
        let Some(msix) = function.space.msix() else { return };
        for (entry, _) in function.vectors().entries {
            let at = u64::from(msix.table_offset) + bars::ENTRY * u64::from(entry) + 4 * CONTROL as u64;
            if let Some(control) = self.with_memory(msix.table_bar, |memory| memory.read(at, 4) as u32) {
                function.space.image_mut().set_table_word(entry, CONTROL, control & MASKED);
            }
        }
    }
}
