//! The page of an ioreq server: a `struct ioreq` of `xen/hvm/ioreq.h` for each vCPU.
//!
//! Xen writes a request from what a vCPU did and waits until it is answered. Where a request makes no sense it is answered all
//! the same: a vCPU that waits forever is worse than one that reads all ones. States only move forward: ready, in
//! process, answered; the rest is Xen's.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::Devfn;
use crate::config::{Access, Width};

/// Bytes of the page.
pub const PAGE_BYTES: usize = 4096;
/// How many vCPUs it has room for.
pub const VCPUS: u16 = (PAGE_BYTES / REQUEST_BYTES) as u16;
const REQUEST_BYTES: usize = 32;

/// Offsets within a request, in words.
mod word {
    pub const ADDRESS: usize = 0;
    pub const DATA: usize = 2;
    pub const COUNT: usize = 4;
    pub const SIZE: usize = 5;
    pub const PORT: usize = 6;
    /// State, flags and type.
    pub const KIND: usize = 7;
}

/// Bits of the word with state and type.
mod bits {
    pub const STATE: u32 = 0xf << 16;
    pub const DATA_IS_ADDRESS: u32 = 1 << 20;
    pub const READ: u32 = 1 << 21;
    pub const DOWN: u32 = 1 << 22;
    pub const TYPE: u32 = 24;
}

/// `STATE_IOREQ_READY`, `STATE_IOREQ_INPROCESS`, `STATE_IORESP_READY`, in their place.
const READY: u32 = 1 << 16;
const IN_PROCESS: u32 = 2 << 16;
const ANSWERED: u32 = 3 << 16;

/// `IOREQ_TYPE_PIO`: I/O ports.
pub const TYPE_PORT: u32 = 0;
/// `IOREQ_TYPE_COPY`: memory.
const TYPE_MEMORY: u32 = 1;
/// `IOREQ_TYPE_PCI_CONFIG`.
pub const TYPE_CONFIG: u32 = 2;

/// The most bytes that one request moves: Xen lets it reach two pages of the guest's memory.
const ITEMS_LIMIT: u32 = 2 * PAGE_BYTES as u32;

/// Where the vCPU's request begins on the page, in words.
const fn first_word(vcpu: u16) -> usize {
    vcpu as usize * REQUEST_BYTES / 4
}

/// Where the port of the vCPU's event channel stands, in words.
pub const fn port_word(vcpu: u16) -> usize {
    first_word(vcpu) + word::PORT
}

/// What a request is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Config space of a function on bus 0 of segment 0, reached through ports CF8 and CFC.
    Config {
        /// Its device and function number.
        function: Devfn,
        /// Where in its config space; not aligned.
        offset: u16,
    },
    /// Physical memory of the guest.
    Memory {
        /// The address.
        address: u64,
    },
    /// Physical memory of the guest that a string instruction reads (`rep movs`): one item after another.
    Items {
        /// The address of the first item.
        address: u64,
        /// Where it goes to in the guest's memory.
        to: u64,
        /// How many items.
        count: u16,
        /// The others lie below the first, and not above it.
        down: bool,
    },
    /// An I/O port.
    Port {
        /// Its number.
        port: u16,
    },
    /// Something that a server of this kind never asked for.
    Other,
}

/// A copy of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoRequest {
    /// Where.
    pub place: Place,
    /// Bytes, of each item: 1, 2, 4, or 8 of memory. 0: a size that does not exist, or a string instruction that does not read memory.
    pub bytes: u8,
    /// The value to write; `None` for a read.
    pub write: Option<u64>,
    /// A previous process of the service began it.
    pub again: bool,
}

/// The request that waits for this vCPU, copied and marked as begun; `None` when none waits. `resumed`: those count too that
/// are marked already, by a previous process.
pub fn take_request(page: &[AtomicU32], vcpu: u16, resumed: bool) -> Option<IoRequest> {
    let first = first_word(vcpu);
    let load = |index: usize| page[first + index].load(Ordering::Relaxed);
    let double = |index: usize| u64::from(load(index)) | u64::from(load(index + 1)) << 32;
    let kind = &page[first + word::KIND];
    // Acquire: what Xen wrote before the state is seen after it.
    let seen = kind.load(Ordering::Acquire);
    let again = match seen & bits::STATE {
        READY => false,
        IN_PROCESS if resumed => true,
        _ => return None,
    };
    if !again {
        // From here, only this process changes the state.
        let begun = seen & !bits::STATE | IN_PROCESS;
        kind.compare_exchange(seen, begun, Ordering::AcqRel, Ordering::Relaxed).ok()?;
    }
    let count = load(word::COUNT);
    let in_memory = seen & bits::DATA_IS_ADDRESS != 0;
    let size = load(word::SIZE);
    let read = seen & bits::READ != 0;
    let items = u16::try_from(count).ok().filter(|_| {
        in_memory && read && count > 0 && size.checked_mul(count).is_some_and(|bytes| bytes <= ITEMS_LIMIT)
    });
    let known = count == 1 && !in_memory || items.is_some() && seen >> bits::TYPE == TYPE_MEMORY;
    let (address, data) = (double(word::ADDRESS), double(word::DATA));
    let (place, most) = match seen >> bits::TYPE {
        TYPE_CONFIG => (config_place(address), 4),
        TYPE_MEMORY => match items {
            Some(count) => (Place::Items { address, to: data, count, down: seen & bits::DOWN != 0 }, 8),
            None => (Place::Memory { address }, 8),
        },
        TYPE_PORT => (u16::try_from(address).map_or(Place::Other, |port| Place::Port { port }), 4),
        _ => (Place::Other, 8),
    };
    let bytes = match size {
        1 | 2 | 4 | 8 if size <= most && known => size as u8,
        _ => 0,
    };
    Some(IoRequest { place, bytes, write: (!read).then_some(data), again })
}

/// Segment 63-48, bus 47-40, device 39-35, function 34-32, register 31-0.
fn config_place(address: u64) -> Place {
    let (sbdf, offset) = ((address >> 32) as u32, address as u32);
    match (u8::try_from(sbdf), u16::try_from(offset)) {
        (Ok(devfn), Ok(offset)) if offset < 0x1000 => Place::Config { function: Devfn(devfn), offset },
        _ => Place::Other,
    }
}

/// Writes what a read found, and returns the request to Xen; the caller then sends an event.
pub fn put_answer(page: &[AtomicU32], vcpu: u16, data: Option<u64>) {
    let first = first_word(vcpu);
    if let Some(data) = data {
        page[first + word::DATA].store(data as u32, Ordering::Relaxed);
        page[first + word::DATA + 1].store((data >> 32) as u32, Ordering::Relaxed);
    }
    let kind = &page[first + word::KIND];
    let seen = kind.load(Ordering::Relaxed);
    if seen & bits::STATE == IN_PROCESS {
        let answered = seen & !bits::STATE | ANSWERED;
        // Release: Xen sees the data once it sees the state. It fails only where Xen itself gave the request up.
        let _ = kind.compare_exchange(seen, answered, Ordering::Release, Ordering::Relaxed);
    }
}

/// The aligned accesses that a request of `bytes` at `offset` consists of, each with its distance in bytes from the first. At
/// most three for up to four bytes, four for eight.
pub fn pieces(offset: u16, bytes: u8) -> impl Iterator<Item = (Access, u8)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = u32::from(offset) + u32::from(done);
        let width = Width::ALL.into_iter().rev().find_map(|width| {
            let size = width.bytes() as u8;
            let access = (done + size <= bytes).then(|| Access::new(at, size.into()).ok())??;
            Some((access, size))
        });
        let (access, size) = width?;
        let piece = (access, done);
        done += size;
        Some(piece)
    })
}

/// How many bytes of a request through port CFC + `offset` % 4 the four ports reach: what lies behind them is not config space.
pub const fn reached_by_ports(offset: u16, bytes: u8) -> u8 {
    let room = 4 - (offset & 3) as u8;
    if bytes < room { bytes } else { room }
}

/// Xen's side of the page, for tests and for the simulated host's guests.
pub mod xen {
    use super::*;

    /// What a vCPU does.
    #[derive(Debug, Clone, Copy)]
    pub struct Access {
        /// The number of the type, as in `struct ioreq`.
        pub kind: u32,
        /// The address, for config space packed as [`config`] does.
        pub address: u64,
        /// Bytes.
        pub size: u32,
        /// The value to write; `None` for a read.
        pub write: Option<u64>,
        /// The rest of a string instruction.
        pub items: Option<Items>,
    }

    /// What a string instruction does.
    #[derive(Debug, Clone, Copy)]
    pub struct Items {
        /// Where the first item goes to, or comes from, in the guest's memory.
        pub memory: u64,
        /// How many.
        pub count: u32,
        /// From high addresses to low ones.
        pub down: bool,
    }

    /// An access to config space of function 0 of a device on bus 0.
    pub fn config(slot: u8, offset: u16, size: u32, write: Option<u32>) -> Access {
        config_of(Devfn(slot << 3), offset, size, write)
    }

    /// An access to config space of a function on bus 0.
    pub fn config_of(function: Devfn, offset: u16, size: u32, write: Option<u32>) -> Access {
        let address = u64::from(function.0) << 32 | u64::from(offset);
        Access { kind: TYPE_CONFIG, address, size, write: write.map(u64::from), items: None }
    }

    /// An access to an I/O port.
    pub fn port(port: u16, size: u32, write: Option<u32>) -> Access {
        Access { kind: TYPE_PORT, address: port.into(), size, write: write.map(u64::from), items: None }
    }

    /// An access to memory.
    pub fn memory(address: u64, size: u32, write: Option<u64>) -> Access {
        Access { kind: TYPE_MEMORY, address, size, write, items: None }
    }

    /// A string instruction that reads memory.
    pub fn read_items(address: u64, size: u32, items: Items) -> Access {
        Access { items: Some(items), ..memory(address, size, None) }
    }

    /// Puts a request on the page.
    pub fn put_request(page: &[AtomicU32], vcpu: u16, access: &Access) {
        let first = first_word(vcpu);
        let data = access.items.map(|items| items.memory).or(access.write).unwrap_or(0);
        let words = [
            access.address as u32,
            (access.address >> 32) as u32,
            data as u32,
            (data >> 32) as u32,
            access.items.map_or(1, |items| items.count),
            access.size,
        ];
        for (index, value) in words.into_iter().enumerate() {
            page[first + index].store(value, Ordering::Relaxed);
        }
        let read = if access.write.is_none() { bits::READ } else { 0 };
        let items = match access.items {
            None => 0,
            Some(Items { down: false, .. }) => bits::DATA_IS_ADDRESS,
            Some(Items { down: true, .. }) => bits::DATA_IS_ADDRESS | bits::DOWN,
        };
        let kind = access.kind << bits::TYPE | read | items | READY;
        page[first + word::KIND].store(kind, Ordering::Release);
    }

    /// The answer, taken; `None` while it is awaited.
    pub fn take_answer(page: &[AtomicU32], vcpu: u16) -> Option<u64> {
        let first = first_word(vcpu);
        if page[first + word::KIND].load(Ordering::Acquire) & bits::STATE != ANSWERED {
            return None;
        }
        page[first + word::KIND].store(0, Ordering::Relaxed);
        let half = |index: usize| u64::from(page[first + index].load(Ordering::Relaxed));
        Some(half(word::DATA) | half(word::DATA + 1) << 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Box<[AtomicU32]> {
        (0..PAGE_BYTES / 4).map(|_| AtomicU32::new(0)).collect()
    }

    /// The layout, from the header, independently of `word` and `bits`.
    #[test]
    fn requests_lie_where_the_header_says_and_states_only_move_forward() {
        let page = page();
        let base = 5 * 8;
        // 0000:00:06.3, register 41h, 4 bytes, a write.
        for (index, value) in [(0, 0x41u32), (1, 6 << 3 | 3), (2, 0x1234_5678), (4, 1), (5, 4), (6, 77)] {
            page[base + index].store(value, Ordering::Relaxed);
        }
        assert_eq!(take_request(&page, 5, true), None);
        page[base + 7].store(2 << 24 | 1 << 16 | 0xabcd, Ordering::Relaxed);
        let request = take_request(&page, 5, false).unwrap();
        let place = Place::Config { function: Devfn(6 << 3 | 3), offset: 0x41 };
        assert_eq!(request, IoRequest { place, bytes: 4, write: Some(0x1234_5678), again: false });
        assert_eq!(page[base + 7].load(Ordering::Relaxed), 2 << 24 | 2 << 16 | 0xabcd);
        assert_eq!(take_request(&page, 5, false), None);
        // Another run of the service takes it up.
        assert!(take_request(&page, 5, true).unwrap().again);
        put_answer(&page, 5, Some(9));
        assert_eq!(page[base + 7].load(Ordering::Relaxed), 2 << 24 | 3 << 16 | 0xabcd);
        assert_eq!(page[base + 2].load(Ordering::Relaxed), 9);
        assert_eq!(page[port_word(5)].load(Ordering::Relaxed), 77);
        // Not again, and not backwards.
        assert_eq!(take_request(&page, 5, true), None);
        page[base + 7].store(0, Ordering::Relaxed);
        put_answer(&page, 5, Some(9));
        assert_eq!(page[base + 7].load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_makes_no_sense_is_taken_as_such_and_can_be_answered() {
        let page = page();
        let cases = [
            xen::Access { kind: 2, address: 1 << 48, size: 4, write: None, items: None },
            xen::Access { kind: 2, address: 1 << 40, size: 4, write: None, items: None },
            xen::Access { kind: 2, address: 0x1000, size: 4, write: None, items: None },
            xen::Access { kind: 2, address: 0xffff_ffff, size: 4, write: None, items: None },
            xen::Access { kind: 0, address: 0x1_0cf8, size: 4, write: None, items: None },
            xen::Access { kind: 255, address: 0, size: 4, write: None, items: None },
        ];
        for case in cases {
            xen::put_request(&page, 127, &case);
            assert_eq!(take_request(&page, 127, false).unwrap().place, Place::Other, "{case:x?}");
            put_answer(&page, 127, Some(u64::MAX));
            assert_eq!(xen::take_answer(&page, 127), Some(u64::MAX), "{case:x?}");
        }
        for size in [0, 3, 5, 8, 9, u32::MAX] {
            xen::put_request(&page, 0, &xen::config(3, 0, size, None));
            assert_eq!(take_request(&page, 0, false).unwrap().bytes, 0, "{size}");
            xen::put_request(&page, 0, &xen::port(0xcf8, size, None));
            let request = take_request(&page, 0, false).unwrap();
            assert_eq!((request.place, request.bytes), (Place::Port { port: 0xcf8 }, 0), "{size}");
        }
        // The same value several times.
        xen::put_request(&page, 0, &xen::memory(0, 4, None));
        page[4].store(2, Ordering::Relaxed);
        assert_eq!(take_request(&page, 0, false).unwrap().bytes, 0);
        let string = |count| xen::Items { memory: 0x1000, count, down: false };
        for (what, access) in [
            ("no items", xen::read_items(0, 4, string(0))),
            ("more than two pages", xen::read_items(0, 4, string(2049))),
            ("far more", xen::read_items(0, 4, string(u32::MAX))),
            ("a size that does not exist", xen::read_items(0, 3, string(4))),
            ("a write", xen::Access { write: Some(0), ..xen::read_items(0, 4, string(4)) }),
            ("of a port", xen::Access { items: Some(string(4)), ..xen::port(0xcf8, 4, None) }),
        ] {
            xen::put_request(&page, 0, &access);
            assert_eq!(take_request(&page, 0, false).unwrap().bytes, 0, "{what}");
        }
    }

    /// The layout, from the header, independently of `word` and `bits`.
    #[test]
    fn a_string_instruction_that_reads_memory_names_where_its_items_go() {
        let page = page();
        for (flags, down) in [(0, false), (1 << 22, true)] {
            for (index, value) in [0xf300_0ffcu32, 1, 0x0123_4000, 2, 1024, 4, 77].into_iter().enumerate() {
                page[index].store(value, Ordering::Relaxed);
            }
            page[7].store(1 << 24 | flags | 1 << 21 | 1 << 20 | 1 << 16, Ordering::Relaxed);
            let place = Place::Items { address: 0x1_f300_0ffc, to: 0x2_0123_4000, count: 1024, down };
            let request = IoRequest { place, bytes: 4, write: None, again: false };
            assert_eq!(take_request(&page, 0, false), Some(request));
            put_answer(&page, 0, None);
            assert_eq!((page[2].load(Ordering::Relaxed), page[3].load(Ordering::Relaxed)), (0x0123_4000, 2));
        }
    }

    #[test]
    fn every_request_is_made_of_aligned_accesses_that_cover_it_once() {
        for offset in (0..0x110).chain(0xfe0..0x1000) {
            for bytes in [0, 1, 2, 3, 4, 8] {
                let mut next = offset;
                for (access, distance) in pieces(offset, bytes) {
                    assert_eq!((access.offset(), access.offset() - offset), (next, distance.into()));
                    next += access.width().bytes();
                }
                let end = (offset + u16::from(bytes)).min(0x1000);
                assert_eq!(next, end, "{offset:#x}/{bytes}");
            }
        }
        assert_eq!(reached_by_ports(0x41, 4), 3);
        assert_eq!(reached_by_ports(0x43, 2), 1);
        assert_eq!(reached_by_ports(0x40, 4), 4);
        assert_eq!(reached_by_ports(0x42, 2), 2);
    }
}
