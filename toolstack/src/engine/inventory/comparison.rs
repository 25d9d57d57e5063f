//! Keeps sysfs, Xen and xenstore consistent: decides when they are compared, and reports repairs.
//!
//! The planner ([`pciback::inventory`]) is a pure function. The lists are compared when the service starts, after events were lost, when
//! an event shows a difference, and on request; one comparison at a time, on a thread ([`super::repairs`]). A repair that fails, or that
//! is undone from outside, is tried [`TRIES`] times and then left to the administrator.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::mpsc;
use std::time::SystemTime;

use log::{error, warn};
use pciback::inventory::{GuestPlace, Intent, Owner, Plan, Repair, Step, Want, Wanted};
use pciback::serve::pv::nodes;
use pciback::{FunctionState, Sbdf};

use super::Event;
use super::examination::ExaminedFunction;
use super::observe::Known;
use super::repairs::{Outcome, Synced};
use crate::engine::problems::Problem;
use crate::engine::tasks::Course;
use crate::engine::{self, Engine};
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Cause, Success, SyncView};
use crate::reply::Reply;
use crate::transaction::{Kind, Withdrawal};

/// How often the same function is repaired, or its list read, before the service gives up.
const TRIES: u32 = 3;
/// The number of repairs that are shown in the status.
const SHOWN: usize = 16;

/// The state of comparisons.
#[derive(Default)]
pub(super) struct Comparisons {
    /// Whether one is under way.
    running: bool,
    /// Whether another one is due, because a difference was seen.
    due: bool,
    /// Clients that wait for a comparison; `true`: they want only the plan.
    waiting: VecDeque<(bool, Reply)>,
    /// Functions with which an operation began after the lists were read. The plan does not apply to them.
    touched: BTreeSet<Sbdf>,
    known: Known,
    tried: BTreeMap<Sbdf, Tried>,
    /// The last repairs that no client requested.
    repaired: VecDeque<String>,
    /// Failed reads of the lists.
    unread: Unread,
}

/// Failed reads of the lists.
#[derive(Default)]
struct Unread {
    why: Vec<String>,
    /// The number of consecutive failures.
    times: u32,
    /// The time of the first one.
    since: Option<SystemTime>,
}

/// Repairs of one function that no client requested.
#[derive(Default)]
struct Tried {
    times: u32,
    failure: Option<String>,
    /// The time of the first failure.
    since: Option<SystemTime>,
}

impl Comparisons {
    /// Whether a comparison is under way.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Queues a client's request for a comparison.
    pub fn queue(&mut self, dry_run: bool, reply: Reply) {
        self.waiting.push_back((dry_run, reply));
    }

    /// Requests a comparison.
    pub fn make_due(&mut self) {
        self.due = true;
    }

    /// Notes that an operation begins with a function, or with the VFs of a PF.
    pub fn touch(&mut self, address: Sbdf) {
        if self.running {
            self.touched.insert(address);
        }
    }

    /// The VFs of a PF, including those that have left the host but that Xen still knows.
    pub fn vfs(&self, pf: Sbdf) -> impl Iterator<Item = Sbdf> {
        self.known.iter().filter(move |(_, found)| **found == Some(pf)).map(|(vf, _)| *vf)
    }

    /// The last repairs, for the status.
    pub fn repaired(&self) -> Vec<String> {
        self.repaired.iter().cloned().collect()
    }

    /// Failed repairs, as problems for the status.
    pub fn problems(&self) -> Vec<Problem> {
        let failed = self.tried.iter().filter_map(|(address, tried)| {
            let given_up = if tried.times < TRIES { "" } else { "; given up, 'xpci sync' tries again" };
            let text = match &tried.failure {
                Some(failure) => {
                    format!("{address} is not consistent in sysfs, Xen and xenstore: {failure}{given_up}")
                }
                None if given_up.is_empty() => return None,
                None => format!("{address} was repaired {TRIES} times and is inconsistent again{given_up}"),
            };
            let problem = Problem::new(Cause::OutOfStep, text).on(*address);
            Some(problem.since(tried.since.unwrap_or_else(SystemTime::now)))
        });
        let Unread { why, since, .. } = &self.unread;
        let unread = why.iter().map(|why| {
            let problem = Problem::new(Cause::OutOfStep, format!("not compared with Xen: {why}"));
            problem.since(since.unwrap_or_else(SystemTime::now))
        });
        failed.chain(unread).collect()
    }

    /// Resets the number of tries, because another function is at the address, or a requested repair succeeded.
    pub fn begin_anew(&mut self, address: Sbdf) {
        self.tried.remove(&address);
    }

    /// Counts a try; whether it is within the limit.
    pub fn may_try(&mut self, address: Sbdf) -> bool {
        let tried = self.tried.entry(address).or_default();
        tried.times += 1;
        tried.times <= TRIES
    }

    fn given_up(&self, address: Sbdf) -> bool {
        self.tried.get(&address).is_some_and(|tried| tried.times >= TRIES)
    }
}

impl Engine {
    /// Starts a comparison if one is due and none runs.
    pub(in crate::engine) fn reconcile(&mut self) {
        // The examination under way may make a comparison unnecessary.
        if self.inventory.comparisons.running
            || self.inventory.examinations.is_running()
            || self.vfs.is_starting()
        {
            return;
        }
        let Comparisons { due, waiting, .. } = &mut self.inventory.comparisons;
        let client = match waiting.front() {
            // A dry run waits for the due comparison and its repairs.
            Some((true, _)) if *due => None,
            Some(_) => waiting.pop_front(),
            None if *due => None,
            None => return,
        };
        let dry_run = client.as_ref().is_some_and(|(dry_run, _)| *dry_run);
        if !dry_run {
            self.inventory.comparisons.due = false;
        }
        let mut wanted = self.wanted();
        match client {
            // A client that asks has probably fixed the cause of earlier failures.
            Some(_) => self.inventory.comparisons.unread = Default::default(),
            None => wanted.busy.extend(
                self.inventory
                    .comparisons
                    .tried
                    .keys()
                    .filter(|address| self.inventory.comparisons.given_up(**address)),
            ),
        }
        self.inventory.comparisons.running = true;
        self.inventory.comparisons.touched.clear();
        let (context, known) = (self.task_context(), self.inventory.comparisons.known.clone());
        self.background("sync", move || {
            let reply = client.map(|(_, reply)| reply);
            let progress = |text: &str| {
                if let Some(reply) = &reply {
                    reply.progress(text)
                }
            };
            let synced = context.sync(wanted, &known, dry_run, reply.is_none(), &progress);
            context.inbox.send(engine::Event::Inventory(Event::Compared(synced, reply)));
        });
    }

    fn wanted(&self) -> Wanted {
        let intent = |record: &Record| {
            let place = record.guest.map(|guest| GuestPlace { domain: guest.domain, devfn: guest.devfn });
            let want = match (record.state, place) {
                (FunctionState::Quarantined, place) => Want::Quarantined(place),
                (FunctionState::Gone, _) => Want::Gone,
                (FunctionState::Host, _) => Want::Host,
                (_, Some(place)) => Want::Attached(place),
                (_, None) => Want::Held,
            };
            // No identity here: when the event arrives, the incarnation shows whether the device is another one.
            Intent { want, identity: None, msix_prepared: record.msix_prepared }
        };
        Wanted {
            functions: self
                .functions
                .records()
                .all()
                .map(|record| (record.address, intent(record)))
                .collect(),
            busy: self.functions.busy().union(self.vfs.changing()).copied().collect(),
        }
    }

    /// Notes an examined function, and requests a comparison if sysfs and Xen differ.
    pub(super) fn compare(&mut self, seen: &ExaminedFunction) {
        let address = seen.address;
        let known = &mut self.inventory.comparisons.known;
        match (&seen.function, seen.owner) {
            (None, None) => drop(known.remove(&address)),
            (Some(function), _) => drop(known.insert(address, function.physical_function)),
            (None, Some(_)) => drop(known.entry(address).or_default()),
        }
        let drifted = matches!(
            (&seen.function, seen.owner, self.functions.records().state(address)),
            (Some(_), None, _)
                | (None, Some(_), _)
                | (Some(_), Some(Owner::Guest), FunctionState::Held)
                | (Some(_), Some(Owner::Free), FunctionState::Attached)
        );
        if drifted && !self.functions.is_busy(address) && !self.inventory.comparisons.given_up(address) {
            self.inventory.comparisons.make_due();
        }
    }

    /// Handles the end of a comparison.
    pub(super) fn compared(&mut self, synced: Result<Synced, Failure>, reply: Option<Reply>) {
        self.inventory.comparisons.running = false;
        match (synced, reply) {
            (Ok(synced), reply) => {
                for (address, pf) in &synced.found {
                    self.inventory
                        .comparisons
                        .known
                        .entry(*address)
                        .and_modify(|known| *known = known.or(*pf))
                        .or_insert(*pf);
                }
                self.note_unread(synced.unread.clone(), reply.is_none());
                match reply {
                    Some(reply) => {
                        let made =
                            synced.outcomes.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Done));
                        for (step, _) in made {
                            self.inventory.comparisons.begin_anew(step.repair.address());
                        }
                        reply.done(answer(synced));
                    }
                    None => self.note_outcomes(synced),
                }
            }
            (Err(failure), Some(reply)) => reply.done(Err(failure)),
            (Err(failure), None) => {
                warn!("compare sysfs, Xen and xenstore: {failure}");
                self.note_unread(vec![failure.to_string()], true);
            }
        }
    }

    /// Notes failed reads, and requests another comparison up to the limit.
    fn note_unread(&mut self, unread: Vec<String>, again: bool) {
        let before = &self.inventory.comparisons.unread;
        let (times, since) = match unread.is_empty() {
            true => (0, None),
            false => (before.times + 1, before.since.or_else(|| Some(SystemTime::now()))),
        };
        self.inventory.comparisons.due |= again && (1..TRIES).contains(&times);
        self.inventory.comparisons.unread = Unread { why: unread, times, since };
    }

    /// Reports the service's own repairs, and counts failures.
    fn note_outcomes(&mut self, synced: Synced) {
        let Comparisons { tried, repaired, due, .. } = &mut self.inventory.comparisons;
        let planned: BTreeSet<Sbdf> = synced.plan.steps.iter().map(|step| step.repair.address()).collect();
        // A function that became consistent without a repair is no problem any more.
        tried.retain(|address, tried| {
            tried.times >= TRIES || planned.contains(address) || tried.failure.is_none()
        });
        let mut counted = BTreeSet::new();
        for (step, outcome) in synced.outcomes {
            let address = step.repair.address();
            let failure = match outcome {
                Outcome::Left => continue,
                Outcome::Done => {
                    warn!("repaired: {step}");
                    repaired.push_back(step.to_string());
                    None
                }
                Outcome::Failed(failure) => {
                    error!("{step}; but: {failure}");
                    *due = true;
                    Some(format!("{}: {}", step.repair, failure.message))
                }
            };
            let entry = tried.entry(address).or_default();
            // Several steps for one function count as one try.
            entry.times += u32::from(counted.insert(address));
            entry.since = entry.since.or_else(|| Some(SystemTime::now()));
            entry.failure = failure;
        }
        while repaired.len() > SHOWN {
            repaired.pop_front();
        }
    }

    /// Whether the plan still applies to a function.
    fn is_untouched(&self, address: Sbdf) -> bool {
        let pf = self.inventory.comparisons.known.get(&address).copied().flatten();
        let of = |address: Sbdf| {
            self.inventory.comparisons.touched.contains(&address)
                || self.functions.is_busy(address)
                || self.vfs.is_changing(address)
        };
        !of(address) && !pf.is_some_and(of)
    }

    /// Reserves a function for a repair of Xen's list, unless an operation began with it meanwhile.
    pub(super) fn reserve(&mut self, address: Sbdf, answer: &mpsc::Sender<bool>) {
        let free = self.is_untouched(address);
        if free {
            self.repair_begins(address);
        }
        // The thread that asked may have given up.
        if answer.send(free).is_err() && free {
            self.repair_ends(address);
        }
    }

    /// Handles the end of a repair of Xen's list.
    pub(super) fn list_repaired(&mut self, repair: Repair, done: bool) {
        let address = repair.address();
        // Events during the repair were not handled.
        self.inventory.examine(address);
        let forgotten = done && matches!(repair, Repair::ReleaseMsix { .. } | Repair::ReportToXen { .. });
        if forgotten
            && let Some(record) = self.functions.note_msix_released(address)
            && let Err(problem) = self.files.journal.write(&record)
        {
            error!("{problem}");
            self.problems.push(Problem::unwritten(&problem));
        }
        self.repair_ends(address);
    }

    /// Carries out a repair that concerns a guest, a driver or a record.
    pub(super) fn repair(&mut self, repair: Repair, reply: Reply) {
        let address = repair.address();
        if !self.is_untouched(address) {
            return reply.done(Ok(left(format!("{address}: another operation has started"))));
        }
        let record = self.functions.records().get_or_new(address);
        let (course, what) = match repair {
            Repair::Withdraw { .. } => {
                (Course::Backward(Kind::Detach, Withdrawal::Force), "withdrawn from its guest")
            }
            Repair::DetachFromDead { .. } => {
                (Course::Backward(Kind::Detach, Withdrawal::GuestEnded), "held again")
            }
            Repair::Hold { .. } => (Course::Forward(Kind::Hold), "held again"),
            Repair::Release { .. } => {
                (Course::Backward(Kind::Release, Withdrawal::GuestEnded), "dom0's again")
            }
            other => return reply.done(self.note_repair(other, record)),
        };
        self.requests_wait(address);
        self.start(course, record, Some(reply), move |record| format!("{}: {what}", record.address));
        // This operation is part of the plan itself.
        self.inventory.comparisons.touched.remove(&address);
    }

    /// Carries out repairs of records and nodes.
    fn note_repair(&mut self, repair: Repair, record: Record) -> Result<Success, Failure> {
        let address = record.address;
        let failed =
            |error: &dyn std::fmt::Display| Failure::new(ErrorCode::Failed, error.to_string()).on(address);
        let message = match repair {
            Repair::Quarantine { .. } => {
                // The record notes the reason.
                self.functions.keep_new(&record);
                self.quarantine(address, "sysfs, Xen and xenstore disagree on who has it");
                format!("{address}: quarantined")
            }
            Repair::MarkGone { .. } => {
                let gone = Record { state: FunctionState::Gone, transaction: None, ..record };
                self.files.journal.write(&gone).map_err(|error| failed(&error))?;
                self.functions.keep(gone);
                format!("{address}: marked as gone")
            }
            Repair::Forget { .. } => {
                self.forget(address)?;
                format!("{address}: forgotten")
            }
            Repair::RemoveNodes { place, .. } if !self.guests.contains(place.domain) => {
                let store = self.platform.store.as_ref();
                nodes::apply(store, place.domain, &[nodes::NodeChange::RemoveAll])?;
                format!("{address}: its nodes are removed")
            }
            // The handshake of a served guest writes and removes nodes in its own order.
            other => return Ok(left(format!("{other}: not while its guest is served"))),
        };
        Ok(Success::Changed { message, warnings: Vec::new(), functions: Vec::new() })
    }
}

/// The answer if nothing was done.
fn left(message: String) -> Success {
    Success::Already { message }
}

/// The answer to the client that requested the comparison.
fn answer(synced: Synced) -> Result<Success, Failure> {
    let Synced { dry_run, plan, outcomes, unread, .. } = synced;
    let undone = outcomes.iter().filter_map(|(step, outcome)| match outcome {
        Outcome::Done => None,
        Outcome::Left => {
            Some((step, "another operation has started, or it waits for another repair".to_owned(), None))
        }
        Outcome::Failed(failure) => Some((step, failure.message.clone(), Some(failure))),
    });
    let undone: Vec<(&Step, String, Option<&Failure>)> = undone.collect();
    // The first failure is more informative than the steps left out because of it.
    let first = undone.iter().find(|(.., failure)| failure.is_some()).or_else(|| undone.first());
    if let Some((step, why, failure)) = first {
        let done = outcomes.len() - undone.len();
        let message = format!("{}: {why}; {done} of {} repairs were made", step.repair, outcomes.len());
        let code = failure.map_or(ErrorCode::Refused, |failure| failure.code);
        return Err(Failure::new(code, message)
            .on(step.repair.address())
            .hint("'xpci sync --dry-run' plans what is left"));
    }
    if let Some(why) = unread.first() {
        let message = format!("{} functions could not be compared with Xen: {why}", unread.len());
        return Err(Failure::new(ErrorCode::Failed, message));
    }
    Ok(Success::Synced(view(dry_run, plan)))
}

fn view(dry_run: bool, plan: Plan) -> SyncView {
    SyncView { dry_run, text: plan.to_string().lines().map(str::to_owned).collect(), plan }
}
