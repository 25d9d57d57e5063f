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

/// The name of a field that stands for all of a register whose fields could not be verified.
pub const WHOLE: &str = "(not described by field)";

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
    /// As in the first case whose bits of a dword are so.
    Cases {
        /// The dword's offset.
        at: u16,
        /// Mask, value and what then holds.
        cases: &'static [(u32, u32, Length)],
    },
    /// Virtual Channel: port registers, three registers for each channel, and tables where these say.
    Channels,
    /// PCI Express: longer from version 2 on.
    Express,
    /// `base + unit * (field + more)` bytes; the field is `(dword at offset >> shift) & mask`.
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
        /// How many more there are than the field says.
        more: u16,
    },
}

/// How often a group of registers stands in its capability. Offsets are relative to what the group belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// As often as there is room.
    ToEnd,
    /// Once where `dword & mask == value`, else not at all.
    When {
        /// The dword's offset.
        at: u16,
        /// Which of its bits decide.
        mask: u32,
        /// How they must be.
        value: u32,
    },
    /// `((dword at offset >> shift) & mask) + more` times.
    Field {
        /// The dword that holds the field.
        at: u16,
        /// The field's lowest bit.
        shift: u8,
        /// The field's largest value.
        mask: u16,
        /// How many more there are than the field says.
        more: u16,
        /// Bits of the same dword without which there is none at all; 0 where nothing is asked for.
        given: u32,
    },
}

/// Bytes from one group to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stride {
    /// Always this many.
    Fixed(u16),
    /// `base + unit * (field & mask)` bytes; the field is in the first dword of each group.
    Own {
        /// Bytes of the smallest.
        base: u16,
        /// Bytes that one step of the field adds.
        unit: u16,
        /// The field.
        mask: u16,
    },
}

/// Registers that stand in a capability as often as it says: not at all, once or one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// Where the first of them begins; `None`: behind the last of the group before.
    pub first: Option<u16>,
    /// How far it is from one to the next.
    pub stride: Stride,
    /// How often.
    pub count: Count,
    /// The registers of one, relative to where it begins.
    pub registers: &'static [Register],
    /// Groups within each.
    pub groups: &'static [Group],
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
    /// Registers that depend on what it says of itself.
    pub groups: &'static [Group],
    /// What the bytes within its length are that no register covers; `None` where they are the vendor's, which no one else
    /// knows.
    pub rest: Option<Kind>,
}

impl CapabilitySpec {
    /// Whether all its bytes are specified; else its vendor decides what follows its header.
    pub const fn is_specified(&self) -> bool {
        self.rest.is_some()
    }

    pub(super) const fn with(self, groups: &'static [Group]) -> Self {
        Self { groups, ..self }
    }
}

/// A group that stands there once, where bits of the dword at an offset are so.
pub(super) const fn when(at: u16, mask: u32, value: u32, registers: &'static [Register]) -> Group {
    let count = Count::When { at, mask, value };
    Group { first: Some(0), stride: Stride::Fixed(0), count, registers, groups: &[] }
}

/// A group that stands there as often as there is room.
pub(super) const fn each(first: u16, stride: u16, registers: &'static [Register]) -> Group {
    Group { first: Some(first), stride: Stride::Fixed(stride), count: Count::ToEnd, registers, groups: &[] }
}

/// A group that stands there as often as a count says.
pub(super) const fn counted(first: u16, stride: u16, count: Count, registers: &'static [Register]) -> Group {
    Group { first: Some(first), stride: Stride::Fixed(stride), count, registers, groups: &[] }
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

/// Fields of one kind. Where there is room for one more than there are names, all other bits are reserved and zero.
pub(super) const fn fields<const NAMES: usize, const ALL: usize>(
    kind: Kind,
    names: [(u32, &'static str); NAMES],
) -> [Field; ALL] {
    assert!(ALL == NAMES || ALL == NAMES + 1);
    let mut all = [rsvdz(0); ALL];
    let (mut index, mut named) = (0, 0);
    while index < NAMES {
        let (mask, name) = names[index];
        all[index] = Field { mask, kind, name };
        named |= mask;
        index += 1;
    }
    if ALL > NAMES {
        all[NAMES] = rsvdz(!named);
    }
    all
}
