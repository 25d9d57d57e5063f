//! What the service tells systemd (`sd_notify(3)`), where systemd started it.

use std::time::{Duration, Instant};

use log::warn;
use sd_notify::NotifyState;

fn tell(states: &[NotifyState<'_>]) {
    // Without NOTIFY_SOCKET there is nobody to tell, and this does nothing.
    if let Err(error) = sd_notify::notify(states) {
        warn!("notify systemd: {error}");
    }
}

/// The service answers its guests and its control socket.
pub fn ready() {
    tell(&[NotifyState::Ready, NotifyState::Status("serving")]);
}

/// The service is about to end.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Another process is the service's from now on.
pub fn replaced_by(process: u32) {
    tell(&[NotifyState::MainPid(process)]);
}

/// What the service waits for before it is ready.
pub fn waiting(what: &str) {
    tell(&[NotifyState::Status(what)]);
}

/// Tells systemd at intervals that the engine handles events; without that systemd restarts the service.
#[derive(Debug)]
pub struct Watchdog {
    interval: Option<Duration>,
    next: Instant,
}

impl Watchdog {
    /// The watchdog that systemd asks for (WATCHDOG_USEC, WATCHDOG_PID); otherwise one that never does anything.
    pub fn from_environment() -> Self {
        // Half of what systemd allows, as sd_watchdog_enabled(3) recommends.
        let limit = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
        Self { interval: limit.map(|limit| limit / 2), next: Instant::now() }
    }

    /// When to tell it next.
    pub fn next(&self) -> Option<Instant> {
        self.interval.map(|_| self.next)
    }

    /// Tells it, when it is time.
    pub fn feed(&mut self, now: Instant) {
        if let Some(interval) = self.interval.filter(|_| self.next <= now) {
            tell(&[NotifyState::Watchdog]);
            self.next = now + interval;
        }
    }
}
