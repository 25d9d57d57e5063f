//! Where the engine sends what it has to say about one call.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use log::info;

use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{EventView, Success};

/// Where the engine sends what it has to say about one call.
#[derive(Clone)]
pub struct Reply(Listener);

#[derive(Clone)]
enum Listener {
    Client(mpsc::Sender<Line>),
    /// The service itself: a failure goes here.
    Unasked(Arc<dyn Fn(&Failure) + Send + Sync>),
}

/// One thing that the engine has to say about a call.
#[derive(Debug)]
pub(crate) enum Line {
    /// What is done now.
    Progress(String),
    /// What happened.
    Event(Box<EventView>),
    /// The last one.
    Done(Box<Result<Success, Failure>>),
    /// Nothing to say: dropped with the channel, when the last line has been written.
    Written(#[expect(dead_code, reason = "it counts when it is dropped")] mpsc::Sender<()>),
}

impl Reply {
    /// A reply and where its lines come out.
    pub(crate) fn channel() -> (Self, mpsc::Receiver<Line>) {
        let (sender, receiver) = mpsc::channel();
        (Self(Listener::Client(sender)), receiver)
    }

    /// A reply that a thread of the service's own waits for.
    pub fn awaited() -> (Self, Answer) {
        let (reply, lines) = Self::channel();
        (reply, Answer(lines))
    }

    /// A reply for what the service does of its own accord; a failure goes to `failed`.
    pub fn unasked(failed: impl Fn(&Failure) + Send + Sync + 'static) -> Self {
        Self(Listener::Unasked(Arc::new(failed)))
    }

    /// Says what is done now.
    pub fn progress(&self, text: &str) {
        match &self.0 {
            // A client that has gone away is no reason to stop.
            Listener::Client(client) => drop(client.send(Line::Progress(text.to_owned()))),
            Listener::Unasked(_) => info!("{text}"),
        }
    }

    /// Says what happened; `false` when its client has left.
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
    /// Ends the call, and waits until its client has been written to, at most for `limit`: this process ends then.
    pub fn done_before_the_end(&self, outcome: Result<Success, Failure>, limit: Duration) {
        self.done(outcome);
        if let Listener::Client(client) = &self.0 {
            let (token, written) = mpsc::channel();
            // Whether it was dropped unsent or with the channel, nothing is left to write.
            let _ = client.send(Line::Written(token));
            let _ = written.recv_timeout(limit);
        }
    }
}

/// What a thread of the service's own waits for.
pub struct Answer(mpsc::Receiver<Line>);

impl Answer {
    /// The outcome, at most after `limit`.
    pub fn wait(&self, limit: Duration) -> Result<Success, Failure> {
        self.given(limit).unwrap_or_else(|error| {
            Err(Failure::new(ErrorCode::Failed, format!("wait for the engine: {error}")))
        })
    }

    /// The outcome, at most after `limit`; an error where none comes, so that it is not known what was done.
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
