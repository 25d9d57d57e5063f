//! Functions that belong to guests, by policies (`hold: at-once`) or `pci-assignable-add --persist`: held as soon as they appear, when the service starts, and when
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
use super::requests::Plan;
use super::tasks::{Course, Workshop};
use crate::device::Device;
use crate::outcome::Failure;
use crate::protocol::{Cause, Success};
use crate::reply::Reply;
use crate::reservations::Change;
use crate::spec::existing;
use crate::transaction::{Finished, Kind, holder_of};
use crate::wishes::Wish;

/// What is said of functions that are held persistently.
const HELD_AGAIN: &str = ", and is again whenever it appears";

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
            .problems(Cause::Holding, |address, why| format!("{address} is to be held at once: {why}"))
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
                warn!("{address}: it is to be held at once, but {}", failure.message);
                self.refused.insert(address, failure.message.clone());
            }
            _ => self.refused.remove(address),
        }
    }
}

impl Workshop {
    /// Changes what is wanted persistently of a function; whether that is anything new.
    pub(super) fn want(&self, address: Sbdf, change: impl Fn(&mut Wish)) -> Result<bool, Failure> {
        let host = self.platform.host.as_ref();
        let function = existing(host, address)?;
        let before = self.wishes.of(host, &function);
        if before.is_some_and(|before| {
            let mut after = before.clone();
            change(&mut after);
            after == before
        }) {
            return Ok(false);
        }
        self.wishes.change(Device::of(host, &function)?, change).map(|_| true)
    }
}

impl Engine {
    /// Holds a function of dom0's at once if policies or an administrator say so.
    pub(super) fn keep_for_guests(&mut self, function: &HostFunction) {
        let (address, incarnation) = (function.address, function.incarnation);
        let appeared = self.keeping.appeared.remove(&address);
        if appeared {
            self.try_promises();
        }
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
            info!("{address}: it is to be held at once; another program holds it already");
            return;
        }
        if let Err(failure) = Failure::refuse_for(&format!("hold {address}"), self.holdable(function)) {
            warn!("{address}: it is to be held at once, but {}", failure.message);
            self.keeping.refused.insert(address, failure.message);
            return;
        }
        info!("{address}: it is to be held at once");
        let mut record = self.record(address);
        record.unprobed = appeared && function.driver.is_none() && !self.keeping.enabled.contains(&address);
        self.keeping.under_way.insert(address);
        self.start(Course::Forward(Kind::Hold), record, None, |record| {
            format!("{}: held at once", record.address)
        });
    }

    fn belongs_to_guests(&self, function: &HostFunction) -> bool {
        let subject = Subject::of_host(function, None);
        !function.is_bridge()
            && (self.policies.merge(&subject).hold == Holding::AtOnce
                || self.wishes.of(self.platform.host.as_ref(), function).is_some_and(|wish| wish.hold))
    }

    /// Holds a function persistently, by the plan for holding it, or as it is held already.
    pub(super) fn hold_persistently(&mut self, address: Sbdf, plan: Result<Plan, Failure>, reply: Reply) {
        match plan {
            Ok(Plan::Answer(_)) => {
                let (workshop, record) = (self.workshop(), self.record(address));
                self.background("persist", move || {
                    let message = format!("{address} is assignable{HELD_AGAIN}");
                    let wanted = workshop.want(address, |wish| wish.hold = true);
                    reply.done(wanted.map(|changed| match changed {
                        false => Success::Already {
                            message: format!("{address} is assignable already{HELD_AGAIN}"),
                        },
                        true => {
                            let functions = vec![workshop.view_of(&record)];
                            Success::Changed { message, warnings: Vec::new(), functions }
                        }
                    }));
                });
            }
            Ok(Plan::Transaction(course, record, message, _)) => {
                let message = format!("{message}{HELD_AGAIN}");
                self.carry_out(
                    Ok(Plan::Transaction(course, record, message, Some(Change::Hold(address)))),
                    reply,
                );
            }
            other => self.carry_out(other, reply),
        }
    }
}
