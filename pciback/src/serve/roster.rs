//! What a serving thread has, for every source of requests: the functions, and the engine's orders.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::attachment::Attachment;
use super::counters::Counters;
use super::function::{Demand, GuestFunction};
use super::orders::{NotNotified, Notification, Order, ServerReport, Taken};
use crate::fault::AerAnswer;
use crate::platform::PlatformError;
use crate::{Devfn, DomId};

/// What a serving thread has, for every source of requests.
pub(super) struct Roster {
    pub domain: DomId,
    pub functions: BTreeMap<Devfn, Box<GuestFunction>>,
    pub counters: Arc<Counters>,
    pub report: Box<dyn Fn(ServerReport) + Send>,
    /// Error notifications for the guest.
    pub to_notify: VecDeque<Notification>,
    pub orders: mpsc::Receiver<Order>,
}

impl Roster {
    pub fn new(
        domain: DomId,
        mut functions: BTreeMap<Devfn, Box<GuestFunction>>,
        counters: &Arc<Counters>,
        report: Box<dyn Fn(ServerReport) + Send>,
        orders: mpsc::Receiver<Order>,
    ) -> Self {
        functions.values_mut().for_each(|function| function.begin_service());
        let counters = Arc::clone(counters);
        Self { domain, functions, counters, report, to_notify: VecDeque::new(), orders }
    }

    /// Reports to the engine what a request asks for beyond its answer.
    pub fn tell(&self, demand: Option<Demand>, attachment: Option<Attachment>) {
        match (demand, attachment) {
            (Some(Demand::Reset), Some(attachment)) => (self.report)(ServerReport::ResetWanted(attachment)),
            (Some(Demand::Vanished), Some(attachment)) => (self.report)(ServerReport::Vanished(attachment)),
            (Some(Demand::Vfs), Some(attachment)) => (self.report)(ServerReport::VfsWanted(attachment)),
            (Some(Demand::Message), Some(attachment)) => {
                (self.report)(ServerReport::MessageSent(attachment));
            }
            (Some(Demand::DriverStarted), Some(attachment)) => {
                (self.report)(ServerReport::DriverStarted(attachment));
            }
            _ => {}
        }
    }

    /// The function that a notification is about; `None`: it was taken from the guest, which may have another one in its place.
    pub fn notified(&mut self, notification: &Notification) -> Option<&mut GuestFunction> {
        let function = self.functions.get_mut(&notification.devfn)?;
        (function.attachment() == notification.attachment).then_some(function)
    }

    /// Reports the result of a notification of the guest.
    pub fn report_notified(
        &mut self,
        notification: Notification,
        heard: Result<Result<AerAnswer, u32>, NotNotified>,
    ) {
        // A function that was taken in between needs no report.
        if self.notified(&notification).is_some() {
            (self.report)(ServerReport::Notified(notification.attachment, heard));
        }
    }

    /// Gives up the pending notifications of the guest.
    pub fn fail_notifications(&mut self, why: NotNotified) {
        for notification in std::mem::take(&mut self.to_notify) {
            self.report_notified(notification, Err(why));
        }
    }

    /// Waits for an event of the guest's, or for orders, at most until `until`; returns whether there is an event.
    pub fn sleep(
        &self,
        event: BorrowedFd<'_>,
        wake: BorrowedFd<'_>,
        until: Option<Instant>,
    ) -> Result<bool, PlatformError> {
        let mut fds = [PollFd::new(event, PollFlags::POLLIN), PollFd::new(wake, PollFlags::POLLIN)];
        let timeout = until.map_or(PollTimeout::NONE, |until| {
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(PlatformError::new("wait for an event of domain", self.domain, errno)),
        }
        let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        if ready(&fds[1]) {
            // Emptied before the orders are taken: one that comes in between wakes again.
            let mut count = [0u8; 8];
            let _ = nix::unistd::read(wake, &mut count);
        }
        Ok(ready(&fds[0]))
    }

    /// Reports that requests of the guest can no longer be received, and keeps the functions for the engine to take.
    pub fn fail(&mut self, error: &PlatformError) {
        (self.report)(ServerReport::Failed(error.to_string()));
        self.fail_notifications(NotNotified::Unreachable);
        while let Ok(order) = self.orders.recv() {
            if let Some(stop) = self.obey(order) {
                let _ = stop.send(std::mem::take(&mut self.functions));
                return;
            }
            self.fail_notifications(NotNotified::Unreachable);
        }
    }

    /// Whether there are orders that long work on a function has paused for.
    pub fn is_interrupted(&self) -> bool {
        self.functions.values().any(|function| function.revocation.is_interrupted())
    }

    /// Obeys the orders that wait; `true`: the last one was to stop, and the functions were given back.
    pub fn take_orders(&mut self) -> bool {
        self.functions.values().for_each(|function| function.revocation.resume());
        while let Ok(order) = self.orders.try_recv() {
            if let Some(stop) = self.obey(order) {
                // The engine may have stopped waiting.
                let _ = stop.send(std::mem::take(&mut self.functions));
                return true;
            }
        }
        false
    }

    pub fn obey(&mut self, order: Order) -> Option<mpsc::Sender<BTreeMap<Devfn, Box<GuestFunction>>>> {
        match order {
            Order::Add(devfn, mut function) => {
                function.begin_service();
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
            Order::EventsCleared(devfn) => {
                if let Some(function) = self.functions.get_mut(&devfn) {
                    function.events_cleared();
                }
            }
            Order::ReplaceFilter(devfn, filter, done) => {
                if let Some(function) = self.functions.get_mut(&devfn) {
                    let _ = done.send(function.replace_filter(filter));
                }
            }
            Order::MaskedWrites(devfn, writes) => {
                if let Some(function) = self.functions.get(&devfn) {
                    let _ = writes.send(function.masked_writes());
                }
            }
            Order::Notify(notification) => self.to_notify.push_back(notification),
            Order::EndConversation(devfn) => {
                if let Some(function) = self.functions.get_mut(&devfn) {
                    function.note_conversation(None);
                }
            }
            Order::BeginReset(devfn, begun) => {
                if let Some(function) = self.functions.get_mut(&devfn) {
                    let _ = begun.send(function.begin_reset());
                }
            }
            Order::Stop(functions) => return Some(functions),
        }
        None
    }

    pub fn reset_ended(&mut self, devfn: Devfn, verified: bool) {
        let Some(function) = self.functions.get_mut(&devfn) else { return };
        if !verified {
            function.set_gone();
            return;
        }
        if let Err(error) = function.reset_done() {
            let attachment = function.attachment();
            function.set_gone();
            (self.report)(ServerReport::RestoreFailed(attachment, error.to_string()));
        }
    }
}
