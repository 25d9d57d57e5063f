//! Where a function's MSI and MSI-X capabilities are and what they can do.

/// The MSI capability (PCI Express 6.0, section 7.7.1), in one of its four layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MsiCapability {
    /// Where its header is; Message Control is two bytes further.
    pub offset: u16,
    /// Whether addresses have 64 bits.
    pub address_64: bool,
    /// Whether it has mask and pending bits per vector.
    pub maskable: bool,
    /// How many vectors it can send: 1, 2, 4, 8, 16 or 32.
    pub vectors: u16,
}

/// The MSI-X capability (PCI Express 6.0, section 7.7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MsixCapability {
    /// Where its header is; Message Control is two bytes further.
    pub offset: u16,
    /// Entries of the table, 1 to 2,048.
    pub table_size: u16,
    /// The BAR that holds the table.
    pub table_bar: u8,
    /// Where in that BAR.
    pub table_offset: u32,
    /// The BAR that holds the pending bits.
    pub pba_bar: u8,
    /// Where in that BAR.
    pub pba_offset: u32,
}

/// A range of a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarPart {
    /// The index of the BAR.
    pub bar: u8,
    /// Where the range begins in the BAR.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

impl BarPart {
    /// The offset of the first byte behind it.
    pub fn end(&self) -> u64 {
        self.offset + self.bytes
    }
}

impl MsixCapability {
    /// Bytes of an entry of the table.
    pub const ENTRY: u64 = 16;

    /// Where the table is.
    pub fn table(&self) -> BarPart {
        let bytes = Self::ENTRY * u64::from(self.table_size);
        BarPart { bar: self.table_bar, offset: self.table_offset.into(), bytes }
    }

    /// Where the Pending Bit Array is: a bit for each vector, in whole quadwords.
    pub fn pba(&self) -> BarPart {
        let bytes = 8 * u64::from(self.table_size).div_ceil(64);
        BarPart { bar: self.pba_bar, offset: self.pba_offset.into(), bytes }
    }
}
