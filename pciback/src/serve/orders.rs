//! What the engine asks of a serving thread, and what that reports.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::attachment::Attachment;
use super::function::GuestFunction;
use super::interrupts::InterruptError;
use crate::Devfn;
use crate::config::{Filter, MaskedWrite};
use crate::fault::{AerAnswer, Conversation};
use crate::platform::PlatformError;

/// What the thread reports to the engine.
#[derive(Debug)]
pub enum ServerReport {
    /// The guest asked for a function level reset; [`Server::reset_ended`](super::Server::reset_ended) is awaited.
    ResetWanted(Attachment),
    /// The function answers no more.
    Vanished(Attachment),
    /// The guest has changed its mind about VFs of its PF: see [`VfRequests`](super::VfRequests).
    VfsWanted(Attachment),
    /// The guest has sent a message to another function: see [`Mailboxes::rung`](super::Mailboxes::rung).
    MessageSent(Attachment),
    /// The guest's driver for the function has started.
    DriverStarted(Attachment),
    /// The function's interrupts could not be put back after its reset.
    RestoreFailed(Attachment, String),
    /// BARs that an earlier process had placed could not be placed again.
    NotPlaced(Attachment, String),
    /// What became of a notification of an error.
    Notified(Attachment, Result<Result<AerAnswer, u32>, NotNotified>),
    /// The guest has pulled the reset line of its machine.
    RestartWanted,
    /// The guest cannot be served any more.
    Failed(String),
}

impl ServerReport {
    /// Which attachment it is about, if it is about one.
    pub fn attachment(&self) -> Option<Attachment> {
        match self {
            Self::ResetWanted(attachment)
            | Self::Vanished(attachment)
            | Self::VfsWanted(attachment)
            | Self::MessageSent(attachment)
            | Self::DriverStarted(attachment)
            | Self::RestoreFailed(attachment, _)
            | Self::NotPlaced(attachment, _)
            | Self::Notified(attachment, _) => Some(*attachment),
            Self::RestartWanted | Self::Failed(_) => None,
        }
    }
}

/// Why a guest said nothing to an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotNotified {
    /// Its frontend does not say that it can be notified.
    #[error("its frontend cannot be notified of errors")]
    NoHandler,
    /// It did not answer in time.
    #[error("it did not answer in time")]
    Silent,
    /// The thread cannot notify it: the event channel or the function is gone.
    #[error("it cannot be reached")]
    Unreachable,
}

/// The thread did not obey in time: it hangs in a config access that the kernel does not finish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("its serving thread hangs in a config access")]
pub struct ServerStuck;

/// What a function that was taken from the thread looked like in the end.
pub struct Taken {
    /// The function, quiesced; dropping it closes its image and its config space.
    pub function: Box<GuestFunction>,
    /// Whether bus mastering and interrupts are off.
    pub quiesced: Result<(), InterruptError>,
}

pub(super) enum Order {
    Add(Devfn, Box<GuestFunction>),
    Take(Devfn, mpsc::Sender<Taken>),
    ResetEnded(Devfn, bool),
    SetGone(Devfn),
    EventsCleared(Devfn),
    ReplaceFilter(Devfn, Arc<Filter>, mpsc::Sender<io::Result<()>>),
    MaskedWrites(Devfn, mpsc::Sender<Vec<MaskedWrite>>),
    Notify(Notification),
    /// The conversation with the guest's driver about an error has ended.
    EndConversation(Devfn),
    BeginReset(Devfn, mpsc::Sender<Result<(), PlatformError>>),
    /// Stops; the functions come back as they are.
    Stop(mpsc::Sender<BTreeMap<Devfn, Box<GuestFunction>>>),
}

/// A notification of an error.
#[derive(Debug, Clone, Copy)]
pub struct Notification {
    /// The function, as the guest sees it.
    pub devfn: Devfn,
    /// Which attachment of it: the guest may get another function at the same place before it has answered.
    pub attachment: Attachment,
    /// What the guest's driver is asked; nothing is heard yet.
    pub conversation: Conversation,
    /// How long the answer is waited for.
    pub limit: Duration,
    /// Whether an earlier process may have asked already: then it is not asked again.
    pub resumed: bool,
}
