//! Functions that guests have persistently: reserved for a guest by its UUID, and attached to each domain that the guest runs as.
//!
//! Domains are examined when xenstore reports that one was introduced. A PV guest gets its functions while it boots, as by `pci-attach`;
//! an HVM guest is kept paused until it has them (`starts`).
//!
//! A failure is shown in the status, and retried after events that may have removed its cause: the end of a transaction of the function,
//! the loss of another function by the guest, a reload of policies, a start of the service.

mod again;
mod assignments;
mod missing;
mod recognise;
mod reserved;
mod starts;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use log::error;
use pciback::{DeviceNumber, DomId};

use self::assignments::{Assignments, kept_by_settings};

use self::missing::Missing;
use self::starts::Starts;
use super::Engine;
use super::problems::Problem;
use crate::outcome::Failure;

/// The state of guests that have functions persistently.
#[derive(Default)]
pub(super) struct Persistent {
    /// Domains that were examined.
    known: BTreeSet<DomId>,
    missing: Missing,
    /// HVM guests that the service keeps paused.
    starts: Starts,
    /// Functions that the settings assign to running guests and that cannot be reserved.
    unreserved: BTreeMap<DomId, Vec<Problem>>,
}

/// Results of background work for guests that have functions persistently.
pub enum Event {
    /// The device model of a rebooted guest was asked which device numbers it uses.
    DeviceModelRuns(DomId, Result<Vec<DeviceNumber>, Failure>),
    /// The functions that the settings assign to a guest that has appeared.
    AssignmentsFound(Assignments),
    /// Those functions are now reserved for the guest.
    AssignmentsReserved(DomId),
}

impl Persistent {
    /// Missing functions, as problems for `xpci status`.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        self.missing.problems().chain(self.unreserved.values().flatten().cloned())
    }

    /// Sets the problems with functions that the settings assign to a domain, and logs new ones.
    fn note_unreserved(&mut self, domain: DomId, problems: Vec<Problem>) {
        let before = self.unreserved.remove(&domain).unwrap_or_default();
        let mut noted = Vec::new();
        for problem in problems {
            let text = problem.view().message;
            let known = before.iter().find(|known| known.view().message == text);
            if known.is_none() {
                error!("{text}");
            }
            noted.push(known.cloned().unwrap_or(problem));
        }
        if !noted.is_empty() {
            self.unreserved.insert(domain, noted);
        }
    }

    /// Whether a function is missing in the domain that its guest has persistently.
    pub fn is_returning(&self, domain: DomId) -> bool {
        self.missing.is_in(domain)
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        self.starts.next_deadline()
    }

    /// Forgets domains that have ended. Returns those that were kept paused.
    fn keep_those_of(&mut self, present: &BTreeSet<DomId>) -> Vec<DomId> {
        self.known.retain(|domain| present.contains(domain));
        self.unreserved.retain(|domain, _| present.contains(domain));
        self.missing.keep_those_of(present);
        self.starts.keep_those_of(present)
    }
}

impl Engine {
    pub(super) fn handle_persistent(&mut self, event: Event) {
        match event {
            Event::DeviceModelRuns(domain, slots) => self.device_model_runs(domain, slots),
            Event::AssignmentsFound(assignments) => self.assignments_found(assignments),
            Event::AssignmentsReserved(domain) => self.examine_domain_again(domain),
        }
    }
}
