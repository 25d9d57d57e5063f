//! Requests that a thread of the service sends as a client would, for work that consists of several requests.

use std::cell::Cell;
use std::time::Duration;

use crate::engine::Event;
use crate::engine::tasks::TaskContext;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Request, Success};
use crate::reply::Reply;

/// Time that the engine may need in addition to the limits of guests, drivers and resets.
const ENGINE_LIMIT: Duration = Duration::from_secs(60);

/// Sends requests, one after the other.
pub(in crate::engine) struct LocalClient {
    pub context: TaskContext,
    /// Whether a request got no answer; its outcome is then found only by the next run of the service.
    unanswered: Cell<bool>,
}

impl LocalClient {
    pub fn new(context: TaskContext) -> Self {
        Self { context, unanswered: Cell::new(false) }
    }

    /// Whether the outcome of a request is unknown. Nothing must be undone then.
    pub fn is_unanswered(&self) -> bool {
        self.unanswered.get()
    }

    /// Sends a request and waits for the answer; `what` names the whole operation in error messages.
    pub fn ask(&self, request: Request, what: &str) -> Result<Success, Failure> {
        let settings = &self.context.settings;
        let reset = Duration::from_secs(settings.reset.limit_seconds + settings.reset.answer_seconds);
        // Twice, for an attachment that is undone after it fails.
        let limit = (settings.longest_guest_limit() + settings.driver_limit() + reset) * 2 + ENGINE_LIMIT;
        let (reply, answer) = Reply::awaited();
        self.context.inbox.send(Event::Call { request: request.into(), reply });
        answer.given(limit).unwrap_or_else(|error| {
            self.unanswered.set(true);
            Err(Failure::new(ErrorCode::Failed, format!("{what}: wait for the engine: {error}"))
                .hint("see xpcid's log, and restart xpcid, which ends what was begun"))
        })
    }
}
