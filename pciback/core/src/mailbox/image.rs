//! The file of one function's mailbox: its Data Object Exchange, and for a VF the queues. Everything in it is checked once, when a
//! service resumes, and the accessors accept any value of the words.
//!
//! A state is written to the slot that is not in use and switched by one store of a generation number, as in a function's image.

use thiserror::Error;

use super::instance::{Instance, MOST_DWORDS};
use super::queue::QUEUE_WORDS;
use crate::Sbdf;
use crate::config::ImageOwner;
use crate::memory::{SharedWords, Words, next_generation};

/// `xpcm` in the order of bytes in memory.
const MAGIC: u32 = u32::from_le_bytes(*b"xpcm");
/// Changes whenever the meaning of a word does.
const VERSION: u32 = 1;

const PAGE: usize = 1024;
/// The length of the file.
pub const MAILBOX_BYTES: usize = 3 * PAGE * 4;

mod word {
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = 1;
    pub const BOOT: usize = 2;
    pub const DOMAIN: usize = 4;
    pub const ADDRESS: usize = 5;
    pub const GENERATION: usize = 6;
    /// Two slots.
    pub const STATES: usize = 64;
    pub const STATE: usize = 256;
    /// In a state: before its dwords.
    pub const REQUEST: usize = 16;
    pub const RESPONSE: usize = 128;
}

/// Where the header of the queues is.
pub(super) const PEER: usize = 7;
/// Where the queue of each direction is.
pub(super) const QUEUES: [usize; 2] = [PAGE, 2 * PAGE];

const _: () = assert!(word::REQUEST + MOST_DWORDS <= word::RESPONSE);
const _: () = assert!(word::RESPONSE + MOST_DWORDS <= word::STATE);
const _: () = assert!(word::STATES + 2 * word::STATE <= PAGE && QUEUE_WORDS <= PAGE);

/// Why the file of a mailbox cannot be taken over.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MailboxImageError {
    /// It is too short, was never completed, is of another version, or belongs to something else.
    #[error("its {what} is {found:#x} instead of {expected:#x}")]
    Mismatch {
        /// What.
        what: &'static str,
        /// What stands there.
        found: u64,
        /// What should.
        expected: u64,
    },
    /// A value in it cannot be.
    #[error("it is damaged: {what} is {found:#x}")]
    Damaged {
        /// Which value.
        what: &'static str,
        /// What it is.
        found: u32,
    },
}

/// The words of a mapping of [`MAILBOX_BYTES`]: those of a new mailbox, or those of an earlier run, which are checked.
pub fn mailbox_memory(
    memory: impl SharedWords + 'static,
    owner: ImageOwner,
    address: Sbdf,
    begin: Option<u32>,
) -> Result<Words, MailboxImageError> {
    let words = Words::new(memory);
    let identity = [
        ("version", word::VERSION, VERSION),
        ("boot", word::BOOT, owner.boot as u32),
        ("boot", word::BOOT + 1, (owner.boot >> 32) as u32),
        ("domain", word::DOMAIN, u32::from(owner.domain.0)),
        ("function", word::ADDRESS, address.packed()),
    ];
    let mismatch =
        |what, found: u64, expected: u64| Err(MailboxImageError::Mismatch { what, found, expected });
    let bytes = words.all().len() * 4;
    if bytes < MAILBOX_BYTES {
        return mismatch("length", bytes as u64, MAILBOX_BYTES as u64);
    }
    if let Some(first) = begin {
        for index in 0..MAILBOX_BYTES / 4 {
            words.set(index, 0);
        }
        for (_, index, value) in identity {
            words.set(index, value);
        }
        super::queue::begin(&words, first);
        words.publish(word::MAGIC, MAGIC);
    }
    if words.latest(word::MAGIC) != MAGIC {
        return mismatch("magic", words.get(word::MAGIC).into(), MAGIC.into());
    }
    for (what, index, value) in identity {
        if words.get(index) != value {
            return mismatch(what, words.get(index).into(), value.into());
        }
    }
    InstanceImage(words.clone()).check()?;
    super::queue::check(&words)?;
    Ok(words)
}

/// Where a message that is being read came from: it leaves its queue when it has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// The VF whose queue it is in.
    pub vf: u16,
    /// Its number there.
    pub number: u32,
}

/// The state of a Data Object Exchange, as it survives.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InstanceState {
    /// Its registers.
    pub instance: Instance,
    /// The claim of the last access: a service that was killed may meet it again.
    pub claim: u32,
    /// How many messages were sent: what the queue has of the last one.
    pub sent: u32,
    /// The message in the response.
    pub origin: Option<Origin>,
    /// The VF whose message was received last.
    pub last_vf: u16,
}

/// Where that is kept. One thread has it at a time.
#[derive(Debug)]
pub struct InstanceImage(Words);

impl InstanceImage {
    /// That of a mailbox.
    pub fn new(words: &Words) -> Self {
        Self(words.clone())
    }

    fn slot(&self, generation: u32) -> usize {
        word::STATES + (generation & 1) as usize * word::STATE
    }

    fn check(&self) -> Result<(), MailboxImageError> {
        let slot = self.slot(self.0.latest(word::GENERATION));
        let [request, response, read] = [1, 2, 3].map(|index| self.0.get(slot + index));
        for (what, found, most) in [
            ("the length of a request", request, MOST_DWORDS as u32),
            ("the length of a response", response, MOST_DWORDS as u32),
            ("what has been read", read, response.saturating_sub(1)),
        ] {
            if found > most {
                return Err(MailboxImageError::Damaged { what, found });
            }
        }
        Ok(())
    }

    /// The state that was stored last.
    pub fn load(&self) -> InstanceState {
        let slot = self.slot(self.0.latest(word::GENERATION));
        let at = |index: usize| self.0.get(slot + index);
        let list = |start: usize, count: u32| {
            (0..(count as usize).min(MOST_DWORDS)).map(|index| at(start + index)).collect::<Vec<u32>>()
        };
        let flags = at(0);
        let instance = Instance {
            request: list(word::REQUEST, at(1)),
            too_long: flags & 2 != 0,
            response: list(word::RESPONSE, at(2)),
            read: at(3) as usize,
            error: flags & 1 != 0,
        };
        let origin = (flags & 4 != 0).then(|| Origin { vf: at(6) as u16, number: at(7) });
        InstanceState { instance, claim: at(4), sent: at(5), origin, last_vf: at(8) as u16 }
    }

    /// Stores a state, all at once.
    pub fn store(&mut self, state: &InstanceState) {
        let generation = next_generation(self.0.latest(word::GENERATION));
        let slot = self.slot(generation);
        let InstanceState { instance, claim, sent, origin, last_vf } = state;
        let flags =
            u32::from(instance.error) | u32::from(instance.too_long) << 1 | u32::from(origin.is_some()) << 2;
        let (vf, number) = origin.map_or((0, 0), |origin| (origin.vf, origin.number));
        let (request, response) = (&instance.request, &instance.response);
        let header = [
            flags,
            request.len() as u32,
            response.len() as u32,
            instance.read as u32,
            *claim,
            *sent,
            u32::from(vf),
            number,
            u32::from(*last_vf),
        ];
        for (index, value) in header.into_iter().enumerate() {
            self.0.set(slot + index, value);
        }
        for (start, list) in [(word::REQUEST, request), (word::RESPONSE, response)] {
            for (index, value) in list.iter().take(MOST_DWORDS).enumerate() {
                self.0.set(slot + start + index, *value);
            }
        }
        self.0.publish(word::GENERATION, generation);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::AtomicU32;
    use std::sync::atomic::Ordering::Relaxed;

    use proptest::prelude::*;

    use super::*;
    use crate::DomId;
    use crate::spec::doe;

    pub const OWNER: ImageOwner = ImageOwner { boot: 0x1234_5678_9abc_def0, domain: DomId(3) };

    pub fn address() -> Sbdf {
        Sbdf::from_devfn(0, 1, 0x80)
    }

    pub fn memory() -> Box<[AtomicU32]> {
        (0..MAILBOX_BYTES / 4).map(|_| AtomicU32::new(0)).collect()
    }

    /// A copy of the bytes, as another process maps them after this one was killed.
    pub fn copy(words: &Words) -> Box<[AtomicU32]> {
        words.all().iter().map(|word| AtomicU32::new(word.load(Relaxed))).collect()
    }

    fn resumed(words: &Words) -> Result<Words, MailboxImageError> {
        mailbox_memory(copy(words), OWNER, address(), None)
    }

    #[test]
    fn every_state_of_an_exchange_survives_a_killed_service() {
        let words = mailbox_memory(memory(), OWNER, address(), Some(9)).unwrap();
        let mut image = InstanceImage::new(&words);
        assert_eq!(image.load(), InstanceState::default());
        let mut state = InstanceState::default();
        let mut step = |state: &InstanceState| {
            image.store(state);
            assert_eq!(InstanceImage::new(&resumed(&words).unwrap()).load(), *state);
        };
        for length in 0..=MOST_DWORDS + 1 {
            state.instance.write(doe::WRITE_DATA, length as u32 + 1, u32::MAX);
            state.claim += 1;
            step(&state);
        }
        state.instance.write(doe::CONTROL, doe::GO, u32::MAX);
        step(&state);
        state.instance.write(doe::CONTROL, doe::ABORT, u32::MAX);
        state.instance.respond(Some((0..MOST_DWORDS as u32).collect()));
        state =
            InstanceState { sent: 3, origin: Some(Origin { vf: 6, number: u32::MAX }), last_vf: 6, ..state };
        while state.instance.status() != 0 {
            step(&state);
            state.instance.write(doe::READ_DATA, 0, u32::MAX);
        }
        step(&state);
    }

    #[test]
    fn the_file_of_another_version_boot_guest_or_function_is_not_taken_over() {
        let words = mailbox_memory(memory(), OWNER, address(), Some(9)).unwrap();
        for (owner, function) in [
            (ImageOwner { boot: 1, ..OWNER }, address()),
            (ImageOwner { domain: DomId(4), ..OWNER }, address()),
            (OWNER, Sbdf::from_devfn(0, 1, 0x81)),
        ] {
            assert!(mailbox_memory(copy(&words), owner, function, None).is_err());
        }
        let other = copy(&words);
        other[word::VERSION].store(2, Relaxed);
        let error = mailbox_memory(other, OWNER, address(), None).unwrap_err();
        assert_eq!(error.to_string(), "its version is 0x2 instead of 0x1");
        assert!(mailbox_memory(memory(), OWNER, address(), None).is_err());
        let short: Box<[AtomicU32]> = copy(&words).into_vec().into_iter().take(100).collect();
        assert!(mailbox_memory(short, OWNER, address(), None).is_err());
    }

    proptest! {
        #[test]
        fn a_damaged_file_is_refused_or_usable(
            damage in proptest::collection::vec((6..MAILBOX_BYTES / 4, any::<u32>()), 1..40)
        ) {
            let words = mailbox_memory(memory(), OWNER, address(), Some(9)).unwrap();
            let damaged = copy(&words);
            for (index, value) in damage {
                damaged[index].store(value, Relaxed);
            }
            if let Ok(words) = mailbox_memory(damaged, OWNER, address(), None) {
                let state = InstanceImage::new(&words).load();
                let _ = (state.instance.status(), state.instance.data());
            }
        }
    }
}
