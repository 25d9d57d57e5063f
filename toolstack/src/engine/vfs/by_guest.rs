//! VFs that the guest with their PF creates (policy `virtual-functions`).
//!
//! What the guest wants is in the image of the PF, what there is in sysfs: no other record is needed, and a service that was killed between
//! any two steps goes on from both. One change of a PF's VFs runs at a time; a guest that changes its mind meanwhile is looked at again at
//! its end. VFs that go are first taken from their guests and released, then the PF's driver removes them.

use std::collections::{BTreeMap, BTreeSet};

use log::{Level, error};
use pciback::policy::Subject;
use pciback::serve::{GuestFunction, VfRequests};
use pciback::{FunctionState, Sbdf};

use super::{Event, all_known, disable};
use crate::domains;
use crate::engine::problems::Problem;
use crate::engine::tasks::{self, Course, TaskContext};
use crate::engine::{self, Answer, Engine};
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::Cause;
use crate::transaction::{Kind, PF_STUB, Withdrawal};

/// The PFs whose guests create VFs.
#[derive(Default)]
pub(super) struct GuestVfs(BTreeMap<Sbdf, Pf>);

#[derive(Default)]
struct Pf {
    /// The guest's requests; `None` after it has lost the PF.
    requests: Option<VfRequests>,
    /// The number of the request that was looked at last.
    number: u64,
    /// What is being done.
    change: Option<Change>,
    /// The guest asked for a reset of the PF while VFs that it does not want any more are still there.
    reset: bool,
    /// Transactions that wait until the PF has no VFs, to take it from its guest.
    leaving: Vec<Answer>,
}

/// A change of the VFs of a PF.
enum Change {
    /// These are taken from their guests and released, before the driver removes all.
    Clearing(BTreeSet<Sbdf>),
    /// The PF's driver creates or removes VFs.
    Driver,
}

impl GuestVfs {
    /// Whether a transaction of this function is awaited.
    fn awaits(&self, vf: Sbdf) -> Option<Sbdf> {
        let clears = |pf: &Pf| matches!(&pf.change, Some(Change::Clearing(vfs)) if vfs.contains(&vf));
        self.0.iter().find(|(_, pf)| clears(pf)).map(|(address, _)| *address)
    }
}

impl Engine {
    /// A function is served from now on.
    pub(in crate::engine) fn note_vf_requests(&mut self, function: &GuestFunction) {
        if let Some(requests) = function.vf_requests() {
            self.vfs.by_guest.0.entry(function.address()).or_default().requests = Some(requests);
        }
    }

    /// The earlier run may have been killed in the midst of a change.
    pub(in crate::engine) fn resume_guest_vfs(&mut self) {
        for address in self.vfs.by_guest.0.keys().copied().collect::<Vec<_>>() {
            self.vfs_wanted(address);
        }
    }

    /// Brings the VFs of a PF to what its guest wants: to none, if it has lost the PF.
    pub(in crate::engine) fn vfs_wanted(&mut self, address: Sbdf) {
        let host = std::sync::Arc::clone(&self.platform.host);
        let Some(pf) = self.vfs.by_guest.0.get_mut(&address).filter(|pf| pf.change.is_none()) else { return };
        let leaving = !pf.leaving.is_empty();
        let (number, wanted) = match &pf.requests {
            Some(requests) => requests.take(),
            None => (0, 0),
        };
        if number == 0
            && !leaving
            && self.functions.records().get(address).is_some_and(|record| record.keeps_vfs)
        {
            // The guest starts again, and its driver has not asked yet.
            return;
        }
        pf.number = number;
        self.note_asked(address);
        let wanted = if leaving { 0 } else { wanted };
        let present = host.function(address).map(|function| function.virtual_functions).unwrap_or_default();
        if present.len() == usize::from(wanted) {
            self.answer_vfs(address);
            present.into_iter().for_each(|vf| self.hold_guest_vf(vf));
            return;
        }
        if let Err(failure) = self.may_create(address, wanted) {
            self.vfs_refused(address, &failure);
            return;
        }
        match present.is_empty() {
            true => self.create_guest_vfs(address, wanted),
            false => {
                if let Some(pf) = self.vfs.by_guest.0.get_mut(&address) {
                    pf.change = Some(Change::Clearing(present.into_iter().collect()));
                }
                self.clear_guest_vfs(address);
            }
        }
    }

    /// The guest has said what it wants: VFs of its earlier domain do not stay for longer.
    fn note_asked(&mut self, address: Sbdf) {
        let Some(record) = self.functions.note_vfs_asked(address) else { return };
        if let Err(problem) = self.files.journal.write(&record) {
            error!("{address}: {problem}");
            self.problems.push(Problem::failed(Cause::StateFiles, &Failure::from(problem)).on(address));
        }
    }

    /// Refuses more VFs than a policy gives the guest, and those of a PF that another driver holds.
    fn may_create(&self, address: Sbdf, wanted: u16) -> Result<(), Failure> {
        if wanted == 0 {
            return Ok(());
        }
        let refused = |text: String| Failure::refused(text).on(address);
        let record = self.functions.records().get_or_new(address);
        let Some(guest) = record.guest.filter(|_| record.state == FunctionState::Attached) else {
            return Err(refused(format!("{address} is {}", record.state)));
        };
        let function = self.platform.host.function(address)?;
        let name = domains::name(self.platform.store.as_ref(), guest.domain)?;
        let merged = self.policies.merge(&Subject::of_host(&function, name));
        let limit = merged.policy.virtual_functions.map_or(0, |by_guest| by_guest.count);
        if wanted > limit {
            let text = format!("domain {} asks for {wanted} VFs, and policies give it {limit}", guest.domain);
            return Err(refused(text).of(guest.domain));
        }
        if function.driver.as_deref() != Some(PF_STUB) {
            let text = format!(
                "{address} is held by {}, which cannot create VFs",
                function.driver.as_deref().unwrap_or("no driver")
            );
            return Err(refused(text).hint(format!(
                "detach it, then 'xpci pci-assignable-remove {address}' and 'xpci pci-assignable-add {address}': {PF_STUB} holds it then"
            )));
        }
        Ok(())
    }

    fn create_guest_vfs(&mut self, address: Sbdf, wanted: u16) {
        self.change_by_driver(address, move |context| create(context, address, wanted));
    }

    /// Has the driver of a PF create or remove VFs, on a thread of its own.
    fn change_by_driver(
        &mut self,
        address: Sbdf,
        change: impl FnOnce(&TaskContext) -> Result<(), Failure> + Send + 'static,
    ) {
        if let Some(pf) = self.vfs.by_guest.0.get_mut(&address) {
            pf.change = Some(Change::Driver);
        }
        self.vfs.changing.insert(address);
        self.inventory.touch(address);
        let (context, inbox) = (self.task_context(), self.inbox.clone());
        let work = move || change(&context);
        self.inbox.background(&format!("vfs {address}"), work, move |outcome| {
            let outcome = outcome.and_then(|outcome| outcome).map_err(|failure| failure.on(address));
            inbox.send(engine::Event::Vfs(Event::ChangedForGuest(address, outcome)));
        });
    }

    /// The driver has created or removed VFs, or failed to.
    pub(super) fn guest_vfs_changed(&mut self, address: Sbdf, outcome: Result<(), Failure>) {
        self.vfs_changed(address, outcome.is_ok());
        if let Some(pf) = self.vfs.by_guest.0.get_mut(&address) {
            pf.change = None;
        }
        match outcome {
            Ok(()) => self.vfs_wanted(address),
            Err(failure) => self.vfs_refused(address, &failure),
        }
    }

    fn vfs_refused(&mut self, address: Sbdf, failure: &Failure) {
        let text = format!("{address}: VFs that its guest asks for: {failure}");
        if let Some(guest) = self.functions.records().guest(address)
            && let Some(guest) = self.guests.get_mut(guest)
        {
            // Limited: a guest can ask again and again.
            guest.log_line(Level::Error, &text);
        }
        self.problems.resolve_of(address, &[Cause::VirtualFunctions]);
        self.problems.push(Problem::new(Cause::VirtualFunctions, text).on(address));
        let Some(pf) = self.vfs.by_guest.0.get_mut(&address) else { return };
        // What waits for the PF has to say that it still has VFs.
        for answer in std::mem::take(&mut pf.leaving) {
            answer.send(Err(failure.clone()));
        }
        let number = pf.number;
        let asked_again = pf.requests.as_ref().is_some_and(|requests| {
            requests.answer(number, false);
            requests.take().0 != number
        });
        // The same request is not tried again: its guest learns that it failed, and may ask again.
        if asked_again {
            self.vfs_wanted(address);
        }
    }

    /// The PF has as many VFs as its guest wants.
    fn answer_vfs(&mut self, address: Sbdf) {
        let Some(pf) = self.vfs.by_guest.0.get_mut(&address) else { return };
        if let Some(requests) = &pf.requests {
            requests.answer(pf.number, true);
        }
        let reset = std::mem::take(&mut pf.reset);
        for answer in std::mem::take(&mut pf.leaving) {
            pf.requests = None;
            answer.send(Ok(None));
        }
        self.problems.resolve_of(address, &[Cause::VirtualFunctions]);
        if reset {
            self.reset_for_guest(address);
        }
    }

    /// Holds a VF that its guest has created: no driver of dom0 gets it.
    fn hold_guest_vf(&mut self, vf: Sbdf) {
        let record = self.functions.records().get_or_new(vf);
        if record.state == FunctionState::Host && !self.functions.is_busy(vf) {
            let reply = self.inbox.unasked_reply(Cause::VirtualFunctions);
            self.start(Course::Forward(Kind::Hold), record, Some(reply), |record| {
                format!("{}: held, the guest with its PF has created it", record.address)
            });
        }
    }

    /// Takes VFs from their guests and releases them; when none is left, the driver removes them.
    fn clear_guest_vfs(&mut self, address: Sbdf) {
        let Some(Pf { change: Some(Change::Clearing(vfs)), .. }) = self.vfs.by_guest.0.get(&address) else {
            return;
        };
        let mut waits = false;
        for vf in vfs.clone() {
            let record = self.functions.records().get_or_new(vf);
            if record.state == FunctionState::Quarantined
                && record.guest.is_some()
                && !self.functions.is_busy(vf)
            {
                let text = format!(
                    "{vf} cannot be taken from its guest, see its quarantine; VFs stay until that is cleared"
                );
                let failure = Failure::new(ErrorCode::Quarantined, text).on(vf);
                if let Some(pf) = self.vfs.by_guest.0.get_mut(&address) {
                    pf.change = None;
                }
                return self.vfs_refused(address, &failure);
            }
            waits |= self.functions.is_busy(vf) || self.take_from_guest(record);
        }
        if waits {
            return;
        }
        self.change_by_driver(address, move |context| disable(context, address));
    }

    /// Begins to take a VF from its guest, or to release it; `false`: it is dom0's, or quarantined without a guest.
    fn take_from_guest(&mut self, record: Record) -> bool {
        let (course, done) = match (record.state, record.guest) {
            (_, Some(_)) => (Course::Backward(Kind::Detach, Withdrawal::Force), "taken from its guest"),
            (FunctionState::Held, None) => {
                (Course::Backward(Kind::Release, Withdrawal::GuestEnded), "released")
            }
            _ => return false,
        };
        let reply = self.inbox.unasked_reply(Cause::VirtualFunctions);
        self.start(course, record, Some(reply), move |record| {
            format!("{}: {done}, the guest with its PF removes it", record.address)
        });
        true
    }

    /// A transaction of a function has ended.
    pub(in crate::engine) fn guest_vfs_go_on(&mut self, address: Sbdf) {
        if let Some(pf) = self.vfs.by_guest.awaits(address) {
            self.clear_guest_vfs(pf);
        }
    }

    /// A PF is about to be taken from its guest: its VFs go first.
    pub(in crate::engine) fn remove_guest_vfs(&mut self, address: Sbdf, answer: Answer) {
        self.vfs.by_guest.0.entry(address).or_default().leaving.push(answer);
        self.vfs_wanted(address);
    }

    /// Whether a reset of a PF has to wait, because VFs are there that it would remove; `by_guest`: its guest asked for it.
    pub(in crate::engine) fn vfs_prevent_reset(&mut self, address: Sbdf, by_guest: bool) -> bool {
        let Some(pf) = self.vfs.by_guest.0.get_mut(&address) else { return false };
        let vfs = self.platform.host.function(address).map_or(0, |function| function.num_vfs);
        if vfs == 0 && pf.change.is_none() {
            return false;
        }
        if by_guest {
            pf.reset = true;
        } else {
            self.quarantine(address, "a reset would remove its VFs under their guests");
        }
        true
    }
}

impl TaskContext {
    /// Has the VFs of a PF removed that its guest has created, unless they stay for that guest, which starts again.
    pub(in crate::engine) fn without_guest_vfs(
        &self,
        record: &Record,
        withdrawal: Withdrawal,
    ) -> Result<(), Failure> {
        let address = record.address;
        let has_vfs = self.platform.host.function(address).is_ok_and(|function| function.num_vfs > 0);
        if !has_vfs || withdrawal == Withdrawal::GuestEnded && self.keeps_guest_vfs(record) {
            return Ok(());
        }
        self.ask(|answer| tasks::Event::RemoveVfs(address, answer)).map(drop)
    }

    /// Whether the guest of a PF, or its next domain, has it persistently.
    pub(in crate::engine) fn keeps_guest_vfs(&self, record: &Record) -> bool {
        let Some((reservation, place)) = self.files.reservations.get(record.address).zip(record.guest) else {
            return false;
        };
        let is_that_guest = |uuid| reservation.guest == uuid;
        reservation.given_in(&record.boot) == Some(place.domain)
            || self.platform.hypervisor.domain(place.domain).is_ok_and(|info| is_that_guest(info.uuid))
    }
}

/// Creates VFs, all or none.
fn create(context: &TaskContext, address: Sbdf, count: u16) -> Result<(), Failure> {
    context.room_for(address, count)?;
    let (host, limit) = (&context.platform.host, context.settings.driver_limit());
    host.set_vf_autoprobe(address, false)?;
    let created = host.set_num_vfs(address, count, limit).map_err(Failure::from);
    let Err(failure) = created.and_then(|()| all_known(context, address, count, limit)) else {
        return Ok(());
    };
    match host.set_num_vfs(address, 0, limit) {
        Ok(()) => Err(failure),
        Err(second) => {
            error!("{address}: remove VFs that did not all come up: {second}");
            let message = format!("{}; and then: {second}", failure.message);
            Err(Failure { code: ErrorCode::Failed, message, ..failure })
        }
    }
}
