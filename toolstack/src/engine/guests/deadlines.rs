//! Time limits of guests: answers that are late, and functions that a guest has not looked at.

use std::time::{Duration, Instant};

use log::warn;

use super::guest::{Awaited, Guest};
use crate::engine::Engine;

/// After this time, a guest that may have been suspended is notified again of its device; the interval doubles each time.
pub(super) const NOTIFY_AGAIN: Duration = Duration::from_millis(500);
/// The longest interval.
const NOTIFY_AGAIN_AT_MOST: Duration = Duration::from_secs(60);

impl Engine {
    pub(in crate::engine) fn next_deadline(&self) -> Option<Instant> {
        let waiting = self
            .guests
            .by_domain
            .values()
            .flat_map(|guest| guest.waiting.values())
            .map(|waiting| waiting.deadline);
        let due = self.guests.by_domain.values().flat_map(|guest| guest.due());
        waiting.chain(due).min()
    }

    /// Notifies guests again of devices that they have not looked at.
    fn notify_again(&mut self, now: Instant) {
        let due = |guest: &Guest| guest.notify_again.is_some_and(|(when, _)| when <= now);
        let due = self.guests.by_domain.iter().filter(|(_, guest)| due(guest));
        for domain in due.map(|(domain, _)| *domain).collect::<Vec<_>>() {
            // A paused guest receives no watch event.
            let paused = self.platform.hypervisor.domain(domain).is_ok_and(|info| info.paused);
            let Some(guest) = self.guests.get_mut(domain) else { continue };
            guest.notify_again =
                guest.notify_again.filter(|_| guest.handshake.awaits_frontend()).map(|(_, wait)| {
                    let wait = if paused { NOTIFY_AGAIN } else { (wait * 2).min(NOTIFY_AGAIN_AT_MOST) };
                    (now + wait, wait)
                });
            if guest.notify_again.is_some() && !paused {
                let actions = guest.handshake.notify_again();
                self.act(domain, actions);
            }
        }
    }

    /// Withdraws functions from guests that exceeded a time limit.
    pub(in crate::engine) fn check_deadlines(&mut self, now: Instant) {
        self.write_again(now);
        self.notify_again(now);
        let paused =
            self.guests.by_domain.iter().filter(|(_, guest)| guest.pause.is_some_and(|over| over <= now));
        for domain in paused.map(|(domain, _)| *domain).collect::<Vec<_>>() {
            if let Some(guest) = self.guests.get_mut(domain) {
                guest.pause = None;
                let actions = guest.handshake.pause_over();
                self.act(domain, actions);
            }
        }
        let closing =
            self.guests.by_domain.iter().filter(|(_, guest)| guest.closed_by.is_some_and(|by| by <= now));
        for domain in closing.map(|(domain, _)| *domain).collect::<Vec<_>>() {
            if let Some(guest) = self.guests.get_mut(domain) {
                guest.closed_by = None;
                let actions = guest.handshake.closing_over();
                self.act(domain, actions);
            }
        }
        let limit = self.settings.guest_limit();
        let mut late = Vec::new();
        for (domain, Guest { waiting, counters, .. }) in &mut self.guests.by_domain {
            let of_this = waiting.iter_mut().filter_map(|(devfn, waiting)| {
                waiting.is_late(now, limit, counters).then_some((*domain, *devfn, waiting.for_what))
            });
            late.extend(of_this);
        }
        for (domain, devfn, awaited) in late {
            if awaited == Awaited::FirstLook {
                let text =
                    format!("domain {domain} has not connected yet; it will when its xen-pcifront is loaded");
                self.answer(domain, devfn, |_| Some(Ok(Some(text))));
                continue;
            }
            warn!("domain {domain} did not answer in time; the function is withdrawn without it");
            if let Some(guest) = self.guests.get_mut(domain) {
                if let Some(waiting) = guest.waiting.get_mut(&devfn) {
                    // Extended once, because the withdrawal may take some time.
                    waiting.deadline = now + limit;
                    if waiting.for_what == Awaited::Release {
                        waiting.for_what = Awaited::Withdrawing;
                    }
                }
                let actions = guest.handshake.withdraw_unasked(devfn);
                self.act(domain, actions);
            }
        }
    }
}
