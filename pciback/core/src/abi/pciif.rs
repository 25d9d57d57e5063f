//! The page that a PV guest's frontend shares: `struct xen_pci_sharedinfo` of `xen/io/pciif.h`.
//!
//! The page is the guest's. A request is copied once, checked, and answered from the copy; nothing is ever read twice.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::Devfn;
use crate::fault::{AerAnswer, AerRequest, ChannelState};

/// The protocol that frontends must speak, as they write it into xenstore (`XEN_PCI_MAGIC`).
pub const MAGIC: &str = "7";
/// Most MSI-X entries that one request can enable (`SH_INFO_MAX_VEC`).
pub const MSIX_ENTRIES: usize = 128;

/// Offsets within the page, in words.
mod word {
    pub const FLAGS: usize = 0;
    pub const COMMAND: usize = 1;
    pub const ERROR: usize = 2;
    pub const DOMAIN: usize = 3;
    pub const BUS: usize = 4;
    pub const DEVFN: usize = 5;
    pub const OFFSET: usize = 6;
    pub const SIZE: usize = 7;
    pub const VALUE: usize = 8;
    pub const INFO: usize = 9;
    pub const MSIX_ENTRIES: usize = 10;
    pub const AER_COMMAND: usize = 138;
    pub const AER_ERROR: usize = 139;
    pub const AER_DOMAIN: usize = 140;
    pub const AER_BUS: usize = 141;
    pub const AER_DEVFN: usize = 142;
}

/// `XEN_PCIF_active`: a request waits for its answer.
const ACTIVE: u32 = 1 << 0;
/// `XEN_PCIB_AERHANDLER`: the frontend can be notified of errors.
const AER_HANDLER: u32 = 1 << 1;
/// `XEN_PCIB_active`: the frontend was notified of an error and has not answered yet.
const AER_ACTIVE: u32 = 1 << 2;

/// What a frontend asks for (`XEN_PCI_OP_*`); unknown numbers are kept as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Command(pub u32);

impl Command {
    /// Read config space.
    pub const CONF_READ: Self = Self(0);
    /// Write config space.
    pub const CONF_WRITE: Self = Self(1);
    /// Enable MSI.
    pub const ENABLE_MSI: Self = Self(2);
    /// Disable MSI.
    pub const DISABLE_MSI: Self = Self(3);
    /// Enable MSI-X.
    pub const ENABLE_MSIX: Self = Self(4);
    /// Disable MSI-X.
    pub const DISABLE_MSIX: Self = Self(5);
}

/// How a request ended (`XEN_PCI_ERR_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum WireError {
    /// `XEN_PCI_ERR_success`.
    Success = 0,
    /// `XEN_PCI_ERR_dev_not_found`: this guest has no such function.
    NoDevice = -1,
    /// `XEN_PCI_ERR_invalid_offset`: no aligned access of 1, 2 or 4 bytes within config space.
    InvalidOffset = -2,
    /// `XEN_PCI_ERR_access_denied`.
    AccessDenied = -3,
    /// `XEN_PCI_ERR_not_implemented`: an unknown command.
    NotImplemented = -4,
    /// `XEN_PCI_ERR_op_failed`.
    Failed = -5,
}

impl WireError {
    /// The number on the page.
    pub const fn number(self) -> i32 {
        self as i32
    }

    /// Reads a number back, for a record of a previous process; an unknown number is `Failed`.
    pub const fn from_number(number: i32) -> Self {
        match number {
            0 => Self::Success,
            -1 => Self::NoDevice,
            -2 => Self::InvalidOffset,
            -3 => Self::AccessDenied,
            -4 => Self::NotImplemented,
            _ => Self::Failed,
        }
    }
}

/// One entry of an MSI-X request: which table entry, and for the answer which physical interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsixEntry {
    /// The physical interrupt, in the answer.
    pub vector: u16,
    /// The index in the function's MSI-X table.
    pub entry: u16,
}

/// A copy of a request. Nothing in it is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Op {
    /// What is asked for.
    pub command: Command,
    /// The segment of the function, as the guest sees it.
    pub domain: u32,
    /// Its bus.
    pub bus: u32,
    /// Its device and function.
    pub devfn: u32,
    /// Where in config space.
    pub offset: u32,
    /// How many bytes.
    pub size: u32,
    /// The value to write, or the number of MSI-X entries.
    pub value: u32,
    /// A word that frontends send as 0: the request's claim, see [`claim`].
    pub info: u32,
    /// The MSI-X entries, all that the page has room for.
    pub entries: [MsixEntry; MSIX_ENTRIES],
}

/// What goes back to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpAnswer {
    /// How it ended.
    pub error: WireError,
    /// The value read, the MSI's physical interrupt, or 0.
    pub value: u32,
    /// The entries with their physical interrupts, after MSI-X was enabled.
    pub entries: Vec<MsixEntry>,
}

impl OpAnswer {
    /// Success, with a value.
    pub const fn value(value: u32) -> Self {
        Self { error: WireError::Success, value, entries: Vec::new() }
    }

    /// A failure. Its value reads all ones, as from a bus where no device answers.
    pub const fn failed(error: WireError) -> Self {
        Self { error, value: u32::MAX, entries: Vec::new() }
    }
}

/// The request that waits on the page, copied; `None` when none waits.
pub fn take_request(page: &[AtomicU32]) -> Option<Op> {
    // Acquire: what the guest wrote before it set the flag is seen after it.
    if page[word::FLAGS].load(Ordering::Acquire) & ACTIVE == 0 {
        return None;
    }
    let load = |index: usize| page[index].load(Ordering::Relaxed);
    let command = Command(load(word::COMMAND));
    let mut entries = [MsixEntry::default(); MSIX_ENTRIES];
    // Only this command has entries; copying them for each read would cost more than the read.
    if command == Command::ENABLE_MSIX {
        for (index, entry) in entries.iter_mut().enumerate() {
            let packed = load(word::MSIX_ENTRIES + index);
            *entry = MsixEntry { vector: packed as u16, entry: (packed >> 16) as u16 };
        }
    }
    Some(Op {
        command,
        domain: load(word::DOMAIN),
        bus: load(word::BUS),
        devfn: load(word::DEVFN),
        offset: load(word::OFFSET),
        size: load(word::SIZE),
        value: load(word::VALUE),
        info: load(word::INFO),
        entries,
    })
}

/// Marks the request that waits as taken by a number other than 0, in a word that frontends write as 0 with each request and do
/// not read.
///
/// So a later run of the service knows a request that an earlier one began from one with the same content that came after it,
/// and an answer that took longer than the frontend's two seconds is known to have lost its request.
pub fn claim(page: &[AtomicU32], token: u32) {
    page[word::INFO].store(token, Ordering::Relaxed);
}

/// Whether the request that was claimed with `token` still waits.
pub fn claimed(page: &[AtomicU32], token: u32) -> bool {
    page[word::FLAGS].load(Ordering::Acquire) & ACTIVE != 0
        && page[word::INFO].load(Ordering::Relaxed) == token
}

/// Writes an answer and returns the page to the guest; the caller then sends an event.
pub fn put_answer(page: &[AtomicU32], answer: &OpAnswer) {
    let store = |index: usize, value: u32| page[index].store(value, Ordering::Relaxed);
    store(word::ERROR, answer.error.number() as u32);
    store(word::VALUE, answer.value);
    for (index, entry) in answer.entries.iter().take(MSIX_ENTRIES).enumerate() {
        store(word::MSIX_ENTRIES + index, u32::from(entry.entry) << 16 | u32::from(entry.vector));
    }
    // Release: the guest sees the answer once it sees the flag clear. Atomic: the guest may change the other flags at the same time.
    page[word::FLAGS].fetch_and(!ACTIVE, Ordering::Release);
}

/// `XEN_PCI_OP_aer_*`.
const fn aer_number(request: AerRequest) -> u32 {
    match request {
        AerRequest::Detected => 6,
        AerRequest::Resume => 7,
        AerRequest::MmioEnabled => 8,
        AerRequest::SlotReset => 9,
    }
}

/// `pci_channel_state_t`.
const fn channel_number(state: ChannelState) -> u32 {
    match state {
        ChannelState::Normal => 1,
        ChannelState::Frozen => 2,
    }
}

/// No operation: what stands on the page before one is put there.
const NO_AER: u32 = u32::MAX;

/// Whether the frontend says that it can be notified of errors.
pub fn has_aer_handler(page: &[AtomicU32]) -> bool {
    page[word::FLAGS].load(Ordering::Acquire) & AER_HANDLER != 0
}

/// Notifies the frontend of an error of the function that it sees at `devfn`; the caller then sends an event.
pub fn put_aer(page: &[AtomicU32], devfn: Devfn, request: AerRequest, state: ChannelState) {
    let store = |index: usize, value: u32| page[index].store(value, Ordering::Relaxed);
    store(word::AER_ERROR, channel_number(state));
    store(word::AER_DOMAIN, 0);
    store(word::AER_BUS, 0);
    store(word::AER_DEVFN, u32::from(devfn.0));
    // Directly before the flag: by this word a later run of the service knows that the operation was put, see `was_aer_put`.
    page[word::AER_COMMAND].store(aer_number(request), Ordering::Release);
    // Release: the guest sees the operation once it sees the flag. Atomic: the guest may change the other flags at the same time.
    page[word::FLAGS].fetch_or(AER_ACTIVE, Ordering::Release);
}

/// Makes the page say that the next operation is not put yet. No operation may be unanswered.
pub fn clear_aer(page: &[AtomicU32]) {
    // Release: not after what the caller notes next.
    page[word::AER_COMMAND].store(NO_AER, Ordering::Release);
}

/// Whether this operation is the one that was put last, after [`clear_aer`], answered or not: frontends leave its words as they are.
pub fn was_aer_put(page: &[AtomicU32], devfn: Devfn, request: AerRequest) -> bool {
    page[word::AER_COMMAND].load(Ordering::Acquire) == aer_number(request)
        && page[word::AER_DEVFN].load(Ordering::Relaxed) == u32::from(devfn.0)
}

/// What the frontend answered; `None` while it is awaited. `Err`: a number that is no answer.
pub fn take_aer_answer(page: &[AtomicU32]) -> Option<Result<AerAnswer, u32>> {
    let active = page[word::FLAGS].load(Ordering::Acquire) & AER_ACTIVE != 0;
    (!active).then(|| AerAnswer::from_number(page[word::AER_ERROR].load(Ordering::Relaxed)))
}

/// Takes back what was not answered. A frontend that answers it all the same answers nothing.
pub fn withdraw_aer(page: &[AtomicU32]) {
    page[word::FLAGS].fetch_and(!AER_ACTIVE, Ordering::Release);
}

/// The guest's side of the page, for tests and for the simulated host's guests.
pub mod frontend {
    use super::*;

    /// Puts a request on the page and marks it.
    pub fn put_request(page: &[AtomicU32], op: &Op) {
        let values = [op.command.0, 0, op.domain, op.bus, op.devfn, op.offset, op.size, op.value, op.info];
        for (index, value) in values.into_iter().enumerate() {
            page[word::COMMAND + index].store(value, Ordering::Relaxed);
        }
        for (index, entry) in op.entries.iter().enumerate() {
            let packed = u32::from(entry.entry) << 16 | u32::from(entry.vector);
            page[word::MSIX_ENTRIES + index].store(packed, Ordering::Relaxed);
        }
        page[word::FLAGS].fetch_or(ACTIVE, Ordering::Release);
    }

    /// Says that the frontend can be notified of errors, or that it cannot.
    pub fn set_aer_handler(page: &[AtomicU32], able: bool) {
        match able {
            true => page[word::FLAGS].fetch_or(AER_HANDLER, Ordering::Release),
            false => page[word::FLAGS].fetch_and(!AER_HANDLER, Ordering::Release),
        };
    }

    /// The backend's notification of an error: command, state of the link, device and function; `None` where there is none.
    pub fn take_aer(page: &[AtomicU32]) -> Option<(u32, u32, u32)> {
        let load = |index: usize| page[index].load(Ordering::Relaxed);
        let active = page[word::FLAGS].load(Ordering::Acquire) & AER_ACTIVE != 0;
        active.then(|| (load(word::AER_COMMAND), load(word::AER_ERROR), load(word::AER_DEVFN)))
    }

    /// The frontend's answer to that, a `pci_ers_result_t`.
    pub fn answer_aer(page: &[AtomicU32], answer: u32) {
        page[word::AER_ERROR].store(answer, Ordering::Relaxed);
        page[word::FLAGS].fetch_and(!AER_ACTIVE, Ordering::Release);
    }

    /// The answer: error, value and `count` MSI-X entries; `None` while it is awaited.
    pub fn take_answer(page: &[AtomicU32], count: usize) -> Option<(i32, u32, Vec<MsixEntry>)> {
        if page[word::FLAGS].load(Ordering::Acquire) & ACTIVE != 0 {
            return None;
        }
        let entries = (0..count.min(MSIX_ENTRIES)).map(|index| {
            let packed = page[word::MSIX_ENTRIES + index].load(Ordering::Relaxed);
            MsixEntry { vector: packed as u16, entry: (packed >> 16) as u16 }
        });
        let (error, value) =
            (page[word::ERROR].load(Ordering::Relaxed), page[word::VALUE].load(Ordering::Relaxed));
        Some((error as i32, value, entries.collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Box<[AtomicU32]> {
        (0..4096 / 4).map(|_| AtomicU32::new(0)).collect()
    }

    /// The layout, from the header, independently of `word`: sharedinfo is flags then op; entries are u16 vector, u16 entry.
    #[test]
    fn requests_lie_where_the_header_says() {
        let page = page();
        for (offset, value) in [(4, 4u32), (12, 1), (16, 2), (20, 3), (24, 0x10), (28, 4), (32, 2), (36, 9)] {
            page[offset / 4].store(value, Ordering::Relaxed);
        }
        page[40 / 4].store(5 << 16 | 7, Ordering::Relaxed);
        page[(40 + 127 * 4) / 4].store(6 << 16, Ordering::Relaxed);
        assert_eq!(take_request(&page), None);
        page[0].store(1, Ordering::Relaxed);
        let op = take_request(&page).unwrap();
        assert_eq!((op.command, op.domain, op.bus, op.devfn), (Command::ENABLE_MSIX, 1, 2, 3));
        assert_eq!((op.offset, op.size, op.value, op.info), (0x10, 4, 2, 9));
        assert_eq!(op.entries[0], MsixEntry { vector: 7, entry: 5 });
        assert_eq!(op.entries[127], MsixEntry { vector: 0, entry: 6 });
    }

    #[test]
    fn an_answer_leaves_the_other_flags_and_the_request_alone() {
        let page = page();
        page[0].store(0b111, Ordering::Relaxed);
        page[6].store(0x44, Ordering::Relaxed);
        let entries = vec![MsixEntry { vector: 0x37, entry: 2 }];
        put_answer(&page, &OpAnswer { error: WireError::Failed, value: 8, entries });
        assert_eq!(page[0].load(Ordering::Relaxed), 0b110);
        assert_eq!(page[2].load(Ordering::Relaxed) as i32, -5);
        assert_eq!(page[6].load(Ordering::Relaxed), 0x44);
        assert_eq!(page[8].load(Ordering::Relaxed), 8);
        assert_eq!(page[10].load(Ordering::Relaxed), 2 << 16 | 0x37);
    }

    /// struct xen_pcie_aer_op lies at 552: cmd, err, domain, bus, devfn.
    #[test]
    fn what_is_told_of_errors_lies_where_the_header_says_and_leaves_the_other_flags_alone() {
        let page = page();
        page[0].store(0b011, Ordering::Relaxed);
        assert!(has_aer_handler(&page));
        put_aer(&page, Devfn(0x18), AerRequest::SlotReset, ChannelState::Frozen);
        let found = [552, 556, 560, 564, 568].map(|at| page[at / 4].load(Ordering::Relaxed));
        assert_eq!(found, [9, 2, 0, 0, 0x18]);
        assert_eq!(page[0].load(Ordering::Relaxed), 0b111);
        assert_eq!(take_aer_answer(&page), None);
        frontend::answer_aer(&page, 5);
        assert_eq!(take_aer_answer(&page), Some(Ok(AerAnswer::Recovered)));
        assert_eq!(page[0].load(Ordering::Relaxed), 0b011);
        put_aer(&page, Devfn(0), AerRequest::Detected, ChannelState::Normal);
        withdraw_aer(&page);
        assert_eq!((page[552 / 4].load(Ordering::Relaxed), page[0].load(Ordering::Relaxed)), (6, 0b011));
    }
}
