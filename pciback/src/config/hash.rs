//! A hash that stays the same from one build to the next, unlike the standard library's: it is kept in files.

/// FNV-1a over 64 bits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fnv(u64);

impl Fnv {
    pub(super) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(super) fn add(&mut self, value: u64) {
        for byte in value.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// The hash; never 0, which is what an empty file holds.
    pub(super) fn finish(self) -> u64 {
        self.0.max(1)
    }
}
