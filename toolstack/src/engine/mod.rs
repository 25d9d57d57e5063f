//! The engine: one thread that owns all state of the service and handles one event after the other.
//!
//! Whatever may block runs elsewhere: transactions and other work on threads of their own (`background`), config accesses of guests on
//! their serving threads. Those threads send events to the engine through its [`Inbox`]. Some things still run on the engine's thread:
//! opening the functions of guests that are served on after a restart, applying reloaded policies, setting up the first function of a
//! guest, and pausing guests that reboot.

mod background;
mod changes;
mod errors;
mod events;
mod files;
mod functions;
mod guests;
mod holds;
mod inbox;
mod inventory;
mod libxl;
mod mailbox;
mod notes;
mod persistent;
mod policies;
mod problems;
mod recover;
mod requests;
mod saving;
mod store_events;
mod succession;
mod tasks;
mod vfs;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use log::{error, info};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pciback::Sbdf;
use pciback::platform::{ErrorEvents, HostEvents, Platform};
use pciback::policy::PolicySet;
use pciback::serve::Mailboxes;
use pciback::serve::pv::nodes;

use crate::audit::AuditLog;
use crate::device::Devices;
use crate::journal::Journal;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Cause, Request};
use crate::reply::Reply;
use crate::settings::Settings;
use crate::spec::Filters;
use crate::successor::Successor;
use crate::supervisor::{self, Watchdog};
use crate::target::Target;
use errors::Errors;
use files::StateFiles;
pub use functions::Containment;
use functions::Functions;
pub use guests::Event as GuestEvent;
use guests::Guests;
use holds::Holds;
use inbox::Answer;
pub use inbox::Inbox;
use inventory::Inventory;
use libxl::Marks;
use persistent::Persistent;
use problems::Problem;
use requests::Deferred;
use saving::SuspendedGuests;
use succession::Succession;
pub use succession::{Ending, ReadySuccessor};
use vfs::Vfs;

/// What an earlier run has noted of its ioreq server in a domain, for the fuzz targets.
#[cfg(fuzzing)]
pub fn noted_server(settings: &Settings, domain: pciback::DomId) -> Option<pciback::platform::ServerId> {
    notes::noted_server(settings, domain)
}

/// An event that the engine handles.
pub enum Event {
    /// A request of a client.
    Call {
        /// The request.
        request: Request<Target>,
        /// Where the answer is sent.
        reply: Reply,
    },
    /// The same, with the address of each function, or of the PF whose VFs are meant.
    Found {
        /// The request.
        request: Request<Target>,
        /// Where the answer is sent.
        reply: Reply,
    },
    /// What concerns guests that have functions, or are about to get one.
    Guests(guests::Event),
    /// The result of background work for guests that have functions persistently.
    Persistent(persistent::Event),
    /// What transactions ask of the engine, and their end.
    Tasks(tasks::Event),
    /// The result of background work on VFs.
    Vfs(vfs::Event),
    /// What background work on the inventory reports or asks for.
    Inventory(inventory::Event),
    /// A failure for which no client waits.
    Problem(Problem),
    /// The result of background work on errors.
    Errors(errors::Event),
    /// The installed program was started to take over, or could not be started.
    SuccessorStarted(Result<Successor, Failure>, Reply),
    /// The result of background work on policies.
    Policies(policies::Event),
}

/// The service's state.
pub struct Engine {
    platform: Platform,
    settings: Arc<Settings>,
    files: StateFiles,
    boot: String,
    inbox: Inbox,
    events: mpsc::Receiver<Event>,
    functions: Functions,
    guests: Guests,
    /// Which functions the host has, and whether sysfs, Xen and xenstore agree about them.
    inventory: Inventory,
    /// Requests that wait for the end of a repair of their function.
    deferred: Deferred,
    /// VFs and their PFs.
    vfs: Vfs,
    /// What VFs and the owners of their PFs send each other.
    mailboxes: Mailboxes,
    /// Functions that the service holds, or gives back to dom0, by itself.
    holds: Holds,
    /// The policies in force.
    policies: Arc<PolicySet>,
    /// The compiled filters in use.
    filters: Filters,
    /// Errors that functions report, and the responses to them.
    errors: Errors,
    /// The event log, with its followers and the audit log.
    event_log: events::EventLog,
    devices: Devices,
    /// Guests that have functions persistently.
    persistent: Persistent,
    /// Guests that another program suspends while they have functions.
    suspended: SuspendedGuests,
    watchdog: Watchdog,
    succession: Succession,
    /// What libxl is shown of functions.
    marks: Marks,
    /// Problems that concern no single function, for `xpci status`.
    problems: problems::Problems,
}

/// Where events come from, in addition to the inbox and xenstore.
struct Sources {
    host: Box<dyn HostEvents>,
    errors: Option<Box<dyn ErrorEvents>>,
    /// Whether some are left to be taken.
    more: bool,
}

impl Engine {
    /// Creates the engine for a platform; it does nothing before [`Engine::recover`] and [`Engine::run`].
    pub fn new(
        platform: Platform,
        settings: Settings,
        policies: PolicySet,
        journal: Journal,
        boot: String,
    ) -> io::Result<Self> {
        let (inbox, events) = Inbox::new()?;
        let audit = AuditLog::new(&settings.state_directory);
        let (files, problems) = StateFiles::open(journal, &settings, &boot)?;
        let functions = Functions::new(boot.clone());
        Ok(Self {
            platform,
            settings: Arc::new(settings),
            files,
            boot,
            inbox,
            events,
            functions,
            guests: Guests::default(),
            inventory: Inventory::default(),
            deferred: Deferred::default(),
            vfs: Vfs::default(),
            mailboxes: Mailboxes::default(),
            holds: Holds::default(),
            policies: Arc::new(policies),
            filters: Filters::default(),
            errors: Errors::default(),
            event_log: events::EventLog::new(audit),
            devices: Devices::default(),
            persistent: Persistent::default(),
            suspended: SuspendedGuests::default(),
            watchdog: Watchdog::from_environment(),
            succession: Succession::default(),
            marks: Marks::default(),
            problems: problems.into_iter().collect(),
        })
    }

    /// Records a problem that was found before the engine runs, in the log and for `xpci status`.
    pub fn note_problem(&mut self, cause: Cause, problem: String) {
        error!("{problem}");
        self.problems.push(Problem::new(cause, problem));
    }

    /// A handle for sending events to this engine.
    pub fn inbox(&self) -> Inbox {
        self.inbox.clone()
    }

    /// Handles events until `stop` becomes readable or another process takes over. Guests keep their functions in both cases.
    pub fn run(&mut self, stop: BorrowedFd<'_>) -> io::Result<Ending> {
        let mut sources = self.subscribe()?;
        info!("ready on {}", self.platform.description);
        supervisor::ready();
        self.find_vfs_at_start();
        self.recognise_all();
        self.resume_guest_vfs();
        self.resume_mailboxes();
        let ending = loop {
            self.watchdog.feed(Instant::now());
            self.reconcile();
            self.examine_functions();
            self.send_state_events();
            self.show_libxl();
            if let Some(ready_successor) = self.ready_successor() {
                break Ending::Replaced(ready_successor);
            }
            if self.wait(stop, &sources)? {
                info!("stopping; guests keep their functions");
                supervisor::stopping();
                break Ending::Stopped;
            }
            self.take_events(&mut sources)?;
            self.do_what_is_due(Instant::now());
        };
        // Ending the kernel's tracing takes long: the serving threads run until then.
        drop(sources);
        self.end();
        self.errors.unmask_all(self.platform.host.as_ref());
        self.stop_servers();
        Ok(ending)
    }

    fn subscribe(&mut self) -> io::Result<Sources> {
        // The watches on the nodes of xen-pciback and libxl show what xl assigns to guests.
        for event in ["@introduceDomain", "@releaseDomain", nodes::PCIBACK, libxl::DIRECTORY] {
            self.platform.store.watch(event, event).map_err(io::Error::other)?;
        }
        self.find_shown().map_err(io::Error::other)?;
        let host = self.platform.host.events().map_err(io::Error::other)?;
        let errors = self.subscribe_to_errors();
        // Events before the subscription are not delivered: everything is examined once.
        self.inventory.examine_everything();
        Ok(Sources { host, errors, more: false })
    }

    /// Waits until there are events, or something is due; `true`: `stop` is readable.
    fn wait(&self, stop: BorrowedFd<'_>, sources: &Sources) -> io::Result<bool> {
        let errors = sources.errors.as_ref().map(|errors| errors.event_fd());
        let others = [self.inbox.wake_fd(), self.platform.store.event_fd(), sources.host.event_fd()];
        let mut fds: Vec<_> = [stop]
            .into_iter()
            .chain(others)
            .chain(errors)
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        let timeout = if sources.more { PollTimeout::ZERO } else { self.timeout() };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(fds[0].revents().is_some_and(|events| !events.is_empty()))
    }

    fn take_events(&mut self, sources: &mut Sources) -> io::Result<()> {
        while let Some(event) = sources.host.next_event() {
            self.host_changed(event);
        }
        let more_errors = sources.errors.as_ref().is_some_and(|errors| self.take_errors(errors.as_ref()));
        // Drained before the events are taken: an event that arrives in between wakes the loop again.
        self.inbox.drain();
        while let Ok(event) = self.events.try_recv() {
            self.handle(event);
        }
        // Without xenstore no guest can be served: the service ends, and its restart connects to xenstore again.
        let more_changes = self.take_store_events().map_err(io::Error::other)?;
        sources.more = more_errors || more_changes;
        Ok(())
    }

    fn do_what_is_due(&mut self, now: Instant) {
        self.check_deadlines(now);
        self.check_error_deadlines(now);
        self.check_networks(now);
        self.check_starts(now);
    }

    fn timeout(&self) -> PollTimeout {
        let errors = self.errors.next_deadline();
        let deadlines = self.next_deadline().into_iter().chain(errors).chain(self.vfs.next_deadline());
        let deadlines = deadlines.chain(self.persistent.next_deadline()).chain(self.watchdog.next());
        let deadlines = deadlines.chain(self.succession.deadline());
        let Some(deadline) = deadlines.min() else { return PollTimeout::NONE };
        let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Call { request, reply } => self.handle_call(request, reply),
            Event::Found { request, reply } => self.handle_found(request, reply),
            Event::Guests(event) => self.handle_guests(event),
            Event::Persistent(event) => self.handle_persistent(event),
            Event::Tasks(event) => self.handle_tasks(event),
            Event::Vfs(event) => self.handle_vfs(event),
            Event::Inventory(event) => self.handle_inventory(event),
            Event::Problem(problem) => {
                error!("{}", problem.view().message);
                self.problems.push(problem);
            }
            Event::Errors(event) => self.handle_errors(event),
            Event::SuccessorStarted(started, reply) => self.successor_started(started, reply),
            Event::Policies(event) => self.handle_policies(event),
        }
    }

    /// Deletes the record of a function in which the service has no further interest.
    fn forget(&mut self, address: Sbdf) -> Result<(), Failure> {
        self.inventory.touch(address);
        let removed = self.files.journal.remove(address);
        removed.map_err(|error| Failure::new(ErrorCode::Failed, error.to_string()).on(address))?;
        self.functions.forget(address);
        Ok(())
    }
}

impl Engine {
    /// Nothing is handled any more; threads that wait for the engine end.
    fn end(&self) {
        self.inbox.end();
        self.functions.handover().recognition.end();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.end();
    }
}
