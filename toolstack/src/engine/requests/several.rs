//! Attaches several functions to one guest, all or none.
//!
//! After all of them are checked, each is attached by a request of its own. If one fails, those before it are detached in reverse order.
//! A note in the run directory lists the functions meanwhile, so that the next run of a killed service can detach them.

use log::{error, info, warn};
use pciback::policy::Reuse;
use pciback::{DomId, FunctionState, Sbdf, Uuid};
use serde::{Deserialize, Serialize};

use super::attach::AttachOptions;
use super::local_client::LocalClient;
use super::obstacles::attaching;
use crate::domains;
use crate::engine::Engine;
use crate::engine::notes::Notes;
use crate::engine::problems::Problem;
use crate::engine::tasks::Course;
use crate::outcome::{ErrorCode, Failure, Obstacle};
use crate::protocol::{Cause, DomainName, Placed, Request, Scope, Success};
use crate::reply::Reply;
use crate::settings::Settings;
use crate::transaction::{Kind, Withdrawal};

/// The folder in the run directory with the notes.
const ATTACHING: &str = "attaching";
/// The number of devices on a guest's bus.
const MAX_FUNCTIONS: usize = 32;

/// The note about a domain to which several functions are being attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    /// The domain's guest; earlier versions did not note it.
    #[serde(default)]
    guest: Option<Uuid>,
    functions: Vec<Noted>,
}

/// A function of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Noted {
    address: Sbdf,
    /// Whether the guest had it persistently before.
    reserved: bool,
    /// Whether it was attached before; earlier versions noted only the other functions.
    #[serde(default)]
    attached: bool,
}

/// The functions to attach, and the options.
pub(in crate::engine) struct Several {
    pub domain: DomainName,
    pub functions: Vec<Placed>,
    pub options: AttachOptions,
}

impl Several {
    /// The request that checks whether one of the functions can be attached.
    fn check_of(&self, function: &Placed) -> Request {
        self.request(function, AttachOptions { dry_run: true, ..self.options })
    }

    /// The request that attaches one of the functions, which is held by now.
    fn attachment_of(&self, function: &Placed) -> Request {
        self.request(function, AttachOptions { dry_run: false, managed: false, ..self.options })
    }

    fn request(&self, function: &Placed, options: AttachOptions) -> Request {
        Request::PciAttach {
            domain: self.domain.clone(),
            address: function.address,
            slot: function.slot,
            persist: options.persist,
            managed: options.managed,
            trust_former_owner: options.reuse == Reuse::Trusted,
            dry_run: options.dry_run,
        }
    }

    fn named(&self) -> String {
        names(self.functions.iter().map(|function| function.address))
    }

    /// Refuses an invalid request.
    fn check(&self) -> Result<(), Failure> {
        let usage = |text: String| Err(Failure::new(ErrorCode::Usage, text));
        if self.functions.is_empty() || self.functions.len() > MAX_FUNCTIONS {
            return usage(format!(
                "{} functions: one command attaches 1 to {MAX_FUNCTIONS}",
                self.functions.len()
            ));
        }
        for (index, function) in self.functions.iter().enumerate() {
            let before = &self.functions[..index];
            if before.iter().any(|other| other.address == function.address) {
                return usage(format!("{} is named twice", function.address));
            }
            if let Some(slot) = function.slot
                && before.iter().any(|other| other.slot == Some(slot))
            {
                return usage(format!("two functions are to be device {slot:x} of the guest"));
            }
        }
        Ok(())
    }
}

fn names(functions: impl Iterator<Item = Sbdf>) -> String {
    functions.map(|address| address.to_string()).collect::<Vec<_>>().join(", ")
}

/// The state of the thread that attaches the functions.
struct Attaching {
    client: LocalClient,
    /// The domain of the guest, if that runs.
    domain: Option<DomId>,
    wanted: Several,
    reply: Reply,
}

impl Attaching {
    fn ask(&self, request: Request) -> Result<Success, Failure> {
        self.client.ask(request, &format!("attach {}", self.wanted.named()))
    }

    fn run(&self) -> Result<Success, Failure> {
        let missing = self.missing()?;
        if self.wanted.options.dry_run {
            let text = format!(
                "nothing was changed; without --dry-run: {} go to {}",
                self.wanted.named(),
                self.wanted.domain.0
            );
            return Ok(Success::Possible { message: text });
        }
        let held = self.hold()?;
        match self.attach(missing) {
            Err(failure) if !self.client.is_unanswered() => Err(self.give_back(held, failure)),
            outcome => outcome,
        }
    }

    /// The functions that the guest does not have, if nothing prevents attaching any of them.
    fn missing(&self) -> Result<Vec<&Placed>, Failure> {
        let (mut missing, mut refused) = (Vec::new(), Vec::new());
        for function in &self.wanted.functions {
            match self.ask(self.wanted.check_of(function)) {
                // With `persist`, a function that the guest has may still have to be made persistent.
                Ok(Success::Already { .. }) if !self.wanted.options.persist => {}
                Ok(_) => missing.push(function),
                Err(failure) if failure.code.is_refusal() => refused.push(failure),
                Err(failure) => return Err(failure),
            }
        }
        if refused.len() < 2 {
            return refused.pop().map_or(Ok(missing), Err);
        }
        let mut all = Failure::refused(format!(
            "refused to attach {} to {}",
            self.wanted.named(),
            self.wanted.domain.0
        ));
        all.domain = refused.iter().find_map(|failure| failure.domain);
        for failure in refused {
            let action = failure.address.zip(self.domain).map(|(address, domain)| attaching(address, domain));
            match failure.obstacles.is_empty() {
                true => all.obstacles.push(Obstacle::below(failure, &action.unwrap_or_default())),
                false => all.obstacles.extend(failure.obstacles),
            }
        }
        Err(all)
    }

    /// Holds the functions that dom0 has, where they are managed, and returns them.
    fn hold(&self) -> Result<Vec<Sbdf>, Failure> {
        let mut held = Vec::new();
        for function in self.wanted.functions.iter().filter(|_| self.wanted.options.managed) {
            let address = function.address;
            if self.is_attached(address) {
                continue;
            }
            let request = Request::PciAssignableAdd {
                address,
                force: false,
                persist: false,
                managed: true,
                dry_run: false,
            };
            match self.ask(request) {
                Ok(Success::Changed { .. }) => held.push(address),
                Ok(_) => {}
                Err(failure) if self.client.is_unanswered() => return Err(failure),
                Err(failure) => return Err(self.give_back(held, failure)),
            }
        }
        Ok(held)
    }

    /// Gives back what was held for nothing. The engine does so with what was attached before.
    fn give_back(&self, held: Vec<Sbdf>, failure: Failure) -> Failure {
        let (mut message, mut code) = (failure.message.clone(), failure.code);
        for address in held {
            let request = Request::PciAssignableRemove { address, force: false, trust_former_owner: false };
            if let Err(second) = self.ask(request) {
                // It was changed, so the answer must not be a refusal.
                code = if second.code.is_refusal() { ErrorCode::Failed } else { second.code };
                message.push_str(&format!("; {address} was not returned to dom0: {}", second.message));
            }
        }
        Failure { message, code, ..failure }
    }

    fn attach(&self, missing: Vec<&Placed>) -> Result<Success, Failure> {
        let mut done: Vec<Done> = Vec::new();
        let (mut messages, mut all_warnings, mut views) = (Vec::new(), Vec::new(), Vec::new());
        for function in missing {
            let address = function.address;
            let before = self.client.context.files.reservations.get(address).is_some();
            let had = self.is_attached(address);
            self.reply.progress(&format!("attaching {address} to {}", self.wanted.domain.0));
            match self.ask(self.wanted.attachment_of(function)) {
                Ok(Success::Changed { message, warnings, functions }) => {
                    messages.push(message);
                    // Warnings about the guest are the same for each function.
                    for warning in warnings {
                        if !all_warnings.contains(&warning) {
                            all_warnings.push(warning);
                        }
                    }
                    views.extend(functions);
                    done.push(Done { address, reserved: before, had });
                }
                Ok(_) => {}
                Err(failure) => return Err(self.undo(done, failure)),
            }
        }
        if messages.is_empty() {
            let text = format!("{} has {} already", self.wanted.domain.0, self.wanted.named());
            return Ok(Success::Already { message: text });
        }
        Ok(Success::Changed { message: messages.join("; "), warnings: all_warnings, functions: views })
    }

    fn is_attached(&self, address: Sbdf) -> bool {
        matches!(
            self.client.context.files.journal.owners().get(&address),
            Some(crate::journal::Owner::Domain(_))
        )
    }

    /// Undoes what was done, in reverse order, and adds the result to the failure.
    fn undo(&self, done: Vec<Done>, failure: Failure) -> Failure {
        if self.client.is_unanswered() || done.is_empty() {
            return failure;
        }
        warn!("{}: {failure}; taking back {} functions", self.wanted.domain.0, done.len());
        let (mut undone, mut left, mut code) = (Vec::new(), Vec::new(), failure.code);
        for done in done.into_iter().rev() {
            let scope = match (done.had, done.reserved) {
                (true, _) => Scope::Persistent,
                (false, true) => Scope::Live,
                (false, false) => Scope::All,
            };
            let domain = self.wanted.domain.clone();
            let request = Request::PciDetach { domain, address: done.address, force: false, scope };
            match self.ask(request) {
                Ok(_) => undone.push(done.address),
                Err(second) => {
                    code = second.code;
                    left.push(format!("{}: {}", done.address, second.message));
                }
            }
        }
        let mut message = failure.message.clone();
        if !undone.is_empty() {
            message.push_str(&format!("; taken back: {}", names(undone.into_iter())));
        }
        if !left.is_empty() {
            message.push_str(&format!("; not taken back: {}", left.join("; ")));
        }
        // Functions were changed, so the answer must not be a refusal.
        let code = if code.is_refusal() { ErrorCode::Failed } else { code };
        Failure { message, code, ..failure }
    }
}

/// A function that was attached or made persistent.
struct Done {
    address: Sbdf,
    /// Whether the guest had it persistently before.
    reserved: bool,
    /// Whether it was attached to the guest before.
    had: bool,
}

impl Engine {
    /// Attaches several functions to a guest, all or none.
    pub(super) fn attach_several(&self, wanted: Several, reply: Reply) {
        if let Err(failure) = wanted.check() {
            return reply.done(Err(failure));
        }
        let domain = match domains::find(self.platform.store.as_ref(), &wanted.domain) {
            Ok(domain) => Some(domain),
            // Functions are reserved for a guest that does not run.
            Err(failure) if wanted.options.persist && failure.code == ErrorCode::NotFound => None,
            Err(failure) => return reply.done(Err(failure)),
        };
        let notes = notes(&self.settings);
        if let Some(domain) = domain.filter(|_| !wanted.options.dry_run)
            && let Err(failure) = self.note_several(&notes, domain, &wanted)
        {
            return reply.done(Err(failure));
        }
        let noted = domain.filter(|_| !wanted.options.dry_run);
        let client = LocalClient::new(self.task_context());
        let attaching = Attaching { client, domain, wanted, reply: reply.clone() };
        let work = move || {
            let outcome = attaching.run();
            // After an unanswered request the note stays, for the next run of the service.
            if let Some(domain) = noted.filter(|_| !attaching.client.is_unanswered()) {
                notes.remove(domain);
            }
            outcome
        };
        let done = move |outcome: Result<_, Failure>| reply.done(outcome.and_then(|outcome| outcome));
        self.inbox.background("attach several", work, done);
    }

    fn note_several(&self, notes: &Notes, domain: DomId, wanted: &Several) -> Result<(), Failure> {
        if notes.path(domain).exists() {
            let text = format!("domain {domain} gets several functions by another command right now");
            return Err(Failure::refused(text).of(domain).hint("try again"));
        }
        let noted = |function: &Placed| Noted {
            address: function.address,
            reserved: self.files.reservations.get(function.address).is_some(),
            attached: self.functions.records().state(function.address) == FunctionState::Attached,
        };
        let guest = self.platform.hypervisor.domain(domain)?.uuid;
        notes.write(
            domain,
            &Note { guest: Some(guest), functions: wanted.functions.iter().map(noted).collect() },
        )
    }

    /// Undoes what a killed earlier run had done for an unfinished request. A function whose attachment was under way is held again by its
    /// own transaction; no reservation may bring it back.
    pub(in crate::engine) fn undo_several(&mut self) {
        let notes = notes(&self.settings);
        for domain in notes.domains() {
            let Some(Note { guest, functions }) = notes.read::<Note>(domain) else {
                notes.remove(domain);
                continue;
            };
            for Noted { address, reserved, attached } in functions.into_iter().rev() {
                if !reserved {
                    self.forget_unfinished(address, guest);
                }
                let record = self.functions.records().get_or_new(address);
                let is_theirs = record.guest.is_some_and(|guest| guest.domain == domain);
                let is_busy = self.functions.is_busy(address);
                if attached || is_busy || record.state != FunctionState::Attached || !is_theirs {
                    continue;
                }
                info!(
                    "{address}: the previous xpcid ended before all functions of domain {domain} were attached; undoing that"
                );
                self.start(Course::Backward(Kind::Detach, Withdrawal::Ask), record, None, |record| {
                    format!("{}: it is {} again", record.address, record.state)
                });
            }
            notes.remove(domain);
        }
    }

    /// Removes the reservation that an unfinished request made for a guest.
    fn forget_unfinished(&mut self, address: Sbdf, guest: Option<Uuid>) {
        let Some(reservation) = self.files.reservations.get(address) else { return };
        if guest.is_some_and(|guest| guest != reservation.guest) {
            return;
        }
        info!("{address}: forgetting that {} has it persistently", reservation.who());
        if let Err(failure) = self.files.reservations.forget(address) {
            error!("{address}: {failure}");
            self.problems.push(Problem::failed(Cause::StateFiles, &failure).on(address));
        }
    }
}

fn notes(settings: &Settings) -> Notes {
    Notes::of(settings, ATTACHING)
}
