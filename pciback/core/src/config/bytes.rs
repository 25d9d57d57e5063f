//! Reading little-endian registers from bytes that may be too few: what is missing reads all ones, as on a bus.

/// Registers in a slice of bytes.
pub(crate) trait Bytes {
    /// One byte.
    fn byte(&self, offset: u16) -> u8;

    /// Two bytes.
    fn word(&self, offset: u16) -> u16 {
        u16::from_le_bytes([self.byte(offset), self.byte(offset.saturating_add(1))])
    }

    /// Four bytes.
    fn dword(&self, offset: u16) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset.saturating_add(2))) << 16
    }
}

impl Bytes for [u8] {
    fn byte(&self, offset: u16) -> u8 {
        self.get(usize::from(offset)).copied().unwrap_or(0xff)
    }
}
