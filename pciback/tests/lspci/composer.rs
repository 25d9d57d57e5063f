//! Puts config spaces together, register by register.

use pciback::Sbdf;
use pciback::dump::DumpedFunction;

/// A config space that is being composed.
#[derive(Clone)]
pub struct Composer {
    name: &'static str,
    bytes: Vec<u8>,
    /// Where the pointer to the next legacy capability goes.
    legacy: usize,
    /// The extended capability whose pointer is not yet set.
    extended: Option<usize>,
}

impl Composer {
    /// A function with a header of type 0, 1 or 2 and nothing else.
    pub fn new(name: &'static str, size: usize, header_type: u8, class: u32) -> Self {
        // 1af4 is Red Hat's vendor id, of which 10f0-10ff are for anybody's experiments.
        let pointer = if header_type == 2 { 0x14 } else { 0x34 };
        Self { name, bytes: vec![0; size], legacy: pointer, extended: None }
            .put32(0x00, 0x10f0_1af4)
            .put32(0x04, 0x0000_0006)
            .put32(0x08, class << 8 | 1)
            .put8(0x0e, header_type)
    }

    /// An endpoint with 4,096 bytes and the capability that says that it speaks PCI Express.
    pub fn express(name: &'static str, class: u32) -> Self {
        Self::new(name, 4096, 0, class).legacy(0x40, 0x10, &[2, 0, 0xe0, 0x8f, 0, 0x10])
    }

    pub fn put8(mut self, at: usize, value: u8) -> Self {
        self.bytes[at] = value;
        self
    }

    pub fn put32(mut self, at: usize, value: u32) -> Self {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends to the legacy list: the bytes behind the pointer to the next one.
    pub fn legacy(mut self, at: usize, id: u8, body: &[u8]) -> Self {
        self.bytes[6] |= 0x10;
        self.bytes[self.legacy] = at as u8;
        self.bytes[at] = id;
        self.bytes[at + 2..at + 2 + body.len()].copy_from_slice(body);
        self.legacy = at + 1;
        self
    }

    /// Appends to the extended list: the dwords behind the header.
    pub fn extended(mut self, at: usize, id: u16, version: u8, body: &[u32]) -> Self {
        if let Some(last) = self.extended {
            self = self.extended_next(last, at);
        }
        self = self.put32(at, u32::from(version) << 16 | u32::from(id));
        for (index, dword) in body.iter().enumerate() {
            self = self.put32(at + 4 + 4 * index, *dword);
        }
        self.extended = Some(at);
        self
    }

    /// Lets the last legacy capability point anywhere.
    pub fn legacy_next(self, target: u8) -> Self {
        let at = self.legacy;
        self.put8(at, target)
    }

    /// Lets an extended capability point anywhere.
    pub fn extended_next(self, at: usize, target: usize) -> Self {
        let header = u16::from_le_bytes([self.bytes[at + 2], self.bytes[at + 3]]) & 0xf;
        let value = (target as u16) << 4 | header;
        self.put8(at + 2, value as u8).put8(at + 3, (value >> 8) as u8)
    }

    /// Cuts it, as a host does that shows less.
    pub fn cut(mut self, size: usize) -> Self {
        self.bytes.truncate(size);
        self
    }

    /// Its name, and the function as a dump would have it.
    pub fn finish(self) -> (&'static str, DumpedFunction) {
        let title = format!("composed: {}", self.name);
        let address = Sbdf::from_devfn(0, 1, 0);
        (self.name, DumpedFunction { address, title, bytes: self.bytes, line: 1, regions: Vec::new() })
    }
}
