//! Guests that move to another host, or come from one. `xpci migrate` and `xpci migrate-receive` carry that out; what they have agreed on is
//! noted here, so that the status can say which host may let the guest run if one of them is killed.

use log::{info, warn};
use pciback::{DomId, Sbdf, Uuid};

use super::Saving;
use crate::domains;
use crate::engine::problems::Problem;
use crate::engine::{Engine, Event, persistent};
use crate::moves::{Move, Moves};
use crate::outcome::{Failure, few};
use crate::protocol::{Cause, DomainName, Side, Success};
use crate::reply::Reply;
use crate::saved::SavedGuest;

/// The number of functions that a message names.
const SHOWN: usize = 4;

fn done(message: String) -> Success {
    Success::Changed { message, warnings: Vec::new(), functions: Vec::new() }
}

fn under_way(noted: &Move) -> Failure {
    let text = format!("{} is being moved already ({})", noted.called(), noted.peer);
    Failure::refused(text).hint("wait until the other command has ended")
}

impl Engine {
    /// Describes a guest that is to move to another host, and notes that it leaves.
    pub(in crate::engine) fn migrate(&self, name: &DomainName, to: String, process: u32, reply: Reply) {
        let saving = match self.saving(name, &reply).and_then(|saving| self.may_leave(saving)) {
            Ok(saving) => saving,
            Err(failure) => return reply.done(Err(failure)),
        };
        let (files, guest) = (self.files.clone(), saving.guest.guest);
        let noted = Move::now(guest, saving.guest.name.clone(), to, process, &self.boot);
        let work = move || {
            let functions = saving.records.iter().map(|(record, _)| record.address).collect();
            let described = saving.describe_all()?;
            // What was noted of an earlier move to this host no longer matters.
            files.arriving.forget(guest)?;
            files.leaving.note(noted.leaving_as(saving.domain, functions))?;
            Ok(Success::Saved { domain: saving.domain, guest: described })
        };
        let done = move |outcome: Result<_, Failure>| reply.done(outcome.and_then(|outcome| outcome));
        self.inbox.background("migrate", work, done);
    }

    fn may_leave(&self, saving: Saving) -> Result<Saving, Failure> {
        let domain = saving.domain;
        if let Some(noted) = self.files.leaving.of(saving.guest.guest) {
            if noted.is_under_way(&self.boot) {
                return Err(under_way(&noted));
            }
            if noted.handed_over && noted.leaving_in(&self.boot) == Some(domain) {
                let text = format!("{} was handed over to {}", self.called(domain), noted.peer);
                return Err(Failure::refused(text).of(domain).hint("see 'xpci status'"));
            }
        }
        if self.platform.hypervisor.domain(domain)?.paused {
            let text = format!("{} is paused: it would run after the move", self.called(domain));
            return Err(Failure::refused(text).of(domain).hint(format!("'xl unpause {domain}' first")));
        }
        Ok(saving)
    }

    /// Notes that only the other host may let a guest run from now on.
    pub(in crate::engine) fn hand_over(&self, guest: Uuid, reply: Reply) {
        let noted = match self.may_be_handed_over(guest) {
            Ok(noted) => noted.hand_over(),
            Err(failure) => return reply.done(Err(failure)),
        };
        let leaving = self.files.leaving.clone();
        let work = move || {
            let message = format!("{} is handed over to {}", noted.called(), noted.peer);
            leaving.note(noted)?;
            info!("{message}");
            Ok(done(message))
        };
        let done = move |outcome: Result<_, Failure>| reply.done(outcome.and_then(|outcome| outcome));
        self.inbox.background("hand over", work, done);
    }

    fn may_be_handed_over(&self, guest: Uuid) -> Result<Move, Failure> {
        let noted = self.files.leaving.of(guest);
        let leaving = noted.and_then(|noted| Some((noted.leaving_in(&self.boot)?, noted)));
        let Some((domain, noted)) = leaving else {
            return Err(Failure::not_found(format!("guest {guest} does not leave this host")));
        };
        let info = self.platform.hypervisor.domain(domain)?;
        match info.uuid == guest && (info.paused || info.suspended) {
            true => Ok(noted),
            false => {
                let text =
                    format!("{} runs: it cannot be handed over to {}", self.called(domain), noted.peer);
                Err(Failure::refused(text).of(domain))
            }
        }
    }

    /// Reserves functions for a guest that comes from another host.
    pub(in crate::engine) fn receive(&self, saved: SavedGuest, from: String, process: u32, reply: Reply) {
        let guest = saved.guest;
        if let Some(noted) = self.files.arriving.of(guest).filter(|noted| noted.is_under_way(&self.boot)) {
            return reply.done(Err(under_way(&noted)));
        }
        let restoring = match self.restoring(saved, &reply) {
            Ok(restoring) => restoring,
            Err(failure) => return reply.done(Err(failure)),
        };
        let noted = Move::now(guest, restoring.saved.name.clone(), from, process, &self.boot);
        // It comes back from where it went.
        let returns = self.leaving_domain(guest).is_none();
        let files = self.files.clone();
        let work = move || {
            if returns {
                files.leaving.forget(guest)?;
            }
            // Before the functions are reserved, so that none is reserved for an unknown reason.
            files.arriving.note(noted)?;
            restoring.run().inspect_err(|_| {
                if let Err(failure) = files.arriving.forget(guest) {
                    warn!("{failure}");
                }
            })
        };
        let done = move |outcome: Result<_, Failure>| reply.done(outcome.and_then(|outcome| outcome));
        self.inbox.background("receive", work, done);
    }

    /// Ends this host's part of a move.
    pub(in crate::engine) fn end_move(&self, guest: Uuid, side: Side, reply: Reply) {
        let (files, inbox) = (self.files.clone(), self.inbox.clone());
        let work = move || {
            let notes = match side {
                Side::Leaving => &files.leaving,
                Side::Arriving => &files.arriving,
            };
            let Some(noted) = notes.of(guest) else {
                return Ok(Success::Already { message: format!("guest {guest} does not move") });
            };
            for address in noted.functions.iter().filter(|_| noted.handed_over) {
                if files.reservations.get(*address).is_some_and(|kept| kept.guest == guest) {
                    files.reservations.forget(*address)?;
                }
            }
            notes.forget(guest)?;
            inbox.send(Event::Persistent(persistent::Event::MoveEnded));
            Ok(done(format!("the move of {} has ended", noted.called())))
        };
        let done = move |outcome: Result<_, Failure>| reply.done(outcome.and_then(|outcome| outcome));
        self.inbox.background("end move", work, done);
    }

    /// The domain of a guest that leaves this host, as long as it exists.
    pub(super) fn leaving_domain(&self, guest: Uuid) -> Option<DomId> {
        self.persistent_context().leaving(guest).map(|(domain, _)| domain)
    }

    /// Problems for guests whose move was not brought to an end.
    pub(in crate::engine) fn moving_problems(&self) -> Vec<Problem> {
        let ended = |noted: &Move| !noted.is_under_way(&self.boot);
        let leaving = self.files.leaving.all().into_iter().filter(ended);
        let arriving = self.files.arriving.all().into_iter().filter(ended);
        let leaving = leaving.filter_map(|noted| self.departure_problem(&noted));
        leaving.chain(arriving.filter_map(|noted| self.arrival_problem(&noted))).collect()
    }

    /// Forgets a note that an administrator has made good.
    fn forget_move(&self, notes: &Moves, noted: &Move) {
        let (notes, guest) = (notes.clone(), noted.guest);
        self.background("forget move", move || {
            if let Err(failure) = notes.forget(guest) {
                warn!("{failure}");
            }
        });
    }

    fn departure_problem(&self, noted: &Move) -> Option<Problem> {
        let (guest, peer) = (noted.guest, &noted.peer);
        let end = format!("'rm {}' ends this message", self.files.leaving.path(guest).display());
        let problem = |text| Problem::new(Cause::Guest, text).since(noted.at());
        let Some(domain) = self.leaving_domain(guest) else {
            if !noted.handed_over {
                self.forget_move(&self.files.leaving, noted);
                return None;
            }
            let text = format!(
                "{} was handed over to {peer}, and 'xpci migrate' ended before it knew that it runs there: see 'xpci status' of {peer}; {end}",
                noted.called()
            );
            return Some(problem(text));
        };
        let called = self.called(domain);
        if noted.handed_over {
            let text = format!(
                "{called} was handed over to {peer}, and must not run here: 'xl destroy {domain}', then 'xpci status' of {peer} says how to let it run there; {end}"
            );
            return Some(problem(text).of(domain));
        }
        let info = self.platform.hypervisor.domain(domain).ok()?;
        if !info.paused && !info.suspended {
            let has = |address: &Sbdf| self.functions.records().guest(*address) == Some(domain);
            if noted.functions.iter().all(has) {
                self.forget_move(&self.files.leaving, noted);
            }
            return None;
        }
        let name = domains::name(self.platform.store.as_ref(), domain).ok().flatten();
        let rename = noted.name.as_ref().filter(|former| name.as_ref() != Some(*former));
        let rename = rename.map(|former| format!("'xl rename {domain} {former}' and ")).unwrap_or_default();
        let text = format!(
            "{called} was to move to {peer}, was not handed over, and is paused: destroy the copy that {peer} may have ('xpci status' there), then {rename}'xl unpause {domain}' let it run on"
        );
        Some(problem(text).of(domain))
    }

    fn arrival_problem(&self, noted: &Move) -> Option<Problem> {
        let (guest, peer) = (noted.guest, &noted.peer);
        let problem = |text| Problem::new(Cause::Guest, text).since(noted.at());
        if let Some(domain) = self.newest_domain(guest).ok()? {
            if !self.platform.hypervisor.domain(domain).ok()?.paused {
                self.forget_move(&self.files.arriving, noted);
                return None;
            }
            let text = format!(
                "{} came from {peer}, and is paused because 'xpci migrate' ended early: if 'xpci status' of {peer} says that it was handed over, 'xl unpause {domain}' lets it run here, otherwise 'xl destroy {domain}' ends this copy",
                self.called(domain)
            );
            return Some(problem(text).of(domain));
        }
        let kept = self.persistent_context().reserved_for(guest, None);
        let kept: Vec<Sbdf> = kept.into_iter().map(|one| one.address).collect();
        let Some(first) = kept.first() else {
            self.forget_move(&self.files.arriving, noted);
            return None;
        };
        let shown: Vec<String> = kept.iter().map(Sbdf::to_string).collect();
        let text = format!(
            "{} was to come from {peer}, and did not: reserved for it are {}; 'xpci pci-detach --persistent {guest} {first}' ends that",
            noted.called(),
            few(&shown, SHOWN)
        );
        Some(problem(text).on(*first))
    }
}

impl Saving {
    /// Describes the guest with all its functions, which it keeps.
    fn describe_all(&self) -> Result<SavedGuest, Failure> {
        let described = self.records.iter().map(|(record, place)| self.describe(record, *place));
        Ok(SavedGuest { functions: described.collect::<Result<_, _>>()?, ..self.guest.clone() })
    }
}
