//! Takes over from an earlier run of the service.
//!
//! Guests come first: one may have waited for an answer since that run ended, and its frontend gives up after two seconds. Then
//! unfinished transactions are ended: an attach or hold is undone, a detach or release completed. Both mean going backwards from the step
//! in the journal.

use std::collections::BTreeMap;

use log::{error, info, warn};
use nix::errno::Errno;
use pciback::fault::{Conversation, Heard};
use pciback::serve::GuestFunction;
use pciback::{Devfn, DomId, FunctionState, Sbdf};

use super::Engine;
use super::functions::Containment;
use super::guests::Resumed;
use super::problems::Problem;
use super::tasks::Course;
use super::tasks::{Image, Opened};
use crate::journal::{JournalError, Record};
use crate::outcome::Failure;
use crate::protocol::Cause;
use crate::transaction::{Kind, Step, Withdrawal, note_owner};

/// What an earlier run may have been doing with a function of a guest.
struct Unfinished {
    address: Sbdf,
    /// The function was being reset.
    resetting: bool,
    /// Its guest was being notified of an error.
    conversation: Option<Conversation>,
}

impl Engine {
    /// Reads the journal and takes over what still applies.
    pub fn recover(&mut self) -> Result<(), Failure> {
        let read = self.files.journal.read_all();
        let (records, errors) =
            read.map_err(|error| Failure::new(crate::outcome::ErrorCode::Failed, error.to_string()))?;
        let (current, earlier): (Vec<Record>, Vec<Record>) =
            records.into_iter().partition(|record| record.boot == self.boot);
        for record in earlier {
            self.forget_earlier_boot(record);
        }
        let unfinished = self.resume_guests(&current);
        if let Err(error) = self.take_over_dropping() {
            warn!("nodes of guests that have lost their functions: {error}");
        }
        for record in current.iter().filter(|record| record.guest.is_some() && !record.grants.is_empty()) {
            // Grants of a version that did not note former owners.
            if let Err(failure) = note_owner(&self.files.former_owners, &self.platform, record) {
                error!("{}: note that a PV guest may map it: {failure}", record.address);
                self.problems.push(Problem::failed(Cause::StateFiles, &failure).on(record.address));
            }
        }
        for record in current {
            self.settle(record);
        }
        self.undo_several();
        for error in errors {
            self.distrust_unknown(&error);
        }
        self.take_over_states();
        self.finish(unfinished);
        Ok(())
    }

    /// Goes on with resets and conversations that were under way. Their functions are known by now, and those that their guests lose are busy.
    fn finish(&mut self, mut unfinished: Vec<Unfinished>) {
        // What a guest has not answered may still be on its page, which has room for one request.
        unfinished.sort_by_key(|unfinished| {
            unfinished.conversation.is_none_or(|conversation| conversation.heard != Heard::Nothing)
        });
        for Unfinished { address, resetting, conversation } in unfinished {
            let record = self.functions.records().get(address);
            let stays = record
                .is_some_and(|record| record.state == FunctionState::Attached && record.quarantine.is_none());
            let resets = resetting && stays && !self.functions.is_busy(address);
            if resets {
                // The earlier run may have been killed before, during or after the reset.
                self.reset_for_guest(address);
            }
            if let Some(conversation) = conversation {
                self.resume_conversation(address, conversation, resets);
            }
        }
    }

    /// Quarantines a function whose record cannot be read, because it is unknown what an earlier run did with it.
    fn distrust_unknown(&mut self, error: &JournalError) {
        error!("{error}");
        let Some(address) = error.address() else {
            self.problems.push(Problem::unusable(error));
            return;
        };
        let found = self.platform.host.function(address);
        if matches!(&found, Err(error) if error.errno() == Some(Errno::ENOENT)) {
            // A function that is not in the host cannot be used by anyone.
            let text = format!("{error}; {address} is not on this host: remove the file");
            let problem = Problem::new(Cause::StateFiles, text).on(address);
            self.problems.push(problem.until_gone(error.path()));
            return;
        }
        let kept = match self.files.journal.set_aside(address) {
            Ok(path) => format!("; it is kept as {}", path.display()),
            Err(second) => format!("; {second}"),
        };
        let mut record = Record::new(address, &self.boot);
        record.incarnation = found.map_or(0, |function| function.incarnation);
        record.state = FunctionState::Quarantined;
        record.unknown_past = true;
        record.quarantine =
            Some(format!("its record cannot be used, so its state is unknown: {error}{kept}"));
        self.start(Course::Quarantine, record, None, |record| format!("{}: quarantined", record.address));
    }

    /// After a reboot of the host all functions belong to dom0; only a quarantine is kept.
    fn forget_earlier_boot(&mut self, record: Record) {
        let Some(why) = record.quarantine else {
            if let Err(error) = self.files.journal.remove(record.address) {
                warn!("{error}");
            }
            return;
        };
        let mut kept = Record::new(record.address, &self.boot);
        kept.state = FunctionState::Quarantined;
        kept.quarantine = Some(why);
        if let Err(error) = self.files.journal.write(&kept) {
            warn!("{error}");
        }
        self.functions.keep(kept);
    }

    fn resume_guests(&mut self, records: &[Record]) -> Vec<Unfinished> {
        let mut unfinished = Vec::new();
        let mut guests: BTreeMap<DomId, Vec<(Devfn, Sbdf, Box<GuestFunction>)>> = BTreeMap::new();
        let mut hvm_guests: BTreeMap<DomId, Vec<Resumed>> = BTreeMap::new();
        for record in records {
            let Some(place) = record.guest.filter(|_| was_served(record)) else { continue };
            self.functions.handover().reachable.add(record.address);
            if record.unproved {
                // The function was withdrawn from the guest; it only remains to prove that the guest cannot reach it.
                continue;
            }
            match self.task_context().open_function(record, place.domain, Image::Resumed) {
                Ok(Opened { mut function, filter, memory, lacks, .. }) => {
                    for text in lacks {
                        self.note_lacking(record.address, place.domain, text);
                    }
                    if record.quarantine.is_some() {
                        function.set_gone();
                    }
                    self.note_vf_requests(&function);
                    let (resetting, conversation) = (function.resetting(), function.conversation());
                    unfinished.push(Unfinished { address: record.address, resetting, conversation });
                    self.functions.serve(function.attachment(), filter);
                    match memory {
                        Some(memory) => {
                            let resumed = Resumed { devfn: place.devfn, function, memory };
                            hvm_guests.entry(place.domain).or_default().push(resumed);
                        }
                        None => {
                            let functions = guests.entry(place.domain).or_default();
                            functions.push((place.devfn, record.address, function));
                        }
                    }
                }
                Err(failure) => self.note_unserved(record, &failure),
            }
        }
        let pv = guests
            .into_iter()
            .map(|(domain, functions)| (domain, functions.len(), self.resume_guest(domain, functions)));
        let mut outcomes: Vec<_> = pv.collect();
        for (domain, functions) in hvm_guests {
            outcomes.push((domain, functions.len(), self.resume_hvm(domain, functions)));
        }
        self.end_stray_servers();
        for (domain, count, outcome) in outcomes {
            match outcome {
                Ok(()) => info!("domain {domain}: continuing to serve its {count} functions"),
                Err(failure) => {
                    error!("domain {domain}: {failure}");
                    let text = format!("domain {domain} can no longer be served: {failure}");
                    self.problems.push(Problem::new(Cause::Guest, text).of(domain));
                }
            }
        }
        unfinished
    }

    fn note_lacking(&mut self, address: Sbdf, domain: DomId, text: String) {
        error!("{text}");
        self.problems.push(Problem::new(Cause::Guest, text).on(address).of(domain));
    }

    fn note_unserved(&mut self, record: &Record, failure: &Failure) {
        let address = record.address;
        error!("{address}: its guest can no longer be served: {failure}");
        // The transaction is undone now, and may have ended before it created the image.
        if record.transaction.is_none() {
            let text = format!("{address} can no longer be served: {failure}");
            self.problems.push(Problem::new(Cause::Guest, text).on(address));
        }
    }

    /// Ends the unfinished transaction of a record, and handles changes that happened while no service ran.
    fn settle(&mut self, record: Record) {
        let address = record.address;
        let exists = !matches!(
            self.platform.host.function(address), Err(error) if error.errno() == Some(Errno::ENOENT)
        );
        let guest_is_dead = record
            .guest
            .is_some_and(|guest| matches!(self.platform.store.domain_exists(guest.domain), Ok(false)));
        if let Some(progress) = record.transaction.clone() {
            // A function that is not proved to be withdrawn is withdrawn again, whatever step followed.
            let step = if record.unproved { Step::Serve } else { progress.step };

            let withdrawal = if guest_is_dead { Withdrawal::GuestEnded } else { Withdrawal::Force };
            let course = Course::BackwardFrom(progress.kind, step, withdrawal);
            info!(
                "{address}: the previous xpcid was in {:?}, step {:?}; undoing that",
                progress.kind, progress.step
            );
            self.start(course, record, None, |record| {
                format!("{}: it is {} again", record.address, record.state)
            });
            return;
        }
        let attached = record.state == FunctionState::Attached;
        self.functions.keep(record.clone());
        self.keep_watching_errors_of(address);
        if attached && guest_is_dead {
            self.detach_from_ended(record);
        } else if !exists {
            warn!("{address}: it left the host");
        } else if let Some(why) = record.quarantine.filter(|_| record.state != FunctionState::Quarantined) {
            // The earlier run was killed between the decision and its first action.
            self.contain(address, Containment::Quarantine, &why);
        } else if !attached && record.state == FunctionState::Held {
            self.check_held(address);
        }
    }

    /// Reports a held function that its holding driver lost while no service ran.
    fn check_held(&mut self, address: Sbdf) {
        let held = self.platform.host.function(address);
        let held = held.is_ok_and(|function| crate::transaction::is_held(&function));
        if !held {
            let why = "it was held, but its holding driver lost it while xpcid did not run".to_owned();
            warn!("{address}: {why}");
            self.problems.push(Problem::new(Cause::Holding, format!("{address}: {why}")).on(address));
        }
    }
}

/// Whether the guest may know of the function.
fn was_served(record: &Record) -> bool {
    match &record.transaction {
        _ if record.unproved => true,
        None => record.state == FunctionState::Attached,
        Some(progress) => {
            matches!(progress.kind, Kind::Attach | Kind::Detach) && progress.step == Step::Serve
        }
    }
}
