//! Containment: taking a function from its guest because of errors or a policy.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::{error, warn};
use pciback::{FunctionState, Sbdf};

use super::Engine;
use crate::engine::problems::Problem;
use crate::engine::tasks::Course;
use crate::transaction::{Kind, Withdrawal};

/// The degree of containment. A later request replaces an earlier one only if it is stricter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Containment {
    /// The function is withdrawn from its guest, reset and held, and may be attached again.
    Unplug,
    /// The function is withdrawn from its guest, and no guest gets it until 'xpci quarantine clear'.
    Quarantine,
}

/// Functions to be contained when their transaction ends, and why. Transactions read this as well, and write the reason to the journal,
/// so that it survives a killed service.
#[derive(Debug, Clone, Default)]
pub(in crate::engine) struct Awaiting(Arc<Mutex<BTreeMap<Sbdf, (Containment, String)>>>);

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

    fn take(&self, address: Sbdf) -> Option<(Containment, String)> {
        self.locked().remove(&address)
    }

    /// The reason why a function is to be quarantined at the end of its transaction.
    pub fn distrusted(&self, address: Sbdf) -> Option<String> {
        let waiting = self.locked();
        let (_, why) = waiting.get(&address).filter(|(what, _)| *what == Containment::Quarantine)?;
        Some(why.clone())
    }
}

impl Engine {
    /// Takes a function from its guest. For a quarantine, the guest reads all ones from now on, and bus mastering and interrupts are
    /// disabled in hardware first. Then the guest is asked to release the function as for any detach: its driver can access mapped BARs
    /// until it unmaps them in any case.
    ///
    /// A function in a transaction is contained when the transaction ends. A function that belongs to dom0 stays there.
    pub(in crate::engine) fn contain(&mut self, address: Sbdf, containment: Containment, why: &str) {
        let quarantine = containment == Containment::Quarantine;
        if quarantine {
            self.set_gone(address);
        }
        if self.functions.is_busy(address) {
            self.errors.awaiting.put(address, containment, why);
            return;
        }
        let Some(mut record) = self.functions.records().get(address).cloned() else {
            warn!("{address}: {why}; it belongs to dom0 and stays there");
            return;
        };
        if quarantine && record.state != FunctionState::Gone {
            error!("{address}: quarantined: {why}");
            record = self.functions.note_quarantine(address, why).unwrap_or(record);
            if let Err(error) = self.journal.write(&record) {
                error!("{error}");
                self.problems.push(Problem::unwritten(&error));
            }
        }
        let why = why.to_owned();
        match (record.state, containment) {
            (FunctionState::Attached | FunctionState::Resetting, _) => {
                self.start(Course::Backward(Kind::Detach, Withdrawal::Ask), record, None, move |record| {
                    format!("{}: taken from its guest: {why}; it is {}", record.address, record.state)
                });
            }
            (FunctionState::Held | FunctionState::Host, Containment::Quarantine) => {
                self.requests_wait(address);
                self.start(Course::Quarantine, record, None, |record| {
                    format!("{}: quarantined", record.address)
                });
            }
            _ => {}
        }
    }

    /// Quarantines a function that can no longer be trusted.
    pub(in crate::engine) fn quarantine(&mut self, address: Sbdf, why: &str) {
        self.contain(address, Containment::Quarantine, why);
    }

    /// Carries out a containment that was requested during a transaction that has now ended.
    pub(in crate::engine) fn contain_awaiting(&mut self, address: Sbdf) {
        if self.functions.is_busy(address) {
            return;
        }
        let waiting = self.errors.awaiting.take(address);
        let Some((containment, why)) = waiting else { return };
        if self.functions.records().state(address) == FunctionState::Quarantined
            || self.functions.records().get(address).is_none()
        {
            return;
        }
        self.contain(address, containment, &why);
    }
}
