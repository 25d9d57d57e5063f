//! A conversation with a guest's driver as it is noted, so that the next process of the service goes on where a killed one was.

use super::{AerAnswer, AerRequest, ChannelState, Recovery};

/// What the guest said to the last request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// Nothing yet: it is awaited.
    Nothing,
    /// This; `Err` holds a number that is no answer.
    Answer(Result<AerAnswer, u32>),
    /// It was not told, or has not answered in time.
    Silence,
}

/// One conversation, and how far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conversation {
    /// What was asked last.
    pub recovery: Recovery,
    /// Whether the error is the function's own, so that a guest that does not recover has consequences.
    pub own: bool,
    /// What was heard since.
    pub heard: Heard,
}

const REQUEST: u32 = 0x7;
const FROZEN: u32 = 1 << 3;
const MMIO_ENABLED: u32 = 1 << 4;
const OWN: u32 = 1 << 5;
const ANSWERED: u32 = 1 << 6;
const SILENT: u32 = 1 << 7;
/// The number that the guest answered; larger ones are no answers and lose their upper bits.
const ANSWER: u32 = 16;
const LARGEST_ANSWER: u32 = 0xffff;

impl Conversation {
    /// The word that is noted; never 0, which means that there is none.
    pub fn to_word(&self) -> u32 {
        let request = match self.recovery.asks() {
            AerRequest::Detected => 1,
            AerRequest::MmioEnabled => 2,
            AerRequest::SlotReset => 3,
            AerRequest::Resume => 4,
        };
        let set = |bit: u32, is_set: bool| if is_set { bit } else { 0 };
        let heard = match self.heard {
            Heard::Nothing => 0,
            Heard::Answer(answer) => {
                let number = answer.map_or_else(|number| number, AerAnswer::number);
                ANSWERED | number.min(LARGEST_ANSWER) << ANSWER
            }
            Heard::Silence => SILENT,
        };
        request
            | set(FROZEN, self.recovery.state() == ChannelState::Frozen)
            | set(MMIO_ENABLED, self.recovery.mmio_enabled())
            | set(OWN, self.own)
            | heard
    }

    /// The conversation that was noted; `None`: none, or the word is damaged.
    pub fn from_word(word: u32) -> Option<Self> {
        let asked = match word & REQUEST {
            1 => AerRequest::Detected,
            2 => AerRequest::MmioEnabled,
            3 => AerRequest::SlotReset,
            4 => AerRequest::Resume,
            _ => return None,
        };
        let state = if word & FROZEN != 0 { ChannelState::Frozen } else { ChannelState::Normal };
        let heard = match (word & ANSWERED != 0, word & SILENT != 0) {
            (false, false) => Heard::Nothing,
            (true, false) => Heard::Answer(AerAnswer::from_number(word >> ANSWER)),
            (false, true) => Heard::Silence,
            (true, true) => return None,
        };
        let recovery = Recovery::at(asked, state, word & MMIO_ENABLED != 0);
        Some(Self { recovery, own: word & OWN != 0, heard })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read_as_it_was() {
        use AerRequest::{Detected, MmioEnabled, Resume, SlotReset};
        let numbers = (0..8).chain([u32::from(u16::MAX)]);
        let answers = numbers.map(|number| Heard::Answer(AerAnswer::from_number(number)));
        for heard in answers.chain([Heard::Nothing, Heard::Silence]) {
            for asked in [Detected, MmioEnabled, SlotReset, Resume] {
                for state in [ChannelState::Normal, ChannelState::Frozen] {
                    for (mmio_enabled, own) in [(false, false), (false, true), (true, false), (true, true)] {
                        let recovery = Recovery::at(asked, state, mmio_enabled);
                        let conversation = Conversation { recovery, own, heard };
                        assert_ne!(conversation.to_word(), 0);
                        assert_eq!(Conversation::from_word(conversation.to_word()), Some(conversation));
                    }
                }
            }
        }
    }

    #[test]
    fn no_word_of_a_damaged_file_is_more_than_a_conversation_or_none() {
        for word in (0..=0xff).flat_map(|low| [low, low | 0xffff_0000, low | 0xff00]) {
            if let Some(conversation) = Conversation::from_word(word) {
                assert_eq!(Conversation::from_word(conversation.to_word()), Some(conversation));
            }
        }
        assert_eq!(Conversation::from_word(0), None);
    }
}
