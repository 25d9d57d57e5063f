//! The destination of the engine's answers to one call.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use log::info;

use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{EventView, Success};

/// The destination of the engine's answers to one call.
#[derive(Clone)]
pub struct Reply(Listener);

#[derive(Clone)]
enum Listener {
    Client(mpsc::Sender<Line>),
    /// The service itself: a failure is passed to this function.
    Unasked(Arc<dyn Fn(&Failure) + Send + Sync>),
}

/// One message about a call.
#[derive(Debug)]
pub(crate) enum Line {
    /// What is being done.
    Progress(String),
    /// An event.
    Event(Box<EventView>),
    /// The final message.
    Done(Box<Result<Success, Failure>>),
    /// Not sent to the client: dropped with the channel after the last line was written.
    Written(#[expect(dead_code, reason = "it counts when it is dropped")] mpsc::Sender<()>),
}

impl Reply {
    /// A reply, and the receiver of its lines.
    pub(crate) fn channel() -> (Self, mpsc::Receiver<Line>) {
        let (sender, receiver) = mpsc::channel();
        (Self(Listener::Client(sender)), receiver)
    }

    /// A reply for which a thread of the service waits.
    pub fn awaited() -> (Self, Awaited) {
        let (reply, lines) = Self::channel();
        (reply, Awaited(lines))
    }

    /// A reply for work that the service starts by itself; a failure is passed to `failed`.
    pub fn unasked(failed: impl Fn(&Failure) + Send + Sync + 'static) -> Self {
        Self(Listener::Unasked(Arc::new(failed)))
    }

    /// Reports what is being done.
    pub fn progress(&self, text: &str) {
        match &self.0 {
            // A client that has disconnected does not stop the operation.
            Listener::Client(client) => drop(client.send(Line::Progress(text.to_owned()))),
            Listener::Unasked(_) => info!("{text}"),
        }
    }

    /// Sends an event; `false`: the client has disconnected.
    pub fn event(&self, event: &EventView) -> bool {
        match &self.0 {
            Listener::Client(client) => client.send(Line::Event(Box::new(event.clone()))).is_ok(),
            Listener::Unasked(_) => false,
        }
    }

    /// Ends the call.
    pub fn done(&self, outcome: Result<Success, Failure>) {
        match (&self.0, outcome) {
            (Listener::Client(client), outcome) => drop(client.send(Line::Done(Box::new(outcome)))),
            (Listener::Unasked(_), Ok(Success::Changed { message, .. } | Success::Already { message })) => {
                info!("{message}")
            }
            (Listener::Unasked(_), Ok(_)) => {}
            (Listener::Unasked(failed), Err(failure)) => failed(&failure),
        }
    }
}

impl Reply {
    /// Ends the call, and waits up to `limit` until the answer is written, because the process ends afterwards.
    pub fn done_before_the_end(&self, outcome: Result<Success, Failure>, limit: Duration) {
        self.done(outcome);
        if let Listener::Client(client) = &self.0 {
            let (token, written) = mpsc::channel();
            // If it was dropped, nothing is left to write.
            let _ = client.send(Line::Written(token));
            let _ = written.recv_timeout(limit);
        }
    }
}

/// The answer for which a thread of the service waits.
pub struct Awaited(mpsc::Receiver<Line>);

impl Awaited {
    /// Waits for the outcome, up to `limit`.
    pub fn wait(&self, limit: Duration) -> Result<Success, Failure> {
        self.given(limit).unwrap_or_else(|error| {
            Err(Failure::new(ErrorCode::Failed, format!("wait for the engine: {error}")))
        })
    }

    /// Waits for the outcome, up to `limit`; an error if there is none, so that the outcome is unknown.
    pub fn given(&self, limit: Duration) -> Result<Result<Success, Failure>, mpsc::RecvTimeoutError> {
        let deadline = Instant::now() + limit;
        loop {
            match self.0.recv_timeout(deadline.saturating_duration_since(Instant::now()))? {
                Line::Progress(_) | Line::Event(_) | Line::Written(_) => {}
                Line::Done(outcome) => return Ok(*outcome),
            }
        }
    }
}
