//! Functions that policies (`hold: at-once`) or `pci-assignable-add --persist` reserve for guests. They are held when they appear, when
//! the service starts, and when policies are reloaded.
//!
//! Each function is tried once. One that is in use, or that an administrator gave back to dom0, is left alone until another function
//! appears at its address or an administrator holds it. The kernel adds VFs to sysfs 100 ms after it sets VF Enable, so a VF seen here is
//! ready for config accesses.

use std::collections::{BTreeMap, BTreeSet};

use log::{info, warn};
use pciback::platform::{HostFunction, Platform};
use pciback::policy::{Holding, PolicySet, Subject};
use pciback::{FunctionState, Sbdf};

use crate::device::{Device, Devices};
use crate::engine::Engine;
use crate::engine::files::StateFiles;
use crate::engine::functions::Functions;
use crate::engine::problems::{Deviations, Problem};
use crate::engine::requests::{Plan, holdable};
use crate::engine::tasks::{Course, TaskContext};
use crate::journal::Record;
use crate::outcome::Failure;
use crate::persistent_settings::DeviceSettings;
use crate::protocol::{Cause, Success};
use crate::reply::Reply;
use crate::reservations::Change;
use crate::spec::existing;
use crate::transaction::{Finished, Kind, holder_of};

/// The end of messages about functions that are held persistently.
const HELD_AGAIN: &str = "; it is held again whenever it appears";

/// What was done about functions that are reserved for guests.
#[derive(Debug, Default)]
pub(super) struct AtOnce {
    /// Functions for which holding was tried, with their incarnation.
    tried: BTreeMap<Sbdf, u64>,
    /// Functions that an administrator gave back to dom0, with their incarnation.
    given_back: BTreeMap<Sbdf, u64>,
    /// Functions that have just appeared and that may not have been probed for a driver yet.
    appeared: BTreeSet<Sbdf>,
    /// VFs that the service enabled itself, with driver probing off.
    enabled: BTreeSet<Sbdf>,
    /// Functions for which a hold transaction runs.
    under_way: BTreeSet<Sbdf>,
    /// Why functions could not be held.
    refused: Deviations,
}

/// What decides whether a function is held at once.
struct Context<'a> {
    platform: &'a Platform,
    policies: &'a PolicySet,
    files: &'a StateFiles,
    functions: &'a Functions,
    devices: &'a Devices,
}

impl Context<'_> {
    fn belongs_to_guests(&self, function: &HostFunction) -> bool {
        !function.is_bridge()
            && (self.policies.merge(&Subject::of_host(function, None)).hold == Holding::AtOnce
                || self.is_held_persistently(function))
    }

    /// Whether a function is held persistently; the thread that examined it has read its device.
    fn is_held_persistently(&self, function: &HostFunction) -> bool {
        let settings = &self.files.persistent_settings;
        if settings.is_empty() {
            return false;
        }
        match self.devices.known(function) {
            Ok(device) => settings.of_device(&device).is_some_and(|one| one.hold),
            Err(failure) => {
                warn!("{}: find out whether it is held persistently: {failure}", function.address);
                false
            }
        }
    }
}

impl AtOnce {
    /// Functions that could not be held, as problems for `xpci status`.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        self.refused
            .problems(Cause::Holding, |address, why| format!("{address} is to be held at once: {why}"))
    }

    /// Called when policies were reloaded: holding is tried again, except for functions that an administrator gave back.
    pub fn begin_anew(&mut self) {
        self.tried.clear();
        self.refused.clear();
    }

    /// Notes that a function appeared.
    pub fn appeared(&mut self, address: Sbdf) {
        self.appeared.insert(address);
    }

    /// Notes VFs that the service has enabled.
    pub fn vfs_enabled(&mut self, vfs: &[Sbdf]) {
        self.enabled.extend(vfs);
    }

    /// Forgets a function without a record that left the host.
    pub fn left(&mut self, address: Sbdf) {
        self.tried.remove(&address);
        self.given_back.remove(&address);
        self.appeared.remove(&address);
        self.enabled.remove(&address);
        self.refused.remove(address);
    }

    /// Notes that an administrator gives a function back to dom0.
    pub fn gives_back(&mut self, address: Sbdf, incarnation: u64) {
        self.given_back.insert(address, incarnation);
    }

    /// The record of a function that a policy or a persistent setting requires to be held now. `appeared`: its driver may not have probed
    /// it yet.
    fn due(&mut self, function: &HostFunction, appeared: bool, context: &Context<'_>) -> Option<Record> {
        let (address, incarnation) = (function.address, function.incarnation);
        let same = |known: &BTreeMap<Sbdf, u64>| known.get(&address) == Some(&incarnation);
        if same(&self.tried) || same(&self.given_back) || !context.belongs_to_guests(function) {
            return None;
        }
        self.tried.insert(address, incarnation);
        if holder_of(function).is_some() {
            info!("{address}: it is to be held at once; another program holds it already");
            return None;
        }
        let obstacles = holdable(context.platform, function);
        if let Err(failure) = Failure::refuse_for(&format!("hold {address}"), obstacles) {
            warn!("{address}: it is to be held at once, but {}", failure.message);
            self.refused.insert(address, failure.message);
            return None;
        }
        info!("{address}: it is to be held at once");
        let mut record = context.functions.records().get_or_new(address);
        record.unprobed = appeared && function.driver.is_none() && !self.enabled.contains(&address);
        self.under_way.insert(address);
        Some(record)
    }

    /// Notes the result of a transaction.
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

impl TaskContext {
    /// Changes the persistent settings for a function; returns whether anything changed.
    pub(in crate::engine) fn want(
        &self,
        address: Sbdf,
        change: impl Fn(&mut DeviceSettings),
    ) -> Result<bool, Failure> {
        let host = self.platform.host.as_ref();
        let function = existing(host, address)?;
        let before = self.files.persistent_settings.of(host, &function);
        if before.is_some_and(|before| {
            let mut after = before.clone();
            change(&mut after);
            after == before
        }) {
            return Ok(false);
        }
        self.files.persistent_settings.change(Device::of(host, &function)?, change).map(|_| true)
    }
}

impl Engine {
    /// Holds a function of dom0 if a policy or a persistent setting requires it.
    pub(in crate::engine) fn keep_for_guests(&mut self, function: &HostFunction) {
        let appeared = self.holds.at_once.appeared.remove(&function.address);
        if appeared {
            self.retry_assignments();
        }
        // When a change of the VFs of the function or of its PF ends, the function is examined again.
        if self.vfs.is_changing(function.physical_function.unwrap_or(function.address)) {
            return;
        }
        let Self { holds, platform, policies, files, functions, devices, .. } = self;
        let context = Context { platform, policies, files, functions, devices };
        if let Some(record) = holds.at_once.due(function, appeared, &context) {
            self.start(Course::Forward(Kind::Hold), record, None, |record| {
                format!("{}: held at once", record.address)
            });
        }
    }

    /// Holds a function persistently, by the given plan; a function that is held already is only noted as persistent.
    pub(in crate::engine) fn hold_persistently(
        &mut self,
        address: Sbdf,
        plan: Result<Plan, Failure>,
        reply: Reply,
    ) {
        match plan {
            Ok(Plan::Answer(_)) => {
                let (context, record) = (self.task_context(), self.functions.records().get_or_new(address));
                self.background("persist", move || {
                    let message = format!("{address} is assignable{HELD_AGAIN}");
                    let wanted = context.want(address, |one| one.hold = true);
                    reply.done(wanted.map(|changed| match changed {
                        false => Success::Already {
                            message: format!("{address} is assignable already{HELD_AGAIN}"),
                        },
                        true => {
                            let functions = vec![context.view_of(&record)];
                            Success::Changed { message, warnings: Vec::new(), functions }
                        }
                    }));
                });
            }
            Ok(Plan::Transaction(course, record, message, _)) => {
                let message = message.and(HELD_AGAIN);
                self.carry_out(
                    Ok(Plan::Transaction(course, record, message, Some(Change::Hold(address)))),
                    reply,
                );
            }
            other => self.carry_out(other, reply),
        }
    }
}
