//! Functions that guests have persistently: reserved for a guest by its UUID, and attached to each domain that the guest runs as.
//!
//! Domains are examined when xenstore reports that one was introduced. A PV guest gets its functions while it boots, as by `pci-attach`;
//! an HVM guest is kept paused until it has them (`starts`). Both stand on [`Persistent`], which looks at other parts through a [`Context`] and
//! leaves [`Effect`]s that the engine carries out (`effects`). What reservations say about requests of clients is in `reserved`, and how
//! those change them in `updates`.
//!
//! A failure is shown in the status, and retried after events that may have removed its cause: the end of a transaction of the function,
//! the loss of another function by the guest, a reload of policies, a start of the service.

mod again;
mod assignments;
mod effects;
mod missing;
mod recognise;
mod reserved;
mod starts;
mod updates;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use log::error;
use pciback::platform::Platform;
use pciback::{DeviceNumber, DomId, Sbdf, Uuid};

use self::assignments::{Assignments, kept_by_settings};
use self::missing::Missing;
use self::starts::Starts;
use super::files::StateFiles;
use super::functions::Functions;
use super::inbox::Inbox;
use super::notes::Notes;
use super::problems::Problem;
use crate::device::Devices;
use crate::outcome::Failure;
use crate::reply::Reply;
use crate::reservations::Reservation;
use crate::settings::Settings;

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
    /// What the engine has to do after the present step.
    effects: Vec<Effect>,
}

/// What this part looks at outside of its own state, and how it starts background work.
pub(super) struct Context<'a> {
    pub platform: &'a Platform,
    pub settings: &'a Settings,
    pub files: &'a StateFiles,
    pub functions: &'a Functions,
    pub devices: &'a Devices,
    pub boot: &'a str,
    pub inbox: &'a Inbox,
}

impl Context<'_> {
    /// The notes about guests that are kept paused.
    fn pause_notes(&self) -> Notes {
        Notes::of(self.settings, "paused")
    }
}

/// What the engine does after a step, in this order.
pub(super) enum Effect {
    /// A function is attached to the domain in which it is missing.
    Attach(Sbdf, DomId),
    /// The functions that the settings assign to a new domain are searched for; with its UUID.
    FindAssignments(DomId, Uuid),
    /// A reservation is removed, at the request of a client.
    Forget(Box<Reservation>, Reply),
    /// The domains that run are known: an earlier problem with that is resolved.
    DomainsFound,
    /// A problem for the status.
    Problem(Problem),
}

/// Results of background work for guests that have functions persistently.
pub enum Event {
    /// The device model of a rebooted guest was asked which device numbers it uses.
    DeviceModelRuns(DomId, Result<Vec<DeviceNumber>, Failure>),
    /// The functions that the settings assign to a guest that has appeared.
    AssignmentsFound(Assignments),
    /// Those functions are now reserved for the guest.
    AssignmentsReserved(DomId),
    /// The devices of the host were read after the start of the service.
    DevicesRead,
    /// A guest no longer moves: what it has persistently besides is attached.
    MoveEnded,
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
}
