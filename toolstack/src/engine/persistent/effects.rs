//! What the engine does for guests that have functions persistently.

use std::time::Instant;

use log::info;
use pciback::policy::Reuse;
use pciback::{DomId, Sbdf, Uuid};

use super::assignments::Assignments;
use super::updates::changed;
use super::{Context, Effect, Event, Persistent};
use crate::engine::requests::{AttachOptions, persistent_view};
use crate::engine::tasks::Course;
use crate::engine::{self, Engine};
use crate::journal::{GuestPlace, Record};
use crate::outcome::Failure;
use crate::protocol::{Cause, DomainName, FunctionView, Placed, Success};
use crate::reply::Reply;
use crate::reservations::{Followed, Reservation};
use crate::spec::existing;
use crate::transaction::{Finished, Kind};

impl Engine {
    fn persistent_in_context(&mut self) -> (&mut Persistent, Context<'_>) {
        let Self { persistent, platform, settings, files, functions, devices, boot, inbox, .. } = self;
        (persistent, Context { platform, settings, files, functions, devices, boot, inbox })
    }

    /// What decides about functions that guests have persistently.
    pub(in crate::engine) fn persistent_context(&self) -> Context<'_> {
        let Self { platform, settings, files, functions, devices, boot, inbox, .. } = self;
        Context { platform, settings, files, functions, devices, boot, inbox }
    }

    fn persistent_step<T>(&mut self, step: impl FnOnce(&mut Persistent, &Context<'_>) -> T) -> T {
        let (persistent, context) = self.persistent_in_context();
        let done = step(persistent, &context);
        for effect in std::mem::take(&mut persistent.effects) {
            match effect {
                Effect::Attach(address, domain) => self.attach_again(address, domain),
                Effect::FindAssignments(domain, guest) => self.find_assignments(domain, guest),
                Effect::Forget(reservation, reply) => self.end_reservation(*reservation, reply),
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
            Event::DevicesRead => self.devices_read(),
            Event::MoveEnded => self.find_returning(),
            Event::AssignmentsReserved(domain) => {
                self.persistent_step(|persistent, context| persistent.examine_again(domain, context));
            }
        }
    }

    /// Finds domains that have appeared, and forgets those that have ended.
    pub(in crate::engine) fn find_returning(&mut self) {
        // They are found when it is known which devices are theirs.
        if !self.functions.handover().recognition.has_ended() {
            return;
        }
        for domain in self.persistent_step(Persistent::new_domains) {
            self.persistent_step(|persistent, context| persistent.examine_new(domain, context));
        }
    }

    /// Takes over guests that an earlier run kept paused, and finds domains that appeared meanwhile.
    pub(super) fn resume_returning(&mut self) {
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
    fn stop_waiting_for(&mut self, address: Sbdf) {
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

    /// Reserves a function for a guest that does not run.
    pub(in crate::engine) fn reserve_for_absent(
        &self,
        guest: Result<(Uuid, Option<String>), Failure>,
        function: Placed,
        options: AttachOptions,
        reply: Reply,
    ) {
        let context = self.persistent_context();
        let wanted = guest.and_then(|guest| {
            let Placed { address, slot } = function;
            let function = existing(self.platform.host.as_ref(), address)?;
            self.functions.idle(address)?;
            // Former owners that may still reach the function are checked when the guest starts.
            let found = self.attach_obstacles(&function, None, Reuse::Trusted);
            context.absent_reservation(guest, &function, slot, found)
        });
        match wanted {
            Ok(wanted) => context.reserve(wanted, options.dry_run, reply),
            Err(failure) => reply.done(Err(failure)),
        }
    }

    /// Removes a function from those that the guest has persistently.
    pub(in crate::engine) fn forget_reservation(&mut self, guest: &DomainName, address: Sbdf, reply: Reply) {
        self.persistent_step(|persistent, context| persistent.forget(guest, address, reply, context));
    }

    fn end_reservation(&self, reservation: Reservation, reply: Reply) {
        let context = self.task_context();
        self.background("forget", move || {
            let address = reservation.address;
            let again = context.assigned_again(&reservation).unwrap_or_default();
            let message = format!("{address} is no longer persistent for {}{again}", reservation.who());
            reply.done(context.files.reservations.forget(address).map(|()| changed(message)));
        });
    }

    /// The reservation of a function that goes back to dom0, which ends it.
    pub(in crate::engine) fn reservation_ends(&mut self, address: Sbdf) -> Option<Reservation> {
        self.persistent_step(|persistent, context| persistent.ends(address, context))
    }

    /// Lists all reservations, or those of one guest.
    pub(in crate::engine) fn reserved_list(&self, guest: Option<&DomainName>, reply: Reply) {
        let listed = self.persistent_context().listed(guest);
        self.show(reply, move |shown| {
            let view = |reservation: &Reservation| {
                let view = shown.view(reservation.address);
                let guest_address = view.guest_address.or(Some(Sbdf::in_guest(reservation.devfn)));
                FunctionView { guest_address, persistent: Some(persistent_view(reservation)), ..view }
            };
            Ok(Success::Functions { functions: listed.iter().map(view).collect() })
        });
    }

    /// Finds, on a thread, the functions that the settings assign to a new domain.
    fn find_assignments(&self, domain: DomId, guest: Uuid) {
        if self.settings.guests.is_empty() {
            return;
        }
        let context = self.task_context();
        self.background("find", move || {
            if let Some(found) = context.assignments(domain, guest) {
                context.inbox.send(engine::Event::Persistent(Event::AssignmentsFound(found)));
            }
        });
    }

    fn assignments_found(&mut self, assignments: Assignments) {
        let free_vf = |pf, domain: DomId, taken: &[Sbdf]| {
            self.free_vf(pf, &DomainName(domain.0.to_string()), Reuse::AfterShutdown, taken)
        };
        let assigning = self.persistent_context().assigning(assignments, &free_vf);
        self.persistent_step(|persistent, context| persistent.assign(assigning, context));
    }

    /// Searches again for functions that are assigned to running guests, because a function has appeared or become free.
    pub(in crate::engine) fn retry_assignments(&mut self) {
        self.persistent_step(Persistent::search_again);
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
