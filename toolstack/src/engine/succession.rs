//! Replacing the service by another process, for example after an upgrade, while guests keep using their functions.

use std::time::{Duration, Instant};

use log::{info, warn};

use super::{Engine, Event};
use crate::outcome::{ErrorCode, Failure};
use crate::reply::Reply;
use crate::successor::{ENDED, Program, Successor};

/// The limit for the new process to get ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// The limit for operations that are under way to end.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

fn failed(why: &str) -> Failure {
    Failure::new(ErrorCode::Failed, format!("replace the service: {why}"))
}

/// Why the engine stopped.
pub enum Ending {
    /// The service is to stop.
    Stopped,
    /// Another process takes over.
    Replaced(ReadySuccessor),
}

/// A process that is ready to take over, and the client that requested it.
pub struct ReadySuccessor {
    /// The process.
    pub successor: Successor,
    /// Where the answer is sent.
    pub reply: Reply,
}

/// What replaces this service.
#[derive(Default)]
pub(super) struct Succession {
    /// The executable that this process was started from.
    program: Option<Program>,
    state: State,
}

/// The state of a replacement.
#[derive(Default)]
enum State {
    /// None was requested.
    #[default]
    None,
    /// The new process is starting.
    Starting,
    /// The new process is ready, and takes over when no operation is under way.
    Ready {
        ready_successor: ReadySuccessor,
        /// When the attempt is given up.
        deadline: Instant,
    },
}

impl Succession {
    /// When a ready process is given up.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Ready { deadline, .. } => Some(*deadline),
            _ => None,
        }
    }
}

impl Engine {
    /// Sets the program that can replace this service; the file at its path is started.
    pub fn set_program(&mut self, program: Program) {
        self.succession.program = Some(program);
    }

    /// Starts the installed program, which takes over when it is ready.
    pub(super) fn start_successor(&mut self, reply: Reply) {
        let Some(program) = self.succession.program.clone() else {
            let text = "replace the service: it does not know from which file it was started";
            return reply.done(Err(Failure::refused(text).hint("restart it: 'systemctl restart xpcid'")));
        };
        if !matches!(self.succession.state, State::None) {
            return reply.done(Err(Failure::refused("replace the service: this is under way already")));
        }
        self.succession.state = State::Starting;
        reply.progress("starting the installed xpcid ...");
        let inbox = self.inbox.clone();
        let start = move || {
            let mut successor = program.start()?;
            successor.wait_until_ready(READY_LIMIT)?;
            Ok(successor)
        };
        self.inbox.background("successor", start, move |started: Result<Result<_, String>, _>| {
            let started = started.and_then(|started| started.map_err(|why| failed(&why)));
            inbox.send(Event::SuccessorStarted(started, reply));
        });
    }

    /// Handles the start of the new process, or its failure.
    pub(super) fn successor_started(&mut self, started: Result<Successor, Failure>, reply: Reply) {
        match started {
            Ok(successor) => {
                let deadline = Instant::now() + IDLE_LIMIT;
                self.succession.state =
                    State::Ready { ready_successor: ReadySuccessor { successor, reply }, deadline };
            }
            Err(failure) => self.continue_after(failure, "see its log: 'journalctl -u xpcid'", &reply),
        }
    }

    /// Gives up the replacement; this process continues.
    fn continue_after(&mut self, failure: Failure, hint: &str, reply: &Reply) {
        warn!("{failure}; the running process continues");
        self.succession.state = State::None;
        reply.done(Err(failure.hint(format!("the running process continues; {hint}"))));
    }

    /// The process that takes over now, if one can.
    pub(super) fn ready_successor(&mut self) -> Option<ReadySuccessor> {
        let deadline = self.succession.deadline()?;
        let late = deadline <= Instant::now();
        let idle = self.nothing_is_under_way();
        if !idle && !late {
            return None;
        }
        let State::Ready { mut ready_successor, .. } = std::mem::take(&mut self.succession.state) else {
            return None;
        };
        let why = if !ready_successor.successor.is_there() {
            ENDED.to_owned()
        } else if !idle {
            format!("operations on functions have not ended within {} s", IDLE_LIMIT.as_secs())
        } else {
            info!("process {} takes over", ready_successor.successor.id());
            return Some(ready_successor);
        };
        self.continue_after(failed(&why), "try again", &ready_successor.reply);
        None
    }

    /// Whether no operation is under way that changes functions, hardware or records.
    fn nothing_is_under_way(&self) -> bool {
        self.functions.are_idle()
            && self.functions.handover().recognition.has_ended()
            && self.vfs.is_idle()
            && !self.inventory.is_comparing()
    }
}
