//! Containing a function that its guest shall not keep.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::{error, warn};
use pciback::{FunctionState, Sbdf};

use super::Engine;
use super::problems::Problem;
use super::tasks::Course;
use crate::transaction::{Kind, Parting};

/// What becomes of a function. A later one replaces an earlier one only if it is stricter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Containment {
    /// Its guest loses it; it is reset and held, ready for the next one.
    Unplug,
    /// Its guest loses it, and no guest gets it until 'xpci quarantine clear'.
    Quarantine,
}

/// Functions that are to be contained when their transaction ends, and why. Transactions see it too: one that is killed on the way
/// leaves the reason in the journal.
#[derive(Debug, Clone, Default)]
pub(super) struct Awaiting(Arc<Mutex<BTreeMap<Sbdf, (Containment, String)>>>);

impl Awaiting {
    fn locked(&self) -> MutexGuard<'_, BTreeMap<Sbdf, (Containment, String)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, address: Sbdf, containment: Containment, why: &str) {
        let mut waiting = self.locked();
        let stricter = waiting.get(&address).is_none_or(|(earlier, _)| *earlier < containment);
        if stricter {
            waiting.insert(address, (containment, why.to_owned()));
        }
    }

    /// Why a function shall end quarantined.
    pub fn distrusted(&self, address: Sbdf) -> Option<String> {
        let waiting = self.locked();
        let (_, why) = waiting.get(&address).filter(|(what, _)| *what == Containment::Quarantine)?;
        Some(why.clone())
    }
}

impl Engine {
    /// Takes a function from its guest. With quarantine its guest reads all ones from now on, and bus mastering and interrupts
    /// are switched off in hardware before anything else; then the guest is asked to let go, as with any detach, because its
    /// driver could not be stopped from touching memory that it has mapped in any case.
    ///
    /// A function in a transaction is contained when that has ended; one that is dom0's is left alone.
    pub(super) fn contain(&mut self, address: Sbdf, containment: Containment, why: &str) {
        let quarantine = containment == Containment::Quarantine;
        if quarantine {
            self.set_gone(address);
        }
        if self.busy.contains(&address) {
            self.awaiting.put(address, containment, why);
            return;
        }
        let Some(record) = self.records.get_mut(&address) else {
            warn!("{address}: {why}; it belongs to dom0 and stays there");
            return;
        };
        if quarantine && record.state != FunctionState::Gone {
            error!("{address}: quarantined: {why}");
            record.quarantine.get_or_insert_with(|| why.to_owned());
            if let Err(error) = self.journal.write(record) {
                error!("{error}");
                self.problems.push(Problem::unwritten(&error));
            }
        }
        let record = record.clone();
        let why = why.to_owned();
        match (record.state, containment) {
            (FunctionState::Attached | FunctionState::Resetting, _) => {
                self.start(Course::Backward(Kind::Detach, Parting::Ask), record, None, move |record| {
                    format!("{}: taken from its guest: {why}; it is {}", record.address, record.state)
                });
            }
            (FunctionState::Held | FunctionState::Host, Containment::Quarantine) => {
                self.requests_wait(address);
                self.start(Course::Condemn, record, None, |record| {
                    format!("{}: quarantined", record.address)
                });
            }
            _ => {}
        }
    }

    /// Marks a function that can be trusted no more, and takes it from its guest.
    pub(super) fn quarantine(&mut self, address: Sbdf, why: &str) {
        self.contain(address, Containment::Quarantine, why);
    }

    /// A transaction has ended: what was decided meanwhile is done.
    pub(super) fn contain_awaiting(&mut self, address: Sbdf) {
        if self.busy.contains(&address) {
            return;
        }
        let waiting = self.awaiting.locked().remove(&address);
        let Some((containment, why)) = waiting else { return };
        if self.state(address) == FunctionState::Quarantined || !self.records.contains_key(&address) {
            return;
        }
        self.contain(address, containment, &why);
    }
}
