//! What background threads have of the service, and how they run transactions.

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use pciback::config::{Filter, FunctionSpec};
use pciback::platform::Platform;
use pciback::policy::PolicySet;
use pciback::serve::Mailboxes;
use pciback::{DomId, Sbdf};

use super::{Course, Event, Image, Opened};
use crate::device::Devices;
use crate::engine;
use crate::engine::changes::Changes;
use crate::engine::files::StateFiles;
use crate::engine::functions::Handover;
use crate::engine::inbox::{Answer, Answered, Inbox};
use crate::engine::problems::Problem;
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::Cause;
use crate::reservations::Change;
use crate::settings::Settings;
use crate::spec::Filters;
use crate::transaction::{Context, Finished, Kind, Serving, Sharing, Withdrawal, guest_of, refuse_release};

/// Time that the engine may need in addition to a guest's own limit, before a transaction stops waiting for it.
const ENGINE_MARGIN: Duration = Duration::from_secs(10);

/// Everything that a background thread needs, without borrowing from the engine.
#[derive(Clone)]
pub(in crate::engine) struct TaskContext {
    pub platform: Platform,
    pub settings: Arc<Settings>,
    pub files: StateFiles,
    pub inbox: Inbox,
    pub policies: Arc<PolicySet>,
    pub filters: Filters,
    pub changes: Changes,
    pub handover: Handover,
    pub devices: Devices,
    pub mailboxes: Mailboxes,
    /// The function that [`Serving::open`] opened, until it is served.
    pub opened: Arc<Mutex<Option<Box<Opened>>>>,
}

impl Serving for TaskContext {
    fn open(&self, record: &Record) -> Result<(), Failure> {
        let opened = Box::new(self.open_function(record, guest_of(record)?, Image::New)?);
        *self.opened.lock().unwrap_or_else(PoisonError::into_inner) = Some(opened);
        Ok(())
    }

    fn serve(&self, record: &Record) -> Result<Option<String>, Failure> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner).take();
        let opened = opened.ok_or_else(|| {
            Failure::new(ErrorCode::Failed, "serve a function that was not opened").on(record.address)
        })?;
        let mut opened = opened;
        let without = opened.without_mailbox.take();
        let said = self.ask(|answer| Event::Serve { record: Box::new(record.clone()), opened, answer })?;
        let warnings: Vec<String> = said.into_iter().chain(without).collect();
        Ok((!warnings.is_empty()).then(|| warnings.join("; ")))
    }

    fn withdraw(&self, record: &Record, withdrawal: Withdrawal) -> Result<Option<String>, Failure> {
        self.without_guest_vfs(record, withdrawal)?;
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

    fn keeps_vfs(&self, record: &Record) -> bool {
        self.keeps_guest_vfs(record)
    }

    fn filter(&self, spec: &FunctionSpec, domain: DomId) -> Result<Arc<Filter>, Failure> {
        self.compile_filter(spec, domain, None)
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

impl TaskContext {
    pub(in crate::engine) fn ask(&self, event: impl FnOnce(Answer) -> Event) -> Answered {
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
    pub(super) fn run_with(
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
            Some(Change::Reserve(wanted)) => self.files.reservations.get(wanted.address),
            _ => None,
        };
        let mut newly_held = false;
        let made = match change.clone() {
            Some(Change::Reserve(wanted)) => self.files.reservations.keep(*wanted),
            Some(Change::Forget(address)) => self.files.reservations.forget(address),
            Some(Change::Hold(address)) => {
                self.want(address, |one| one.hold = true).map(|new| newly_held = new)
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
                Some(before) => self.files.reservations.keep(before),
                None => self.files.reservations.forget(wanted.address),
            },
            (Err(_), Some(Change::Hold(address))) if newly_held && !self.ended() => {
                self.want(address, |one| one.hold = false).map(drop)
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

    /// Removes the persistent settings for a function that goes back to dom0.
    fn want_nothing(&self, address: Sbdf) -> Result<(), Failure> {
        let host = self.platform.host.as_ref();
        match host.function(address) {
            Ok(function) => self.files.persistent_settings.forget(host, &function).map(drop),
            // The function has left the host.
            Err(_) => Ok(()),
        }
    }

    /// The record for a transaction that could not begin.
    pub(super) fn unchanged(&self, course: Course, record: Record) -> Record {
        match course {
            Course::Forward(Kind::Attach) => Record { guest: None, ..record },
            _ => record,
        }
    }

    /// Notes that a guest now has the function that it has persistently.
    fn note_given(&self, record: &Record) -> Result<(), Failure> {
        let Some((reservation, place)) = self.reservation_of(record.address).zip(record.guest) else {
            return Ok(());
        };
        if self.platform.hypervisor.domain(place.domain)?.uuid != reservation.guest {
            return Ok(());
        }
        match reservation.saved {
            Some(_) => self.files.reservations.forget(record.address),
            None => self.files.reservations.give(reservation, &record.boot, place.domain),
        }
    }

    /// The inputs of checks for shared resources.
    pub(in crate::engine) fn sharing(&self) -> Sharing<'_> {
        Sharing {
            platform: &self.platform,
            policies: &self.policies,
            journal: &self.files.journal,
            fresh: &self.handover.fresh,
        }
    }

    fn run(&self, course: Course, record: Record, progress: &dyn Fn(&str)) -> Finished {
        let context = Context {
            platform: &self.platform,
            settings: &self.settings,
            policies: &self.policies,
            journal: &self.files.journal,
            ledger: &self.files.ledger,
            former_owners: &self.files.former_owners,
            fresh: &self.handover.fresh,
            persistent_settings: &self.files.persistent_settings,
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
