//! Carrying out what the guests with PFs want of their VFs (`by_guest`).

use std::sync::Arc;

use log::{Level, error};
use pciback::Sbdf;
use pciback::serve::GuestFunction;

use super::by_guest::{Context, Effect, GuestVfs};
use super::driver::{create_bare, disable};
use super::{ChangedPf, Event, Vfs};
use crate::engine::problems::Problem;
use crate::engine::tasks::{self, Course, TaskContext};
use crate::engine::{self, Answer, Engine};
use crate::journal::Record;
use crate::outcome::Failure;
use crate::protocol::Cause;
use crate::transaction::{Kind, Withdrawal};

impl Engine {
    fn guest_vfs(&mut self) -> (&mut GuestVfs, Context<'_>) {
        let Self { vfs: Vfs { by_guest, .. }, platform, functions, policies, .. } = self;
        (by_guest, Context { platform, functions, policies })
    }

    fn guest_vfs_step(&mut self, step: impl FnOnce(&mut GuestVfs, &Context<'_>) -> Vec<Effect>) {
        let (vfs, context) = self.guest_vfs();
        for effect in step(vfs, &context) {
            match effect {
                Effect::Keep(vf) => self.pf_started_again(vf),
                Effect::Asked(pf) => self.note_vfs_asked(pf),
                Effect::Create(pf, count) => {
                    self.change_by_driver(pf, move |context| create_bare(context, pf, count));
                }
                Effect::Remove(pf) => self.change_by_driver(pf, move |context| disable(context, pf)),
                Effect::Hold(vf) => self.hold_guest_vf(vf),
                Effect::Take(record) => {
                    let detach = Course::Backward(Kind::Detach, Withdrawal::Force);
                    self.remove_guest_vf(detach, *record, "taken from its guest");
                }
                Effect::Release(record) => {
                    let release = Course::Backward(Kind::Release, Withdrawal::GuestEnded);
                    self.remove_guest_vf(release, *record, "released");
                }
                Effect::Refused(pf, failure) => self.vfs_refused(pf, &failure),
                Effect::Settled(pf) => self.problems.resolve_of(pf, &[Cause::VirtualFunctions]),
                Effect::Reset(pf) => self.reset_for_guest(pf),
                Effect::ResetView(pf) => self.end_reset_of_view(pf),
            }
        }
    }

    /// A function is served from now on.
    pub(in crate::engine) fn note_vf_requests(&mut self, function: &GuestFunction) {
        self.vfs.by_guest.note_requests(function);
    }

    /// The earlier run may have been killed in the midst of a change.
    pub(in crate::engine) fn resume_guest_vfs(&mut self) {
        for pf in self.vfs.by_guest.pfs() {
            self.vfs_wanted(pf);
        }
    }

    /// Brings the VFs of a PF to what its guest wants: to none, if it has lost the PF.
    pub(in crate::engine) fn vfs_wanted(&mut self, pf: Sbdf) {
        self.guest_vfs_step(|vfs, context| vfs.wanted(pf, context));
    }

    /// The driver has created or removed VFs, or failed to.
    pub(super) fn guest_vfs_changed(&mut self, changed: ChangedPf, outcome: Result<(), Failure>) {
        let pf = changed.pf;
        self.vfs_changed(changed, outcome.is_ok());
        self.guest_vfs_step(|vfs, context| vfs.changed(pf, outcome, context));
    }

    /// A transaction of a function has ended.
    pub(in crate::engine) fn guest_vfs_go_on(&mut self, vf: Sbdf) {
        self.guest_vfs_step(|vfs, context| vfs.go_on(vf, context));
    }

    /// A PF is about to be taken from its guest: its VFs go first.
    pub(in crate::engine) fn remove_guest_vfs(&mut self, pf: Sbdf, answer: Answer) {
        self.guest_vfs_step(|vfs, context| vfs.leaves(pf, answer, context));
    }

    /// A PF is about to be taken from its guest: a change of its VFs ends first.
    pub(in crate::engine) fn await_guest_vfs(&mut self, pf: Sbdf, answer: Answer) {
        self.vfs.by_guest.await_change(pf, answer);
    }

    /// Whether a reset of a PF has to wait, because VFs are there that it would remove; `by_guest`: its guest asked for it.
    pub(in crate::engine) fn vfs_prevent_reset(&mut self, pf: Sbdf, by_guest: bool) -> bool {
        let (vfs, context) = self.guest_vfs();
        let prevented = vfs.prevent_reset(pf, &context);
        if prevented && by_guest {
            self.guest_vfs_step(|vfs, context| vfs.reset_waits(pf, context));
        } else if prevented {
            self.quarantine(pf, "a reset would remove its VFs under their guests");
        }
        prevented
    }

    fn note_vfs_asked(&mut self, pf: Sbdf) {
        let Some(record) = self.functions.note_vfs_asked(pf) else { return };
        if let Err(problem) = self.files.journal.write(&record) {
            error!("{pf}: {problem}");
            self.problems.push(Problem::failed(Cause::StateFiles, &Failure::from(problem)).on(pf));
        }
    }

    /// Has the driver of a PF create or remove VFs, on a thread of its own.
    fn change_by_driver(
        &mut self,
        pf: Sbdf,
        change: impl FnOnce(&TaskContext) -> Result<(), Failure> + Send + 'static,
    ) {
        self.vfs.begin(pf);
        self.inventory.touch(pf);
        let (context, inbox) = (self.task_context(), self.inbox.clone());
        let host = Arc::clone(&self.platform.host);
        let work = move || change(&context);
        self.inbox.background(&format!("vfs {pf}"), work, move |outcome| {
            let outcome = outcome.and_then(|outcome| outcome).map_err(|failure| failure.on(pf));
            let changed = ChangedPf::read(host.as_ref(), pf);
            inbox.send(engine::Event::Vfs(Event::ChangedForGuest(changed, outcome)));
        });
    }

    fn vfs_refused(&mut self, pf: Sbdf, failure: &Failure) {
        let text = format!("{pf}: VFs that its guest asks for: {failure}");
        if let Some(guest) = self.functions.records().guest(pf)
            && let Some(guest) = self.guests.get_mut(guest)
        {
            // Limited: a guest can ask again and again.
            guest.log_line(Level::Error, &text);
        }
        self.problems.resolve_of(pf, &[Cause::VirtualFunctions]);
        self.problems.push(Problem::new(Cause::VirtualFunctions, text).on(pf));
    }

    fn hold_guest_vf(&mut self, vf: Sbdf) {
        let record = self.functions.records().get_or_new(vf);
        if record.state == pciback::FunctionState::Host && !self.functions.is_busy(vf) {
            let reply = self.inbox.unasked_reply(Cause::VirtualFunctions);
            self.start(Course::Forward(Kind::Hold), record, Some(reply), |record| {
                format!("{}: held, the guest with its PF has created it", record.address)
            });
        }
    }

    fn remove_guest_vf(&mut self, course: Course, record: Record, done: &'static str) {
        let reply = self.inbox.unasked_reply(Cause::VirtualFunctions);
        self.start(course, record, Some(reply), move |record| {
            format!("{}: {done}, the guest with its PF removes it", record.address)
        });
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
        // Not NumVFs: the kernel counts VFs when it has created them all, and the guest can still ask for them.
        let may_have_vfs = self.platform.host.function(address).is_ok_and(|function| function.total_vfs > 0);
        if !may_have_vfs {
            return Ok(());
        }
        if withdrawal == Withdrawal::GuestEnded && self.keeps_guest_vfs(record) {
            return self.ask(|answer| tasks::Event::AwaitVfs(address, answer)).map(drop);
        }
        self.ask(|answer| tasks::Event::RemoveVfs(address, answer)).map(drop)
    }

    /// Whether the guest of a PF, or its next domain, has it persistently.
    pub(in crate::engine) fn keeps_guest_vfs(&self, record: &Record) -> bool {
        let Some((reservation, place)) = self.reservation_of(record.address).zip(record.guest) else {
            return false;
        };
        let is_that_guest = |uuid| reservation.guest == uuid;
        reservation.given_in(&record.boot) == Some(place.domain)
            || self.platform.hypervisor.domain(place.domain).is_ok_and(|info| is_that_guest(info.uuid))
    }
}
