//! Restoring guests: they get the functions that they were saved with, or equivalent ones, before they run.

use std::collections::BTreeMap;

use log::warn;
use pciback::platform::{HostFunction, VfSettings};
use pciback::{DeviceNumber, DomId, FunctionState, Sbdf, Uuid};

use super::now;
use crate::domains;
use crate::engine::Engine;
use crate::engine::requests::LocalClient;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{DomainName, Request, ReservedFunction, Success};
use crate::reply::Reply;
use crate::saved::{SavedFunction, SavedGuest};
use crate::spec::existing;
use crate::transaction::read_network;

/// The state of the thread that chooses functions for a restored guest.
pub(super) struct Restoring {
    client: LocalClient,
    pub(super) saved: SavedGuest,
    /// What the guest has on this host, which it leaves.
    left: Vec<Sbdf>,
    states: BTreeMap<Sbdf, FunctionState>,
    reply: Reply,
}

/// A suitable function.
struct Chosen<'a> {
    function: ReservedFunction,
    wanted: &'a SavedFunction,
    is_held: bool,
}

impl Engine {
    /// Reserves the functions of a saved guest before it is restored, or refuses with the differences.
    pub(in crate::engine) fn restore(&self, saved: SavedGuest, reply: Reply) {
        let restoring = match self.restoring(saved, &reply) {
            Ok(restoring) => restoring,
            Err(failure) => return reply.done(Err(failure)),
        };
        let done = move |outcome: Result<_, Failure>| reply.done(outcome.and_then(|outcome| outcome));
        self.inbox.background("restore", move || restoring.run(), done);
    }

    /// Refuses a guest that cannot be restored now, whatever functions it had.
    pub(super) fn restoring(&self, saved: SavedGuest, reply: &Reply) -> Result<Restoring, Failure> {
        if let Err(why) = saved.check() {
            let text = format!("the request to restore a guest cannot be used: {why}");
            return Err(Failure::new(ErrorCode::Usage, text));
        }
        let (by_uuid, context) = (DomainName(saved.guest.to_string()), self.persistent_context());
        context
            .absent_guest(&by_uuid, Failure::not_found("no such guest"))
            .map_err(|failure| failure.hint("a guest is restored once: destroy or rename what runs"))?;
        let left = context.leaving(saved.guest).map(|(_, noted)| noted.functions).unwrap_or_default();
        let states = self.functions.records().all().map(|record| (record.address, record.state)).collect();
        let client = LocalClient::new(self.task_context());
        Ok(Restoring { client, saved, left, states, reply: reply.clone() })
    }

    /// Makes sure that a restored guest, which has not run yet, has the functions that were reserved for it.
    pub(in crate::engine) fn restored(&self, guest: Uuid, functions: Vec<ReservedFunction>, reply: Reply) {
        let domain = match self.domain_of(guest) {
            Ok(domain) => domain,
            Err(failure) => return reply.done(Err(failure)),
        };
        let client = LocalClient::new(self.task_context());
        let work = move || {
            let mut warnings = Vec::new();
            for ReservedFunction { address, slot, .. } in functions {
                let attach = attachment(domain.to_string(), address, slot, false, false);
                let attached = client.ask(attach, &format!("attach {address} to {domain}"));
                // The failure names the domain, so that the client can destroy it.
                let attached = attached.map_err(|failure| failure.of(domain))?;
                if let Success::Changed { warnings: more, .. } = attached {
                    warnings.extend(more);
                }
            }
            Ok(Success::Restored { domain, warnings })
        };
        let done = move |outcome: Result<_, Failure>| reply.done(outcome.and_then(|outcome| outcome));
        self.inbox.background("restored", work, done);
    }

    fn domain_of(&self, guest: Uuid) -> Result<DomId, Failure> {
        self.newest_domain(guest)?
            .ok_or_else(|| Failure::not_found(format!("there is no domain of guest {guest}")))
    }

    /// The domain that a guest is, without one that leaves this host.
    pub(super) fn newest_domain(&self, guest: Uuid) -> Result<Option<DomId>, Failure> {
        let leaving = self.leaving_domain(guest);
        let is_it = |domain: &DomId| {
            Some(*domain) != leaving
                && self.platform.hypervisor.domain(*domain).is_ok_and(|info| info.uuid == guest)
        };
        // The highest number is the newest domain; an older one with this UUID is shutting down.
        Ok(domains::present(self.platform.store.as_ref())?.into_iter().filter(is_it).max())
    }
}

/// The request to attach a function with a given device number.
fn attachment(domain: String, address: Sbdf, slot: DeviceNumber, persist: bool, dry_run: bool) -> Request {
    Request::PciAttach {
        domain: DomainName(domain),
        address,
        slot: Some(slot),
        persist,
        managed: false,
        trust_former_owner: false,
        dry_run,
    }
}

impl Restoring {
    pub(super) fn run(&self) -> Result<Success, Failure> {
        let chosen = self.choose()?;
        let mut done = Vec::new();
        for Chosen { function, wanted, is_held } in &chosen {
            done.push(function.clone());
            self.reply.progress(&format!("reserving {} for {}", function.address, self.saved.called()));
            let last = done.len() - 1;
            let reserved = self.reserve(&mut done[last], *is_held, wanted);
            if let Err(failure) = reserved.and_then(|()| self.set_network(&mut done[last], wanted)) {
                self.undo(&done);
                return Err(failure);
            }
        }
        Ok(Success::Reserved { guest: self.saved.guest, functions: done })
    }

    fn ask(&self, request: Request) -> Result<Success, Failure> {
        self.client.ask(request, &format!("reserve functions for {}", self.saved.called()))
    }

    /// Chooses a function for each that the guest had; the failure lists all that are missing.
    fn choose(&self) -> Result<Vec<Chosen<'_>>, Failure> {
        let host = self.client.context.platform.host.as_ref();
        let all = host.functions()?.into_iter().filter_map(|address| host.function(address).ok());
        let all: Vec<HostFunction> = all.collect();
        let (mut chosen, mut missing) = (Vec::<Chosen<'_>>::new(), Vec::new());
        for wanted in &self.saved.functions {
            let free = |function: &&HostFunction| {
                !self.left.contains(&function.address)
                    && chosen.iter().all(|other| other.function.address != function.address)
                    && wanted.device.is_kind_of(function)
            };
            match self.choose_for(wanted, all.iter().filter(free)) {
                Ok(one) => chosen.push(one),
                Err(failure) => missing.push(failure),
            }
        }
        Failure::refuse_for(&format!("restore {}", self.saved.called()), missing)?;
        Ok(chosen)
    }

    /// The best candidate: the same device, then one that is reserved for the guest, then one that is held.
    fn choose_for<'a, 'b>(
        &self,
        wanted: &'a SavedFunction,
        candidates: impl Iterator<Item = &'b HostFunction>,
    ) -> Result<Chosen<'a>, Failure> {
        let context = &self.client.context;
        let host = context.platform.host.as_ref();
        let mut ranked = Vec::new();
        for function in candidates {
            let is_it = context.devices.of(host, function).is_ok_and(|device| device.is(&wanted.device));
            let kept = context.files.reservations.get(function.address);
            let is_kept = kept.is_some_and(|kept| kept.guest == self.saved.guest);
            let state = self.states.get(&function.address).copied().unwrap_or(FunctionState::Host);
            let is_free = match state {
                FunctionState::Held => true,
                // Only the guest's own device is taken from a driver of dom0.
                FunctionState::Host => {
                    is_it || function.physical_function.is_some() && function.driver.is_none()
                }
                _ => is_it,
            };
            if is_free {
                let is_held = state == FunctionState::Held;
                ranked.push(((!is_it, !is_kept, !is_held, function.address), function, is_held));
            }
        }
        ranked.sort_by_key(|(rank, ..)| *rank);
        let mut why = None;
        for (_, function, is_held) in ranked {
            match self.check_candidate(wanted, function, is_held) {
                Ok(()) => {
                    let (address, slot) = (function.address, wanted.slot);
                    let network_before = VfSettings::default();
                    let (is_new, newly_held) = (false, false);
                    let function = ReservedFunction { address, slot, is_new, newly_held, network_before };
                    return Ok(Chosen { function, wanted, is_held });
                }
                // The first candidate is the guest's own device, if there; its failure is the most useful one.
                Err(failure) => drop(why.get_or_insert(failure)),
            }
        }
        let had =
            format!("{} had {} as device {:x}", self.saved.called(), wanted.device.address, wanted.slot);
        let why = why
            .map_or_else(|| "this host has none of its kind that is free".to_owned(), |why| why.to_string());
        Err(Failure::refused(format!("{had}: {why}")).on(wanted.device.address))
    }

    fn check_candidate(
        &self,
        wanted: &SavedFunction,
        function: &HostFunction,
        is_held: bool,
    ) -> Result<(), Failure> {
        let (host, address) = (self.client.context.platform.host.as_ref(), function.address);
        if let Some(differs) = wanted.difference(host, function)? {
            return Err(Failure::refused(format!("{address} {differs}")).on(address));
        }
        let request = match is_held {
            true => attachment(self.saved.guest.to_string(), address, wanted.slot, true, true),
            false => Request::PciAssignableAdd {
                address,
                force: false,
                persist: false,
                managed: false,
                dry_run: true,
            },
        };
        self.ask(request).map(drop)
    }

    /// Holds a function if necessary, and reserves it for the guest.
    fn reserve(
        &self,
        done: &mut ReservedFunction,
        is_held: bool,
        wanted: &SavedFunction,
    ) -> Result<(), Failure> {
        let (address, reservations) = (done.address, &self.client.context.files.reservations);
        if !is_held {
            let hold = Request::PciAssignableAdd {
                address,
                force: false,
                persist: false,
                managed: false,
                dry_run: false,
            };
            done.newly_held = matches!(self.ask(hold)?, Success::Changed { .. });
        }
        let request = attachment(self.saved.guest.to_string(), address, wanted.slot, true, false);
        done.is_new = matches!(self.ask(request)?, Success::Changed { .. });
        if let Some(mut reservation) = reservations.get(address).filter(|_| done.is_new) {
            reservation.saved = (!wanted.persistent).then(now);
            reservation.name.clone_from(&self.saved.name);
            reservations.keep(reservation)?;
        }
        Ok(())
    }

    /// Applies those network settings of the saved guest that the VF does not have.
    fn set_network(&self, done: &mut ReservedFunction, wanted: &SavedFunction) -> Result<(), Failure> {
        let address = done.address;
        if wanted.network.is_empty() {
            return Ok(());
        }
        let platform = &self.client.context.platform;
        existing(platform.host.as_ref(), address)?;
        let present = read_network(platform, address)?.settings.unwrap_or_default();
        let settings = wanted.network.unlike(&present);
        if settings.is_empty() {
            return Ok(());
        }
        // Before the attempt: it may have set some of them.
        done.network_before = present.only(&settings);
        self.ask(Request::VfSet { address, settings, persist: false }).map(drop)
    }

    fn undo(&self, done: &[ReservedFunction]) {
        if self.client.is_unanswered() {
            return;
        }
        for request in done.iter().rev().flat_map(|function| function.undoing(self.saved.guest)) {
            if let Err(failure) = self.ask(request) {
                warn!("undo what was reserved for {}: {failure}", self.saved.called());
            }
        }
    }
}
