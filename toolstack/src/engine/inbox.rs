//! How other threads reach the engine: events in its inbox, and answers that they wait for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use log::error;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Event;
use super::problems::Problem;
use crate::outcome::Failure;
use crate::protocol::Cause;
use crate::reply::Reply;

/// A handle by which other threads send events to the engine.
#[derive(Clone)]
pub struct Inbox {
    sender: mpsc::Sender<Event>,
    wake: Arc<EventFd>,
    /// Whether the engine has stopped.
    ended: Arc<AtomicBool>,
}

impl Inbox {
    /// Creates an inbox, with the receiver of its events.
    pub(super) fn new() -> io::Result<(Self, mpsc::Receiver<Event>)> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let (sender, events) = mpsc::channel();
        Ok((Self { sender, wake: Arc::new(wake), ended: Arc::default() }, events))
    }

    /// Sends an event. Once the engine has stopped, the event is dropped, and with it the sender of any answer that a thread waits for.
    pub fn send(&self, event: Event) {
        // EAGAIN: the counter of the eventfd is at its maximum, so the engine is woken anyway.
        if self.sender.send(event).is_ok()
            && let Err(errno) = self.wake.write(1)
            && errno != Errno::EAGAIN
        {
            error!("wake the engine: {errno}");
        }
    }

    /// Readable after an event was sent.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Makes [`Self::wake_fd`] unreadable, before the events are taken.
    pub(super) fn drain(&self) {
        // EAGAIN: it was not readable.
        let _ = self.wake.read();
    }

    /// The engine has stopped. Called before the channels close, so that waiting threads can tell a stopped engine from a refusal.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    /// Whether the engine has stopped.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Sends an event with a channel for its answer, which the caller waits for.
    pub(super) fn ask(&self, event: impl FnOnce(Answer) -> Event) -> mpsc::Receiver<Answered> {
        let (sender, receiver) = mpsc::channel();
        self.send(event(Answer { sender, ended: Arc::clone(&self.ended) }));
        receiver
    }

    /// A reply for work that the service starts by itself: a failure becomes a problem in `xpci status`.
    pub(super) fn unasked_reply(&self, cause: Cause) -> Reply {
        let inbox = self.clone();
        Reply::unasked(move |failure| inbox.send(Event::Problem(Problem::failed(cause, failure))))
    }
}

/// What the engine answers to a transaction; a success may have a warning.
pub(super) type Answered = Result<Option<String>, Failure>;

/// The channel on which a transaction waits for an answer of the engine.
pub struct Answer {
    sender: mpsc::Sender<Answered>,
    ended: Arc<AtomicBool>,
}

impl Answer {
    /// Sends the answer. The transaction may have stopped waiting, so that a failure to send is ignored.
    pub(super) fn send(&self, outcome: Answered) {
        let _ = self.sender.send(outcome);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // If the engine panics while it handles the request, this is no refusal: the transaction stays in the journal for the next run of
        // the service.
        if std::thread::panicking() {
            self.ended.store(true, Ordering::SeqCst);
        }
    }
}
