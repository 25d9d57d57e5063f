//! A serving thread, as the engine holds it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::error;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::counters::Counters;
use super::function::GuestFunction;
use super::orders::{Notification, Order, ServerReport, ServerStuck, Taken};
use super::revocation::Revocation;
use super::roster::Roster;
use super::worker::{RequestSource, Worker};
use crate::config::{Filter, MaskedWrite};
use crate::platform::PlatformError;
use crate::{Devfn, DomId};

/// How long the engine waits for the thread, unless that advances in mapping or unmapping a BAR. An access takes microseconds, one to a
/// function that the kernel resets up to a minute.
const STUCK: Duration = Duration::from_secs(2);

/// A running thread, as the engine holds it.
pub struct Server {
    orders: mpsc::Sender<Order>,
    wake: Arc<EventFd>,
    counters: Arc<Counters>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// How the functions are taken from the thread should it hang.
    revocations: Mutex<BTreeMap<Devfn, Revocation>>,
}

impl Server {
    /// Starts a thread that serves a guest whose requests come from `source`. Reports go to `report`, which must not block.
    pub(super) fn start(
        domain: DomId,
        source: impl RequestSource + 'static,
        functions: BTreeMap<Devfn, Box<GuestFunction>>,
        counters: Arc<Counters>,
        report: Box<dyn Fn(ServerReport) + Send>,
    ) -> io::Result<Self> {
        let wake =
            Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (sender, orders) = mpsc::channel();
        let revocations: BTreeMap<Devfn, Revocation> =
            functions.iter().map(|(devfn, function)| (*devfn, function.revocation.clone())).collect();
        functions.values().for_each(|function| function.vfs.set_wake(&wake));
        let roster = Roster::new(domain, functions, &counters, report, orders);
        let mut worker = Worker::new(roster, source);
        let thread_wake = Arc::clone(&wake);
        let thread = thread::Builder::new()
            .name(format!("guest {domain}"))
            .spawn(move || worker.run(thread_wake.as_fd()))?;
        let (thread, revocations) = (Mutex::new(Some(thread)), Mutex::new(revocations));
        Ok(Self { orders: sender, wake, counters, thread, revocations })
    }

    fn revocations(&self) -> MutexGuard<'_, BTreeMap<Devfn, Revocation>> {
        self.revocations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: Order) {
        if self.orders.send(order).is_ok() {
            // Not before it was sent: the thread looks at its orders once for this.
            self.revocations().values().for_each(Revocation::interrupt);
            match self.wake.write(1) {
                // EAGAIN: it is as awake as can be.
                Ok(_) | Err(Errno::EAGAIN) => {}
                Err(errno) => error!("wake a serving thread: {errno}"),
            }
        }
    }

    /// Serves one more function.
    pub fn add(&self, devfn: Devfn, function: Box<GuestFunction>) {
        self.revocations().insert(devfn, function.revocation.clone());
        function.vfs.set_wake(&self.wake);
        self.order(Order::Add(devfn, function));
    }

    /// Takes a function out and quiesces it; `Ok(None)` when the thread does not have it. `Err`: the thread hangs in an access; it makes
    /// no other one to this function when that ends, but the function is as the guest had it.
    pub fn take(&self, devfn: Devfn) -> Result<Option<Taken>, ServerStuck> {
        let taken = self.ask(|sender| Order::Take(devfn, sender));
        let revocation = self.revocations().remove(&devfn);
        if let (Err(ServerStuck), Some(revocation)) = (&taken, revocation) {
            revocation.revoke();
        }
        taken
    }

    /// The function has left the host: from now on it reads all ones and no hardware is touched.
    pub fn set_gone(&self, devfn: Devfn) {
        self.order(Order::SetGone(devfn));
    }

    /// The host has read and cleared the function's error registers.
    pub fn events_cleared(&self, devfn: Devfn) {
        self.order(Order::EventsCleared(devfn));
    }

    /// Puts another filter in force between two of the guest's requests; `Ok(None)` when the thread does not have the function.
    pub fn replace_filter(
        &self,
        devfn: Devfn,
        filter: Arc<Filter>,
    ) -> Result<Option<io::Result<()>>, ServerStuck> {
        self.ask(|sender| Order::ReplaceFilter(devfn, filter, sender))
    }

    /// What of the guest's writes did not reach hardware; `Ok(None)` when the thread does not have the function.
    pub fn masked_writes(&self, devfn: Devfn) -> Result<Option<Vec<MaskedWrite>>, ServerStuck> {
        self.ask(|sender| Order::MaskedWrites(devfn, sender))
    }

    /// Notifies the guest of an error; [`ServerReport::Notified`] follows, and until then requests are served as usual. Things that
    /// get orders at once wait for each other, each with a limit of its own.
    pub fn tell(&self, notification: Notification) {
        self.order(Order::Notify(notification));
    }

    /// The function is about to be reset, which the guest did not ask for: until [`Self::reset_ended`] it reads all ones, and nothing of
    /// it is mapped in its guest. `Ok(None)` when the thread does not have the function; an error: it must not be reset.
    pub fn begin_reset(&self, devfn: Devfn) -> Result<Option<Result<(), PlatformError>>, ServerStuck> {
        self.ask(|sender| Order::BeginReset(devfn, sender))
    }

    /// The conversation of which notifications were part has ended: no later process of the service goes on with it.
    pub fn end_conversation(&self, devfn: Devfn) {
        self.order(Order::EndConversation(devfn));
    }

    fn ask<T>(&self, order: impl FnOnce(mpsc::Sender<T>) -> Order) -> Result<Option<T>, ServerStuck> {
        let (sender, answer) = mpsc::channel();
        self.order(order(sender));
        let mut before = self.parts();
        loop {
            match answer.recv_timeout(STUCK) {
                Ok(answer) => return Ok(Some(answer)),
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(None),
                Err(mpsc::RecvTimeoutError::Timeout) if self.parts() == before => return Err(ServerStuck),
                Err(mpsc::RecvTimeoutError::Timeout) => before = self.parts(),
            }
        }
    }

    /// How many parts of long work the thread has done.
    fn parts(&self) -> u64 {
        self.revocations().values().fold(0, |parts, revocation| parts.wrapping_add(revocation.parts()))
    }

    /// The reset that a guest asked for has ended; unless `verified` the function reads all ones from now on.
    pub fn reset_ended(&self, devfn: Devfn, verified: bool) {
        self.order(Order::ResetEnded(devfn, verified));
    }

    /// Stops and gives the functions back, untouched: they can be served again. `Err`: the thread hangs in an access, and
    /// stops when that ends, without another access to its functions, which are as the guest had them.
    pub fn stop(&self) -> Result<BTreeMap<Devfn, Box<GuestFunction>>, ServerStuck> {
        let functions = match self.ask(Order::Stop) {
            Err(stuck) => {
                self.revocations().values().for_each(Revocation::revoke);
                return Err(stuck);
            }
            Ok(functions) => functions.unwrap_or_default(),
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
