//! What the engine does for guests that have functions persistently.

use std::time::Instant;

use log::info;
use pciback::policy::Reuse;
use pciback::{DomId, Sbdf};

use super::{Context, Effect, Event, Persistent};
use crate::engine::Engine;
use crate::engine::tasks::Course;
use crate::journal::{GuestPlace, Record};
use crate::outcome::Failure;
use crate::protocol::Cause;
use crate::reservations::Followed;
use crate::transaction::{Finished, Kind};

impl Engine {
    fn persistent_in_context(&mut self) -> (&mut Persistent, Context<'_>) {
        let Self { persistent, platform, settings, files, functions, boot, inbox, .. } = self;
        (persistent, Context { platform, settings, files, functions, boot, inbox })
    }

    fn persistent_step<T>(&mut self, step: impl FnOnce(&mut Persistent, &Context<'_>) -> T) -> T {
        let (persistent, context) = self.persistent_in_context();
        let done = step(persistent, &context);
        for effect in std::mem::take(&mut persistent.effects) {
            match effect {
                Effect::Attach(address, domain) => self.attach_again(address, domain),
                Effect::FindAssignments(domain, guest) => self.find_assignments(domain, guest),
                Effect::DomainsFound => self.problems.resolve(Cause::Starts),
                Effect::Problem(problem) => self.problems.push(problem),
            }
        }
        done
    }

    pub(in crate::engine) fn handle_persistent(&mut self, event: Event) {
        match event {
            Event::DeviceModelRuns(domain, slots) => {
                self.persistent_step(|persistent, context| {
                    persistent.device_model_runs(domain, slots, context);
                });
            }
            Event::AssignmentsFound(assignments) => self.assignments_found(assignments),
            Event::AssignmentsReserved(domain) => {
                self.persistent_step(|persistent, context| persistent.examine_again(domain, context));
            }
        }
    }

    /// Finds domains that have appeared, and forgets those that have ended.
    pub(in crate::engine) fn find_returning(&mut self) {
        for domain in self.persistent_step(Persistent::new_domains) {
            self.persistent_step(|persistent, context| persistent.examine_new(domain, context));
        }
    }

    /// Takes over guests that an earlier run kept paused, and finds domains that appeared meanwhile.
    pub(in crate::engine) fn resume_returning(&mut self) {
        self.persistent_step(Persistent::resume);
        self.find_returning();
        self.persistent_step(Persistent::unpause_those_ready);
    }

    /// Handles a persistent function that has moved to another address.
    pub(in crate::engine) fn followed(&mut self, followed: &Followed) {
        let Followed { from, to, guest } = *followed;
        info!("{to}: it was {from} when it was made persistent for guest {guest}");
        if self.files.reservations.get(from).is_none() {
            self.stop_waiting_for(from);
        }
        for domain in self.persistent_step(|persistent, context| persistent.domains_of(guest, context)) {
            self.persistent_step(|persistent, context| persistent.examine_again(domain, context));
        }
    }

    /// Stops waiting for a function.
    pub(super) fn stop_waiting_for(&mut self, address: Sbdf) {
        self.persistent_step(|persistent, context| persistent.stop_waiting_for(address, context));
    }

    /// Handles the end of a transaction; `before`: the guest that the function had when it began.
    pub(in crate::engine) fn returning_finished(&mut self, finished: &Finished, before: Option<DomId>) {
        self.persistent_step(|persistent, context| persistent.finished(finished, before, context));
    }

    /// Retries failed attachments.
    pub(in crate::engine) fn try_again(&mut self) {
        self.persistent_step(|persistent, context| persistent.try_again(None, context));
    }

    /// Called when the state of a guest's device model may have changed.
    pub(in crate::engine) fn device_model_changed(&mut self, domain: DomId) {
        self.persistent_step(|persistent, context| persistent.device_model_changed(domain, context));
    }

    /// Lets guests run whose time limit has expired.
    pub(in crate::engine) fn check_starts(&mut self, now: Instant) {
        self.persistent_step(|persistent, context| persistent.check_starts(now, context));
    }

    fn attach_again(&mut self, address: Sbdf, domain: DomId) {
        match self.attachment_again(address, domain) {
            Ok(record) => {
                self.persistent.missing.begin(address);
                self.requests_wait(address);
                self.start(Course::Forward(Kind::Attach), record, None, move |record| {
                    format!("{}: attached again, to domain {domain}", record.address)
                });
            }
            Err(failure) => self.persistent_step(|persistent, context| {
                persistent.not_attached(address, &failure, context);
            }),
        }
    }

    fn attachment_again(&self, address: Sbdf, domain: DomId) -> Result<Record, Failure> {
        let reservation = self.files.reservations.get(address);
        let reservation = reservation.ok_or_else(|| Failure::not_found("it was forgotten meanwhile"))?;
        let mut record = self.attachable(address, domain, Reuse::AfterShutdown)?;
        let slots = self.persistent.starts.slots(domain);
        if slots.is_none() {
            self.has_bus(domain)?;
        }
        self.can_lose_bars(domain)?;
        let (slot, others) = (Some(reservation.devfn.device()), slots.unwrap_or_default());
        let devfn = self.free_place(domain, address, slot, std::iter::empty(), &others)?;
        record.guest = Some(GuestPlace { domain, devfn });
        Ok(record)
    }
}
