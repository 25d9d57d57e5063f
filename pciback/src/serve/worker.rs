//! The thread that serves one guest: it answers requests, obeys orders, and notifies the guest of errors.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use super::function::GuestFunction;
use super::orders::{NotNotified, Notification};
use super::pace::Pace;
use super::roster::Roster;
use crate::fault::{AerAnswer, Conversation, Heard};
use crate::platform::PlatformError;

/// How many looks for a request come between two looks at the clock, which under Xen may be a system call.
const LOOKS: u32 = 64;
/// How many requests are answered in a row before anything else is looked at, by a guest that never pauses.
const BURST: u32 = 64;
/// How many events are taken in a row before orders are looked at: the guest can send the next one before this one is taken.
pub(super) const EVENTS: u32 = 16;

/// How a guest's requests come and are answered, and how it is notified of errors.
pub(super) trait RequestSource: Send {
    /// Puts right what an earlier thread was killed in the midst of. Called once, before the first request is answered.
    fn recover(&mut self, roster: &mut Roster);

    /// Answers what waits, each vCPU that has a request once. [`Roster::take_orders`] comes after a request was found and before it is
    /// carried out: a guest asks for a function as soon as that is published, and must not reach one that is taken from it.
    fn serve(&mut self, roster: &mut Roster) -> Turn;
    /// When a request that waits for the host is answered all the same, if one does: the thread serves others meanwhile.
    fn due(&self) -> Option<Instant> {
        None
    }

    /// Readable when the guest has sent an event.
    fn event_fd(&self) -> BorrowedFd<'_>;
    /// Takes events that the guest has sent, without waiting, and at most [`EVENTS`]: where more have come, the thread wakes again.
    fn take_events(&mut self) -> Result<(), PlatformError>;

    /// Notifies the guest's driver of an error of a function and notes that there; no other notification may be unanswered.
    fn tell(&mut self, notification: &Notification, function: &mut GuestFunction) -> Result<(), NotNotified>;
    /// Takes the driver's answer; `Err`: a number that means nothing.
    fn take_answer(&mut self) -> Option<Result<AerAnswer, u32>>;
    /// Takes back a notification that was not answered.
    fn withdraw(&mut self);
}

/// How a series of requests ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// No request has come for a moment.
    Idle,
    /// There may be more, but other things are due.
    Busy,
    /// The thread was ordered to stop; the request that was found waits for the next thread.
    Stopped,
}

/// What runs in the thread.
pub(super) struct Worker<S> {
    pub roster: Roster,
    pub source: S,
    /// How long it looks for the guest's next request before it sleeps.
    pace: Pace,
    /// There is an event to take.
    event: bool,
    /// The notification that the guest has not answered, and when its time is up.
    pending: Option<(Notification, Instant)>,
}

impl<S: RequestSource> Worker<S> {
    pub fn new(roster: Roster, source: S) -> Self {
        Self { roster, source, pace: Pace::default(), event: false, pending: None }
    }

    /// Serves until it is ordered to stop; `wake` is readable when there are orders.
    pub fn run(&mut self, wake: BorrowedFd<'_>) {
        self.source.recover(&mut self.roster);
        // A request may have waited since before the guest was connected.
        let mut turn = self.serve_while_busy();
        loop {
            if turn == Turn::Stopped || self.roster.take_orders() {
                // A notification that is not answered stays on the page: the next process awaits the answer.
                return;
            }
            self.hear();
            if turn == Turn::Idle
                && let Err(error) = self.wait(wake)
            {
                if let Some((notification, _)) = self.pending.take() {
                    self.conclude(notification, Err(NotNotified::Unreachable));
                }
                return self.roster.fail(&error);
            }
            turn = self.serve_while_busy();
        }
    }

    /// Takes the guest's answer to a notification of an error, or gives up waiting for it, and sends the next one.
    pub fn hear(&mut self) {
        loop {
            if let Some((notification, until)) = self.pending {
                let heard = match self.source.take_answer() {
                    Some(answer) => Ok(answer),
                    None if Instant::now() >= until => Err(NotNotified::Silent),
                    None => return,
                };
                self.pending = None;
                self.conclude(notification, heard);
                if heard.is_err() {
                    self.source.withdraw();
                }
            }
            let Some(notification) = self.roster.to_notify.pop_front() else { return };
            let told = match self.roster.notified(&notification) {
                Some(function) => self.source.tell(&notification, function),
                None => Err(NotNotified::Unreachable),
            };
            match told {
                Ok(()) => self.pending = Some((notification, Instant::now() + notification.limit)),
                Err(why) => self.conclude(notification, Err(why)),
            }
        }
    }

    /// Notes and reports what became of a notification. Noted first: the page has room for one answer, which the next one takes.
    fn conclude(&mut self, notification: Notification, heard: Result<Result<AerAnswer, u32>, NotNotified>) {
        if let Some(function) = self.roster.notified(&notification) {
            let heard = heard.map_or(Heard::Silence, Heard::Answer);
            function.note_conversation(Some(Conversation { heard, ..notification.conversation }));
        }
        self.roster.report_notified(notification, heard);
    }

    /// Sleeps until the guest has sent an event or the engine an order, or a limit is over.
    ///
    /// An event is taken at the end of what it brought: until then its port is masked, and others would only interrupt. What came between
    /// the last look and the taking has no event any more, so the caller looks again before the next call sleeps.
    fn wait(&mut self, wake: BorrowedFd<'_>) -> Result<(), PlatformError> {
        if std::mem::take(&mut self.event) {
            return self.source.take_events();
        }
        let notified = self.pending.map(|(_, until)| until);
        let until = notified.into_iter().chain(self.source.due()).min();
        self.event = self.roster.sleep(self.source.event_fd(), wake, until)?;
        Ok(())
    }

    /// Answers requests until none has come for as long as the guest's requests have been apart lately.
    pub fn serve_while_busy(&mut self) -> Turn {
        for _ in 0..BURST {
            match self.source.serve(&mut self.roster) {
                Turn::Busy => self.pace.answered(),
                Turn::Stopped => return Turn::Stopped,
                Turn::Idle => match self.look_for_more() {
                    Turn::Busy => self.pace.answered(),
                    other => return other,
                },
            }
        }
        Turn::Busy
    }

    /// Looks for the next request for a while, and answers it.
    fn look_for_more(&mut self) -> Turn {
        let Some(_looking) = self.pace.begin() else { return Turn::Idle };
        loop {
            for _ in 0..LOOKS {
                match self.source.serve(&mut self.roster) {
                    Turn::Idle => std::hint::spin_loop(),
                    other => return other,
                }
            }
            if self.pace.is_over() {
                return Turn::Idle;
            }
        }
    }
}
