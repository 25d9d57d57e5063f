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
