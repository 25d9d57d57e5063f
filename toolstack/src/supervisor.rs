//! Notifications to systemd (`sd_notify(3)`), if systemd started the service.

use std::time::{Duration, Instant};

use log::warn;
use sd_notify::NotifyState;

fn notify(states: &[NotifyState<'_>]) {
    // Without NOTIFY_SOCKET, this does nothing.
    if let Err(error) = sd_notify::notify(states) {
        warn!("notify systemd: {error}");
    }
}

/// The service serves its guests and its control socket.
pub fn ready() {
    notify(&[NotifyState::Ready, NotifyState::Status("serving")]);
}

/// The service is about to end.
pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Another process is the main process of the service.
pub fn replaced_by(process: u32) {
    notify(&[NotifyState::MainPid(process)]);
}

/// The service waits for something before it is ready.
pub fn waiting(what: &str) {
    notify(&[NotifyState::Status(what)]);
}

/// Notifies systemd at intervals that the engine handles events; otherwise systemd restarts the service.
#[derive(Debug)]
pub struct Watchdog {
    interval: Option<Duration>,
    next: Instant,
}

impl Watchdog {
    /// The watchdog that systemd requests (WATCHDOG_USEC, WATCHDOG_PID); without a request, it does nothing.
    pub fn from_environment() -> Self {
        // Half of the limit, as sd_watchdog_enabled(3) recommends.
        let limit = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
        Self { interval: limit.map(|limit| limit / 2), next: Instant::now() }
    }

    /// When the next notification is due.
    pub fn next(&self) -> Option<Instant> {
        self.interval.map(|_| self.next)
    }

    /// Sends a notification if one is due.
    pub fn feed(&mut self, now: Instant) {
        if let Some(interval) = self.interval.filter(|_| self.next <= now) {
            notify(&[NotifyState::Watchdog]);
            self.next = now + interval;
        }
    }
}
