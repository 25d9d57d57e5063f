//! Walking the two lists of capabilities.
//!
//! Walks are bounded, and what is wrong with a list is part of the result: hardware and dump files are not trusted to be well
//! formed.

use std::fmt;

use super::bytes::Bytes;
use crate::spec::{AnyId, CapabilityId, ExtendedCapabilityId, header};

/// The header type of a bridge to CardBus, which no guest is given but any dump may hold. At 34h it has the limit of a window; its
/// pointer to the list is here (PCI to PCMCIA CardBus Bridge Register Description, Yenta 2.3, section 3).
const CARD_BUS: u8 = 2;
const CARD_BUS_POINTER: u16 = 0x14;

/// One capability as its list shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Where its header is.
    pub offset: u16,
    /// Its id and list.
    pub id: AnyId,
    /// Bits 19:16 of an extended capability's header; 0 in the legacy list.
    pub version: u8,
    /// Where its header says that the next one is, as it stands there.
    pub next: u16,
}

/// What is wrong with a list. The walk continues where it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListProblem {
    /// The pointer at `at` has reserved low bits set; they were ignored.
    Misaligned {
        /// Where the pointer is.
        at: u16,
        /// What it says.
        target: u16,
    },
    /// The pointer at `at` leads into the header, or out of extended config space; the walk ends there.
    InsideHeader {
        /// Where the pointer is.
        at: u16,
        /// What it says.
        target: u16,
    },
    /// The pointer at `at` leads behind the bytes that exist; the walk ends there.
    OutOfRange {
        /// Where the pointer is.
        at: u16,
        /// What it says.
        target: u16,
    },
    /// The pointer at `at` leads to a capability that was already seen; the walk ends there.
    Loop {
        /// Where the pointer is.
        at: u16,
        /// What it says.
        target: u16,
    },
    /// The header at `at` reads all ones; the walk ends there.
    NoAnswer {
        /// Where.
        at: u16,
    },
    /// A capability runs into one that was seen before it, or into the header of the function; the first owns the bytes.
    Overlap {
        /// The later capability.
        at: u16,
        /// The first byte that has an owner already.
        with: u16,
    },
    /// A capability runs over the end of its region; it was cut.
    Truncated {
        /// The capability.
        at: u16,
        /// Its full length.
        length: u16,
    },
    /// The MSI-X capability at `at` names places that cannot hold its structures.
    Msix {
        /// Where the capability is.
        at: u16,
        /// What is wrong with the places.
        fault: MsixFault,
    },
}

/// Why the MSI-X table and the Pending Bit Array (PBA) cannot be where their capability says (PCI Express 6.0, section 7.7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MsixFault {
    /// A BAR Indicator of 6 or 7, which are reserved.
    ReservedBar,
    /// A BAR that decodes I/O space.
    IoSpace {
        /// Its index, 0 to 5.
        bar: u8,
    },
    /// A place that ends behind the end of its BAR.
    BehindTheEnd {
        /// The index of the BAR, 0 to 5.
        bar: u8,
    },
    /// The table and the PBA have bytes in common.
    Overlap {
        /// The index of the BAR, 0 to 5.
        bar: u8,
    },
}

impl fmt::Display for MsixFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReservedBar => write!(f, "its table or its PBA is in a BAR that cannot exist"),
            Self::IoSpace { bar } => write!(f, "its table or its PBA is in BAR {bar}, which is in I/O space"),
            Self::BehindTheEnd { bar } => {
                write!(f, "its table or its PBA ends behind the end of BAR {bar}")
            }
            Self::Overlap { bar } => write!(f, "its table and its PBA overlap in BAR {bar}"),
        }
    }
}

impl fmt::Display for ListProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Misaligned { at, target } => {
                write!(f, "the pointer at {at:#x} is {target:#x}: its low bits should be 0 and are ignored")
            }
            Self::InsideHeader { at, target } => {
                write!(f, "the pointer at {at:#x} is {target:#x}, where no capability can be: the list ends")
            }
            Self::OutOfRange { at, target } => {
                write!(f, "the pointer at {at:#x} is {target:#x}, behind the bytes that exist: the list ends")
            }
            Self::Loop { at, target } => {
                write!(f, "the pointer at {at:#x} leads back to {target:#x}: the list ends")
            }
            Self::NoAnswer { at } => write!(f, "the capability at {at:#x} reads all ones: the list ends"),
            Self::Overlap { at, with } => {
                write!(f, "the capability at {at:#x} runs into bytes at {with:#x} that belong to another")
            }
            Self::Truncated { at, length } => {
                write!(f, "the capability at {at:#x} takes {length:#x} bytes, more than there are")
            }
            Self::Msix { at, fault } => {
                write!(f, "the MSI-X capability at {at:#x} cannot be used: {fault}")
            }
        }
    }
}

/// Both lists of a function, in the order in which they are linked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CapabilityList {
    /// First the legacy list, then the extended one.
    pub capabilities: Vec<Capability>,
    /// What is wrong with them.
    pub problems: Vec<ListProblem>,
}

impl CapabilityList {
    /// Walks the lists in a config space of any length.
    pub fn walk(bytes: &[u8]) -> Self {
        let mut list = Self::default();
        if bytes.len() >= usize::from(header::SIZE) {
            list.walk_legacy(bytes);
        }
        if bytes.len() > usize::from(header::EXTENDED) {
            list.walk_extended(bytes);
        }
        list
    }

    /// The first capability with this id in the legacy list.
    pub fn legacy(&self, id: CapabilityId) -> Option<&Capability> {
        self.capabilities.iter().find(|capability| capability.id == AnyId::Legacy(id))
    }

    /// The first capability with this id in the extended list.
    pub fn extended(&self, id: ExtendedCapabilityId) -> Option<&Capability> {
        self.capabilities.iter().find(|capability| capability.id == AnyId::Extended(id))
    }

    fn walk_legacy(&mut self, bytes: &[u8]) {
        if bytes.word(header::STATUS) & header::STATUS_CAPABILITIES == 0 {
            return;
        }
        let end = bytes.len().min(usize::from(header::EXTENDED)) as u16;
        let header_type = bytes.byte(header::HEADER_TYPE) & !header::MULTI_FUNCTION;
        let mut at = if header_type == CARD_BUS { CARD_BUS_POINTER } else { header::CAPABILITIES_POINTER };
        let mut target = u16::from(bytes.byte(at));
        while let Some(offset) = self.follow(at, target, header::SIZE..end) {
            let (id, next) = (bytes.byte(offset), bytes.byte(offset + 1));
            if id == 0xff {
                self.problems.push(ListProblem::NoAnswer { at: offset });
                return;
            }
            let id = AnyId::Legacy(CapabilityId(id));
            self.capabilities.push(Capability { offset, id, version: 0, next: u16::from(next) });
            (at, target) = (offset + 1, u16::from(next));
        }
    }

    fn walk_extended(&mut self, bytes: &[u8]) {
        // A first header of 0 says that there are no extended capabilities (PCI Express 6.0, section 7.6.2).
        if matches!(bytes.dword(header::EXTENDED), 0 | u32::MAX) {
            return;
        }
        let end = bytes.len().min(4096) as u16;
        let (mut at, mut target) = (header::EXTENDED, header::EXTENDED);
        while let Some(offset) = self.follow(at, target, header::EXTENDED..end) {
            let value = bytes.dword(offset);
            if value == u32::MAX {
                self.problems.push(ListProblem::NoAnswer { at: offset });
                return;
            }
            let id = AnyId::Extended(ExtendedCapabilityId(value as u16));
            let next = (value >> 20) as u16;
            self.capabilities.push(Capability { offset, id, version: (value >> 16) as u8 & 0xf, next });
            (at, target) = (offset, next);
        }
    }

    /// Where a pointer leads; `None` at the end of the list, however it ends. Each offset is visited once, which bounds the
    /// walk.
    fn follow(&mut self, at: u16, target: u16, region: std::ops::Range<u16>) -> Option<u16> {
        let offset = target & !3;
        if offset == 0 {
            return None;
        }
        if offset != target {
            self.problems.push(ListProblem::Misaligned { at, target });
        }
        let problem = if offset < region.start {
            ListProblem::InsideHeader { at, target }
        } else if offset.saturating_add(4) > region.end {
            ListProblem::OutOfRange { at, target }
        } else if self.capabilities.iter().any(|seen| seen.offset == offset) {
            ListProblem::Loop { at, target }
        } else {
            return Some(offset);
        };
        self.problems.push(problem);
        None
    }
}
