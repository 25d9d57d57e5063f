//! How registers are described: fields, what a write to each means to hardware, and how long a capability is.

use super::AnyId;

/// What hardware does with a field (PCI Express 6.0, section 7.4). Bits that no field names are reserved and preserved
/// (RsvdP): they read 0 and a write must carry what hardware holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// RO or HwInit, and the same as long as the function is powered.
    Constant,
    /// RO, changed by hardware.
    Status,
    /// RW.
    Control,
    /// RW1C: a write of 1 clears it.
    Rw1c,
    /// RsvdZ: a write must carry 0.
    RsvdZ,
    /// A write of 1 starts something: what was read must never be written back.
    Trigger,
}

/// Some bits of a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Which bits of the register.
    pub mask: u32,
    /// What hardware does with them.
    pub kind: Kind,
    /// What the specification calls them.
    pub name: &'static str,
}

/// One register, relative to the start of its capability (or of config space, in the header).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Register {
    /// Where.
    pub offset: u16,
    /// Its width in bytes: 1, 2 or 4.
    pub width: u8,
    /// What the specification calls it.
    pub name: &'static str,
    /// Its fields, disjoint.
    pub fields: &'static [Field],
}

/// How many bytes a capability takes, its header included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// Always this many.
    Fixed(u16),
    /// At most this many, and no more than up to the next capability: its last registers are optional.
    UpTo(u16),
    /// The byte at this offset says how many.
    Byte(u16),
    /// Bits 31:20 of the dword at this offset say how many.
    High12(u16),
    /// One of the four layouts of MSI.
    Msi,
    /// PCI-X: longer with ECC registers.
    PciX,
    /// PCI Express: longer from version 2 on.
    Express,
    /// `base + unit * (field + 1)` bytes; the field is `(dword at offset >> shift) & mask`.
    Counted {
        /// Bytes before the repeated part.
        base: u16,
        /// Bytes of one repetition.
        unit: u16,
        /// The dword that holds the field.
        at: u16,
        /// The field's lowest bit.
        shift: u8,
        /// The field's largest value.
        mask: u16,
    },
}

/// One capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapabilitySpec {
    /// Its id and list.
    pub id: AnyId,
    /// Where it is specified.
    pub section: &'static str,
    /// How many bytes it takes.
    pub length: Length,
    /// Its registers, without the header.
    pub registers: &'static [Register],
    /// What the bytes within its length are that no register covers: repeated registers.
    pub rest: Kind,
}

pub(super) const fn register(
    offset: u16,
    width: u8,
    name: &'static str,
    fields: &'static [Field],
) -> Register {
    Register { offset, width, name, fields }
}

pub(super) const fn constant(mask: u32, name: &'static str) -> Field {
    Field { mask, kind: Kind::Constant, name }
}

pub(super) const fn status(mask: u32, name: &'static str) -> Field {
    Field { mask, kind: Kind::Status, name }
}

pub(super) const fn control(mask: u32, name: &'static str) -> Field {
    Field { mask, kind: Kind::Control, name }
}

pub(super) const fn rw1c(mask: u32, name: &'static str) -> Field {
    Field { mask, kind: Kind::Rw1c, name }
}

pub(super) const fn trigger(mask: u32, name: &'static str) -> Field {
    Field { mask, kind: Kind::Trigger, name }
}

pub(super) const fn rsvdz(mask: u32) -> Field {
    Field { mask, kind: Kind::RsvdZ, name: "reserved, zero" }
}
