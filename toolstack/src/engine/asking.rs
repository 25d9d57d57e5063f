//! Requests that a thread of the service makes, as a client would: work that consists of several of them.

use std::cell::Cell;
use std::time::Duration;

use super::Event;
use super::tasks::Workshop;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Request, Success};
use crate::reply::Reply;

/// What the engine may take besides what guests, drivers and resets may.
const ENGINE_LIMIT: Duration = Duration::from_secs(60);

/// Makes requests, one after the other.
pub(super) struct Asking {
    pub workshop: Workshop,
    /// Whether a request was not answered: what came of it the next run of the service finds out.
    unanswered: Cell<bool>,
}

impl Asking {
    pub fn new(workshop: Workshop) -> Self {
        Self { workshop, unanswered: Cell::new(false) }
    }

    /// Whether it is unknown what came of a request: then nothing is undone.
    pub fn is_unanswered(&self) -> bool {
        self.unanswered.get()
    }

    /// Makes a request; `what` it is a part of, for people.
    pub fn ask(&self, request: Request, what: &str) -> Result<Success, Failure> {
        let settings = &self.workshop.settings;
        let reset = Duration::from_secs(settings.reset.limit_seconds + settings.reset.answer_seconds);
        // Attached and, when that fails, taken back.
        let limit = (settings.longest_guest_limit() + settings.driver_limit() + reset) * 2 + ENGINE_LIMIT;
        let (reply, answer) = Reply::awaited();
        self.workshop.inbox.send(Event::Call { request: request.into(), reply });
        answer.given(limit).unwrap_or_else(|error| {
            self.unanswered.set(true);
            Err(Failure::new(ErrorCode::Failed, format!("{what}: wait for the engine: {error}"))
                .hint("see xpcid's log, and restart xpcid, which ends what was begun"))
        })
    }
}
