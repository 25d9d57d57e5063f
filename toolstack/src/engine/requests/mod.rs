//! Requests of clients: checked against the current state before anything is changed.

mod already;
mod attach;
mod deferred;
mod hold;
mod lists;
mod local_client;
mod obstacles;
mod paths;
mod several;
mod survey;
mod targets;

use pciback::{DomId, FunctionState};

pub(super) use self::attach::{AttachOptions, Wanted};
pub(super) use self::deferred::Deferred;
use self::hold::Hold;
pub(super) use self::hold::{Reserved, holdable, not_in_state};
pub(super) use self::lists::{all_pfs, known_pf, persistent_view};
pub(super) use self::local_client::LocalClient;
use self::obstacles::{Refusal, ThreadChecks, reuse_with};
use self::several::Several;
pub(super) use self::targets::{how_to_forget, kept_for};
use super::Engine;
use super::tasks::{Course, TaskContext};
use crate::journal::Record;
use crate::outcome::Failure;
use crate::protocol::{Placed, Request, Success};
use crate::reply::Reply;
use crate::reservations::{Change, Reservation};
use crate::transaction::Withdrawal;

/// The plan for a request.
pub(in crate::engine) enum Plan {
    /// Answer at once.
    Answer(Success),
    /// Start a transaction, with the message for its success, and change the function's reservation before it.
    Transaction(Course, Box<Record>, Message, Option<Change>),
    /// Answer with the obstacles, including those that are found on a thread; with the given answer if there are none.
    Check(Refusal, ThreadChecks, Success),
}

impl Plan {
    /// The plan of a dry run: the same checks, without changes.
    pub(in crate::engine) fn into_dry_run(self) -> Self {
        match self {
            Self::Transaction(_, record, message, _) => {
                let (address, domain) = (record.address, record.guest.map(|guest| guest.domain));
                let action = match domain {
                    Some(domain) => obstacles::attaching(address, domain),
                    None => format!("give {address} back to dom0"),
                };
                let checks = ThreadChecks { hold: None, shares: Some(domain.or(Some(DomId::DOM0))) };
                Self::Check(
                    Refusal { address, action, found: Vec::new() },
                    checks,
                    dry_run_answer(&message.text),
                )
            }
            other => other,
        }
    }
}

/// The part of messages that a detached function is assignable again.
const ASSIGNABLE_AGAIN: &str = " and assignable again";

/// The message for a successful transaction.
pub(in crate::engine) struct Message {
    text: String,
    /// The reservation that ends with the transaction.
    ends: Option<Reservation>,
}

impl From<String> for Message {
    fn from(text: String) -> Self {
        Self { text, ends: None }
    }
}

impl Message {
    /// Adds words at the end.
    pub fn and(self, words: &str) -> Self {
        Self { text: self.text + words, ..self }
    }

    /// Adds that the reservation has ended, and what the settings give its guest back.
    pub fn and_ends(self, reservation: Reservation) -> Self {
        Self { ends: Some(reservation), ..self }
    }

    /// The text after the transaction. A function that is quarantined, or has left the host, is not assignable again.
    fn of(&self, record: &Record, context: &TaskContext) -> String {
        let text = match record.state {
            FunctionState::Held => self.text.clone(),
            state => self.text.replacen(ASSIGNABLE_AGAIN, &format!("; it is {state}"), 1),
        };
        let Some(reservation) = &self.ends else { return text };
        let again = context.assigned_again(reservation);
        text + again.as_deref().unwrap_or(", and no longer persistent")
    }
}

/// The answer of a dry run.
fn dry_run_answer(message: &str) -> Success {
    Success::Possible { message: format!("nothing was changed; without --dry-run: {message}") }
}

impl Engine {
    pub(super) fn handle_request(&mut self, request: Request, reply: Reply) {
        let Some((request, reply)) = self.defer(request, reply) else { return };
        match request {
            Request::List { filter } => self.list(filter, reply),
            Request::Doctor => self.examine(reply),
            Request::Show { address } => self.show_function(address, reply),
            Request::PciAssignableList => self.assignable_list(reply),
            Request::PciList { domain } => self.guest_list(&domain, reply),
            Request::PciListPersistent { guest } => self.reserved_list(guest.as_ref(), reply),
            Request::VfList { address } => self.vf_list(address, reply),
            Request::VfCreate { address, count, unmanaged } => {
                self.create_vfs(address, count, unmanaged, reply);
            }
            Request::VfSetCount { address, count } => self.set_vf_count(address, count, reply),
            Request::VfDestroy { address } => self.destroy_vfs(address, reply),
            Request::VfSet { address, settings, persist } => {
                self.set_network(address, settings, persist, reply);
            }
            Request::VfShow { address } => self.show_network(address, reply),
            Request::AerStatus { address } => self.aer_status(address, reply),
            Request::AerHistory { address } => reply.done(self.error_history(address)),
            Request::BlastRadius { address } => self.blast_radius(address, reply),
            Request::Events { follow } => self.events(follow, reply),
            Request::Status => self.status(reply),
            Request::PciAssignableAdd { address, force, persist, managed, dry_run } => {
                self.hold(Hold { address, force, persist, managed, dry_run }, reply);
            }
            Request::PciAssignableRemove { address, force, trust_former_owner } => {
                self.release(address, force, trust_former_owner, reply);
            }
            Request::PciAttach { domain, address, slot, persist, managed, trust_former_owner, dry_run } => {
                let reuse = reuse_with(trust_former_owner);
                let options = AttachOptions { persist, managed, reuse, dry_run };
                self.attach_one(domain, Placed { address, slot }, options, reply);
            }
            Request::PciAttachAll { domain, functions, persist, managed, trust_former_owner, dry_run } => {
                let reuse = reuse_with(trust_former_owner);
                let options = AttachOptions { persist, managed, reuse, dry_run };
                self.attach_several(Several { domain, functions, options }, reply);
            }
            Request::PciDetach { domain, address, force, scope } => {
                let withdrawal = if force { Withdrawal::Force } else { Withdrawal::Ask };
                self.detach(&domain, address, withdrawal, scope, reply);
            }
            Request::QuarantineClear { address, trust_former_owner } => {
                self.clear_quarantine(address, reuse_with(trust_former_owner), reply);
            }
            Request::PolicyShow { address, domain } => self.show_policy(address, domain, reply),
            Request::PolicyExplain { address, domain } => self.explain_policy(address, domain, reply),
            Request::PolicyLearn { target } => self.learned(&target, reply),
            Request::PolicyReload => self.reload_policies(reply),
            Request::Sync { dry_run } => self.inventory.compare_for(dry_run, reply),
            Request::DaemonReexec => self.start_successor(reply),
            Request::MailboxSend { address, kind, sequence, data } => {
                reply.done(self.send_message(address, (kind, sequence), &data));
            }
            Request::MailboxReceive { address } => reply.done(self.receive_messages(address)),
            Request::Save { domain } => self.save(&domain, reply),
            Request::Restore { guest } => self.restore(guest, reply),
            Request::Restored { guest, functions } => self.restored(guest, functions, reply),
            Request::Migrate { domain, to, process } => self.migrate(&domain, to, process, reply),
            Request::MigrateHandOver { guest } => self.hand_over(guest, reply),
            Request::MigrateReceive { guest, from, process } => self.receive(guest, from, process, reply),
            Request::MigrateEnd { guest, side } => self.end_move(guest, side, reply),
        }
    }

    pub(in crate::engine) fn carry_out(&mut self, plan: Result<Plan, Failure>, reply: Reply) {
        match plan {
            Err(failure) => reply.done(Err(failure)),
            Ok(Plan::Answer(success)) => reply.done(Ok(success)),
            Ok(Plan::Check(refusal, checks, otherwise)) => {
                self.answer_with_obstacles(refusal, checks, otherwise, reply)
            }
            Ok(Plan::Transaction(course, record, message, change)) => {
                let context = self.task_context();
                let done = move |record: &Record| message.of(record, &context);
                self.start_with(course, *record, change, Some(reply), done);
            }
        }
    }
}
