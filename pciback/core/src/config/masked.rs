//! What of a guest's writes did not reach hardware, counted.

use std::collections::BTreeMap;

/// The writes to one dword whose bits were masked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MaskedWrite {
    /// The dword's offset.
    pub dword: u16,
    /// Bits that the guest changed for itself only: it reads them back, hardware does not know.
    pub kept: u32,
    /// Bits whose new value was dropped.
    pub dropped: u32,
    /// How many writes lost a bit.
    pub writes: u64,
    /// The bits of the last such write, in the place of the dword.
    pub last: u32,
}

/// The masked writes of one guest to one function: at most one entry for each of the 1,024 dwords, however hard the guest tries.
/// A write of the value that the guest reads loses nothing and is not counted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MaskedWrites {
    by_dword: BTreeMap<u16, MaskedWrite>,
}

impl MaskedWrites {
    pub(super) fn note(&mut self, dword: u16, kept: u32, dropped: u32, value: u32) {
        let entry = self.by_dword.entry(dword).or_default();
        entry.dword = dword;
        entry.kept |= kept;
        entry.dropped |= dropped;
        entry.writes = entry.writes.saturating_add(1);
        entry.last = value;
    }

    /// The entries, by offset.
    pub fn iter(&self) -> impl Iterator<Item = &MaskedWrite> {
        self.by_dword.values()
    }
}
