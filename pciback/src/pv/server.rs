//! The thread that serves one connected guest.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use log::{error, warn};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::attachment::Attachment;
use super::function::GuestFunction;
use super::interrupts::InterruptError;
use super::revocation::Revocation;
use super::roster::{Complaints, Roster};
use super::wire::{self, Command, Op, OpAnswer, WireError};
use crate::DomId;
use crate::config::{MaskedWrite, Planes};
use crate::fault::{AerAnswer, AerRequest, ChannelState};
use crate::platform::{PlatformError, Ring};

/// How long the thread looks at the page after an answer before it sleeps: a guest that reads one register usually reads
/// the next, and waking up costs more than the access.
pub(crate) const SPIN: Duration = Duration::from_micros(400);
/// How many requests are answered in a row before anything else is looked at, by a guest that never pauses.
pub(crate) const BURST: u32 = 64;
/// How many events are taken in a row before orders are looked at: the guest can send the next one before this one is taken.
pub(crate) const EVENTS: u32 = 16;
/// How long the engine waits for the thread. An access takes microseconds, one to a function that the kernel resets up to a
/// minute.
const STUCK: Duration = Duration::from_secs(2);

/// What the thread tells the engine.
#[derive(Debug)]
pub enum ServerReport {
    /// The guest asked for a function level reset; [`Server::reset_ended`] is awaited.
    ResetWanted(Attachment),
    /// The function answers no more.
    Vanished(Attachment),
    /// The guest's driver for the function has started.
    DriverStarted(Attachment),
    /// The function's interrupts could not be put back after its reset.
    RestoreFailed(Attachment, String),
    /// What became of something the guest was told about an error.
    Told(Attachment, Result<Result<AerAnswer, u32>, NotTold>),
    /// The guest has pulled the reset line of its machine.
    RestartWanted,
    /// The guest cannot be served any more.
    Failed(String),
}

impl ServerReport {
    /// Which attachment it is about, if it is about one.
    pub fn attachment(&self) -> Option<Attachment> {
        match self {
            Self::ResetWanted(attachment)
            | Self::Vanished(attachment)
            | Self::DriverStarted(attachment)
            | Self::RestoreFailed(attachment, _)
            | Self::Told(attachment, _) => Some(*attachment),
            Self::RestartWanted | Self::Failed(_) => None,
        }
    }
}

/// Why a guest said nothing to an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotTold {
    /// Its frontend does not say that it can be notified.
    #[error("its frontend cannot be notified of errors")]
    NoHandler,
    /// It did not answer in time.
    #[error("it did not answer in time")]
    Silent,
    /// The thread cannot tell it: the event channel or the function is gone.
    #[error("it cannot be reached")]
    Unreachable,
}

/// The thread did not obey in time: it hangs in a config access that the kernel does not finish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("its serving thread hangs in a config access")]
pub struct ServerStuck;

/// What a function that was taken from the thread looked like in the end.
pub struct Taken {
    /// The function, quiesced; dropping it closes its image and its config space.
    pub function: Box<GuestFunction>,
    /// Whether bus mastering and interrupts are off.
    pub quiesced: Result<(), InterruptError>,
}

/// How much a thread has done.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    /// A guest that connects anew has no more to say than before.
    complaints: Mutex<Complaints>,
}

impl Counters {
    /// Whether a line about the guest's requests may be written to the log now, and how many were not since the last one.
    pub(crate) fn may_complain(&self) -> Option<u64> {
        self.complaints.lock().unwrap_or_else(PoisonError::into_inner).may_say()
    }

    pub(crate) fn count(&self, error: bool) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.errors.fetch_add(error.into(), Ordering::Relaxed);
    }

    /// Requests answered.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Those of them answered with an error.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}

pub(crate) enum Order {
    Add(u8, Box<GuestFunction>),
    Take(u8, mpsc::Sender<Taken>),
    ResetEnded(u8, bool),
    SetGone(u8),
    EventsCleared(u8),
    ReplaceFilter(u8, Arc<Planes>, mpsc::Sender<io::Result<()>>),
    MaskedWrites(u8, mpsc::Sender<Vec<MaskedWrite>>),
    Tell(Telling),
    BeginReset(u8, mpsc::Sender<Result<(), PlatformError>>),
    /// Stops; the functions come back as they are.
    Stop(mpsc::Sender<BTreeMap<u8, Box<GuestFunction>>>),
}

/// Something to be told about an error.
#[derive(Debug, Clone, Copy)]
pub struct Telling {
    /// The function, as the guest sees it.
    pub devfn: u8,
    /// What the guest's driver is asked.
    pub request: AerRequest,
    /// In which state the link is.
    pub state: ChannelState,
    /// How long the answer is waited for.
    pub limit: Duration,
}

/// A running thread, as the engine holds it.
pub struct Server {
    orders: mpsc::Sender<Order>,
    wake: Arc<EventFd>,
    counters: Arc<Counters>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// How the functions are taken from the thread should it hang.
    revocations: Mutex<BTreeMap<u8, Revocation>>,
}

impl Server {
    /// Starts serving. Reports go to `report`, which must not block.
    pub fn start(
        domain: DomId,
        ring: Box<dyn Ring>,
        functions: BTreeMap<u8, Box<GuestFunction>>,
        counters: Arc<Counters>,
        report: Box<dyn Fn(ServerReport) + Send>,
    ) -> io::Result<Self> {
        let revocations = revocations(&functions);
        let roster = Roster::new(domain, functions, &counters, report);
        let mut serving = Serving { roster, ring, token: first_token(), told: None };
        Self::spawn(domain, counters, revocations, move |orders, wake| serving.run(&orders, wake.as_fd()))
    }

    /// Starts a thread that serves a guest and takes orders.
    pub(crate) fn spawn(
        domain: DomId,
        counters: Arc<Counters>,
        revocations: BTreeMap<u8, Revocation>,
        serve: impl FnOnce(mpsc::Receiver<Order>, Arc<EventFd>) + Send + 'static,
    ) -> io::Result<Self> {
        let wake =
            Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (sender, orders) = mpsc::channel();
        let thread_wake = Arc::clone(&wake);
        let thread = thread::Builder::new()
            .name(format!("guest {domain}"))
            .spawn(move || serve(orders, thread_wake))?;
        let (thread, revocations) = (Mutex::new(Some(thread)), Mutex::new(revocations));
        Ok(Self { orders: sender, wake, counters, thread, revocations })
    }

    fn revocations(&self) -> MutexGuard<'_, BTreeMap<u8, Revocation>> {
        self.revocations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: Order) {
        if self.orders.send(order).is_ok() {
            match self.wake.write(1) {
                // EAGAIN: it is as awake as can be.
                Ok(_) | Err(Errno::EAGAIN) => {}
                Err(errno) => error!("wake a serving thread: {errno}"),
            }
        }
    }

    /// Serves one more function.
    pub fn add(&self, devfn: u8, function: Box<GuestFunction>) {
        self.revocations().insert(devfn, function.revocation.clone());
        self.order(Order::Add(devfn, function));
    }

    /// Takes a function out and quiesces it; `Ok(None)` when the thread does not have it. `Err`: the thread hangs in an access; it makes
    /// no other one to this function when that ends, but the function is as the guest had it.
    pub fn take(&self, devfn: u8) -> Result<Option<Taken>, ServerStuck> {
        let revocation = self.revocations().remove(&devfn);
        let taken = self.ask(|sender| Order::Take(devfn, sender));
        if let (Err(ServerStuck), Some(revocation)) = (&taken, revocation) {
            revocation.revoke();
        }
        taken
    }

    /// The function has left the host: from now on it reads all ones and no hardware is touched.
    pub fn set_gone(&self, devfn: u8) {
        self.order(Order::SetGone(devfn));
    }

    /// The host has read and cleared the function's error registers.
    pub fn events_cleared(&self, devfn: u8) {
        self.order(Order::EventsCleared(devfn));
    }

    /// Puts another filter in force between two of the guest's requests; `Ok(None)` when the thread does not have the function.
    pub fn replace_filter(
        &self,
        devfn: u8,
        planes: Arc<Planes>,
    ) -> Result<Option<io::Result<()>>, ServerStuck> {
        self.ask(|sender| Order::ReplaceFilter(devfn, planes, sender))
    }

    /// What of the guest's writes did not reach hardware; `Ok(None)` when the thread does not have the function.
    pub fn masked_writes(&self, devfn: u8) -> Result<Option<Vec<MaskedWrite>>, ServerStuck> {
        self.ask(|sender| Order::MaskedWrites(devfn, sender))
    }

    /// Tells the guest something about an error; [`ServerReport::Told`] follows, and meanwhile the guest is served as ever. Things that
    /// are told at once wait for each other, each with a limit of its own.
    pub fn tell(&self, telling: Telling) {
        self.order(Order::Tell(telling));
    }

    /// The function is about to be reset, which the guest did not ask for: until [`Self::reset_ended`] it reads all ones, and nothing of
    /// it is mapped in an HVM guest. `Ok(None)` when the thread does not have the function; an error: it must not be reset.
    pub fn begin_reset(&self, devfn: u8) -> Result<Option<Result<(), PlatformError>>, ServerStuck> {
        self.ask(|sender| Order::BeginReset(devfn, sender))
    }

    fn ask<T>(&self, order: impl FnOnce(mpsc::Sender<T>) -> Order) -> Result<Option<T>, ServerStuck> {
        let (sender, answer) = mpsc::channel();
        self.order(order(sender));
        match answer.recv_timeout(STUCK) {
            Ok(answer) => Ok(Some(answer)),
            Err(mpsc::RecvTimeoutError::Disconnected) => Ok(None),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(ServerStuck),
        }
    }

    /// The reset that a guest asked for has ended; unless `verified` the function reads all ones from now on.
    pub fn reset_ended(&self, devfn: u8, verified: bool) {
        self.order(Order::ResetEnded(devfn, verified));
    }

    /// Stops and gives the functions back, untouched: they can be served again. `Err`: the thread hangs in an access, and
    /// stops when that ends, without another access to its functions, which are as the guest had them.
    pub fn stop(&self) -> Result<BTreeMap<u8, Box<GuestFunction>>, ServerStuck> {
        let (sender, functions) = mpsc::channel();
        self.order(Order::Stop(sender));
        let functions = match functions.recv_timeout(STUCK) {
            Err(mpsc::RecvTimeoutError::Timeout) => {
                self.revocations().values().for_each(Revocation::revoke);
                return Err(ServerStuck);
            }
            answered => answered.unwrap_or_default(),
        };
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()
            && thread.join().is_err()
        {
            error!("a serving thread panicked");
        }
        Ok(functions)
    }

    /// How much it has done.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }
}

/// How functions are taken from a thread that hangs.
pub(crate) fn revocations(functions: &BTreeMap<u8, Box<GuestFunction>>) -> BTreeMap<u8, Revocation> {
    functions.iter().map(|(devfn, function)| (*devfn, function.revocation.clone())).collect()
}

struct Serving {
    roster: Roster,
    ring: Box<dyn Ring>,
    /// The claim of the last request.
    token: u32,
    /// What the guest was told and has not answered, with the end of its time.
    told: Option<(Telling, Instant)>,
}

/// How a series of requests ended. Orders are obeyed after a request was found and before it is carried out: a guest asks for a function as
/// soon as that is published, and must not reach one that is taken from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// No request has come for a moment.
    Idle,
    /// There may be more, but other things are due.
    Busy,
    /// The thread was ordered to stop; the request that was found stays on the page.
    Stopped,
}

/// Claims that an earlier life left on the page or in a record must not be met again soon.
fn first_token() -> u32 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u32
}

impl Serving {
    fn run(&mut self, orders: &mpsc::Receiver<Order>, wake: BorrowedFd<'_>) {
        self.roster.recover_interrupted();
        // A request may have waited since before the ring was connected.
        let mut turn = self.serve_while_busy(orders);
        loop {
            if turn == Turn::Stopped || self.roster.take_orders(orders) {
                if self.told.take().is_some() {
                    // Another life, or another thread, begins with a page on which nothing is told.
                    wire::withdraw_aer(self.ring.page());
                }
                return;
            }
            self.hear();
            if turn == Turn::Idle
                && let Err(error) = self.wait(wake)
            {
                if let Some((telling, _)) = self.told.take() {
                    self.roster.report_told(telling, Err(NotTold::Unreachable));
                }
                return self.roster.fail(&error, orders);
            }
            turn = self.serve_while_busy(orders);
        }
    }

    /// Takes the guest's answer to what it was told of an error, or gives up waiting for it, and tells it the next thing.
    fn hear(&mut self) {
        if let Some((telling, until)) = self.told {
            let heard = match wire::take_aer_answer(self.ring.page()) {
                Some(answer) => Ok(answer),
                None if Instant::now() >= until => {
                    wire::withdraw_aer(self.ring.page());
                    Err(NotTold::Silent)
                }
                None => return,
            };
            self.told = None;
            self.roster.report_told(telling, heard);
        }
        while let Some(telling) = self.roster.to_tell.pop_front() {
            let refused = if !self.roster.functions.contains_key(&telling.devfn) {
                NotTold::Unreachable
            } else if !wire::has_aer_handler(self.ring.page()) {
                NotTold::NoHandler
            } else {
                wire::put_aer(self.ring.page(), telling.devfn, telling.request, telling.state);
                match self.ring.notify() {
                    Ok(()) => {
                        self.told = Some((telling, Instant::now() + telling.limit));
                        return;
                    }
                    Err(error) => {
                        warn!("domain {}: tell it of an error: {error}", self.roster.domain);
                        wire::withdraw_aer(self.ring.page());
                        NotTold::Unreachable
                    }
                }
            };
            self.roster.report_told(telling, Err(refused));
        }
    }

    fn wait(&mut self, wake: BorrowedFd<'_>) -> Result<(), PlatformError> {
        self.roster.sleep(self.ring.event_fd(), wake, self.told.map(|(_, until)| until))?;
        // Where more have come, the thread wakes again, and looks at orders in between.
        for _ in 0..EVENTS {
            if !self.ring.take_event()? {
                break;
            }
        }
        Ok(())
    }

    /// Answers requests until none has come for a moment.
    fn serve_while_busy(&mut self, orders: &mpsc::Receiver<Order>) -> Turn {
        let mut last = Instant::now();
        let mut left = BURST;
        loop {
            if let Some(op) = wire::take_request(self.ring.page()) {
                if self.roster.take_orders(orders) {
                    return Turn::Stopped;
                }
                self.serve(op);
                left -= 1;
                if left == 0 {
                    return Turn::Busy;
                }
                last = Instant::now();
            } else if last.elapsed() >= SPIN {
                return Turn::Idle;
            } else {
                std::hint::spin_loop();
            }
        }
    }

    fn serve(&mut self, mut op: Op) {
        if op.info == 0 {
            self.token = self.token.wrapping_add(1).max(1);
            op.info = self.token;
            wire::claim(self.ring.page(), op.info);
        }
        let op = &op;
        let devfn = u8::try_from(op.devfn).ok().filter(|_| op.domain == 0 && op.bus == 0);
        let mut demand = None;
        let mut attachment = None;
        let answer = match devfn.and_then(|devfn| self.roster.functions.get_mut(&devfn)) {
            Some(function) => {
                attachment = Some(function.attachment());
                let (answer, wanted) = function.execute(op);
                demand = wanted;
                answer
            }
            None => OpAnswer::failed(WireError::NoDevice),
        };
        // The frontend gives up after two seconds; an answer that comes later must not reach its next request.
        if wire::claimed(self.ring.page(), op.info) {
            wire::put_answer(self.ring.page(), &answer);
            if let Err(error) = self.ring.notify() {
                warn!("domain {}: {error}", self.roster.domain);
            }
        }
        let mut trouble = None;
        if let Some(function) = devfn.and_then(|devfn| self.roster.functions.get_mut(&devfn)) {
            function.sent(op);
            trouble = function.take_trouble();
        }
        self.roster.counters.count(answer.error != WireError::Success);
        if answer.error != WireError::Success {
            self.complain(op, answer.error, trouble);
        }
        self.roster.tell(demand, attachment);
    }

    fn complain(&mut self, op: &Op, error: WireError, trouble: Option<String>) {
        // A bus scan asks for every device number: that is how guests find out which are there.
        if error == WireError::NoDevice && op.command == Command::CONF_READ {
            return;
        }
        if let Some(unsaid) = self.roster.counters.may_complain() {
            let (command, devfn, offset, size) = (op.command.0, op.devfn, op.offset, op.size);
            let trouble = trouble.map(|text| format!(" ({text})")).unwrap_or_default();
            warn!(
                "domain {}: request {command} on {:x}:{:x}:{devfn:x} at {offset:#x}, {size} bytes: {error:?}{trouble}; {unsaid} more of its \
                 requests failed since the last such line",
                self.roster.domain, op.domain, op.bus
            );
        }
    }
}

#[cfg(test)]
mod tests;
