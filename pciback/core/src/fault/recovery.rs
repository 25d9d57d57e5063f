//! The recovery protocol with a guest whose driver is notified of an error: the next request, given the last answer.
//!
//! It is the one that Linux has with its own drivers (Documentation/PCI/pci-error-recovery), as `xen/io/pciif.h` carries it. Linux in
//! dom0 does not wait for it: it has recovered the link by itself, and what the guest answers decides on its own function only.

/// What the guest's driver is asked (`XEN_PCI_OP_aer_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AerRequest {
    /// There was an error.
    Detected,
    /// The function may be looked at.
    MmioEnabled,
    /// The function was reset.
    SlotReset,
    /// Work may continue.
    Resume,
}

/// In which state the link is (`pci_channel_state_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChannelState {
    /// It works: the error was not fatal.
    Normal,
    /// It was stopped: the error was fatal.
    Frozen,
}

/// What a driver can answer (`pci_ers_result_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AerAnswer {
    /// Nothing: there is no driver, or it knows nothing of errors.
    None,
    /// It can continue without a reset.
    CanRecover,
    /// It needs a reset.
    NeedReset,
    /// It gives up.
    Disconnect,
    /// It has recovered.
    Recovered,
}

impl AerAnswer {
    /// From the number on the page; `Err` for one that is none.
    pub const fn from_number(number: u32) -> Result<Self, u32> {
        match number {
            // PCI_ERS_RESULT_NONE, and PCI_ERS_RESULT_NO_AER_DRIVER.
            1 | 6 => Ok(Self::None),
            2 => Ok(Self::CanRecover),
            3 => Ok(Self::NeedReset),
            4 => Ok(Self::Disconnect),
            5 => Ok(Self::Recovered),
            other => Err(other),
        }
    }

    /// The number on the page.
    pub const fn number(self) -> u32 {
        match self {
            Self::None => 1,
            Self::CanRecover => 2,
            Self::NeedReset => 3,
            Self::Disconnect => 4,
            Self::Recovered => 5,
        }
    }
}

/// What comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Ask this.
    Ask(AerRequest),
    /// Reset the function, then say so with [`Recovery::was_reset`].
    Reset,
    /// The guest has recovered.
    Done,
    /// It has not, with the reason.
    Failed(String),
}

/// One conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovery {
    state: ChannelState,
    mmio_enabled: bool,
    /// What was asked last.
    asked: AerRequest,
}

impl Recovery {
    /// Begins with [`AerRequest::Detected`]; `mmio_enabled`: the driver may be asked to look at the function.
    pub const fn begin(state: ChannelState, mmio_enabled: bool) -> Self {
        Self::at(AerRequest::Detected, state, mmio_enabled)
    }

    /// One in which this was asked last.
    pub const fn at(asked: AerRequest, state: ChannelState, mmio_enabled: bool) -> Self {
        Self { state, mmio_enabled, asked }
    }

    /// The next question to the guest.
    pub const fn asks(&self) -> AerRequest {
        self.asked
    }

    /// The state of the link that goes with it.
    pub const fn state(&self) -> ChannelState {
        self.state
    }

    /// The function has lost its state, by a reset of the link or another error: it is reset, whatever the driver answers next.
    pub const fn freeze(&mut self) {
        self.state = ChannelState::Frozen;
    }

    /// Whether the driver may be asked to look at the function.
    pub const fn mmio_enabled(&self) -> bool {
        self.mmio_enabled
    }

    fn ask(&mut self, request: AerRequest) -> Next {
        self.asked = request;
        Next::Ask(request)
    }

    /// The guest's answer to what was asked; `Err` holds a number that is no answer.
    pub fn answered(&mut self, answer: Result<AerAnswer, u32>) -> Next {
        use AerAnswer::{CanRecover, Disconnect, NeedReset, None, Recovered};
        if self.asked == AerRequest::Resume {
            // Drivers have nothing to say to that.
            return Next::Done;
        }
        let answer = match answer {
            Ok(answer) => answer,
            Err(number) => return Next::Failed(format!("it answered {number}, which is not a valid answer")),
        };
        match (self.asked, answer) {
            (_, None) => Next::Failed("its driver has no error handlers, or there is no driver".to_owned()),
            (_, Disconnect) => Next::Failed("its driver gives up".to_owned()),
            // A link that was stopped and a driver that says it can do without a reset: the state behind the link is gone all the same.
            (AerRequest::Detected | AerRequest::MmioEnabled, CanRecover | Recovered)
                if self.state == ChannelState::Frozen =>
            {
                Next::Reset
            }
            (AerRequest::Detected, CanRecover) if self.mmio_enabled => self.ask(AerRequest::MmioEnabled),
            (AerRequest::SlotReset, NeedReset | CanRecover) => {
                Next::Failed("its driver did not recover by a reset".to_owned())
            }
            (_, NeedReset) => Next::Reset,
            (_, CanRecover | Recovered) => self.ask(AerRequest::Resume),
        }
    }

    /// The function was reset.
    pub fn was_reset(&mut self) -> Next {
        self.ask(AerRequest::SlotReset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers to the questions in turn; a reset succeeds.
    fn converse(state: ChannelState, mmio: bool, answers: &[u32]) -> (Vec<AerRequest>, Next) {
        let (mut recovery, mut answers) = (Recovery::begin(state, mmio), answers.iter());
        let mut asked = vec![recovery.asks()];
        loop {
            let Some(answer) = answers.next() else { return (asked, Next::Ask(recovery.asks())) };
            let mut next = recovery.answered(AerAnswer::from_number(*answer));
            if next == Next::Reset {
                next = recovery.was_reset();
            }
            match next {
                Next::Ask(request) => asked.push(request),
                end => return (asked, end),
            }
        }
    }

    #[test]
    fn the_conversation_is_linuxs_own() {
        use AerRequest::{Detected, MmioEnabled, Resume, SlotReset};
        use ChannelState::{Frozen, Normal};
        for (state, mmio, answers, asked) in [
            (Normal, false, &[2, 1][..], &[Detected, Resume][..]),
            (Normal, false, &[5, 0], &[Detected, Resume]),
            (Normal, true, &[2, 5, 1], &[Detected, MmioEnabled, Resume]),
            (Normal, true, &[2, 3, 5, 9], &[Detected, MmioEnabled, SlotReset, Resume]),
            (Normal, false, &[3, 5, 1], &[Detected, SlotReset, Resume]),
            (Normal, true, &[3, 5, 1], &[Detected, SlotReset, Resume]),
            (Frozen, false, &[2, 5, 1], &[Detected, SlotReset, Resume]),
            (Frozen, true, &[2, 5, 1], &[Detected, SlotReset, Resume]),
        ] {
            assert_eq!(converse(state, mmio, answers), (asked.to_vec(), Next::Done), "{answers:?}");
        }
    }

    #[test]
    fn no_answer_of_a_guest_makes_it_ask_without_end_or_look_without_being_allowed() {
        for state in [ChannelState::Normal, ChannelState::Frozen] {
            for mmio in [false, true] {
                for number in 0..8u32.pow(4) {
                    let answers: Vec<u32> = (0..4).map(|place| number >> (3 * place) & 7).collect();
                    let (asked, end) = converse(state, mmio, &answers);
                    assert!(asked.len() <= 4 && !matches!(end, Next::Ask(_)), "{answers:?}: {asked:?}");
                    let looked = asked.contains(&AerRequest::MmioEnabled);
                    assert!(!looked || (mmio && answers[0] == 2 && state == ChannelState::Normal));
                }
            }
        }
    }

    #[test]
    fn a_function_that_loses_its_state_in_the_middle_is_reset_whatever_its_driver_answers() {
        for (before, answer) in [(None, 2), (None, 5), (Some(2), 2), (Some(2), 5)] {
            let mut recovery = Recovery::begin(ChannelState::Normal, true);
            if let Some(answer) = before {
                assert_eq!(
                    recovery.answered(AerAnswer::from_number(answer)),
                    Next::Ask(AerRequest::MmioEnabled)
                );
            }
            recovery.freeze();
            assert_eq!(recovery.answered(AerAnswer::from_number(answer)), Next::Reset);
        }
    }

    #[test]
    fn silence_of_the_driver_giving_up_and_nonsense_are_failures() {
        for (answers, said) in [
            (&[1][..], "no error handlers"),
            (&[6], "no error handlers"),
            (&[4], "gives up"),
            (&[0], "answered 0"),
            (&[u32::MAX], "not a valid answer"),
            (&[3, 3], "did not recover by a reset"),
            (&[3, 1], "no error handlers"),
        ] {
            let (_, end) = converse(ChannelState::Normal, false, answers);
            let Next::Failed(why) = end else { panic!("{answers:?}: {end:?}") };
            assert!(why.contains(said), "{why}");
        }
    }
}
