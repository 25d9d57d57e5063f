//! Containment: taking a function from its guest because of errors or a policy.

use log::{error, warn};
use pciback::{FunctionState, Sbdf};

use super::Event;
use crate::engine::functions::Containment;
use crate::engine::inbox::Inbox;
use crate::engine::problems::Problem;
use crate::engine::tasks::Course;
use crate::engine::{self, Engine};
use crate::transaction::{Kind, Withdrawal};

impl Inbox {
    /// Has a function contained, for the given reason.
    pub fn contain(&self, address: Sbdf, containment: Containment, why: &str) {
        self.send(engine::Event::Errors(Event::Contain(address, containment, why.to_owned())));
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
            self.functions.handover().awaiting.put(address, containment, why);
            return;
        }
        let Some(mut record) = self.functions.records().get(address).cloned() else {
            warn!("{address}: {why}; it belongs to dom0 and stays there");
            return;
        };
        if quarantine && record.state != FunctionState::Gone {
            error!("{address}: quarantined: {why}");
            record = self.functions.note_quarantine(address, why).unwrap_or(record);
            if let Err(error) = self.files.journal.write(&record) {
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
        let waiting = self.functions.handover().awaiting.take(address);
        let Some((containment, why)) = waiting else { return };
        if self.functions.records().state(address) == FunctionState::Quarantined
            || self.functions.records().get(address).is_none()
        {
            return;
        }
        self.contain(address, containment, &why);
    }
}
