//! The thread that serves one connected guest.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use log::{error, warn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::function::{Demand, GuestFunction};
use super::interrupts::{self, InterruptError};
use super::wire::{self, Command, Op, OpAnswer, WireError};
use crate::config::{MaskedWrite, Planes};
use crate::fault::{AerAnswer, AerRequest, ChannelState};
use crate::platform::{PlatformError, Ring};
use crate::{DomId, Sbdf};

/// How long the thread looks at the page after an answer before it sleeps: a guest that reads one register usually reads
/// the next, and waking up costs more than the access.
const SPIN: Duration = Duration::from_micros(400);
/// How many requests are answered in a row before orders are looked at, by a guest that never pauses.
const BURST: u32 = 64;
/// How long the engine waits for the thread. An access takes microseconds, one to a function that the kernel resets up to a
/// minute.
const STUCK: Duration = Duration::from_secs(2);
/// A guest that asks for nonsense gets a line in the log at most this often.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// What the thread tells the engine.
#[derive(Debug)]
pub enum ServerReport {
    /// The guest asked for a function level reset; [`Server::reset_ended`] is awaited.
    ResetWanted(Sbdf),
    /// The function answers no more.
    Vanished(Sbdf),
    /// The guest's driver for the function has started.
    DriverStarted(Sbdf),
    /// The function's interrupts could not be put back after its reset.
    RestoreFailed(Sbdf, String),
    /// What became of something the guest was told about an error.
    Told(Sbdf, Result<Result<AerAnswer, u32>, NotTold>),
    /// The guest cannot be served any more.
    Failed(String),
}

/// Why a guest said nothing to an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotTold {
    /// Its frontend does not say that it can be told.
    #[error("its frontend cannot be told of errors")]
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
}

impl Counters {
    /// Requests answered.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Those of them answered with an error.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}

enum Order {
    Add(u8, Box<GuestFunction>),
    Take(u8, mpsc::Sender<Taken>),
    ResetEnded(u8, bool),
    SetGone(u8),
    ReplaceFilter(u8, Arc<Planes>, mpsc::Sender<io::Result<()>>),
    MaskedWrites(u8, mpsc::Sender<Vec<MaskedWrite>>),
    Tell(Telling),
    BeginReset(u8),
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
    thread: Option<JoinHandle<()>>,
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
        let wake =
            Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (sender, orders) = mpsc::channel();
        let mut serving = Serving {
            domain,
            ring,
            functions,
            counters: Arc::clone(&counters),
            report,
            complaints: Complaints::default(),
            token: first_token(),
            told: None,
            to_tell: VecDeque::new(),
        };
        let thread_wake = Arc::clone(&wake);
        let thread = thread::Builder::new()
            .name(format!("guest {domain}"))
            .spawn(move || serving.run(&orders, thread_wake.as_ref().as_fd()))?;
        Ok(Self { orders: sender, wake, counters, thread: Some(thread) })
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
        self.order(Order::Add(devfn, function));
    }

    /// Takes a function out and quiesces it; `Ok(None)` when the thread does not have it. `Err`: the thread hangs in an access.
    pub fn take(&self, devfn: u8) -> Result<Option<Taken>, ServerStuck> {
        self.ask(|sender| Order::Take(devfn, sender))
    }

    /// The function has left the host: from now on it reads all ones and no hardware is touched.
    pub fn set_gone(&self, devfn: u8) {
        self.order(Order::SetGone(devfn));
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

    /// The function is about to be reset, which the guest did not ask for: until [`Self::reset_ended`] it reads all ones.
    pub fn begin_reset(&self, devfn: u8) {
        self.order(Order::BeginReset(devfn));
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
    /// stops when that ends.
    pub fn stop(mut self) -> Result<BTreeMap<u8, Box<GuestFunction>>, ServerStuck> {
        let (sender, functions) = mpsc::channel();
        self.order(Order::Stop(sender));
        let functions = match functions.recv_timeout(STUCK) {
            Err(mpsc::RecvTimeoutError::Timeout) => return Err(ServerStuck),
            answered => answered.unwrap_or_default(),
        };
        if let Some(thread) = self.thread.take()
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

struct Serving {
    domain: DomId,
    ring: Box<dyn Ring>,
    functions: BTreeMap<u8, Box<GuestFunction>>,
    counters: Arc<Counters>,
    report: Box<dyn Fn(ServerReport) + Send>,
    complaints: Complaints,
    /// The claim of the last request.
    token: u32,
    /// What the guest was told and has not answered, with the end of its time.
    told: Option<(Telling, Instant)>,
    /// What it will be told next.
    to_tell: VecDeque<Telling>,
}

/// Claims that an earlier life left on the page or in a record must not be met again soon.
fn first_token() -> u32 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u32
}

impl Serving {
    fn run(&mut self, orders: &mpsc::Receiver<Order>, wake: BorrowedFd<'_>) {
        self.recover_interrupted();
        // A request may have waited since before the ring was connected.
        let mut busy = self.serve_while_busy();
        loop {
            if let Some(stop) = self.take_orders(orders) {
                // The engine may have stopped waiting.
                let _ = stop.send(std::mem::take(&mut self.functions));
                return;
            }
            self.hear();
            if !busy && let Err(error) = self.wait(wake) {
                (self.report)(ServerReport::Failed(error.to_string()));
                return self.idle(orders);
            }
            busy = self.serve_while_busy();
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
            self.report_told(telling, heard);
        }
        while let Some(telling) = self.to_tell.pop_front() {
            let refused = if !self.functions.contains_key(&telling.devfn) {
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
                        warn!("domain {}: tell it of an error: {error}", self.domain);
                        wire::withdraw_aer(self.ring.page());
                        NotTold::Unreachable
                    }
                }
            };
            self.report_told(telling, Err(refused));
        }
    }

    fn report_told(&self, telling: Telling, heard: Result<Result<AerAnswer, u32>, NotTold>) {
        // A function that was taken meanwhile is nobody's concern any more.
        if let Some(function) = self.functions.get(&telling.devfn) {
            (self.report)(ServerReport::Told(function.address(), heard));
        }
    }

    /// Keeps the functions for the engine to take, when the ring is of no use any more.
    fn idle(&mut self, orders: &mpsc::Receiver<Order>) {
        for telling in
            self.told.take().map(|(telling, _)| telling).into_iter().chain(std::mem::take(&mut self.to_tell))
        {
            self.report_told(telling, Err(NotTold::Unreachable));
        }
        while let Ok(order) = orders.recv() {
            if let Order::Tell(telling) = order {
                self.report_told(telling, Err(NotTold::Unreachable));
                continue;
            }
            if let Some(stop) = self.obey(order) {
                let _ = stop.send(std::mem::take(&mut self.functions));
                return;
            }
        }
    }

    fn wait(&mut self, wake: BorrowedFd<'_>) -> Result<(), PlatformError> {
        {
            let mut fds =
                [PollFd::new(self.ring.event_fd(), PollFlags::POLLIN), PollFd::new(wake, PollFlags::POLLIN)];
            let timeout = self.told.map_or(PollTimeout::NONE, |(_, until)| {
                let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            });
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    return Err(PlatformError::new("wait for an event of domain", self.domain, errno));
                }
            }
            if fds[1].revents().is_some_and(|events| !events.is_empty()) {
                // Emptied before the orders are taken: one that comes in between wakes again.
                let mut count = [0u8; 8];
                let _ = nix::unistd::read(wake, &mut count);
            }
        }
        while self.ring.take_event()? {}
        Ok(())
    }

    /// Answers requests until none has come for a moment. `true`: there may be more, but orders come first.
    fn serve_while_busy(&mut self) -> bool {
        let mut last = Instant::now();
        let mut left = BURST;
        loop {
            if let Some(op) = wire::take_request(self.ring.page()) {
                self.serve(op);
                left -= 1;
                if left == 0 {
                    return true;
                }
                last = Instant::now();
            } else if last.elapsed() >= SPIN {
                return false;
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
        let mut address = None;
        let answer = match devfn.and_then(|devfn| self.functions.get_mut(&devfn)) {
            Some(function) => {
                address = Some(function.address());
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
                warn!("domain {}: {error}", self.domain);
            }
        }
        let mut trouble = None;
        if let Some(function) = devfn.and_then(|devfn| self.functions.get_mut(&devfn)) {
            function.sent(op);
            trouble = function.take_trouble();
        }
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        if answer.error != WireError::Success {
            self.counters.errors.fetch_add(1, Ordering::Relaxed);
            self.complain(op, answer.error, trouble);
        }
        match (demand, address) {
            (Some(Demand::Reset), Some(address)) => (self.report)(ServerReport::ResetWanted(address)),
            (Some(Demand::Vanished), Some(address)) => (self.report)(ServerReport::Vanished(address)),
            (Some(Demand::DriverStarted), Some(address)) => {
                (self.report)(ServerReport::DriverStarted(address));
            }
            _ => {}
        }
    }

    fn complain(&mut self, op: &Op, error: WireError, trouble: Option<String>) {
        // A bus scan asks for every device number: that is how guests find out which are there.
        if error == WireError::NoDevice && op.command == Command::CONF_READ {
            return;
        }
        if let Some(unsaid) = self.complaints.may_say() {
            let (command, devfn, offset, size) = (op.command.0, op.devfn, op.offset, op.size);
            let trouble = trouble.map(|text| format!(" ({text})")).unwrap_or_default();
            warn!(
                "domain {}: request {command} on {:x}:{:x}:{devfn:x} at {offset:#x}, {size} bytes: {error:?}{trouble}; {unsaid} more of its \
                 requests failed since the last such line",
                self.domain, op.domain, op.bus
            );
        }
    }

    fn take_orders(
        &mut self,
        orders: &mpsc::Receiver<Order>,
    ) -> Option<mpsc::Sender<BTreeMap<u8, Box<GuestFunction>>>> {
        while let Ok(order) = orders.try_recv() {
            let stop = self.obey(order);
            if stop.is_some() {
                return stop;
            }
        }
        None
    }

    fn obey(&mut self, order: Order) -> Option<mpsc::Sender<BTreeMap<u8, Box<GuestFunction>>>> {
        match order {
            Order::Add(devfn, function) => {
                self.functions.insert(devfn, function);
            }
            Order::Take(devfn, taken) => {
                if let Some(mut function) = self.functions.remove(&devfn) {
                    let quiesced = function.quiesce();
                    // The engine waits for it.
                    let _ = taken.send(Taken { function, quiesced });
                }
            }
            Order::ResetEnded(devfn, verified) => self.reset_ended(devfn, verified),
            Order::SetGone(devfn) => {
                if let Some(function) = self.functions.get_mut(&devfn) {
                    function.set_gone();
                }
            }
            Order::ReplaceFilter(devfn, planes, done) => {
                if let Some(function) = self.functions.get_mut(&devfn) {
                    let _ = done.send(function.replace_filter(planes));
                }
            }
            Order::MaskedWrites(devfn, writes) => {
                if let Some(function) = self.functions.get(&devfn) {
                    let _ = writes.send(function.masked_writes());
                }
            }
            Order::Tell(telling) => self.to_tell.push_back(telling),
            Order::BeginReset(devfn) => {
                if let Some(function) = self.functions.get_mut(&devfn) {
                    function.begin_reset();
                }
            }
            Order::Stop(functions) => {
                if self.told.take().is_some() {
                    // Another life, or another thread, begins with a page on which nothing is told.
                    wire::withdraw_aer(self.ring.page());
                }
                return Some(functions);
            }
        }
        None
    }

    fn reset_ended(&mut self, devfn: u8, verified: bool) {
        let Some(function) = self.functions.get_mut(&devfn) else { return };
        if !verified {
            function.set_gone();
            return;
        }
        if let Err(error) = function.reset_done() {
            let address = function.address();
            function.set_gone();
            (self.report)(ServerReport::RestoreFailed(address, error.to_string()));
        }
    }

    /// Gives back vectors that an earlier life of the service mapped and was killed before it could note them.
    fn recover_interrupted(&mut self) {
        let known: Vec<u32> =
            self.functions.values().flat_map(|function| interrupts::known(function)).collect();
        for function in self.functions.values_mut().filter(|function| interrupts::interrupted(function)) {
            if let Err(error) = interrupts::unmap_unknown(function, &known) {
                warn!("{}: recover a vector of domain {}: {error}", function.address(), self.domain);
            }
        }
    }
}

/// Limits what a guest can put into the log.
#[derive(Debug, Default)]
struct Complaints {
    last: Option<Instant>,
    unsaid: u64,
}

impl Complaints {
    /// Whether a line may be written now, and how many were not since the last one.
    fn may_say(&mut self) -> Option<u64> {
        if self.last.is_some_and(|last| last.elapsed() < COMPLAINT_INTERVAL) {
            self.unsaid += 1;
            return None;
        }
        self.last = Some(Instant::now());
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests;
