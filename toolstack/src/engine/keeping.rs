//! Functions that policies say belong to guests (`hold: at-once`): held as soon as they appear, when the service starts, and when
//! policies are reloaded.
//!
//! Each is tried once: one that is in use, or that somebody gave back, is left alone until another function appears at its address or
//! somebody says so. The kernel makes VFs known 100 ms after VF Enable, so those seen here have settled.

use std::collections::{BTreeMap, BTreeSet};

use log::{info, warn};
use pciback::platform::HostFunction;
use pciback::policy::{Holding, Subject};
use pciback::{FunctionState, Sbdf};

use super::Engine;
use super::problems::{Lasting, Problem};
use super::tasks::Course;
use crate::outcome::Failure;
use crate::protocol::Cause;
use crate::transaction::{Finished, Kind, holder_of};

/// What was done about functions that belong to guests.
#[derive(Debug, Default)]
pub(super) struct Keeping {
    /// Those that were tried, and which of the functions at their address it was.
    tried: BTreeMap<Sbdf, u64>,
    /// Those that somebody gave back to dom0, likewise.
    given_back: BTreeMap<Sbdf, u64>,
    /// Those that have just appeared: a driver may not have been asked yet.
    appeared: BTreeSet<Sbdf>,
    /// VFs that the service itself enabled, so that no driver was asked.
    enabled: BTreeSet<Sbdf>,
    /// Those being held.
    under_way: BTreeSet<Sbdf>,
    /// Why some could not be held.
    refused: Lasting,
}

impl Keeping {
    /// What is wrong, for `xpci status`.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        self.refused
            .problems(Cause::Holding, |address, why| format!("{address} should be held at once: {why}"))
    }

    /// Policies are others now: what was tried may be tried again, what somebody gave back stays.
    pub fn begin_anew(&mut self) {
        self.tried.clear();
        self.refused.clear();
    }

    /// A function appeared.
    pub fn appeared(&mut self, address: Sbdf) {
        self.appeared.insert(address);
    }

    /// VFs that the service has enabled.
    pub fn vfs_enabled(&mut self, vfs: &[Sbdf]) {
        self.enabled.extend(vfs);
    }

    /// A function that nobody looks after left the host.
    pub fn left(&mut self, address: Sbdf) {
        self.tried.remove(&address);
        self.given_back.remove(&address);
        self.appeared.remove(&address);
        self.enabled.remove(&address);
        self.refused.remove(address);
    }

    /// Somebody gives a function back to dom0.
    pub fn gives_back(&mut self, address: Sbdf, incarnation: u64) {
        self.given_back.insert(address, incarnation);
    }

    /// A transaction ended.
    pub fn finished(&mut self, finished: &Finished) {
        let record = &finished.record;
        let address = record.address;
        let tried = self.under_way.remove(&address);
        match (&finished.outcome, record.state) {
            (Err(failure), FunctionState::Host) if tried => {
                warn!("{address}: policies say that it is held at once, but {}", failure.message);
                self.refused.insert(address, failure.message.clone());
            }
            _ => self.refused.remove(address),
        }
    }
}

impl Engine {
    /// Holds a function of dom0's at once if policies say so.
    pub(super) fn keep_for_guests(&mut self, function: &HostFunction) {
        let (address, incarnation) = (function.address, function.incarnation);
        let appeared = self.keeping.appeared.remove(&address);
        let same = |known: &BTreeMap<Sbdf, u64>| known.get(&address) == Some(&incarnation);
        if same(&self.keeping.tried) || same(&self.keeping.given_back) || !self.belongs_to_guests(function) {
            return;
        }
        // The change of its PF, or of its own VFs, ends with a look at it.
        if self.busy_pfs.contains(&function.physical_function.unwrap_or(address)) {
            return;
        }
        self.keeping.tried.insert(address, incarnation);
        if holder_of(function).is_some() {
            info!("{address}: policies say that it is held at once; another program holds it already");
            return;
        }
        if let Err(failure) = Failure::refuse_for(&format!("hold {address}"), self.holdable(function)) {
            warn!("{address}: policies say that it is held at once, but {}", failure.message);
            self.keeping.refused.insert(address, failure.message);
            return;
        }
        info!("{address}: policies say that it is held at once");
        let mut record = self.record(address);
        record.unprobed = appeared && function.driver.is_none() && !self.keeping.enabled.contains(&address);
        self.keeping.under_way.insert(address);
        self.start(Course::Forward(Kind::Hold), record, None, |record| {
            format!("{}: held at once, as policies say", record.address)
        });
    }

    fn belongs_to_guests(&self, function: &HostFunction) -> bool {
        let subject = Subject::of_host(function, None);
        !function.is_bridge() && self.policies.merge(&subject).hold == Holding::AtOnce
    }
}
