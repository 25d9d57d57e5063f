//! Carries out the planner's repairs, on a thread.
//!
//! Repairs that only concern Xen's list are carried out here, after the engine has reserved the function. Repairs that concern a guest, a
//! driver or a record are transactions of the engine.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::Duration;

use nix::errno::Errno;
use pciback::Sbdf;
use pciback::inventory::{Observed, Plan, Reason, Repair, ReportKind, Step, Want, Wanted, plan};
use pciback::platform::hypervisor::DeviceReport;

use super::Event;
use super::observe::Known;
use crate::engine;
use crate::engine::tasks::TaskContext;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::Success;
use crate::reply::Reply;

/// The limit for an answer of the engine, which never blocks.
const ENGINE_LIMIT: Duration = Duration::from_secs(10);

/// The result of a comparison.
pub struct Synced {
    /// Nothing was to be repaired.
    pub(super) dry_run: bool,
    pub(super) plan: Plan,
    /// The outcome of each step.
    pub(super) outcomes: Vec<(Step, Outcome)>,
    /// The functions that were found.
    pub(super) found: Known,
    /// Why functions could not be compared.
    pub(super) unread: Vec<String>,
}

/// The outcome of one step.
pub(super) enum Outcome {
    Done,
    /// Not carried out: the function has changed meanwhile, or a step failed that this one relies on.
    Left,
    Failed(Failure),
}

impl TaskContext {
    /// Compares the lists and repairs differences. `unasked`: no client waits for the result.
    pub(super) fn sync(
        &self,
        mut wanted: Wanted,
        known: &Known,
        dry_run: bool,
        unasked: bool,
        progress: &dyn Fn(&str),
    ) -> Result<Synced, Failure> {
        let (observed, unread) = self.observe(&mut wanted, known)?;
        let mut plan = plan(&observed, &wanted);
        if unasked {
            plan.steps.retain(|step| !is_left(step, &observed, &wanted));
        }
        let outcomes = if dry_run { Vec::new() } else { self.carry_out(&plan, &observed, progress) };
        let found =
            observed.functions.iter().map(|(address, function)| (*address, function.physical_function));
        Ok(Synced { dry_run, plan, outcomes, found: found.collect(), unread })
    }

    /// Carries out the steps in order; a step that relies on one that was not carried out is left out.
    fn carry_out(&self, plan: &Plan, observed: &Observed, progress: &dyn Fn(&str)) -> Vec<(Step, Outcome)> {
        let pf =
            |address: Sbdf| observed.functions.get(&address).and_then(|function| function.physical_function);
        let (mut stuck, mut stuck_pfs) = (BTreeSet::new(), BTreeSet::new());
        let outcomes = plan.steps.iter().map(|step| {
            let address = step.repair.address();
            // Xen must know the PF of a VF when the VF is added or removed, and a PF may be removed only after its VFs.
            let relies = match step.repair {
                Repair::ReportToXen { .. } => pf(address).is_some_and(|pf| stuck.contains(&pf)),
                Repair::RemoveFromXen { .. } => {
                    pf(address).is_some_and(|pf| stuck.contains(&pf)) || stuck_pfs.contains(&address)
                }
                _ => false,
            };
            let outcome = if relies || stuck.contains(&address) {
                Outcome::Left
            } else {
                progress(&step.repair.to_string());
                self.carry_out_one(step.repair)
            };
            if !matches!(outcome, Outcome::Done) {
                stuck.insert(address);
                stuck_pfs.extend(pf(address));
            }
            (*step, outcome)
        });
        outcomes.collect()
    }

    fn carry_out_one(&self, repair: Repair) -> Outcome {
        let address = repair.address();
        if !matches!(
            repair,
            Repair::ReportToXen { .. } | Repair::RemoveFromXen { .. } | Repair::ReleaseMsix { .. }
        ) {
            let limit = self.settings.longest_guest_limit() + self.settings.driver_limit() + ENGINE_LIMIT;
            let (reply, answer) = Reply::awaited();
            self.inbox.send(engine::Event::Inventory(Event::Repair(repair, reply)));
            return match answer.wait(limit) {
                Ok(Success::Already { .. }) => Outcome::Left,
                Ok(_) => Outcome::Done,
                Err(failure) => Outcome::Failed(failure),
            };
        }
        let (sender, answer) = mpsc::channel();
        self.inbox.send(engine::Event::Inventory(Event::Reserve(address, sender)));
        match answer.recv_timeout(ENGINE_LIMIT) {
            Ok(true) => {}
            Ok(false) => return Outcome::Left,
            Err(error) => {
                return Outcome::Failed(Failure::new(
                    ErrorCode::Failed,
                    format!("wait for the engine: {error}"),
                ));
            }
        }
        let outcome = self.repair_list(repair).unwrap_or_else(Outcome::Failed);
        let event = Event::ListRepaired(repair, matches!(outcome, Outcome::Done));
        self.inbox.send(engine::Event::Inventory(event));
        outcome
    }

    /// Repairs Xen's list, unless sysfs has changed meanwhile.
    fn repair_list(&self, repair: Repair) -> Result<Outcome, Failure> {
        let hypervisor = self.platform.hypervisor.as_ref();
        let address = repair.address();
        let function = self.find(address)?;
        match (repair, function) {
            (Repair::ReportToXen { kind, .. }, Some(function)) => {
                let (extended, physical_function) = match kind {
                    ReportKind::Plain => (false, None),
                    ReportKind::Extended => (true, None),
                    ReportKind::Virtual { physical_function } => (false, Some(physical_function)),
                };
                let proximity = function.numa_node;
                hypervisor.device_add(address, DeviceReport { extended, physical_function, proximity })?;
            }
            (Repair::RemoveFromXen { .. }, None) => match hypervisor.device_remove(address) {
                // dom0's kernel may have removed it already.
                Err(error) if error.errno() == Some(Errno::ENODEV) => {}
                other => other?,
            },
            (Repair::ReleaseMsix { .. }, Some(_)) => hypervisor.release_msix(address)?,
            _ => return Ok(Outcome::Left),
        }
        Ok(Outcome::Done)
    }
}

/// Whether a step is left out if no client asked for it: taking a held function back from a driver that an administrator bound it to,
/// since that makes it dom0's (see [`super::examination`]), and retrying a failed withdrawal that has quarantined the function.
fn is_left(step: &Step, observed: &Observed, wanted: &Wanted) -> bool {
    let address = step.repair.address();
    match step.repair {
        Repair::Hold { .. } => {
            let host = observed.functions.get(&address).and_then(|function| function.host.as_ref());
            step.reason == Reason::NotHeld && host.is_some_and(|host| host.driver)
        }
        Repair::Withdraw { .. } => {
            let intent = wanted.functions.get(&address);
            intent.is_some_and(|intent| matches!(intent.want, Want::Quarantined(_)))
        }
        _ => false,
    }
}
