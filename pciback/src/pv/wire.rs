//! The shared page of the PV protocol (`xen/io/pciif.h`), seen through atomic words.
//!
//! The page is the guest's. Each word of a request is loaded once, into a [`Request`] that nobody else can change, and only
//! that copy is checked, carried out and answered.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, fence};

use crate::platform::SharedMemory;

/// Bytes of the protocol's structure at the start of the page.
pub const SHARED_INFO_BYTES: usize = 572;
/// The most MSI-X entries that one request carries.
pub const MAX_ENTRIES: usize = 128;

/// Where each word of the page is, in words.
mod word {
    pub const FLAGS: usize = 0;
    pub const COMMAND: usize = 1;
    pub const ERROR: usize = 2;
    pub const SEGMENT: usize = 3;
    pub const BUS: usize = 4;
    pub const DEVFN: usize = 5;
    pub const OFFSET: usize = 6;
    pub const SIZE: usize = 7;
    pub const VALUE: usize = 8;
    pub const INFO: usize = 9;
    /// 128 words, each a vector in the lower and an entry in the upper half.
    pub const ENTRIES: usize = 10;
}

/// Bits of the page's first word.
pub mod flag {
    /// A request of the guest waits (`XEN_PCIF_active`).
    pub const REQUEST: u32 = 1 << 0;
    /// The guest takes error recovery requests (`XEN_PCIB_AERHANDLER`).
    pub const TAKES_ERRORS: u32 = 1 << 1;
    /// An error recovery request to the guest waits (`XEN_PCIB_active`).
    pub const ERROR_REQUEST: u32 = 1 << 2;
}

/// What a guest asks for; unknown numbers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Command(pub u32);

impl Command {
    /// Read config space.
    pub const READ: Self = Self(0);
    /// Write config space.
    pub const WRITE: Self = Self(1);
    /// Map the function's MSI and enable it.
    pub const ENABLE_MSI: Self = Self(2);
    /// Undo that.
    pub const DISABLE_MSI: Self = Self(3);
    /// Map entries of the MSI-X table and enable it.
    pub const ENABLE_MSIX: Self = Self(4);
    /// Undo that.
    pub const DISABLE_MSIX: Self = Self(5);
    /// Map several MSI vectors in a block. No Linux frontend sends it.
    pub const ENABLE_MULTI_MSI: Self = Self(10);
}

/// The protocol's answer code (`XEN_PCI_ERR_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ErrorCode(pub i32);

impl ErrorCode {
    /// Done.
    pub const SUCCESS: Self = Self(0);
    /// There is no such function.
    pub const NO_DEVICE: Self = Self(-1);
    /// Offset and size are no access to config space.
    pub const INVALID_OFFSET: Self = Self(-2);
    /// Refused.
    pub const ACCESS_DENIED: Self = Self(-3);
    /// A command that this backend does not have.
    pub const NOT_IMPLEMENTED: Self = Self(-4);
    /// Tried, and it failed.
    pub const FAILED: Self = Self(-5);
}

/// A copy of a guest's request: nothing in it is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What it asks for.
    pub command: Command,
    /// PCI segment.
    pub segment: u32,
    /// Bus.
    pub bus: u32,
    /// Device and function.
    pub devfn: u32,
    /// Register.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// What to write, or the number of MSI-X entries.
    pub value: u32,
    /// A word that this protocol's frontends leave 0; see [`Page::claim`].
    pub info: u32,
    /// The entries of an MSI-X request, as many as `value` says and at most [`MAX_ENTRIES`]; empty for other commands.
    pub entries: Vec<u16>,
}

impl Request {
    /// A hash over the entries, to know a request again (FNV-1a).
    pub fn entries_hash(&self) -> u64 {
        self.entries.iter().flat_map(|entry| entry.to_le_bytes()).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }
}

/// What is written back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// How it went.
    pub error: ErrorCode,
    /// What was read, the MSI's physical interrupt, or 0 for MSI-X.
    pub value: u32,
    /// The physical interrupts of an MSI-X request's entries, in their order.
    pub vectors: Vec<u16>,
}

/// A guest's page.
#[derive(Debug, Clone, Copy)]
pub struct Page<'a>(&'a SharedMemory);

impl<'a> Page<'a> {
    /// Looks at a mapping as the protocol's page; words beyond a mapping that is too short read 0.
    pub fn new(memory: &'a SharedMemory) -> Self {
        Self(memory)
    }

    fn word(&self, index: usize) -> Option<&'a AtomicU32> {
        self.0.get(index)
    }

    fn get(&self, index: usize) -> u32 {
        self.word(index).map_or(0, |word| word.load(Relaxed))
    }

    fn set(&self, index: usize, value: u32) {
        if let Some(word) = self.word(index) {
            word.store(value, Relaxed);
        }
    }

    /// The flags. What the guest stored before it raised one is visible after this.
    pub fn flags(&self) -> u32 {
        self.word(word::FLAGS).map_or(0, |word| word.load(Acquire))
    }

    /// Whether a request waits.
    pub fn active(&self) -> bool {
        self.flags() & flag::REQUEST != 0
    }

    /// Copies the request that waits, each word once; `None` when none waits.
    pub fn request(&self) -> Option<Request> {
        if !self.active() {
            return None;
        }
        let command = Command(self.get(word::COMMAND));
        let value = self.get(word::VALUE);
        let count = if command == Command::ENABLE_MSIX { (value as usize).min(MAX_ENTRIES) } else { 0 };
        Some(Request {
            command,
            segment: self.get(word::SEGMENT),
            bus: self.get(word::BUS),
            devfn: self.get(word::DEVFN),
            offset: self.get(word::OFFSET),
            size: self.get(word::SIZE),
            value,
            info: self.get(word::INFO),
            entries: (0..count).map(|index| (self.get(word::ENTRIES + index) >> 16) as u16).collect(),
        })
    }

    /// Marks the request that waits as taken, by a number other than 0 in a word that frontends send as 0 and do not
    /// read. Every new request overwrites it. So a later life of the service knows a request that an
    /// earlier one began from one with the same content that came after it, and an answer that took more than the
    /// frontend's two seconds is known to have lost its request.
    pub fn claim(&self, token: u32) {
        self.set(word::INFO, token);
    }

    /// Whether the request that was claimed with `token` still waits.
    pub fn claimed(&self, token: u32) -> bool {
        self.active() && self.get(word::INFO) == token
    }

    /// Writes an answer and hands the page back to the guest. The caller notifies it.
    pub fn answer(&self, answer: &Answer) {
        for (index, vector) in answer.vectors.iter().take(MAX_ENTRIES).enumerate() {
            // The entry's number is kept as it stands: writing our copy of it could only tell the guest what it said.
            let at = word::ENTRIES + index;
            let entry = self.get(at) & 0xffff_0000;
            self.set(at, entry | u32::from(*vector));
        }
        self.set(word::VALUE, answer.value);
        self.set(word::ERROR, answer.error.0 as u32);
        // The guest changes the other flags at any time: only this bit is ours to clear, and all of the above goes before.
        fence(Release);
        if let Some(flags) = self.word(word::FLAGS) {
            flags.fetch_and(!flag::REQUEST, Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> SharedMemory {
        SharedMemory::anonymous(4096).unwrap()
    }

    #[test]
    fn offsets_are_those_of_the_protocols_header() {
        assert_eq!(word::ENTRIES * 4 + MAX_ENTRIES * 4 + 20, SHARED_INFO_BYTES);
        let memory = memory();
        for index in 0..200 {
            memory[index].store(index as u32 * 4, Relaxed);
        }
        memory[0].store(1, Relaxed);
        memory[1].store(Command::ENABLE_MSIX.0, Relaxed);
        let request = Page::new(&memory).request().unwrap();
        let numbers =
            [request.segment, request.bus, request.devfn, request.offset, request.size, request.value];
        // Offsets of struct xen_pci_op are relative to its place, 4.
        assert_eq!(numbers, [8, 12, 16, 20, 24, 28].map(|offset| offset + 4));
        assert_eq!(request.info, 32 + 4);
    }

    #[test]
    fn an_answer_clears_only_its_own_flag_and_keeps_the_entries() {
        let memory = memory();
        let page = Page::new(&memory);
        memory[0].store(flag::REQUEST | flag::TAKES_ERRORS | 0x8000_0000, Relaxed);
        memory[word::COMMAND].store(4, Relaxed);
        memory[word::VALUE].store(2, Relaxed);
        memory[word::ENTRIES].store(0x0005_ffff, Relaxed);
        memory[word::ENTRIES + 1].store(0x0003_ffff, Relaxed);
        assert_eq!(page.request().unwrap().entries, [5, 3]);
        page.answer(&Answer { error: ErrorCode::FAILED, value: 7, vectors: vec![40, 41] });
        assert_eq!(page.flags(), flag::TAKES_ERRORS | 0x8000_0000);
        assert_eq!(memory[word::ENTRIES].load(Relaxed), 0x0005_0028);
        assert_eq!(memory[word::ENTRIES + 1].load(Relaxed), 0x0003_0029);
        assert_eq!(memory[word::ERROR].load(Relaxed) as i32, -5);
        assert_eq!(memory[word::VALUE].load(Relaxed), 7);
        assert_eq!(page.request(), None);
    }

    #[test]
    fn a_claim_is_lost_when_the_guest_gives_up_or_asks_anew() {
        let memory = memory();
        let page = Page::new(&memory);
        memory[0].store(1, Relaxed);
        page.claim(77);
        assert!(page.claimed(77));
        memory[0].store(0, Relaxed);
        assert!(!page.claimed(77), "given up");
        memory[word::INFO].store(0, Relaxed);
        memory[0].store(1, Relaxed);
        assert!(!page.claimed(77), "a new request");
    }

    proptest::proptest! {
        #[test]
        fn any_content_is_copied_without_a_panic(content in proptest::collection::vec(proptest::num::u32::ANY, 143)) {
            let memory = memory();
            for (index, value) in content.iter().enumerate() {
                memory[index].store(*value, Relaxed);
            }
            if let Some(request) = Page::new(&memory).request() {
                assert!(request.entries.len() <= MAX_ENTRIES);
            }
        }
    }
}
