//! Background threads for transactions and changes of VFs.

mod open;
mod proof;

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use log::{error, info, warn};
use pciback::config::{FunctionSpec, Planes};
use pciback::platform::Platform;
use pciback::policy::PolicySet;
use pciback::{DomId, FunctionState, Sbdf};

pub use self::open::Opened;
use super::changes::Changes;
use super::functions::{Ended, Handover};
use super::inbox::{Answer, Answered};
use super::problems::Problem;
use super::{Engine, Inbox};
use crate::device::Devices;
use crate::engine;
use crate::former_owners::FormerOwners;
use crate::journal::{Journal, Record};
use crate::ledger::Ledger;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Cause, Success};
use crate::reply::Reply;
use crate::reservations::{Change, Reservations};
use crate::settings::Settings;
use crate::spec::Filters;
use crate::transaction::{
    Context, Finished, Kind, Serving, Sharing, Step, Withdrawal, guest_of, refuse_release,
};
use crate::wishes::Wishes;

/// Time that the engine may need in addition to a guest's own limit, before a transaction stops waiting for it.
const ENGINE_MARGIN: Duration = Duration::from_secs(10);

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
    /// A transaction ended.
    Finished(Box<Finished>),
}

/// Everything that a background thread needs, without borrowing from the engine.
#[derive(Clone)]
pub(super) struct Workshop {
    pub platform: Platform,
    pub settings: Arc<Settings>,
    pub journal: Journal,
    pub ledger: Ledger,
    pub former_owners: FormerOwners,
    pub inbox: Inbox,
    pub policies: Arc<PolicySet>,
    pub filters: Filters,
    pub changes: Changes,
    pub handover: Handover,
    pub reservations: Reservations,
    pub wishes: Wishes,
    pub devices: Devices,
    /// The function that [`Serving::open`] opened, until it is served.
    pub opened: Arc<Mutex<Option<Box<Opened>>>>,
}

impl Serving for Workshop {
    fn open(&self, record: &Record) -> Result<(), Failure> {
        let opened = Box::new(self.open_function(record, guest_of(record)?, false)?);
        *self.opened.lock().unwrap_or_else(PoisonError::into_inner) = Some(opened);
        Ok(())
    }

    fn serve(&self, record: &Record) -> Result<Option<String>, Failure> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner).take();
        let opened = opened.ok_or_else(|| {
            Failure::new(ErrorCode::Failed, "serve a function that was not opened").on(record.address)
        })?;
        self.ask(|answer| Event::Serve { record: Box::new(record.clone()), opened, answer })
    }

    fn withdraw(&self, record: &Record, withdrawal: Withdrawal) -> Result<Option<String>, Failure> {
        let warning =
            self.ask(|answer| Event::Withdraw { record: Box::new(record.clone()), withdrawal, answer })?;
        if !self.handover.resets.wait(record.address, self.settings.driver_limit() + ENGINE_MARGIN) {
            let text = format!("{}: a reset that its guest asked for has not ended", record.address);
            return Err(Failure::new(ErrorCode::Failed, text).on(record.address).hint(format!(
                "see dom0's kernel log; when it has ended, 'xpci quarantine clear {}'",
                record.address
            )));
        }
        if let Some(place) = record.guest {
            self.prove_withdrawn(record, place.domain)?;
        }
        Ok(warning)
    }

    fn filter(&self, spec: &FunctionSpec, domain: DomId) -> Result<Arc<Planes>, Failure> {
        self.planes(spec, domain, None)
    }

    fn distrusted(&self, address: Sbdf) -> Option<String> {
        self.handover.awaiting.distrusted(address)
    }

    fn host_changes(&self) -> u64 {
        self.changes.count()
    }

    fn wait_for_host(&self, seen: u64, deadline: Instant) -> bool {
        self.changes.wait(seen, deadline)
    }

    fn ended(&self) -> bool {
        self.inbox.has_ended()
    }
}

impl Workshop {
    fn ask(&self, event: impl FnOnce(Answer) -> Event) -> Answered {
        let receiver = self.inbox.ask(|answer| engine::Event::Tasks(event(answer)));
        receiver.recv_timeout(self.settings.longest_guest_limit() + ENGINE_MARGIN).unwrap_or_else(|error| {
            let text = match error {
                mpsc::RecvTimeoutError::Disconnected => {
                    "xpcid is stopping; it completes or undoes this when it runs again"
                }
                mpsc::RecvTimeoutError::Timeout => "xpcid's engine did not answer in time",
            };
            Err(Failure::new(ErrorCode::Failed, text).hint("see xpcid's log"))
        })
    }

    /// Runs a transaction, after the change of reservations that belongs to it.
    fn run_with(
        &self,
        course: Course,
        record: Record,
        change: Option<Change>,
        progress: &dyn Fn(&str),
    ) -> Finished {
        if course == Course::GiveBack
            && let Err(failure) = refuse_release(&self.sharing(), &record)
        {
            return Finished { record, outcome: Err(failure) };
        }
        let before = match &change {
            Some(Change::Reserve(wanted)) => self.reservations.get(wanted.address),
            _ => None,
        };
        let mut newly_held = false;
        let made = match change.clone() {
            Some(Change::Reserve(wanted)) => self.reservations.keep(*wanted),
            Some(Change::Forget(address)) => self.reservations.forget(address),
            Some(Change::Hold(address)) => {
                self.want(address, |wish| wish.hold = true).map(|new| newly_held = new)
            }
            None => Ok(()),
        };
        let made = made.and_then(|()| match course {
            Course::GiveBack => self.want_nothing(record.address),
            _ => Ok(()),
        });
        if let Err(failure) = made {
            return Finished { record: self.unchanged(course, record), outcome: Err(failure) };
        }
        let mut finished = self.run(course, record, progress);
        let after = match (&mut finished.outcome, change) {
            (Ok(warnings), _) if course == Course::Forward(Kind::Attach) => {
                if let Err(failure) = self.note_given(&finished.record) {
                    warnings.push(failure.to_string());
                }
                Ok(())
            }
            (Err(_), Some(Change::Reserve(wanted))) if !self.ended() => match before {
                Some(before) => self.reservations.keep(before),
                None => self.reservations.forget(wanted.address),
            },
            (Err(_), Some(Change::Hold(address))) if newly_held && !self.ended() => {
                self.want(address, |wish| wish.hold = false).map(drop)
            }
            _ => Ok(()),
        };
        if let Err(failure) = after {
            self.inbox.send(engine::Event::Problem(
                Problem::failed(Cause::StateFiles, &failure).on(finished.record.address),
            ));
        }
        finished
    }

    /// Removes the persistent wishes for a function that goes back to dom0.
    fn want_nothing(&self, address: Sbdf) -> Result<(), Failure> {
        let host = self.platform.host.as_ref();
        match host.function(address) {
            Ok(function) => self.wishes.forget(host, &function).map(drop),
            // The function has left the host.
            Err(_) => Ok(()),
        }
    }

    /// The record for a transaction that could not begin.
    fn unchanged(&self, course: Course, record: Record) -> Record {
        match course {
            Course::Forward(Kind::Attach) => Record { guest: None, ..record },
            _ => record,
        }
    }

    /// Notes that a guest now has the function that it has persistently.
    fn note_given(&self, record: &Record) -> Result<(), Failure> {
        let Some((reservation, place)) = self.reservations.get(record.address).zip(record.guest) else {
            return Ok(());
        };
        if self.platform.hypervisor.domain(place.domain)?.uuid != reservation.guest {
            return Ok(());
        }
        match reservation.saved {
            Some(_) => self.reservations.forget(record.address),
            None => self.reservations.give(reservation, &record.boot, place.domain),
        }
    }

    /// The inputs of checks for shared resources.
    pub(super) fn sharing(&self) -> Sharing<'_> {
        Sharing {
            platform: &self.platform,
            policies: &self.policies,
            journal: &self.journal,
            fresh: &self.handover.fresh,
        }
    }

    fn run(&self, course: Course, record: Record, progress: &dyn Fn(&str)) -> Finished {
        let context = Context {
            platform: &self.platform,
            settings: &self.settings,
            policies: &self.policies,
            journal: &self.journal,
            ledger: &self.ledger,
            former_owners: &self.former_owners,
            fresh: &self.handover.fresh,
            wishes: &self.wishes,
            serving: self,
            withdrawal: course.withdrawal(),
            force: course == Course::ForceHold,
            progress,
        };
        match course {
            Course::Forward(kind) => context.forward(kind, record),
            Course::ForceHold => context.forward(Kind::Hold, record),
            Course::Backward(kind, _) => context.backward(kind, record),
            Course::GiveBack => context.backward(Kind::Release, record),
            Course::BackwardFrom(kind, step, _) => context.backward_from(kind, step, record),
            Course::Quarantine => context.quarantine(record),
            Course::Clear => context.clear(record),
        }
    }
}

/// Causes of problems of a function that a successful operation removes.
const RESOLVED_BY_SUCCESS: [Cause; 5] =
    [Cause::Holding, Cause::Network, Cause::OutOfStep, Cause::ErrorReporting, Cause::Guest];

impl Engine {
    pub(super) fn handle_tasks(&mut self, event: Event) {
        match event {
            Event::Serve { record, opened, answer } => self.serve(&record, *opened, answer),
            Event::Withdraw { record, withdrawal, answer } => self.withdraw(&record, withdrawal, answer),
            Event::Finished(finished) => self.transaction_finished(*finished),
        }
    }

    pub(super) fn workshop(&self) -> Workshop {
        Workshop {
            platform: self.platform.clone(),
            settings: Arc::clone(&self.settings),
            journal: self.journal.clone(),
            ledger: self.ledger.clone(),
            former_owners: self.former_owners.clone(),
            inbox: self.inbox.clone(),
            policies: Arc::clone(&self.policies),
            filters: self.filters.clone(),
            changes: self.inventory.changes(),
            handover: self.functions.handover().clone(),
            reservations: self.reservations.clone(),
            wishes: self.wishes.clone(),
            devices: self.devices.clone(),
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
        let workshop = self.workshop();
        let (reporter, listener) = (workshop.clone(), reply.clone());
        let not_begun = workshop.unchanged(course, record.clone());
        let work = move || {
            let progress = |text: &str| {
                if let Some(listener) = &listener {
                    listener.progress(text);
                }
            };
            workshop.run_with(course, record, change, &progress)
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
