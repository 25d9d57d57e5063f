//! What must survive a killed service: one function's virtual config space and interrupts, in a mapped file.
//!
//! Everything that is read here may have been written by a damaged file system or an older version: [`FunctionImage::check`]
//! looks at it once when a service resumes, and the accessors accept any value of the words.
//!
//! Values that change together have two slots: see [`Words`].

use std::sync::atomic::Ordering::Relaxed;

use super::list::CapabilityList;
use super::records::{ImageError, ImageOwner, InterruptMode, RequestRecord, RequestStage, VectorState};
use crate::Sbdf;
use crate::memory::{SharedWords, Words, next_generation};

/// `xpci` in the order of bytes in memory.
const MAGIC: u32 = u32::from_le_bytes(*b"xpci");
/// Changes whenever the meaning of a word does.
pub(super) const VERSION: u32 = 2;
const PAGE: usize = 1024;
/// No guest has an address from here on: a BAR that is being sized lies beyond it.
pub const GUEST_END: u64 = 1 << 39;

mod word {
    //! Where each word of the header page is.
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = 1;
    pub const BOOT: usize = 2;
    pub const DOMAIN: usize = 4;
    pub const ADDRESS: usize = 5;
    pub const SHAPE: usize = 6;
    pub const RESETTING: usize = 8;
    pub const VECTORS_GENERATION: usize = 9;
    pub const REQUEST_GENERATION: usize = 10;
    pub const CONVERSATION: usize = 11;
    /// Where an HVM guest has each BAR: two words for each of seven.
    pub const PLACED: usize = 16;
    /// How many page frames of each of these are mapped, from the first on.
    pub const MAPPED: usize = 32;
    pub const REQUESTS: usize = 64;
    pub const REQUEST_SLOT: usize = 64;
}

const SHADOW: usize = PAGE;
const RESET_VALUES: usize = 2 * PAGE;
const VECTORS: usize = 3 * PAGE;
/// Which bits the filter in force reads from hardware: what a filter that replaces it must know of it.
const FROM_HARDWARE: usize = 5 * PAGE;
/// An HVM guest's MSI-X table, in images of such guests only.
const TABLE: usize = 6 * PAGE;
/// Words of a vector slot before its entries: mode, pending entry, number of entries, reserved.
const VECTOR_HEADER: usize = 4;
const NO_ENTRY: u32 = u32::MAX;
/// Beside a vector's entry: the guest chose the number of its interrupt.
const CHOSEN: u32 = 1 << 16;

/// The mapped words of one function.
///
/// Page 0: header, then two request slots; page 1: the shadow; page 2: what the shadow returns to at a reset; pages 3 and 4: two
/// slots of vectors; page 5: the bits that are read from hardware. For an HVM guest, pages 6 to 13: its MSI-X table. One thread owns it at a time.
#[derive(Debug)]
pub struct FunctionImage {
    words: Words,
    owner: ImageOwner,
}

impl FunctionImage {
    /// The length of the file.
    pub const BYTES: usize = 6 * PAGE * 4;
    /// The length of the file for an HVM guest.
    pub const HVM_BYTES: usize = Self::BYTES + 8 * PAGE * 4;
    /// The most vectors that can be noted; the PV protocol asks for at most 128.
    pub const MAX_VECTORS: usize = (PAGE - VECTOR_HEADER) / 2;

    /// Wraps a mapping of at least [`Self::BYTES`]; its words are first looked at by
    /// [`super::VirtualConfigSpace::create`], which overwrites them, or `resume`, which checks them.
    pub fn new(memory: impl SharedWords + 'static, owner: ImageOwner) -> Self {
        Self { words: Words::new(memory), owner }
    }

    /// The guest, within one boot, that it belongs to.
    pub fn owner(&self) -> ImageOwner {
        self.owner
    }

    /// Begins an image: all zero, valid only after [`Self::complete`].
    pub(super) fn begin(&mut self, address: Sbdf, shape: u64) -> Result<(), ImageError> {
        self.check_size(address)?;
        self.words.set(word::MAGIC, 0);
        for index in 1..self.words.all().len() {
            self.words.set(index, 0);
        }
        self.words.set(word::VERSION, VERSION);
        self.set_double(word::BOOT, self.owner.boot);
        self.words.set(word::DOMAIN, u32::from(self.owner.domain.0));
        self.words.set(word::ADDRESS, address.packed());
        self.set_double(word::SHAPE, shape);
        Ok(())
    }

    /// Makes what was begun valid.
    pub(super) fn complete(&mut self) {
        self.words.publish(word::MAGIC, MAGIC);
    }

    /// Checks everything that another run of the service left.
    pub(super) fn check(&self, address: Sbdf, shape: u64) -> Result<(), ImageError> {
        self.check_size(address)?;
        let magic = self.words.latest(word::MAGIC);
        if magic != MAGIC {
            return Err(ImageError::Magic { address, found: magic });
        }
        if self.words.get(word::VERSION) != VERSION {
            return Err(ImageError::Version { address, found: self.words.get(word::VERSION) });
        }
        for (what, found, expected) in [
            ("boot", self.get_double(word::BOOT), self.owner.boot),
            ("domain", u64::from(self.words.get(word::DOMAIN)), u64::from(self.owner.domain.0)),
            ("function", u64::from(self.words.get(word::ADDRESS)), u64::from(address.packed())),
            ("layout", self.get_double(word::SHAPE), shape),
        ] {
            if found != expected {
                return Err(ImageError::Mismatch { address, what, found, expected });
            }
        }
        let damaged = |what, found| Err(ImageError::Damaged { address, what, found });
        // Both halves of a note that was half written are of addresses before the end.
        let beyond = (0..7).filter_map(|bar| self.placed(bar)).find(|address| *address >= GUEST_END);
        if let Some(address) = beyond {
            return damaged("the upper half of a BAR's address", (address >> 32) as u32);
        }
        if self.words.get(word::RESETTING) > 1 {
            return damaged("the reset flag", self.words.get(word::RESETTING));
        }
        let slot = self.vector_slot();
        let (mode, pending, count) =
            (self.words.get(slot), self.words.get(slot + 1), self.words.get(slot + 2));
        if mode > 3 {
            return damaged("the interrupt mode", mode);
        }
        if pending != NO_ENTRY
            && pending > u32::from(u16::MAX)
            && self.words.get(word::VECTORS_GENERATION) != 0
        {
            return damaged("the pending vector", pending);
        }
        if count as usize > Self::MAX_VECTORS {
            return damaged("the number of vectors", count);
        }
        for index in 0..count as usize {
            let entry = self.words.get(slot + VECTOR_HEADER + 2 * index);
            if entry & !CHOSEN > u32::from(u16::MAX) {
                return damaged("a vector's entry", entry);
            }
        }
        let stage = self.words.get(self.request_slot());
        if stage > 2 {
            return damaged("the stage of the request", stage);
        }
        Ok(())
    }

    fn check_size(&self, address: Sbdf) -> Result<(), ImageError> {
        let bytes = self.words.all().len() * 4;
        if bytes < Self::BYTES { Err(ImageError::Size { address, bytes }) } else { Ok(()) }
    }

    /// One dword of the shadow.
    pub(super) fn shadow(&self, dword: usize) -> u32 {
        self.words.get(SHADOW + (dword & (PAGE - 1)))
    }

    /// Stores one dword of the shadow.
    pub(super) fn set_shadow(&mut self, dword: usize, value: u32) {
        self.words.set(SHADOW + (dword & (PAGE - 1)), value);
    }

    /// Clears bits of one dword of the shadow.
    pub(super) fn clear_shadow_bits(&self, dword: usize, bits: u32) {
        if let Some(word) = self.words.all().get(SHADOW + (dword & (PAGE - 1))) {
            word.fetch_and(!bits, Relaxed);
        }
    }

    /// What a dword of the shadow returns to at a reset.
    pub(super) fn reset_value(&self, dword: usize) -> u32 {
        self.words.get(RESET_VALUES + (dword & (PAGE - 1)))
    }

    /// Stores what a dword of the shadow returns to at a reset.
    pub(super) fn set_reset_value(&mut self, dword: usize, value: u32) {
        self.words.set(RESET_VALUES + (dword & (PAGE - 1)), value);
    }

    /// The bits of a dword that are read from hardware.
    pub(super) fn hardware_bits(&self, dword: usize) -> u32 {
        self.words.get(FROM_HARDWARE + (dword & (PAGE - 1)))
    }

    /// Notes which bits of a dword are read from hardware.
    pub(super) fn set_hardware_bits(&mut self, dword: usize, bits: u32) {
        self.words.set(FROM_HARDWARE + (dword & (PAGE - 1)), bits);
    }

    /// Where a BAR (0-5, 6 for the ROM) is mapped in an HVM guest; `None` where it is not.
    pub fn placed(&self, bar: u8) -> Option<u64> {
        let address = self.get_double(word::PLACED + 2 * usize::from(bar.min(6)));
        (address != 0).then_some(address)
    }

    /// Notes where a BAR is about to be mapped, or that it is mapped no more.
    pub fn set_placed(&mut self, bar: u8, address: Option<u64>) {
        let at = word::PLACED + 2 * usize::from(bar.min(6));
        self.set_mapped_frames(bar, 0);
        // The lower half is never 0 for an address within 4 GiB, and a half-written note leads to an unmapping that fails.
        self.set_double(at, address.unwrap_or(0));
    }

    /// How many page frames of a BAR are mapped where it is placed, from its first one on; 0 in images of versions that did not note it.
    pub fn mapped_frames(&self, bar: u8) -> u64 {
        self.words.get(word::MAPPED + usize::from(bar.min(6))).into()
    }

    /// Notes that. What is noted is mapped.
    pub fn set_mapped_frames(&mut self, bar: u8, frames: u64) {
        self.words.set(word::MAPPED + usize::from(bar.min(6)), u32::try_from(frames).unwrap_or(u32::MAX));
    }

    /// An entry of an HVM guest's MSI-X table: address, upper address, data, vector control.
    pub fn table_entry(&self, entry: u16) -> [u32; 4] {
        [0, 1, 2, 3].map(|index| self.words.get(TABLE + 4 * usize::from(entry) + index))
    }

    /// Stores one word (0-3) of an entry of an HVM guest's MSI-X table.
    pub fn set_table_word(&mut self, entry: u16, index: usize, value: u32) {
        self.words.set(TABLE + 4 * usize::from(entry) + (index & 3), value);
    }

    /// The offsets of the capabilities that the guest sees, in a function with `size` bytes of config space: the links of the
    /// lists are its own and do not depend on what hardware says.
    pub fn visible_capabilities(&self, size: usize) -> Vec<u16> {
        let bytes: Vec<u8> =
            (0..size.min(4 * PAGE) / 4).flat_map(|dword| self.shadow(dword).to_le_bytes()).collect();
        CapabilityList::walk(&bytes).capabilities.iter().map(|capability| capability.offset).collect()
    }

    /// The vectors that are mapped for the guest.
    pub fn vectors(&self) -> VectorState {
        if self.words.get(word::VECTORS_GENERATION) == 0 {
            return VectorState::default();
        }
        let slot = self.vector_slot();
        let mode = match self.words.get(slot) {
            1 => InterruptMode::Intx,
            2 => InterruptMode::Msi,
            3 => InterruptMode::MsiX,
            _ => InterruptMode::Off,
        };
        let count = (self.words.get(slot + 2) as usize).min(Self::MAX_VECTORS);
        let words = (0..count).map(|index| slot + VECTOR_HEADER + 2 * index);
        let words = words.map(|at| (self.words.get(at), self.words.get(at + 1)));
        VectorState {
            mode,
            entries: words.clone().map(|(entry, pirq)| (entry as u16, pirq)).collect(),
            chosen: words.filter(|(entry, _)| entry & CHOSEN != 0).map(|(entry, _)| entry as u16).collect(),
            pending: u16::try_from(self.words.get(slot + 1)).ok(),
        }
    }

    /// Replaces the vectors, all at once. Entries beyond [`Self::MAX_VECTORS`] are the caller's mistake: nothing is changed and
    /// the result is `false`.
    #[must_use = "too many vectors are not stored"]
    pub fn set_vectors(&mut self, state: &VectorState) -> bool {
        if state.entries.len() > Self::MAX_VECTORS {
            return false;
        }
        let generation = next_generation(self.words.get(word::VECTORS_GENERATION));
        let slot = VECTORS + (generation & 1) as usize * PAGE;
        let mode = match state.mode {
            InterruptMode::Off => 0,
            InterruptMode::Intx => 1,
            InterruptMode::Msi => 2,
            InterruptMode::MsiX => 3,
        };
        self.words.set(slot, mode);
        self.words.set(slot + 1, state.pending.map_or(NO_ENTRY, u32::from));
        self.words.set(slot + 2, state.entries.len() as u32);
        for (index, (entry, pirq)) in state.entries.iter().enumerate() {
            let at = slot + VECTOR_HEADER + 2 * index;
            let chosen = if state.chosen.contains(entry) { CHOSEN } else { 0 };
            self.words.set(at, u32::from(*entry) | chosen);
            self.words.set(at + 1, *pirq);
        }
        self.words.publish(word::VECTORS_GENERATION, generation);
        true
    }

    /// The request in progress or the one answered last; `None` when there is none.
    pub fn request(&self) -> Option<RequestRecord> {
        let slot = self.request_slot();
        let stage = match self.words.get(slot) {
            1 => RequestStage::Begun,
            2 => {
                RequestStage::Done { error: self.words.get(slot + 8) as i32, value: self.words.get(slot + 9) }
            }
            _ => return None,
        };
        Some(RequestRecord {
            command: self.words.get(slot + 1),
            offset: self.words.get(slot + 2),
            size: self.words.get(slot + 3),
            value: self.words.get(slot + 4),
            info: self.words.get(slot + 5),
            entries_hash: self.get_double(slot + 6),
            stage,
        })
    }

    /// Notes a request, all at once, before anything is done about it. Its stage is taken as it is given.
    pub fn begin_request(&mut self, record: &RequestRecord) {
        self.put_request(Some(record));
    }

    /// Notes that the effects of the request in progress are complete, with its answer; nothing happens where there is none.
    pub fn finish_request(&mut self, error: i32, value: u32) {
        if let Some(record) = self.request() {
            self.put_request(Some(&RequestRecord { stage: RequestStage::Done { error, value }, ..record }));
        }
    }

    /// Forgets the request: its answer was sent.
    pub fn clear_request(&mut self) {
        self.put_request(None);
    }

    fn put_request(&mut self, record: Option<&RequestRecord>) {
        let generation = next_generation(self.words.get(word::REQUEST_GENERATION));
        let slot = word::REQUESTS + (generation & 1) as usize * word::REQUEST_SLOT;
        self.words.set(slot, 0);
        if let Some(record) = record {
            let (stage, error, value) = match record.stage {
                RequestStage::Begun => (1, 0, 0),
                RequestStage::Done { error, value } => (2, error as u32, value),
            };
            let words = [stage, record.command, record.offset, record.size, record.value, record.info];
            for (index, value) in words.into_iter().enumerate() {
                self.words.set(slot + index, value);
            }
            self.set_double(slot + 6, record.entries_hash);
            self.words.set(slot + 8, error);
            self.words.set(slot + 9, value);
        }
        self.words.publish(word::REQUEST_GENERATION, generation);
    }

    /// Whether the function is being reset: every access reads all ones and no hardware is touched.
    pub fn resetting(&self) -> bool {
        self.words.get(word::RESETTING) != 0
    }

    /// Begins or ends the time in which every access reads all ones.
    pub fn set_resetting(&mut self, resetting: bool) {
        self.words.publish(word::RESETTING, u32::from(resetting));
    }

    /// The note of a conversation with the guest's driver about an error; 0 where there is none, and in images of versions that did not
    /// note it.
    pub fn conversation(&self) -> u32 {
        self.words.latest(word::CONVERSATION)
    }

    /// Replaces that note, after everything that was stored before.
    pub fn set_conversation(&mut self, note: u32) {
        self.words.publish(word::CONVERSATION, note);
    }

    fn vector_slot(&self) -> usize {
        VECTORS + (self.words.get(word::VECTORS_GENERATION) & 1) as usize * PAGE
    }

    fn request_slot(&self) -> usize {
        word::REQUESTS + (self.words.get(word::REQUEST_GENERATION) & 1) as usize * word::REQUEST_SLOT
    }

    fn get_double(&self, index: usize) -> u64 {
        u64::from(self.words.get(index)) | u64::from(self.words.get(index + 1)) << 32
    }

    fn set_double(&mut self, index: usize, value: u64) {
        self.words.set(index, value as u32);
        self.words.set(index + 1, (value >> 32) as u32);
    }
}
