//! Requests of clients: checked against the current state before anything is changed.

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

use pciback::{DomId, FunctionState, Sbdf};

pub(super) use self::attach::Wanted;
pub(super) use self::deferred::Deferred;
pub(super) use self::hold::not_in_state;
pub(super) use self::lists::{all_pfs, known_pf, persistent_view};
pub(super) use self::local_client::LocalClient;
use self::obstacles::{Refusal, ThreadChecks};
use self::several::Several;
pub(super) use self::targets::{how_to_forget, kept_for};
use super::Engine;
use super::tasks::Course;
use crate::domains;
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Placed, Request, Scope, Success};
use crate::reply::Reply;
use crate::reservations::Change;

/// The plan for a request.
pub(in crate::engine) enum Plan {
    /// Answer at once.
    Answer(Success),
    /// Start a transaction, with the message for its success, and change the function's reservation before it.
    Transaction(Course, Box<Record>, String, Option<Change>),
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
                Self::Check(Refusal { address, action, found: Vec::new() }, checks, dry_run_answer(&message))
            }
            other => other,
        }
    }
}

/// The part of messages that a detached function is assignable again.
const ASSIGNABLE_AGAIN: &str = " and assignable again";

/// The message for a successful transaction. A function that is quarantined, or has left the host, is not assignable again.
fn ended(record: &Record, message: &str) -> String {
    match record.state {
        FunctionState::Held => message.to_owned(),
        state => message.replacen(ASSIGNABLE_AGAIN, &format!("; it is {state}"), 1),
    }
}

/// The answer of a dry run.
fn dry_run_answer(message: &str) -> Success {
    Success::Possible { message: format!("nothing was changed; without --dry-run: {message}") }
}

impl Engine {
    pub(super) fn handle_request(&mut self, request: Request, reply: Reply) {
        let Some((request, reply)) = self.defer(request, reply) else { return };
        let plan = match request {
            Request::List { filter } => return self.list(filter, reply),
            Request::Doctor => return self.examine(reply),
            Request::Show { address } => return self.show_function(address, reply),
            Request::PciAssignableList => return self.assignable_list(reply),
            Request::PciList { domain } => return self.guest_list(&domain, reply),
            Request::VfList { address } => return self.vf_list(address, reply),
            Request::AerStatus { address } => return self.aer_status(address, reply),
            Request::BlastRadius { address } => return self.blast_radius(address, reply),
            Request::AerHistory { address } => self.error_history(address).map(Plan::Answer),
            Request::Events { follow } => return self.events(follow, reply),
            Request::Status => return self.status(reply),
            Request::PciAssignableAdd { address, force, persist, managed, dry_run } => {
                let plan = self.plan_hold(address, force, managed, dry_run);
                if matches!(plan, Ok(Plan::Answer(_))) && !managed && !dry_run {
                    self.keep_held(address);
                }
                if persist && !dry_run {
                    return self.hold_persistently(address, plan, reply);
                }
                plan
            }
            Request::PciAssignableRemove { address, force, trust_former_owner } => self
                .forget_gone(address)
                .unwrap_or_else(|| self.plan_release(address, force, trust_former_owner)),
            Request::PciAttach {
                domain,
                address,
                slot,
                persist,
                managed: true,
                trust_former_owner,
                dry_run: false,
            } => {
                let (functions, trust) = (vec![Placed { address, slot }], trust_former_owner);
                let wanted = Several { domain, functions, persist, managed: true, trust, dry_run: false };
                return self.attach_several(wanted, reply);
            }
            Request::PciAttach {
                domain,
                address,
                slot,
                persist,
                managed,
                trust_former_owner: trust,
                dry_run,
            } => {
                if let Some(record) = self.attached_already(&domain, address, slot) {
                    return match persist && !dry_run {
                        true => {
                            self.keep_held(address);
                            self.make_persistent(&record, reply)
                        }
                        false => reply.done(Ok(self.has_it(&record))),
                    };
                }
                match domains::find(self.platform.store.as_ref(), &domain) {
                    Ok(domain) => {
                        let wanted = Wanted { domain, address, slot, persist, managed, trust, dry_run };
                        return self.attach(wanted, reply);
                    }
                    Err(failure) if persist && failure.code == ErrorCode::NotFound => {
                        let absent = self.absent_guest(&domain, failure);
                        return self.reserve_for_absent(absent, address, (slot, dry_run), reply);
                    }
                    Err(failure) => Err(failure),
                }
            }
            Request::PciAttachAll {
                domain,
                functions,
                persist,
                managed,
                trust_former_owner: trust,
                dry_run,
            } => {
                let wanted = Several { domain, functions, persist, managed, trust, dry_run };
                return self.attach_several(wanted, reply);
            }
            Request::PciDetach { domain, address, force, scope } => {
                if scope == Scope::Persistent || self.is_only_reserved(&domain, address, scope) {
                    return self.forget_reservation(&domain, address, reply);
                }
                self.plan_detach(&domain, address, force, scope)
            }
            Request::PciListPersistent { guest } => return self.reserved_list(guest.as_ref(), reply),
            Request::QuarantineClear { address, trust_former_owner } => {
                return self.clear_quarantine(address, trust_former_owner, reply);
            }
            Request::PolicyShow { address, domain } => return self.show_policy(address, domain, reply),
            Request::PolicyExplain { address, domain } => return self.explain_policy(address, domain, reply),
            Request::PolicyLearn { target } => return self.learned(&target, reply),
            Request::Sync { dry_run } => return self.inventory.compare_for(dry_run, reply),
            Request::DaemonReexec => return self.start_successor(reply),
            Request::PolicyReload => return self.reload_policies(reply),
            Request::VfCreate { address, count, unmanaged } => {
                return self.create_vfs(address, count, unmanaged, reply);
            }
            Request::VfSet { address, settings, persist } => {
                return self.set_network(address, settings, persist, reply);
            }
            Request::VfShow { address } => return self.show_network(address, reply),
            Request::Save { domain } => return self.save(&domain, reply),
            Request::Restore { guest } => return self.restore(guest, reply),
            Request::Restored { guest, functions } => return self.restored(guest, functions, reply),
            Request::VfSetCount { address, count } => return self.set_vf_count(address, count, reply),
            Request::VfDestroy { address } => return self.destroy_vfs(address, reply),
        };
        self.carry_out(plan, reply);
    }

    pub(in crate::engine) fn carry_out(&mut self, plan: Result<Plan, Failure>, reply: Reply) {
        match plan {
            Err(failure) => reply.done(Err(failure)),
            Ok(Plan::Answer(success)) => reply.done(Ok(success)),
            Ok(Plan::Check(refusal, checks, otherwise)) => {
                self.answer_with_obstacles(refusal, checks, otherwise, reply)
            }
            Ok(Plan::Transaction(course, record, message, change)) => {
                self.start_with(course, *record, change, Some(reply), move |record| ended(record, &message));
            }
        }
    }

    /// Refuses a function that is in a transaction.
    pub(in crate::engine) fn idle(&self, address: Sbdf) -> Result<(), Failure> {
        if self.functions.is_busy(address) {
            let state = self.functions.records().state(address);
            return Err(Failure::refused(format!("{address} is {state} right now"))
                .on(address)
                .hint("try again"));
        }
        Ok(())
    }
}
