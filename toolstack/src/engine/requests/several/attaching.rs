//! The thread that attaches several functions to one guest, or takes back what it has done.

use log::warn;
use pciback::{DomId, Sbdf};

use super::{Several, names};
use crate::engine::requests::local_client::LocalClient;
use crate::engine::requests::obstacles::attaching;
use crate::outcome::{ErrorCode, Failure, Obstacle};
use crate::protocol::{Placed, Request, Scope, Success};
use crate::reply::Reply;

/// The state of the thread that attaches the functions.
pub(super) struct Attaching {
    pub client: LocalClient,
    /// The domain of the guest, if that runs.
    pub domain: Option<DomId>,
    pub wanted: Several,
    pub reply: Reply,
}

impl Attaching {
    fn ask(&self, request: Request) -> Result<Success, Failure> {
        self.client.ask(request, &format!("attach {}", self.wanted.named()))
    }

    pub fn run(&self) -> Result<Success, Failure> {
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
