//! The engine: one thread that owns all state of the service and handles one event after the other.
//!
//! What may block runs elsewhere: transactions and other work on threads of their own (`background`), guests' config accesses on
//! their serving threads. They talk to the engine through its [`Inbox`]. Still on this thread are the reload of policies, the set-up of a
//! guest's first function, and pausing guests that start again.

mod asked;
mod asking;
mod attachments;
mod background;
mod contain;
mod deferred;
mod faults;
mod frontends;
mod given;
mod guest;
mod guests;
mod hvm;
mod keeping;
mod lists;
mod log_limit;
mod looks;
mod network;
mod news;
mod notes;
mod observe;
mod obstacles;
mod open;
mod paths;
mod policies;
mod problems;
mod promised;
mod recognise;
mod recover;
mod repairs;
mod requests;
mod reserved;
mod responses;
mod restoring;
mod returning;
mod saving;
mod several;
mod store_events;
mod succession;
mod survey;
mod sync;
mod tasks;
mod unmanaged;
mod vfs;
mod watch;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use log::{error, info};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pciback::fault::Action;
use pciback::inventory::Repair;
use pciback::platform::Platform;
use pciback::policy::PolicySet;
use pciback::serve::pv::nodes;
use pciback::serve::{Attachment, ServerReport};
use pciback::{DomId, FunctionState, Sbdf};

use crate::audit::AuditLog;
use crate::device::Devices;
use crate::former_owners::FormerOwners;
use crate::journal::{Journal, NetworkRecord, Record};
use crate::ledger::Ledger;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Cause, RegisterValue, Request};
use crate::reply::Reply;
use crate::reservations::Reservations;
use crate::settings::Settings;
use crate::spec::Filters;
use crate::successor::{Program, Successor};
use crate::supervisor::{self, Watchdog};
use crate::target::Target;
use crate::transaction::{Finished, Fresh, Parting};
use crate::wishes::Wishes;
pub use contain::Containment;
use guest::Guest;
use keeping::Keeping;
use network::NetworkChecks;
use open::{Filter, Opened};
use policies::Reloaded;
use problems::Problem;
use repairs::Synced;
use returning::Returning;
use succession::Succession;
pub use succession::{Ending, Heir};
use sync::Syncing;
use watch::{Changes, Look, Stirred};

/// What the engine handles.
pub enum Event {
    /// A client's request.
    Call {
        /// What it wants.
        request: Request<Target>,
        /// Where the answer goes.
        reply: Reply,
    },
    /// A guest's device model was asked for its devices, before a function is attached.
    DeviceModelAsked {
        /// The request.
        wanted: hvm::Wanted,
        /// The device numbers that are not free.
        slots: Result<Vec<u8>, Failure>,
        /// Where the answer goes.
        reply: Reply,
    },
    /// The device model of a guest that starts again was asked for its devices.
    DeviceModelRuns(DomId, Result<Vec<u8>, Failure>),
    /// A transaction asks to serve a function.
    Serve {
        /// The function, with its guest.
        record: Box<Record>,
        /// The function, ready to be served.
        opened: Box<Opened>,
        /// Where the answer goes.
        answer: Answer,
    },
    /// A transaction asks to stop serving a function.
    Withdraw {
        /// The function, with its guest.
        record: Box<Record>,
        /// How the guest loses it.
        parting: Parting,
        /// Where the answer goes.
        answer: Answer,
    },
    /// A transaction ended.
    Finished(Box<Finished>),
    /// A thread that serves a guest has something to say.
    Server(DomId, ServerReport),
    /// A reset that a guest asked for ended.
    ResetEnded(Attachment, Result<(), Failure>),
    /// Something was done for a guest.
    Worked(DomId, work::Worked),
    /// A task that changes a PF's VFs ended.
    VfsChanged(Sbdf, bool),
    /// A repair that concerns a guest, a driver or a record.
    Repair(Repair, Reply),
    /// A function is wanted for a repair of Xen's list; the answer says whether it may be had.
    Reserve(Sbdf, mpsc::Sender<bool>),
    /// That repair has ended; whether it was made.
    ListRepaired(Repair, bool),
    /// What sysfs, Xen and xenstore say was compared; somebody may have asked for it.
    Synced(Box<Result<Synced, Failure>>, Option<Reply>),
    /// A thread that set a VF's network settings ended.
    NetworkSet(Sbdf, Box<Option<NetworkRecord>>),
    /// A function is to be taken from its guest, for the reason that follows.
    Contain(Sbdf, Containment, String),
    /// What a guest's driver made of its VF's network settings; `None`: nothing.
    NetworkCompared(Sbdf, Option<String>),
    /// Functions that the settings give to a guest that has come were found.
    Promised(promised::Promises),
    /// They are kept for it.
    Kept(DomId),
    /// A thread wants to know when nothing of a guest is served.
    TellWhenIdle(DomId, mpsc::Sender<()>),
    /// Something that nobody waits for went wrong.
    Problem(Problem),
    /// Functions were looked at because something happened to them.
    Seen(Look),
    /// The kernel's error counters were looked at.
    LookedAtErrors(Box<looks::Counted>),
    /// The ports above guests' functions were looked at.
    LookedAtPorts(Result<Box<looks::PortsSeen>, Failure>),
    /// What the registers that tell of errors hold.
    ErrorRegisters(Sbdf, Vec<RegisterValue>),
    /// A guest was paused or destroyed, or not.
    GuestStopped(Sbdf, DomId, Action, Result<(), Failure>),
    /// A function's correctable errors were masked, or cannot be.
    Masked(Sbdf, Result<pciback::live::errors::Masked, String>),
    /// They are heard again, or cannot be.
    Unmasked(Sbdf, Result<(), String>),
    /// The installed program was started to take over, or could not be.
    SuccessorStarted(Result<Successor, Failure>, Reply),
    /// New policies were read and checked, and filters compiled for the functions in use.
    Reloaded(Box<Reloaded>),
}

/// Where a transaction waits for the engine.
pub struct Answer {
    sender: mpsc::Sender<Result<Option<String>, Failure>>,
    ended: Arc<AtomicBool>,
}

impl Answer {
    /// Gives it; who asked may have stopped waiting.
    fn send(&self, outcome: Result<Option<String>, Failure>) {
        let _ = self.sender.send(outcome);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // An engine that dies over a question has not refused: what was asked for is the next run's.
        if std::thread::panicking() {
            self.ended.store(true, Ordering::SeqCst);
        }
    }
}

/// The way to the engine, for all other threads.
#[derive(Clone)]
pub struct Inbox {
    sender: mpsc::Sender<Event>,
    wake: Arc<EventFd>,
    /// Whether the engine has stopped.
    ended: Arc<AtomicBool>,
}

impl Inbox {
    /// Sends an event; once the engine has stopped it is dropped, and with it whatever waits for an answer.
    pub fn send(&self, event: Event) {
        // EAGAIN: it is as awake as can be.
        if self.sender.send(event).is_ok()
            && let Err(errno) = self.wake.write(1)
            && errno != Errno::EAGAIN
        {
            error!("wake the engine: {errno}");
        }
    }

    /// A reply for what the service does of its own accord: a failure becomes a problem in the status.
    fn unasked_reply(&self, cause: Cause) -> Reply {
        let inbox = self.clone();
        Reply::unasked(move |failure| inbox.send(Event::Problem(Problem::failed(cause, failure))))
    }
}

/// The service's state.
pub struct Engine {
    platform: Platform,
    settings: Arc<Settings>,
    journal: Journal,
    ledger: Ledger,
    former_owners: FormerOwners,
    boot: String,
    inbox: Inbox,
    events: mpsc::Receiver<Event>,
    /// Every function that is not in state `host`, and those on their way.
    records: BTreeMap<Sbdf, Record>,
    /// Functions in a transaction.
    busy: BTreeSet<Sbdf>,
    /// PFs whose VFs are being changed.
    busy_pfs: BTreeSet<Sbdf>,
    guests: BTreeMap<DomId, Guest>,
    /// Functions whose guest ended while a transaction had them: withdrawn when it ends.
    orphans: BTreeSet<Sbdf>,
    /// The attachments in force.
    attachments: attachments::Attachments,
    /// Functions that are being reset under their guests.
    resets: attachments::Resets,
    /// Functions that were reset with their bus, and that have had no owner since.
    fresh: Fresh,
    /// Functions that guests may reach.
    given: given::Given,
    /// Functions that are to be contained when their transaction ends.
    awaiting: contain::Awaiting,
    /// What is to be looked at, because something happened there.
    stirred: Stirred,
    /// Functions that stopped answering while the host still has them.
    silent: BTreeSet<Sbdf>,
    /// Counts what happens to the host's functions, for those who wait for it.
    changes: Changes,
    /// Requests about functions that are under repair.
    deferred: deferred::Deferred,
    /// What is known of comparisons of sysfs, Xen and xenstore.
    syncing: Syncing,
    /// Looks at what guests' drivers made of VFs' network settings.
    network_checks: NetworkChecks,
    /// Functions that policies keep for guests.
    keeping: Keeping,
    /// The policies in force.
    policies: Arc<PolicySet>,
    /// The filters in use.
    filters: Filters,
    /// What the filter of each attached function was made from.
    in_use: BTreeMap<Sbdf, Filter>,
    /// Errors that functions report.
    faults: faults::Faults,
    /// What happened, for those who want to know.
    news: news::News,
    /// Functions that guests have persistently.
    reservations: Reservations,
    devices: Devices,
    /// What is wanted persistently of functions.
    wishes: Wishes,
    /// Guests that start again.
    returning: Returning,
    /// Threads that wait for guests to be without functions.
    idle_guests: saving::IdleGuests,
    watchdog: Watchdog,
    /// What this service was started from.
    program: Option<Program>,
    succession: Succession,
    /// What was found wrong outside any one function, for `xpci status`.
    problems: problems::Problems,
}

impl Engine {
    /// An engine over a platform; nothing happens before [`Engine::recover`] and [`Engine::run`].
    pub fn new(
        platform: Platform,
        settings: Settings,
        policies: PolicySet,
        journal: Journal,
        boot: String,
    ) -> io::Result<Self> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let (sender, events) = mpsc::channel();
        let ledger = Ledger::open(&settings.state_directory.join("path"), &boot).map_err(io::Error::other)?;
        let audit = AuditLog::new(&settings.state_directory);
        let former_owners = FormerOwners::open(&settings.state_directory.join("former-owners"), &boot);
        let (former_owners, damaged) = former_owners.map_err(io::Error::other)?;
        let reservations = Reservations::open(&settings.state_directory.join("persistent"));
        let (reservations, unusable) = reservations.map_err(io::Error::other)?;
        let (wishes, unreadable) = Wishes::open(settings.state_directory.join("wanted"));
        Ok(Self {
            platform,
            settings: Arc::new(settings),
            journal,
            ledger,
            former_owners,
            boot,
            inbox: Inbox { sender, wake: Arc::new(wake), ended: Arc::default() },
            events,
            records: BTreeMap::new(),
            busy: BTreeSet::new(),
            busy_pfs: BTreeSet::new(),
            guests: BTreeMap::new(),
            orphans: BTreeSet::new(),
            attachments: attachments::Attachments::default(),
            resets: attachments::Resets::default(),
            fresh: Fresh::default(),
            given: given::Given::default(),
            awaiting: contain::Awaiting::default(),
            stirred: Stirred::default(),
            silent: BTreeSet::new(),
            changes: Changes::default(),
            deferred: deferred::Deferred::default(),
            syncing: Syncing::default(),
            network_checks: NetworkChecks::default(),
            keeping: Keeping::default(),
            policies: Arc::new(policies),
            filters: Filters::default(),
            in_use: BTreeMap::new(),
            faults: faults::Faults::default(),
            news: news::News::new(audit),
            reservations,
            devices: Devices::default(),
            wishes,
            returning: Returning::default(),
            idle_guests: saving::IdleGuests::default(),
            watchdog: Watchdog::from_environment(),
            program: None,
            succession: Succession::default(),
            problems: damaged.iter().chain(&unusable).chain(&unreadable).map(Problem::unusable).collect(),
        })
    }

    /// Notes something for the log and 'xpci status' that was found before the engine ran.
    pub fn note_problem(&mut self, cause: Cause, problem: String) {
        error!("{problem}");
        self.problems.push(Problem::new(cause, problem));
    }

    /// The way to this engine.
    pub fn inbox(&self) -> Inbox {
        self.inbox.clone()
    }

    /// Handles events until `stop` becomes readable or another process takes over. Guests keep their functions.
    pub fn run(&mut self, stop: BorrowedFd<'_>) -> io::Result<Ending> {
        // The last one tells of what xl gives to guests.
        for event in ["@introduceDomain", "@releaseDomain", nodes::PCIBACK] {
            self.platform.store.watch(event, event).map_err(io::Error::other)?;
        }
        let host = self.platform.host.events().map_err(io::Error::other)?;
        let errors = self.hear_errors();
        // What happened before the subscription.
        self.stirred.everything();
        info!("ready on {}", self.platform.description);
        supervisor::ready();
        self.take_back_stubs();
        self.create_wanted_vfs();
        self.resume_returning();
        let (mut more_errors, mut more_changes) = (false, false);
        let ending = loop {
            self.watchdog.feed(Instant::now());
            self.reconcile();
            self.look();
            self.tell_states();
            if let Some(heir) = self.heir() {
                break Ending::Replaced(heir);
            }
            let wake = Arc::clone(&self.inbox.wake);
            let store = Arc::clone(&self.platform.store);
            let mut fds = [
                PollFd::new(wake.as_fd(), PollFlags::POLLIN),
                PollFd::new(store.event_fd(), PollFlags::POLLIN),
                PollFd::new(stop, PollFlags::POLLIN),
                PollFd::new(host.event_fd(), PollFlags::POLLIN),
                PollFd::new(
                    errors.as_ref().map_or(host.event_fd(), |errors| errors.event_fd()),
                    PollFlags::POLLIN,
                ),
            ];
            let timeout = if more_errors || more_changes { PollTimeout::ZERO } else { self.timeout() };
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if fds[2].revents().is_some_and(|events| !events.is_empty()) {
                info!("stopping; guests keep their functions");
                supervisor::stopping();
                break Ending::Stopped;
            }
            while let Some(event) = host.next_event() {
                self.host_changed(event);
            }
            more_errors = errors.as_ref().is_some_and(|errors| self.take_errors(errors.as_ref()));
            // Emptied before the events are taken: one that comes in between wakes again.
            let _ = wake.read();
            while let Ok(event) = self.events.try_recv() {
                self.handle(event);
            }
            // Without xenstore nothing can be served; a restarted service may find it again.
            more_changes = self.take_store_events().map_err(io::Error::other)?;
            self.check_deadlines(Instant::now());
            self.check_error_deadlines(Instant::now());
            self.check_networks(Instant::now());
            self.check_starts(Instant::now());
        };
        // The kernel takes long to end its tracing: guests are served until it has.
        drop(errors);
        // Before those who wait for an answer learn that none comes.
        self.inbox.ended.store(true, Ordering::SeqCst);
        self.unmask_all();
        self.stop_servers();
        Ok(ending)
    }

    fn timeout(&self) -> PollTimeout {
        let errors = self.next_error_deadline();
        let deadlines = self.next_deadline().into_iter().chain(errors).chain(self.network_checks.next());
        let deadlines = deadlines.chain(self.returning.next_deadline()).chain(self.watchdog.next());
        let deadlines = deadlines.chain(self.succession_deadline());
        let Some(deadline) = deadlines.min() else { return PollTimeout::NONE };
        let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Call { request, reply } => self.asked(request, reply),
            Event::DeviceModelAsked { wanted, slots, reply } => {
                self.device_model_asked(&wanted, slots, reply)
            }
            Event::DeviceModelRuns(domain, slots) => self.device_model_runs(domain, slots),
            Event::Serve { record, opened, answer } => self.serve(&record, *opened, answer),
            Event::Withdraw { record, parting, answer } => self.withdraw(&record, parting, answer),
            Event::Finished(finished) => self.transaction_finished(*finished),
            Event::Server(domain, report) => self.server_reported(domain, report),
            Event::ResetEnded(attachment, outcome) => self.reset_ended(attachment, outcome),
            Event::Worked(domain, worked) => self.worked(domain, worked),
            Event::VfsChanged(physical_function, succeeded) => {
                self.vfs_changed(physical_function, succeeded);
            }
            Event::Repair(repair, reply) => self.repair(repair, reply),
            Event::Reserve(address, answer) => self.reserve(address, &answer),
            Event::ListRepaired(repair, done) => self.list_repaired(repair, done),
            Event::Synced(synced, reply) => self.synced(*synced, reply),
            Event::NetworkSet(address, network) => self.network_set(address, *network),
            Event::Contain(address, containment, why) => self.contain(address, containment, &why),
            Event::NetworkCompared(address, differs) => self.network_compared(address, differs),
            Event::Promised(promises) => self.promised(promises),
            Event::Kept(domain) => self.look_again_at(domain),
            Event::TellWhenIdle(domain, sender) => self.tell_when_idle(domain, sender),
            Event::Problem(problem) => {
                error!("{}", problem.view().message);
                self.problems.push(problem);
            }
            Event::Seen(seen) => self.seen(seen),
            Event::LookedAtErrors(counted) => self.errors_looked_at(*counted),
            Event::LookedAtPorts(seen) => self.ports_looked_at(seen),
            Event::ErrorRegisters(address, registers) => self.error_registers(address, registers),
            Event::GuestStopped(address, domain, action, outcome) => {
                self.guest_stopped(address, domain, action, outcome);
            }
            Event::Masked(address, outcome) => self.masked(address, outcome),
            Event::Unmasked(address, outcome) => self.unmasked(address, outcome),
            Event::SuccessorStarted(started, reply) => self.successor_started(started, reply),
            Event::Reloaded(reloaded) => self.put_in_force(*reloaded),
        }
    }

    /// A record for a function, known or new.
    fn record(&self, address: Sbdf) -> Record {
        self.records.get(&address).cloned().unwrap_or_else(|| Record::new(address, &self.boot))
    }

    fn state(&self, address: Sbdf) -> FunctionState {
        self.records.get(&address).map_or(FunctionState::Host, |record| record.state)
    }

    /// Forgets a function that is nobody's concern any more.
    fn forget(&mut self, address: Sbdf) -> Result<(), Failure> {
        self.syncing.touch(address);
        let removed = self.journal.remove(address);
        removed.map_err(|error| Failure::new(ErrorCode::Failed, error.to_string()).on(address))?;
        self.records.remove(&address);
        Ok(())
    }

    /// Keeps what the journal has.
    fn keep(&mut self, record: Record) {
        if record.state == FunctionState::Host && record.transaction.is_none() {
            self.records.remove(&record.address);
        } else {
            self.records.insert(record.address, record);
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Before the inbox is closed.
        self.inbox.ended.store(true, Ordering::SeqCst);
    }
}
