//! Guests that have functions: serving them, their frontends and ioreq servers, their time limits, what their serving threads report.

mod deadlines;
mod frontends;
mod guest;
mod hvm;
mod log_limit;
mod resets;
mod serving;
mod work;

use std::collections::BTreeMap;
use std::sync::mpsc;

use log::{Level, error, info};
use pciback::serve::pv::Handshake;
use pciback::serve::{Attachment, ServerReport};
use pciback::{DeviceNumber, DomId};

use self::guest::Guest;
pub(super) use self::guest::MaskedWrites;
pub(super) use self::hvm::Resumed;
use self::work::WorkDone;
use super::Engine;
use super::errors::Connected;
use super::problems::Problem;
use super::requests::Wanted;
use crate::outcome::Failure;
use crate::protocol::Cause;
use crate::reply::Reply;

/// The guests that have functions.
#[derive(Default)]
pub(super) struct Guests {
    by_domain: BTreeMap<DomId, Guest>,
    /// Threads that wait until a guest has no served functions.
    waiting_for_idle: Vec<(DomId, mpsc::Sender<()>)>,
}

/// What concerns guests that have functions, or are about to get one.
pub enum Event {
    /// The device model of a guest was asked which device numbers it uses, before a function is attached.
    DeviceModelAsked {
        /// The attachment that was requested.
        wanted: Wanted,
        /// The device numbers that are in use.
        slots: Result<Vec<DeviceNumber>, Failure>,
        /// Where the answer is sent.
        reply: Reply,
    },
    /// A report of the serving thread of a guest.
    Reported(DomId, ServerReport),
    /// A reset that a guest requested has ended.
    ResetEnded(Attachment, Result<(), Failure>),
    /// Background work for a guest has ended.
    WorkDone(DomId, WorkDone),
    /// A thread waits until no function of a guest is served.
    NotifyWhenIdle(DomId, mpsc::Sender<()>),
}

impl Connected for Guests {
    fn is_connected(&self, domain: DomId) -> bool {
        self.get(domain).is_some_and(Guest::is_connected)
    }

    fn has_same_frontend(&self, domain: DomId) -> bool {
        self.get(domain).is_some_and(Guest::has_same_frontend)
    }
}

impl Guests {
    pub fn contains(&self, domain: DomId) -> bool {
        self.by_domain.contains_key(&domain)
    }

    pub fn get(&self, domain: DomId) -> Option<&Guest> {
        self.by_domain.get(&domain)
    }

    pub fn get_mut(&mut self, domain: DomId) -> Option<&mut Guest> {
        self.by_domain.get_mut(&domain)
    }

    /// Guests with functions. One that has lost its last function is kept for a moment, until its nodes may be created again.
    pub fn with_functions(&self) -> impl Iterator<Item = (DomId, &Guest)> {
        self.by_domain
            .iter()
            .filter(|(_, guest)| guest.has_functions())
            .map(|(domain, guest)| (*domain, guest))
    }

    /// The guest, or a new one without a frontend.
    fn get_or_new(&mut self, domain: DomId) -> &mut Guest {
        self.by_domain.entry(domain).or_insert_with(|| Guest::new(Handshake::new(domain)))
    }

    fn add(&mut self, domain: DomId, guest: Guest) {
        self.by_domain.insert(domain, guest);
    }

    /// Forgets a guest without functions, and notifies the threads that wait for this.
    fn remove(&mut self, domain: DomId) -> Option<Guest> {
        for (_, sender) in self.waiting_for_idle.extract_if(.., |(waited_for, _)| *waited_for == domain) {
            // The thread may have given up.
            let _ = sender.send(());
        }
        self.by_domain.remove(&domain)
    }

    /// Notifies a thread when no function of a guest is served any more and its nodes are removed.
    fn notify_when_idle(&mut self, domain: DomId, sender: mpsc::Sender<()>) {
        if self.contains(domain) {
            self.waiting_for_idle.push((domain, sender));
        } else {
            let _ = sender.send(());
        }
    }
}

impl Engine {
    pub(super) fn handle_guests(&mut self, event: Event) {
        match event {
            Event::DeviceModelAsked { wanted, slots, reply } => {
                self.device_model_asked(&wanted, slots, reply);
            }
            Event::Reported(domain, report) => self.server_reported(domain, report),
            Event::ResetEnded(attachment, outcome) => self.reset_ended(attachment, outcome),
            Event::WorkDone(domain, work_done) => self.work_done(domain, work_done),
            Event::NotifyWhenIdle(domain, sender) => self.guests.notify_when_idle(domain, sender),
        }
    }

    fn server_reported(&mut self, domain: DomId, report: ServerReport) {
        if let Some(attachment) = report.attachment()
            && !self.functions.is_current(attachment)
        {
            info!(
                "{}: a report about an attachment that has ended is ignored: {report:?}",
                attachment.address()
            );
            return;
        }
        match report {
            ServerReport::VfsWanted(attachment) => self.vfs_wanted(attachment.address()),
            ServerReport::MessageSent(_) => self.ring_doorbells(),
            ServerReport::ResetWanted(attachment) => self.reset_for_guest(attachment.address()),
            ServerReport::Vanished(attachment) => {
                let address = attachment.address();
                // The function may have left the host: sysfs is read before a decision.
                self.inventory.examine_silent(address);
            }
            ServerReport::DriverStarted(attachment) => {
                self.driver_started(attachment.address());
                self.runs_again(domain);
            }
            ServerReport::RestoreFailed(attachment, why) => {
                self.quarantine(
                    attachment.address(),
                    &format!("its interrupts could not be restored after a reset: {why}"),
                );
            }
            ServerReport::NotPlaced(attachment, why) => {
                let address = attachment.address();
                error!("{address}: {why}");
                let text = format!("{address}: {why}");
                self.problems.push(Problem::new(Cause::Guest, text).on(address).of(domain));
            }
            ServerReport::Notified(attachment, answer) => self.guest_answered(attachment.address(), answer),
            ServerReport::RestartWanted => {
                if let Some(guest) = self.guests.get_mut(domain) {
                    guest.log_line(Level::Info, &format!("domain {domain}: it resets itself"));
                }
                if let Err(error) = self.platform.hvm.restart(domain) {
                    error!("{error}");
                }
            }
            ServerReport::Failed(why) => {
                // Limited, because a guest can cause this again and again by reconnecting.
                if let Some(guest) = self.guests.get_mut(domain) {
                    guest.log_line(Level::Error, &format!("domain {domain}: {why}"));
                }
                self.problems.push_of(domain, format!("domain {domain} is no longer served: {why}"));
            }
        }
    }
}
