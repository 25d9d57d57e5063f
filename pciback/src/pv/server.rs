//! The thread that serves one guest.
//!
//! It never waits for anything but its guest and its orders: no reset, no lock that somebody holds for long, no
//! xenstore. Everything slow is somebody else's, who sends the result as an order.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::counters::Counters;
use super::function::ServedFunction;
use super::guest::{Guest, GuestReport, ResetError};
use super::wire::Page;
use crate::platform::{Host, PlatformError, Ring};
use crate::{DomId, Sbdf};

/// How a serving thread behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerOptions {
    /// How long it looks for the next request after an answer before it sleeps: a guest that reads one register usually
    /// reads the next, and being woken takes longer than that.
    pub spin: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { spin: Duration::from_micros(50) }
    }
}

/// Where serving threads report to.
#[derive(Clone)]
pub struct Reports {
    sender: Sender<(DomId, GuestReport)>,
    wake: Arc<dyn Fn() + Send + Sync>,
}

impl Reports {
    /// Reports go to `sender`, each followed by a call of `wake`, which must not block.
    pub fn new(sender: Sender<(DomId, GuestReport)>, wake: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { sender, wake }
    }

    fn send(&self, domain: DomId, report: GuestReport) {
        if self.sender.send((domain, report)).is_err() {
            log::debug!("guest {domain}: nobody listens to reports any more");
        }
        (self.wake)();
    }
}

/// Carries out resets that guests ask for.
pub trait ResetRunner: Send + Sync {
    /// Begins a reset and returns at once; `done` hears of its end.
    fn start(&self, address: Sbdf, done: ResetDone);
}

/// Resets by the host's own means, each in a thread of its own.
pub struct HostReset {
    /// The host.
    pub host: Arc<dyn Host>,
    /// How long one may take.
    pub limit: Duration,
}

impl ResetRunner for HostReset {
    fn start(&self, address: Sbdf, done: ResetDone) {
        let (host, limit) = (self.host.clone(), self.limit);
        let run = move || done.finish(host.reset(address, limit));
        // Without a thread, `run` is dropped and `done` with it, which reports that.
        if let Err(error) = std::thread::Builder::new().name("reset".into()).spawn(run) {
            log::error!("{address}: cannot start a thread for its reset: {error}");
        }
    }
}

/// To be told of the end of one reset. Dropped without that, it reports that the reset was given up.
pub struct ResetDone {
    control: ServerControl,
    devfn: u8,
    address: Sbdf,
    finished: bool,
}

impl ResetDone {
    /// The reset is over.
    pub fn finish(mut self, result: Result<(), PlatformError>) {
        self.send(result.map_err(ResetError::Host));
    }

    fn send(&mut self, result: Result<(), ResetError>) {
        self.finished = true;
        self.control.order(Order::ResetFinished { devfn: self.devfn, address: self.address, result });
    }
}

impl Drop for ResetDone {
    fn drop(&mut self) {
        if !self.finished {
            self.send(Err(ResetError::Abandoned));
        }
    }
}

/// An order to a serving thread. New filters for functions that are being served will be one more.
enum Order {
    Add { devfn: u8, function: Box<ServedFunction> },
    Remove { devfn: u8 },
    Gone { devfn: u8 },
    ResetFinished { devfn: u8, address: Sbdf, result: Result<(), ResetError> },
    Stop,
}

/// Gives orders to a serving thread, in their order and without waiting.
#[derive(Clone)]
pub struct ServerControl {
    orders: Sender<Order>,
    wake: Arc<EventFd>,
}

impl ServerControl {
    /// Whether the thread is there to hear it.
    fn order(&self, order: Order) -> bool {
        let sent = self.orders.send(order).is_ok();
        if let Err(errno) = self.wake.write(1) {
            log::error!("wake a serving thread: {errno}");
        }
        sent
    }

    /// Serves one more function: it answers every request that the guest makes after this call. A function that is there
    /// already is quiesced and reported as removed. `false`: the thread has ended.
    pub fn add(&self, devfn: u8, function: ServedFunction) -> bool {
        self.order(Order::Add { devfn, function: Box::new(function) })
    }

    /// Stops serving a function and makes it quiet; [`GuestReport::Removed`] brings it back, also when there is none.
    /// `false`: the thread has ended, and there will be no report.
    pub fn remove(&self, devfn: u8) -> bool {
        self.order(Order::Remove { devfn })
    }

    /// A function left the host.
    pub fn set_gone(&self, devfn: u8) -> bool {
        self.order(Order::Gone { devfn })
    }
}

/// One guest's serving thread.
pub struct GuestServer {
    control: ServerControl,
    counters: Arc<Counters>,
    thread: JoinHandle<BTreeMap<u8, ServedFunction>>,
}

impl GuestServer {
    /// Starts serving. What an earlier life of the service had begun with these functions is finished first, the
    /// request that may wait on the ring included.
    pub fn start(
        domain: DomId,
        ring: Box<dyn Ring>,
        functions: BTreeMap<u8, ServedFunction>,
        resets: Arc<dyn ResetRunner>,
        reports: Reports,
        options: ServerOptions,
    ) -> io::Result<Self> {
        let (orders, received) = channel();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let control = ServerControl { orders, wake };
        let counters = Arc::new(Counters::default());
        let guest = Guest::new(domain, ring, functions, counters.clone());
        let serving = Serving {
            domain,
            guest,
            control: control.clone(),
            orders: received,
            resets,
            reports,
            options,
            counters: counters.clone(),
        };
        let thread =
            std::thread::Builder::new().name(format!("guest-{domain}")).spawn(move || serving.run())?;
        Ok(Self { control, counters, thread })
    }

    /// To give it orders.
    pub fn control(&self) -> &ServerControl {
        &self.control
    }

    /// What it has done.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Stops serving and disconnects the ring. The functions come back as the guest left them, interrupts and all: for a
    /// successor that goes on, or to be quiesced. A request that waits stays flagged.
    pub fn stop(self) -> BTreeMap<u8, ServedFunction> {
        self.control.order(Order::Stop);
        self.thread.join().unwrap_or_else(|_panic| {
            log::error!("a serving thread panicked");
            BTreeMap::new()
        })
    }
}

struct Serving {
    domain: DomId,
    guest: Guest,
    control: ServerControl,
    orders: Receiver<Order>,
    resets: Arc<dyn ResetRunner>,
    reports: Reports,
    options: ServerOptions,
    counters: Arc<Counters>,
}

/// Whether to go on.
#[derive(PartialEq, Eq)]
enum Next {
    Go,
    Stop,
}

impl Serving {
    fn run(mut self) -> BTreeMap<u8, ServedFunction> {
        for (devfn, address) in self.guest.settle() {
            self.start_reset(devfn, address);
        }
        self.report();
        if let Err(cause) = self.serve_all() {
            log::error!("guest {}: its ring failed: {cause}", self.domain);
            self.reports.send(self.domain, GuestReport::RingFailed { cause });
            // Functions still come and go by order.
            while self.orders_until_stop() == Next::Go {}
        }
        self.guest.into_functions()
    }

    fn orders_until_stop(&mut self) -> Next {
        match self.orders.recv() {
            Ok(order) => {
                let next = self.obey(order);
                self.report();
                next
            }
            Err(_) => Next::Stop,
        }
    }

    fn serve_all(&mut self) -> Result<(), PlatformError> {
        // A request may wait whose event came before the ring was connected.
        loop {
            if self.obey_all() == Next::Stop || self.serve_burst()? == Next::Stop {
                return Ok(());
            }
            self.sleep()?;
            Counters::add(&self.counters.wakeups);
            while self.guest.ring().take_event()? {}
        }
    }

    /// Serves until no request has come for a while.
    fn serve_burst(&mut self) -> Result<Next, PlatformError> {
        let mut served = false;
        loop {
            // Only the first look may find nothing: the event may have been an order's, or one for an answered request.
            let waits = Page::new(self.guest.ring().page()).active();
            if !waits && (!served || !self.spin()) {
                return Ok(Next::Go);
            }
            if let Some(reset) = self.guest.serve()? {
                served = true;
                if let Some((devfn, address)) = reset {
                    self.start_reset(devfn, address);
                }
                self.report();
            }
            // A guest that never pauses does not keep orders from being heard.
            if self.obey_all() == Next::Stop {
                return Ok(Next::Stop);
            }
        }
    }

    /// Waits for a request, busily and not for long.
    fn spin(&self) -> bool {
        let end = Instant::now() + self.options.spin;
        let page = Page::new(self.guest.ring().page());
        loop {
            for _ in 0..32 {
                if page.active() {
                    Counters::add(&self.counters.spun);
                    return true;
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= end {
                return false;
            }
        }
    }

    fn sleep(&self) -> Result<(), PlatformError> {
        let wake = self.control.wake.as_fd();
        let mut fds = [
            PollFd::new(self.guest.ring().event_fd(), PollFlags::POLLIN),
            PollFd::new(wake, PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(PlatformError::new("wait for events of guest", self.domain, errno)),
        }
        let failed = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        if fds[0].revents().is_some_and(|events| events.intersects(failed)) {
            return Err(PlatformError::new("wait for events of guest", self.domain, Errno::EIO));
        }
        if fds[1].any() == Some(true)
            && let Err(errno) = self.control.wake.read()
            && errno != Errno::EAGAIN
        {
            return Err(PlatformError::new("take orders for guest", self.domain, errno));
        }
        Ok(())
    }

    fn obey_all(&mut self) -> Next {
        loop {
            match self.orders.try_recv() {
                Ok(order) => {
                    let next = self.obey(order);
                    self.report();
                    if next == Next::Stop {
                        return next;
                    }
                }
                // We hold a sender ourselves: there is always one.
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Next::Go,
            }
        }
    }

    fn obey(&mut self, order: Order) -> Next {
        match order {
            Order::Add { devfn, function } => {
                if self.guest.holds(devfn) {
                    self.guest.remove(devfn);
                }
                let address = function.address();
                let resetting = function.image().resetting();
                self.guest.add(devfn, *function);
                if resetting {
                    self.start_reset(devfn, address);
                }
            }
            Order::Remove { devfn } => self.guest.remove(devfn),
            Order::Gone { devfn } => self.guest.set_gone(devfn),
            Order::ResetFinished { devfn, address, result } => {
                self.guest.reset_finished(devfn, address, result);
            }
            Order::Stop => return Next::Stop,
        }
        Next::Go
    }

    fn start_reset(&mut self, devfn: u8, address: Sbdf) {
        let done = ResetDone { control: self.control.clone(), devfn, address, finished: false };
        self.resets.start(address, done);
    }

    fn report(&mut self) {
        for report in self.guest.take_reports() {
            self.reports.send(self.domain, report);
        }
    }
}
