//! Attaches several functions to one guest, all or none.
//!
//! After all of them are checked, each is attached by a request of its own (`attaching`). If one fails, those before it are detached in
//! reverse order. A note in the run directory lists the functions meanwhile, so that the next run of a killed service can detach them
//! (`note`).

mod attaching;
mod note;

use pciback::Sbdf;
use pciback::policy::Reuse;

use self::attaching::Attaching;
use self::note::notes;
use super::attach::AttachOptions;
use super::local_client::LocalClient;
use crate::domains;
use crate::engine::Engine;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{DomainName, Placed, Request};
use crate::reply::Reply;

/// The number of devices on a guest's bus.
const MAX_FUNCTIONS: usize = 32;

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
}
