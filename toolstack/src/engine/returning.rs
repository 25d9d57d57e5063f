//! Guests that reboot or start again, as new domains, and get the functions that they have persistently.
//!
//! Domains are examined when xenstore reports that one was introduced. A PV guest gets its functions while it boots, as by `pci-attach`.
//! An HVM guest finds devices only when its firmware runs, and libxl introduces the domain before it starts the device model. So the
//! service pauses an HVM guest at once, in addition to libxl's own pause, until the guest has its functions, an attachment fails, or the
//! time limit expires.
//!
//! A failure is shown in the status, and retried after events that may have removed its cause: the end of a transaction of the function,
//! the loss of another function by the guest, a reload of policies, a start of the service.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use log::{error, info, warn};
use pciback::{DomId, FunctionState, Sbdf, Uuid};
use serde::{Deserialize, Serialize};

use super::notes::Notes;
use super::problems::Problem;
use super::tasks::Course;
use super::{Engine, Event};
use crate::domains::{self, DomainType};
use crate::journal::{GuestPlace, Record};
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::Cause;
use crate::reservations::Followed;
use crate::transaction::{Finished, Kind};

/// The state of guests that have functions persistently.
#[derive(Default)]
pub(super) struct Returning {
    /// Domains that were examined.
    known: BTreeSet<DomId>,
    /// Functions that a running guest has persistently and that are not attached to it.
    missing: BTreeMap<Sbdf, Missing>,
    /// HVM guests that the service keeps paused.
    paused: BTreeMap<DomId, Start>,
    /// Functions that the settings assign to running guests and that cannot be reserved.
    unreserved: BTreeMap<DomId, Vec<Problem>>,
}

struct Missing {
    domain: DomId,
    /// Whether it is being attached.
    under_way: bool,
    /// Why the last attempt failed; `None` before the first one.
    why: Option<String>,
    /// When it failed first.
    since: Option<SystemTime>,
}

/// An HVM guest that is kept paused at its start.
struct Start {
    /// Until when it is kept paused; `None`: the limit has expired, and the guest runs when the transactions under way end.
    deadline: Option<Instant>,
    /// Whether its device model is being asked.
    asked: bool,
    /// The device numbers that its device model uses.
    slots: Option<Vec<u8>>,
}

/// The note in the run directory about a domain that is kept paused.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    guest: Uuid,
    /// Whether the pause is certain; `false` while the domain is being paused or unpaused.
    paused: bool,
}

impl Missing {
    fn is_waited_for(&self, by: DomId) -> bool {
        self.domain == by && (self.under_way || self.why.is_none())
    }
}

impl Returning {
    /// Missing functions, as problems for `xpci status`.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        let missing = self.missing.iter().filter_map(|(address, missing)| {
            let (why, domain) = (missing.why.as_ref()?, missing.domain);
            let text = format!("{address} is missing in domain {domain}, which has it persistently: {why}");
            let since = missing.since.unwrap_or_else(SystemTime::now);
            Some(Problem::new(Cause::Persistent, text).on(*address).of(domain).since(since))
        });
        missing.chain(self.unreserved.values().flatten().cloned())
    }

    /// Sets the problems with functions that the settings assign to a domain, and logs new ones.
    pub fn note_unreserved(&mut self, domain: DomId, problems: Vec<Problem>) {
        let before = self.unreserved.remove(&domain).unwrap_or_default();
        let mut noted = Vec::new();
        for problem in problems {
            let text = problem.view().message;
            let known = before.iter().find(|known| known.view().message == text);
            if known.is_none() {
                error!("{text}");
            }
            noted.push(known.cloned().unwrap_or(problem));
        }
        if !noted.is_empty() {
            self.unreserved.insert(domain, noted);
        }
    }

    /// The domains with such problems.
    pub fn with_unreserved(&self) -> Vec<DomId> {
        self.unreserved.keys().copied().collect()
    }

    /// Whether a function is missing in the domain that its guest has persistently.
    pub fn is_returning(&self, domain: DomId) -> bool {
        self.missing.values().any(|missing| missing.domain == domain)
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        self.paused.values().filter_map(|start| start.deadline).min()
    }

    /// Functions whose attachment failed, of one domain or of all.
    fn failed(&self, of: Option<DomId>) -> Vec<Sbdf> {
        let failed = self.missing.iter().filter(|(_, missing)| {
            missing.why.is_some() && !missing.under_way && of.is_none_or(|domain| domain == missing.domain)
        });
        failed.map(|(address, _)| *address).collect()
    }

    fn waiting(&self, domain: DomId) -> Vec<Sbdf> {
        let waiting = self
            .missing
            .iter()
            .filter(|(_, missing)| missing.domain == domain && missing.why.is_none() && !missing.under_way);
        waiting.map(|(address, _)| *address).collect()
    }
}

impl Engine {
    /// Finds domains that have appeared, and forgets those that have ended.
    pub(super) fn find_returning(&mut self) {
        if self.reservations.is_empty() && self.settings.guests.is_empty() {
            self.returning.known.clear();
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
        self.returning.known.retain(|domain| present.contains(domain));
        self.returning.unreserved.retain(|domain, _| present.contains(domain));
        self.returning.missing.retain(|_, missing| present.contains(&missing.domain));
        let gone = self.returning.paused.keys().filter(|domain| !present.contains(domain));
        for domain in gone.copied().collect::<Vec<_>>() {
            self.returning.paused.remove(&domain);
            self.pause_notes().remove(domain);
        }
        for domain in present {
            if self.returning.known.insert(domain)
                && let Some(guest) = self.examine_domain(domain)
            {
                self.find_assignments(domain, guest);
            }
        }
    }

    /// Examines a running guest again, for which more functions are reserved now.
    pub(super) fn examine_domain_again(&mut self, domain: DomId) {
        if self.returning.known.contains(&domain) {
            self.examine_domain(domain);
        }
    }

    /// Handles a persistent function that has moved to another address.
    pub(super) fn followed(&mut self, followed: &Followed) {
        let Followed { from, to, guest } = *followed;
        info!("{to}: it was {from} when it was made persistent for guest {guest}");
        if self.reservations.get(from).is_none() {
            self.stop_waiting_for(from);
        }
        for domain in self.returning.known.clone() {
            if self.platform.hypervisor.domain(domain).is_ok_and(|info| info.uuid == guest) {
                self.examine_domain(domain);
            }
        }
    }

    pub(super) fn domains_present(&self) -> Result<BTreeSet<DomId>, Failure> {
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
                self.returning.known.remove(&domain);
                return None;
            }
        };
        let mut found = false;
        for reservation in self.reservations.of(guest) {
            let address = reservation.address;
            if reservation.was_given(&self.boot, domain) {
                continue;
            }
            let place = self
                .functions
                .records()
                .get(address)
                .filter(|record| record.state == FunctionState::Attached);
            if place.and_then(|record| record.guest).is_some_and(|place| place.domain == domain) {
                let (reservations, boot) = (self.reservations.clone(), self.boot.clone());
                self.background("give", move || {
                    if let Err(failure) = reservations.give(reservation, &boot, domain) {
                        error!("{address}: {failure}");
                    }
                });
                continue;
            }
            if self.returning.missing.get(&address).is_some_and(|missing| missing.domain == domain) {
                // Handled already.
                continue;
            }
            info!("{address}: domain {domain} has it persistently");
            self.returning
                .missing
                .insert(address, Missing { domain, under_way: false, why: None, since: None });
            found = true;
        }
        if found && self.keep_paused(domain) {
            self.try_waiting(domain);
        }
        Some(guest)
    }

    /// Keeps an HVM guest paused until it has its functions. Returns whether the attachment can begin, that is whether the device numbers
    /// of its device model are known; always for a PV guest.
    fn keep_paused(&mut self, domain: DomId) -> bool {
        if let Some(start) = self.returning.paused.get(&domain) {
            return start.slots.is_some();
        }
        match domains::kind(self.platform.store.as_ref(), domain) {
            Ok(DomainType::Hvm) => {}
            Ok(_) => return true,
            Err(error) => {
                self.give_up(domain, &Failure::from(error));
                return false;
            }
        }
        if let Err(failure) = self.pause_at_start(domain) {
            self.give_up(domain, &failure);
        }
        false
    }

    fn pause_at_start(&mut self, domain: DomId) -> Result<(), Failure> {
        let hypervisor = Arc::clone(&self.platform.hypervisor);
        let has_run = || {
            let text =
                format!("domain {domain} runs already, and an HVM guest finds its devices when it starts");
            Failure::refused(text).of(domain).hint("reboot it once more")
        };
        let info = hypervisor.domain(domain)?;
        if info.has_run {
            return Err(has_run());
        }
        self.pause_notes().write(domain, &Note { guest: info.uuid, paused: false })?;
        if let Err(error) = hypervisor.pause(domain) {
            self.pause_notes().remove(domain);
            return Err(error.into());
        }
        let noted = self.pause_notes().write(domain, &Note { guest: info.uuid, paused: true });
        info!("domain {domain}: kept paused until it has its functions");
        self.wait_for_device_model(domain);
        let ran = hypervisor.domain(domain).map(|info| info.has_run);
        match (noted, ran) {
            (Ok(()), Ok(false)) => Ok(()),
            (noted, ran) => {
                self.unpause_guest(domain);
                noted?;
                Err(ran.map_or_else(Failure::from, |_| has_run()))
            }
        }
    }

    fn wait_for_device_model(&mut self, domain: DomId) {
        let start =
            Start { deadline: Some(Instant::now() + self.settings.start_limit()), asked: false, slots: None };
        self.returning.paused.insert(domain, start);
        let node = domains::device_model_state(domain);
        if let Err(error) = self.platform.store.watch(&node, &node) {
            self.give_up(domain, &Failure::from(error));
        }
    }

    /// Called when the state of a guest's device model may have changed.
    pub(super) fn device_model_changed(&mut self, domain: DomId) {
        let Some(start) = self.returning.paused.get_mut(&domain).filter(|start| !start.asked) else { return };
        match domains::device_model_runs(self.platform.store.as_ref(), domain) {
            Ok(false) => {}
            Err(error) => self.give_up(domain, &Failure::from(error)),
            Ok(true) => {
                start.asked = true;
                let (hvm, inbox) = (Arc::clone(&self.platform.hvm), self.inbox.clone());
                self.background("ask a device model", move || {
                    let slots = hvm.device_model_slots(domain).map_err(Failure::from);
                    inbox.send(Event::DeviceModelRuns(domain, slots));
                });
            }
        }
    }

    /// The device model has reported its device numbers, or failed.
    pub(super) fn device_model_runs(&mut self, domain: DomId, slots: Result<Vec<u8>, Failure>) {
        let Some(start) = self.returning.paused.get_mut(&domain) else { return };
        match slots {
            Ok(slots) => {
                start.slots = Some(slots);
                self.try_waiting(domain);
                self.unpause_if_ready(domain);
            }
            Err(failure) => self.give_up(domain, &failure),
        }
    }

    fn try_waiting(&mut self, domain: DomId) {
        for address in self.returning.waiting(domain) {
            self.attach_again(address);
        }
    }

    /// Tries to attach a function to the guest that has it persistently. A function in a transaction is tried after its end.
    fn attach_again(&mut self, address: Sbdf) {
        let Some(missing) = self.returning.missing.get_mut(&address) else { return };
        let domain = missing.domain;
        missing.why = None;
        if missing.under_way || self.functions.is_busy(address) || !self.keep_paused(domain) {
            return;
        }
        match self.attachment_again(address, domain) {
            Ok(record) => {
                if let Some(missing) = self.returning.missing.get_mut(&address) {
                    missing.under_way = true;
                }
                self.requests_wait(address);
                self.start(Course::Forward(Kind::Attach), record, None, move |record| {
                    format!("{}: attached again, to domain {domain}", record.address)
                });
            }
            Err(failure) => self.not_attached(address, &failure),
        }
    }

    fn attachment_again(&self, address: Sbdf, domain: DomId) -> Result<Record, Failure> {
        let reservation = self.reservations.get(address);
        let reservation = reservation.ok_or_else(|| Failure::not_found("it was forgotten meanwhile"))?;
        let mut record = self.attachable(address, domain, false)?;
        let slots = self.returning.paused.get(&domain).and_then(|start| start.slots.clone());
        if slots.is_none() {
            self.has_bus(domain)?;
        }
        self.can_lose_bars(domain)?;
        let (slot, others) = (Some(reservation.devfn >> 3), slots.unwrap_or_default());
        let devfn = self.free_place(domain, address, slot, std::iter::empty(), &others)?;
        record.guest = Some(GuestPlace { domain, devfn });
        Ok(record)
    }

    /// Notes that a function could not be attached.
    fn not_attached(&mut self, address: Sbdf, failure: &Failure) {
        let Some(missing) = self.returning.missing.get_mut(&address) else { return };
        let domain = missing.domain;
        error!("{address}: not attached again to domain {domain}: {failure}");
        missing.under_way = false;
        missing.why = Some(failure.to_string());
        missing.since = missing.since.or_else(|| Some(SystemTime::now()));
        self.unpause_if_ready(domain);
    }

    /// Gives up on all functions that a domain waits for.
    fn give_up(&mut self, domain: DomId, failure: &Failure) {
        for address in self.returning.waiting(domain) {
            self.not_attached(address, failure);
        }
    }

    /// Stops waiting for a function.
    pub(super) fn stop_waiting_for(&mut self, address: Sbdf) {
        if let Some(missing) = self.returning.missing.remove(&address) {
            self.unpause_if_ready(missing.domain);
        }
    }

    /// Handles the end of a transaction; `before`: the guest that the function had when it began.
    pub(super) fn returning_finished(&mut self, finished: &Finished, before: Option<DomId>) {
        let record = &finished.record;
        let address = record.address;
        let missing = self.returning.missing.get(&address);
        let under_way = missing.is_some_and(|missing| missing.under_way);
        let attached =
            missing.zip(record.guest).is_some_and(|(missing, place)| missing.domain == place.domain)
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
    pub(super) fn try_again(&mut self, of: Option<DomId>) {
        for address in self.returning.failed(of) {
            self.attach_again(address);
        }
    }

    /// Lets guests run whose time limit has expired.
    pub(super) fn check_starts(&mut self, now: Instant) {
        let late = self.returning.paused.iter_mut();
        let late = late.filter(|(_, start)| start.deadline.is_some_and(|deadline| deadline <= now));
        let late = late.map(|(domain, start)| {
            start.deadline = None;
            (*domain, start.slots.is_some())
        });
        for (domain, asked) in late.collect::<Vec<_>>() {
            let what =
                if asked { "it was in a transaction" } else { "the domain's device model did not run" };
            let text = format!("{what} for {} s", self.settings.start_limit_seconds);
            self.give_up(domain, &Failure::new(ErrorCode::Failed, text).of(domain));
        }
    }

    /// Unpauses a guest that no longer waits for a function.
    fn unpause_if_ready(&mut self, domain: DomId) {
        let waits = self.returning.missing.values().any(|missing| missing.is_waited_for(domain));
        if !waits && self.returning.paused.contains_key(&domain) {
            self.unpause_guest(domain);
        }
    }

    fn unpause_guest(&mut self, domain: DomId) {
        self.returning.paused.remove(&domain);
        let node = domains::device_model_state(domain);
        if let Err(error) = self.platform.store.unwatch(&node, &node) {
            warn!("domain {domain}: {error}");
        }
        // Noted before, so that a service killed in between does not unpause twice, which would cancel the toolstack's own pause.
        let note = self.pause_notes().read::<Note>(domain);
        if let Some(note) = note.map(|note| Note { paused: false, ..note })
            && let Err(failure) = self.pause_notes().write(domain, &note)
        {
            error!("{failure}");
        }
        match self.platform.hypervisor.unpause(domain) {
            Ok(()) => info!("domain {domain}: not kept paused any more"),
            Err(_) if matches!(self.platform.store.domain_exists(domain), Ok(false)) => {}
            Err(error) => {
                error!("{error}");
                let text = format!("{error}; 'xl unpause {domain}' may do it");
                self.problems.push(Problem::new(Cause::Guest, text).of(domain).until_unpaused());
            }
        }
        self.pause_notes().remove(domain);
    }

    /// Takes over guests that an earlier run kept paused, and finds domains that appeared meanwhile.
    pub(super) fn resume_returning(&mut self) {
        for domain in self.pause_notes().domains() {
            let info = self.platform.hypervisor.domain(domain).ok();
            let note = self
                .pause_notes()
                .read::<Note>(domain)
                .zip(info)
                .filter(|(note, info)| note.guest == info.uuid);
            match note {
                Some((Note { paused: true, .. }, _)) => {
                    info!("domain {domain}: xpcid paused it before its restart");
                    self.wait_for_device_model(domain);
                    continue;
                }
                // Xen counts pauses but has no hypercall that returns the count, so whether the service's own pause is among them is
                // unknown.
                Some((_, info)) if info.paused && !info.has_run => {
                    let text = format!(
                        "xpcid was killed while it paused domain {domain} or let it run: if it does not start, 'xl unpause {domain}'"
                    );
                    self.problems.push(Problem::new(Cause::Guest, text).of(domain).until_unpaused());
                }
                _ => {}
            }
            self.pause_notes().remove(domain);
        }
        self.find_returning();
        for domain in self.returning.paused.keys().copied().collect::<Vec<_>>() {
            self.unpause_if_ready(domain);
        }
    }

    fn pause_notes(&self) -> Notes {
        Notes::of(&self.settings, "paused")
    }
}
