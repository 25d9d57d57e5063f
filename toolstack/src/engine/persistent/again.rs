//! Attaching the functions that a guest has persistently to the domain that it runs as now.

use std::collections::BTreeSet;

use log::{error, info, warn};
use pciback::policy::Reuse;
use pciback::{DomId, FunctionState, Sbdf, Uuid};

use crate::engine::Engine;
use crate::engine::problems::Problem;
use crate::engine::tasks::Course;
use crate::journal::{GuestPlace, Record};
use crate::outcome::Failure;
use crate::protocol::Cause;
use crate::reservations::Followed;
use crate::transaction::{Finished, Kind};

impl Engine {
    /// Finds domains that have appeared, and forgets those that have ended.
    pub(in crate::engine) fn find_returning(&mut self) {
        if self.files.reservations.is_empty() && self.settings.guests.is_empty() {
            self.persistent.known.clear();
            return;
        }
        let present = match self.domains_present() {
            Ok(present) => {
                self.problems.resolve(Cause::Starts);
                present
            }
            Err(error) => {
                let text = format!("look for guests that start again: {error}");
                error!("{text}");
                self.problems.push(Problem::new(Cause::Starts, text));
                return;
            }
        };
        for domain in self.persistent.keep_those_of(&present) {
            self.pause_notes().remove(domain);
        }
        for domain in present {
            if self.persistent.known.insert(domain)
                && let Some(guest) = self.examine_domain(domain)
            {
                self.find_assignments(domain, guest);
            }
        }
    }

    /// Examines a running guest again, for which more functions are reserved now.
    pub(super) fn examine_domain_again(&mut self, domain: DomId) {
        if self.persistent.known.contains(&domain) {
            self.examine_domain(domain);
        }
    }

    /// Handles a persistent function that has moved to another address.
    pub(in crate::engine) fn followed(&mut self, followed: &Followed) {
        let Followed { from, to, guest } = *followed;
        info!("{to}: it was {from} when it was made persistent for guest {guest}");
        if self.files.reservations.get(from).is_none() {
            self.stop_waiting_for(from);
        }
        for domain in self.persistent.known.clone() {
            if self.platform.hypervisor.domain(domain).is_ok_and(|info| info.uuid == guest) {
                self.examine_domain(domain);
            }
        }
    }

    pub(in crate::engine) fn domains_present(&self) -> Result<BTreeSet<DomId>, Failure> {
        let store = self.platform.store.as_ref();
        let mut present = BTreeSet::new();
        for number in store.list("/local/domain")? {
            // A domain's nodes exist before it is introduced; its memory does not.
            if let Some(domain) = number.parse().ok().map(DomId).filter(|domain| *domain != DomId::DOM0)
                && store.domain_exists(domain)?
            {
                present.insert(domain);
            }
        }
        Ok(present)
    }

    /// Finds functions that a domain has persistently and that must be attached. Returns the domain's UUID.
    fn examine_domain(&mut self, domain: DomId) -> Option<Uuid> {
        let guest = match self.platform.hypervisor.domain(domain) {
            Ok(info) => info.uuid,
            Err(error) => {
                // The domain may have ended.
                warn!("{error}");
                self.persistent.known.remove(&domain);
                return None;
            }
        };
        let mut found = false;
        for reservation in self.files.reservations.of(guest) {
            let address = reservation.address;
            if reservation.was_given(&self.boot, domain) {
                continue;
            }
            let records = self.functions.records();
            if records.state(address) == FunctionState::Attached && records.guest(address) == Some(domain) {
                let (reservations, boot) = (self.files.reservations.clone(), self.boot.clone());
                self.background("give", move || {
                    if let Err(failure) = reservations.give(reservation, &boot, domain) {
                        error!("{address}: {failure}");
                    }
                });
                continue;
            }
            if self.persistent.missing.add(address, domain) {
                info!("{address}: domain {domain} has it persistently");
                found = true;
            }
        }
        if found && self.keep_paused(domain) {
            self.try_waiting(domain);
        }
        Some(guest)
    }

    pub(super) fn try_waiting(&mut self, domain: DomId) {
        for address in self.persistent.missing.untried(domain) {
            self.attach_again(address);
        }
    }

    /// Tries to attach a function to the guest that has it persistently. A function in a transaction is tried after its end.
    fn attach_again(&mut self, address: Sbdf) {
        let Some(domain) = self.persistent.missing.try_again(address) else { return };
        if self.functions.is_busy(address) || !self.keep_paused(domain) {
            return;
        }
        match self.attachment_again(address, domain) {
            Ok(record) => {
                self.persistent.missing.begin(address);
                self.requests_wait(address);
                self.start(Course::Forward(Kind::Attach), record, None, move |record| {
                    format!("{}: attached again, to domain {domain}", record.address)
                });
            }
            Err(failure) => self.not_attached(address, &failure),
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

    /// Notes that a function could not be attached.
    fn not_attached(&mut self, address: Sbdf, failure: &Failure) {
        let Some(domain) = self.persistent.missing.failed(address, failure.to_string()) else { return };
        error!("{address}: not attached again to domain {domain}: {failure}");
        self.unpause_if_ready(domain);
    }

    /// Gives up on all functions that a domain waits for.
    pub(super) fn give_up(&mut self, domain: DomId, failure: &Failure) {
        for address in self.persistent.missing.untried(domain) {
            self.not_attached(address, failure);
        }
    }

    /// Stops waiting for a function.
    pub(super) fn stop_waiting_for(&mut self, address: Sbdf) {
        if let Some(domain) = self.persistent.missing.remove(address) {
            self.unpause_if_ready(domain);
        }
    }

    /// Handles the end of a transaction; `before`: the guest that the function had when it began.
    pub(in crate::engine) fn returning_finished(&mut self, finished: &Finished, before: Option<DomId>) {
        let record = &finished.record;
        let address = record.address;
        let under_way = self.persistent.missing.is_under_way(address);
        let domain = self.persistent.missing.domain(address);
        let attached = domain.is_some()
            && record.guest.map(|place| place.domain) == domain
            && record.state == FunctionState::Attached;
        match &finished.outcome {
            Err(failure) if under_way => self.not_attached(address, failure),
            _ if under_way || attached => self.stop_waiting_for(address),
            _ => {
                if record.state == FunctionState::Held {
                    self.attach_again(address);
                }
                // A device number in the guest may be free now.
                if let Some(domain) = before.filter(|_| record.guest.is_none()) {
                    self.try_again(Some(domain));
                }
            }
        }
    }

    /// Retries failed attachments.
    pub(in crate::engine) fn try_again(&mut self, of: Option<DomId>) {
        for address in self.persistent.missing.all_failed(of) {
            self.attach_again(address);
        }
    }
}
