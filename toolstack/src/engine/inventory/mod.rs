//! Which functions the host has, and whether sysfs, Xen and xenstore agree about them.
//!
//! Events only show what to look at. One function at a time is examined (`examination`); if sysfs and Xen differ, all lists are compared
//! (`comparison`), as `observe` reads them, and repaired (`repairs`).

mod comparison;
mod examination;
mod observe;
mod repairs;

use std::sync::mpsc;

use pciback::Sbdf;
use pciback::inventory::Repair;

use self::comparison::Comparisons;
use self::examination::{Examination, Examinations};
use self::repairs::Synced;
use super::Engine;
use super::changes::Changes;
use super::problems::Problem;
use crate::outcome::Failure;
use crate::reply::Reply;

/// What is known of the host's functions, and what is to be looked at.
#[derive(Default)]
pub(super) struct Inventory {
    examinations: Examinations,
    comparisons: Comparisons,
    /// A generation counter of events about the host's functions, for threads that wait for one.
    changes: Changes,
}

/// What background work on the inventory reports or asks for.
pub enum Event {
    /// Functions were examined after events about them.
    Examined(Examination),
    /// A comparison of sysfs, Xen and xenstore has ended; a client may wait for the result.
    Compared(Result<Synced, Failure>, Option<Reply>),
    /// A repair that concerns a guest, a driver or a record is to be carried out.
    Repair(Repair, Reply),
    /// A thread needs exclusive use of a function to repair Xen's list; the answer says whether it gets it.
    Reserve(Sbdf, mpsc::Sender<bool>),
    /// That repair has ended; whether it was carried out.
    ListRepaired(Repair, bool),
}

impl Inventory {
    /// Has a function examined.
    pub fn examine(&mut self, address: Sbdf) {
        self.examinations.add([address]);
    }

    /// Has several functions examined.
    pub fn examine_all_of(&mut self, addresses: impl IntoIterator<Item = Sbdf>) {
        self.examinations.add(addresses);
    }

    /// Has all VFs of a PF examined, including those that have left the host but that Xen still knows.
    pub fn examine_vfs(&mut self, pf: Sbdf) {
        self.examinations.add(self.comparisons.vfs(pf));
    }

    /// Has all functions examined.
    pub fn examine_everything(&mut self) {
        self.examinations.add_everything();
    }

    /// Has the functions examined that another toolstack has attached to guests.
    pub fn examine_others(&mut self) {
        self.examinations.add_others();
    }

    /// Has a function examined that has stopped answering: it may have left the host.
    pub fn examine_silent(&mut self, address: Sbdf) {
        self.examinations.add_silent(address);
    }

    /// Notes that a transaction begins with a function: what was read of it before is outdated.
    pub fn begin(&mut self, address: Sbdf) {
        self.comparisons.touch(address);
        self.examinations.begin(address);
    }

    /// Notes that a function, or the VFs of a PF, change otherwise: a plan made before does not apply to them.
    pub fn touch(&mut self, address: Sbdf) {
        self.comparisons.touch(address);
    }

    /// Whether a comparison is under way.
    pub fn is_comparing(&self) -> bool {
        self.comparisons.is_running()
    }

    /// A counter of events about the host's functions, for threads that wait for one.
    pub fn changes(&self) -> Changes {
        self.changes.clone()
    }

    /// Failed repairs, as problems for the status.
    pub fn problems(&self) -> Vec<Problem> {
        self.comparisons.problems()
    }

    /// The last repairs, for the status.
    pub fn repaired(&self) -> Vec<String> {
        self.comparisons.repaired()
    }

    /// Queues a client's request for a comparison.
    pub fn compare_for(&mut self, dry_run: bool, reply: Reply) {
        self.comparisons.queue(dry_run, reply);
    }
}

impl Engine {
    pub(super) fn handle_inventory(&mut self, event: Event) {
        match event {
            Event::Examined(examination) => self.examined(examination),
            Event::Compared(synced, reply) => self.compared(synced, reply),
            Event::Repair(repair, reply) => self.repair(repair, reply),
            Event::Reserve(address, answer) => self.reserve(address, &answer),
            Event::ListRepaired(repair, done) => self.list_repaired(repair, done),
        }
    }
}
