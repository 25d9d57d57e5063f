//! Functions that were held for one guest (`pci-attach --managed`): they go back to dom0 and to their drivers when the guest has
//! released them.
//!
//! A PV guest may still have the BARs mapped then, so that the function stays held until that guest has ended. [`Managed`] decides which
//! functions go back; the engine tries that, as if an administrator had asked for it.

use std::collections::BTreeSet;

use log::{error, info};
use pciback::policy::Reuse;
use pciback::{FunctionState, Sbdf};

use crate::engine::Engine;
use crate::engine::functions::{Functions, Records};
use crate::engine::problems::Problem;
use crate::engine::requests::Reserved;
use crate::journal::Record;
use crate::protocol::Cause;

/// Functions that go back to dom0 when nothing prevents it any more.
#[derive(Debug, Default)]
pub(super) struct Managed {
    waiting: BTreeSet<Sbdf>,
}

impl Managed {
    /// Whether a function goes back to dom0 that a transaction has left held. `during`: its state in the transaction.
    fn goes_back(&mut self, address: Sbdf, during: Option<FunctionState>, functions: &Functions) -> bool {
        match during {
            // It was held just now, for an attachment that follows.
            Some(FunctionState::Host) | None => false,
            // The return itself has failed.
            Some(FunctionState::Held) => {
                self.waiting.insert(address);
                false
            }
            Some(_) => !functions.is_busy(address),
        }
    }

    /// Those that waited for the end of a guest and that no guest has now.
    fn take_waiting(&mut self, records: &Records) -> Vec<Sbdf> {
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        waiting.filter(|address| records.get(*address).is_some_and(is_left)).collect()
    }
}

/// Whether a function is held for a guest that does not have it.
fn is_left(record: &Record) -> bool {
    record.managed && record.state == FunctionState::Held
}

impl Engine {
    /// Returns a function to dom0 that was held for the guest that has just released it.
    fn return_managed(&mut self, address: Sbdf) {
        if !self.functions.handover().recognition.has_ended() {
            // It is tried when it is known whether a guest has it persistently.
            self.holds.managed.waiting.insert(address);
            return;
        }
        let plan = self.plan_release(address, Reserved::Refused, Reuse::AfterShutdown);
        if let Err(failure) = &plan {
            info!("{address}: it stays held for now: {failure}");
            self.holds.managed.waiting.insert(address);
            return;
        }
        self.holds.managed.waiting.remove(&address);
        // A user cannot know that the service works on it by itself.
        self.requests_wait(address);
        let reply = self.inbox.unasked_reply(Cause::Holding);
        self.carry_out(plan, reply);
    }

    /// Returns a function that a transaction has left held; `during`: its state in the transaction.
    pub(in crate::engine) fn managed_is_held(&mut self, address: Sbdf, during: Option<FunctionState>) {
        if self.holds.managed.goes_back(address, during, &self.functions) {
            self.return_managed(address);
        }
    }

    /// Tries again for those that waited for the end of a guest.
    pub(in crate::engine) fn return_managed_again(&mut self) {
        for address in self.holds.managed.take_waiting(self.functions.records()) {
            self.return_managed(address);
        }
    }

    /// Returns those that no guest has, at the start of the service: an earlier run was stopped before it did so.
    pub(in crate::engine) fn return_all_managed(&mut self) {
        let idle = |record: &&Record| is_left(record) && !self.functions.is_busy(record.address);
        let left: Vec<Sbdf> =
            self.functions.records().all().filter(idle).map(|record| record.address).collect();
        for address in left {
            self.return_managed(address);
        }
    }

    /// Keeps a held function held, whatever it was held for.
    pub(in crate::engine) fn keep_held(&mut self, address: Sbdf) {
        let record = self.functions.records().get_or_new(address);
        if !record.managed || self.functions.is_busy(address) {
            return;
        }
        let record = Record { managed: false, ..record };
        if let Err(error) = self.files.journal.write(&record) {
            error!("{error}");
            self.problems.push(Problem::unwritten(&error));
        }
        self.holds.managed.waiting.remove(&address);
        self.functions.keep(record);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_goes_back_when_its_guest_has_released_it_and_a_failed_return_is_tried_again() {
        let (mut managed, address) = (Managed::default(), Sbdf::from_devfn(0, 1, 0x80));
        let mut functions = Functions::new("this boot".to_owned());
        let mut record = functions.records().get_or_new(address);
        (record.state, record.managed) = (FunctionState::Held, true);
        functions.keep(record);
        assert!(!managed.goes_back(address, Some(FunctionState::Host), &functions), "it is attached next");
        assert!(managed.goes_back(address, Some(FunctionState::Detaching), &functions));
        assert!(!managed.goes_back(address, Some(FunctionState::Held), &functions), "it cannot go back");
        assert_eq!(managed.take_waiting(functions.records()), [address]);
        assert_eq!(managed.take_waiting(functions.records()), [], "it is tried once");
        functions.reserve(address);
        assert!(!managed.goes_back(address, Some(FunctionState::Detaching), &functions), "it is busy");
    }

    #[test]
    fn a_function_that_a_guest_has_meanwhile_stays_with_it() {
        let (mut managed, address) = (Managed::default(), Sbdf::from_devfn(0, 1, 0x80));
        let mut functions = Functions::new("this boot".to_owned());
        managed.goes_back(address, Some(FunctionState::Held), &functions);
        let mut record = functions.records().get_or_new(address);
        (record.state, record.managed) = (FunctionState::Attached, true);
        functions.keep(record);
        assert_eq!(managed.take_waiting(functions.records()), []);
    }
}
