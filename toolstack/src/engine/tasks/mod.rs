//! Transactions on background threads: starting them, what they ask of the engine, and their end.

mod context;
mod open;
mod proof;

use std::sync::Arc;

use log::{error, info, warn};
use pciback::{FunctionState, Sbdf};

pub(super) use self::context::TaskContext;
pub(super) use self::open::Image;
pub use self::open::Opened;
use super::Engine;
use super::functions::Ended;
use super::inbox::Answer;
use crate::engine;
use crate::journal::Record;
use crate::protocol::{Cause, Success};
use crate::reply::Reply;
use crate::reservations::Change;
use crate::transaction::{Finished, Kind, Step, Withdrawal};

/// What a transaction does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Course {
    /// The steps from the first to the last.
    Forward(Kind),
    /// The steps of [`Kind::Hold`] from the first, even while the function is in use.
    ForceHold,
    /// The steps from the last, backwards.
    Backward(Kind, Withdrawal),
    /// The steps of [`Kind::Hold`] backwards, at a client's request: refused while a function of a guest shares something with it.
    GiveBack,
    /// The steps backwards from a given one, for an unfinished transaction of an earlier run.
    BackwardFrom(Kind, Step, Withdrawal),
    /// Quarantine a function that no guest has.
    Quarantine,
    /// End a quarantine, after a verified reset.
    Clear,
}

impl Course {
    const fn state_during(self) -> FunctionState {
        match self {
            Self::ForceHold => Kind::Hold.state_during(),
            Self::Forward(kind) | Self::Backward(kind, _) | Self::BackwardFrom(kind, ..) => {
                kind.state_during()
            }
            Self::Quarantine | Self::GiveBack => FunctionState::Held,
            Self::Clear => FunctionState::Resetting,
        }
    }

    const fn withdrawal(self) -> Withdrawal {
        match self {
            Self::Forward(_) | Self::ForceHold | Self::Quarantine => Withdrawal::Force,
            Self::Clear | Self::GiveBack => Withdrawal::GuestEnded,
            Self::Backward(_, withdrawal) | Self::BackwardFrom(_, _, withdrawal) => withdrawal,
        }
    }
}

/// What transactions ask of the engine, and their end.
pub enum Event {
    /// A transaction asks to serve a function.
    Serve {
        /// The record of the function, with its guest.
        record: Box<Record>,
        /// The function, opened and ready to be served.
        opened: Box<Opened>,
        /// Where the answer is sent.
        answer: Answer,
    },
    /// A transaction asks to stop serving a function.
    Withdraw {
        /// The record of the function, with its guest.
        record: Box<Record>,
        /// How the function is withdrawn from the guest.
        withdrawal: Withdrawal,
        /// Where the answer is sent.
        answer: Answer,
    },
    /// A transaction that takes a PF from its guest asks to remove the VFs that the guest has created.
    RemoveVfs(Sbdf, Answer),
    /// One that takes a PF whose VFs may stay asks to wait for the end of a change of them.
    AwaitVfs(Sbdf, Answer),
    /// A transaction ended.
    Finished(Box<Finished>),
}

/// Causes of problems of a function that a successful operation removes.
const RESOLVED_BY_SUCCESS: [Cause; 5] =
    [Cause::Holding, Cause::Network, Cause::OutOfStep, Cause::ErrorReporting, Cause::Guest];

impl Engine {
    pub(super) fn handle_tasks(&mut self, event: Event) {
        match event {
            Event::Serve { record, opened, answer } => self.serve(&record, *opened, answer),
            Event::Withdraw { record, withdrawal, answer } => self.withdraw(&record, withdrawal, answer),
            Event::RemoveVfs(address, answer) => self.remove_guest_vfs(address, answer),
            Event::AwaitVfs(address, answer) => self.await_guest_vfs(address, answer),
            Event::Finished(finished) => self.transaction_finished(*finished),
        }
    }

    pub(super) fn task_context(&self) -> TaskContext {
        TaskContext {
            platform: self.platform.clone(),
            settings: Arc::clone(&self.settings),
            files: self.files.clone(),
            inbox: self.inbox.clone(),
            policies: Arc::clone(&self.policies),
            filters: self.filters.clone(),
            changes: self.inventory.changes(),
            handover: self.functions.handover().clone(),
            devices: self.devices.clone(),
            mailboxes: self.mailboxes.clone(),
            opened: Arc::default(),
        }
    }

    /// Starts a transaction; `reply` gets its outcome, with the message that `done` makes.
    pub(super) fn start(
        &mut self,
        course: Course,
        record: Record,
        reply: Option<Reply>,
        done: impl Fn(&Record) -> String + Send + 'static,
    ) {
        self.start_with(course, record, None, reply, done);
    }

    /// [`Self::start`] with a change of reservations before it.
    pub(super) fn start_with(
        &mut self,
        course: Course,
        record: Record,
        change: Option<Change>,
        reply: Option<Reply>,
        done: impl Fn(&Record) -> String + Send + 'static,
    ) {
        let address = record.address;
        if matches!(course, Course::Backward(Kind::Release, _) | Course::GiveBack) {
            self.holds.gives_back(address, record.incarnation);
        }
        let mut shown = record.clone();
        shown.state = course.state_during();
        self.functions.begin(shown);
        self.inventory.begin(address);
        // The transaction writes the files again, and reports a new failure.
        self.problems.resolve_of(address, &[Cause::StateFiles]);
        let context = self.task_context();
        let (reporter, listener) = (context.clone(), reply.clone());
        let not_begun = context.unchanged(course, record.clone());
        let work = move || {
            let progress = |text: &str| {
                if let Some(listener) = &listener {
                    listener.progress(text);
                }
            };
            context.run_with(course, record, change, &progress)
        };
        self.inbox.background(&format!("task {address}"), work, move |finished| {
            let finished =
                finished.unwrap_or_else(|failure| Finished { record: not_begun, outcome: Err(failure) });
            let (record, outcome) = (finished.record.clone(), finished.outcome.clone());
            match &outcome {
                Ok(_) => info!("{}", done(&record)),
                // A refused request is not an error of the host.
                Err(failure) if failure.code.is_refusal() => info!("{address}: {failure}"),
                Err(failure) => error!("{address}: {failure}"),
            }
            // The engine first, because a client that has the answer may ask for the state at once.
            reporter.inbox.send(engine::Event::Tasks(Event::Finished(Box::new(finished))));
            if let Some(reply) = reply {
                let view = reporter.view_of(&record);
                let shares = match (&outcome, course) {
                    (Ok(_), Course::Forward(Kind::Hold) | Course::ForceHold) => reporter.shares(address),
                    _ => Vec::new(),
                };
                reply.done(outcome.map(|warnings| Success::Changed {
                    message: done(&record),
                    warnings: [warnings, shares].concat(),
                    functions: vec![view],
                }));
            }
        });
    }

    fn transaction_finished(&mut self, finished: Finished) {
        self.holds.finished(&finished);
        let record = finished.record.clone();
        let address = record.address;
        let Ended { earlier, orphaned } = self.functions.end(record.clone());
        let before = earlier.as_ref().and_then(|record| record.guest).map(|guest| guest.domain);
        let during = earlier.map(|record| record.state);
        let attached = record.state == FunctionState::Attached;
        let (record_is_held, managed) = (record.state == FunctionState::Held, record.managed);
        if !attached {
            self.vfs.forget(address);
        }
        if finished.outcome.is_ok() {
            // The operation succeeded, so that earlier problems no longer exist.
            self.problems.resolve_of(address, &RESOLVED_BY_SUCCESS);
        }
        self.note_network_problem(&record);
        self.keep_watching_errors_of(address);
        // Events during the transaction were not handled.
        self.inventory.examine(address);
        if orphaned && attached {
            warn!("{address}: its guest ended while it was attached");
            self.detach_from_ended(record);
        }
        self.contain_awaiting(address);
        self.returning_finished(&finished, before);
        if record_is_held {
            self.retry_assignments();
        }
        self.requests_go_on(address);
        if record_is_held && managed {
            self.managed_is_held(address, during);
        }
        self.settle_mailboxes(address);
        self.guest_vfs_go_on(address);
    }

    /// Detaches a function whose guest has ended.
    pub(super) fn detach_from_ended(&mut self, record: Record) {
        if self.functions.is_busy(record.address) {
            self.functions.orphan(record.address);
            return;
        }
        self.start(Course::Backward(Kind::Detach, Withdrawal::GuestEnded), record, None, |record| {
            format!("{}: held again, its guest has ended", record.address)
        });
    }
}
