//! Functions that were held for one guest (`pci-attach --managed`): they go back to dom0 and to their drivers when the guest has
//! released them.
//!
//! A PV guest may still have the BARs mapped then, so that the function stays held until that guest has ended.

use std::collections::BTreeSet;

use log::{error, info};
use pciback::policy::Reuse;
use pciback::{FunctionState, Sbdf};

use crate::engine::Engine;
use crate::engine::problems::Problem;
use crate::engine::requests::Reserved;
use crate::journal::Record;
use crate::protocol::Cause;

/// Functions that go back to dom0 when nothing prevents it any more.
#[derive(Debug, Default)]
pub(super) struct Managed {
    waiting: BTreeSet<Sbdf>,
}

impl Engine {
    /// Returns a function to dom0 that was held for the guest that has just released it.
    fn return_managed(&mut self, address: Sbdf) {
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

    /// Returns a function that a transaction has left held, unless it was held just now, for an attachment that follows. `during`: its state
    /// in the transaction.
    pub(in crate::engine) fn managed_is_held(&mut self, address: Sbdf, during: Option<FunctionState>) {
        match during {
            Some(FunctionState::Host) | None => {}
            // The return itself has failed.
            Some(FunctionState::Held) => drop(self.holds.managed.waiting.insert(address)),
            Some(_) if self.functions.is_busy(address) => {}
            Some(_) => self.return_managed(address),
        }
    }

    /// Tries again for those that waited for the end of a guest.
    pub(in crate::engine) fn return_managed_again(&mut self) {
        for address in std::mem::take(&mut self.holds.managed.waiting) {
            if is_left(&self.functions.records().get_or_new(address)) {
                self.return_managed(address);
            }
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

/// Whether a function is held for a guest that does not have it.
fn is_left(record: &Record) -> bool {
    record.managed && record.state == FunctionState::Held
}
