//! HVM guests that are kept paused at their start until they have their functions.
//!
//! An HVM guest finds devices only when its firmware runs, and libxl introduces the domain before it starts the device model. So the
//! service pauses an HVM guest at once, in addition to libxl's own pause, until the guest has its functions, an attachment fails, or the
//! time limit expires.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use log::{error, info, warn};
use pciback::{DeviceNumber, DomId, Uuid};
use serde::{Deserialize, Serialize};

use super::{Context, Effect, Event, Persistent};
use crate::domains::{self, DomainType};
use crate::engine;
use crate::engine::problems::Problem;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::Cause;

/// An HVM guest that is kept paused at its start.
struct Start {
    /// Until when it is kept paused; `None`: the limit has expired, and the guest runs when the transactions under way end.
    deadline: Option<Instant>,
    /// Whether its device model is being asked.
    asked: bool,
    /// The device numbers that its device model uses.
    slots: Option<Vec<DeviceNumber>>,
}

/// The guests that are kept paused.
#[derive(Default)]
pub(super) struct Starts(BTreeMap<DomId, Start>);

impl Starts {
    fn begin(&mut self, domain: DomId, deadline: Instant) {
        self.0.insert(domain, Start { deadline: Some(deadline), asked: false, slots: None });
    }

    fn end(&mut self, domain: DomId) {
        self.0.remove(&domain);
    }

    fn contains(&self, domain: DomId) -> bool {
        self.0.contains_key(&domain)
    }

    fn domains(&self) -> Vec<DomId> {
        self.0.keys().copied().collect()
    }

    /// Whether the device model of a guest was not asked yet.
    fn is_unasked(&self, domain: DomId) -> bool {
        self.0.get(&domain).is_some_and(|start| !start.asked)
    }

    fn note_asked(&mut self, domain: DomId) {
        if let Some(start) = self.0.get_mut(&domain) {
            start.asked = true;
        }
    }

    fn note_slots(&mut self, domain: DomId, slots: Vec<DeviceNumber>) {
        if let Some(start) = self.0.get_mut(&domain) {
            start.slots = Some(slots);
        }
    }

    /// The device numbers that the device model of a guest uses, once they are known.
    pub fn slots(&self, domain: DomId) -> Option<Vec<DeviceNumber>> {
        self.0.get(&domain)?.slots.clone()
    }

    /// Ends the time limits that have expired. Returns their guests, and whether the device numbers of each are known.
    fn expire(&mut self, now: Instant) -> Vec<(DomId, bool)> {
        let late =
            self.0.iter_mut().filter(|(_, start)| start.deadline.is_some_and(|deadline| deadline <= now));
        let late = late.map(|(domain, start)| {
            start.deadline = None;
            (*domain, start.slots.is_some())
        });
        late.collect()
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        self.0.values().filter_map(|start| start.deadline).min()
    }

    /// Forgets domains that have ended, and returns them.
    pub fn keep_those_of(&mut self, present: &BTreeSet<DomId>) -> Vec<DomId> {
        let (kept, ended) =
            std::mem::take(&mut self.0).into_iter().partition(|(domain, _)| present.contains(domain));
        self.0 = kept;
        BTreeMap::into_keys(ended).collect()
    }
}

/// The note in the run directory about a domain that is kept paused.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    guest: Uuid,
    /// Whether the pause is certain; `false` while the domain is being paused or unpaused.
    paused: bool,
}

impl Persistent {
    /// Keeps an HVM guest paused until it has its functions. Returns whether the attachment can begin, that is whether the device numbers
    /// of its device model are known; always for a PV guest.
    pub(super) fn keep_paused(&mut self, domain: DomId, context: &Context<'_>) -> bool {
        if self.starts.contains(domain) {
            return self.starts.slots(domain).is_some();
        }
        match domains::kind(context.platform.store.as_ref(), domain) {
            Ok(DomainType::Hvm) => {}
            Ok(_) => return true,
            Err(error) => {
                self.give_up(domain, &Failure::from(error), context);
                return false;
            }
        }
        if let Err(failure) = self.pause_at_start(domain, context) {
            self.give_up(domain, &failure, context);
        }
        false
    }

    fn pause_at_start(&mut self, domain: DomId, context: &Context<'_>) -> Result<(), Failure> {
        let (hypervisor, notes) = (&context.platform.hypervisor, context.pause_notes());
        let has_run = || {
            let text =
                format!("domain {domain} runs already, and an HVM guest finds its devices when it starts");
            Failure::refused(text).of(domain).hint("reboot it once more")
        };
        let info = hypervisor.domain(domain)?;
        if info.has_run {
            return Err(has_run());
        }
        notes.write(domain, &Note { guest: info.uuid, paused: false })?;
        if let Err(error) = hypervisor.pause(domain) {
            notes.remove(domain);
            return Err(error.into());
        }
        let noted = notes.write(domain, &Note { guest: info.uuid, paused: true });
        info!("domain {domain}: kept paused until it has its functions");
        self.wait_for_device_model(domain, context);
        let ran = hypervisor.domain(domain).map(|info| info.has_run);
        match (noted, ran) {
            (Ok(()), Ok(false)) => Ok(()),
            (noted, ran) => {
                self.unpause(domain, context);
                noted?;
                Err(ran.map_or_else(Failure::from, |_| has_run()))
            }
        }
    }

    fn wait_for_device_model(&mut self, domain: DomId, context: &Context<'_>) {
        self.starts.begin(domain, Instant::now() + context.settings.start_limit());
        let node = domains::device_model_state(domain);
        if let Err(error) = context.platform.store.watch(&node, &node) {
            self.give_up(domain, &Failure::from(error), context);
        }
    }

    /// Called when the state of a guest's device model may have changed.
    pub(super) fn device_model_changed(&mut self, domain: DomId, context: &Context<'_>) {
        if !self.starts.is_unasked(domain) {
            return;
        }
        match domains::device_model_runs(context.platform.store.as_ref(), domain) {
            Ok(false) => {}
            Err(error) => self.give_up(domain, &Failure::from(error), context),
            Ok(true) => {
                self.starts.note_asked(domain);
                let (models, inbox) = (Arc::clone(&context.platform.device_models), context.inbox.clone());
                context.inbox.run("ask a device model", move || {
                    let slots = models.slots(domain).map_err(Failure::from);
                    inbox.send(engine::Event::Persistent(Event::DeviceModelRuns(domain, slots)));
                });
            }
        }
    }

    /// The device model has reported its device numbers, or failed.
    pub(super) fn device_model_runs(
        &mut self,
        domain: DomId,
        slots: Result<Vec<DeviceNumber>, Failure>,
        context: &Context<'_>,
    ) {
        if !self.starts.contains(domain) {
            return;
        }
        match slots {
            Ok(slots) => {
                self.starts.note_slots(domain, slots);
                self.try_waiting(domain, context);
                self.unpause_if_ready(domain, context);
            }
            Err(failure) => self.give_up(domain, &failure, context),
        }
    }

    /// Lets guests run whose time limit has expired.
    pub(super) fn check_starts(&mut self, now: Instant, context: &Context<'_>) {
        for (domain, asked) in self.starts.expire(now) {
            let what =
                if asked { "it was in a transaction" } else { "the domain's device model did not run" };
            let text = format!("{what} for {} s", context.settings.start_limit_seconds);
            self.give_up(domain, &Failure::new(ErrorCode::Failed, text).of(domain), context);
        }
    }

    /// Unpauses a guest that no longer waits for a function.
    pub(super) fn unpause_if_ready(&mut self, domain: DomId, context: &Context<'_>) {
        if !self.missing.is_waited_for(domain) && self.starts.contains(domain) {
            self.unpause(domain, context);
        }
    }

    /// Unpauses the guests that no longer wait for a function.
    pub(super) fn unpause_those_ready(&mut self, context: &Context<'_>) {
        for domain in self.starts.domains() {
            self.unpause_if_ready(domain, context);
        }
    }

    fn unpause(&mut self, domain: DomId, context: &Context<'_>) {
        let (platform, notes) = (context.platform, context.pause_notes());
        self.starts.end(domain);
        let node = domains::device_model_state(domain);
        if let Err(error) = platform.store.unwatch(&node, &node) {
            warn!("domain {domain}: {error}");
        }
        // Noted before, so that a service killed in between does not unpause twice, which would cancel the toolstack's own pause.
        let note = notes.read::<Note>(domain);
        if let Some(note) = note.map(|note| Note { paused: false, ..note })
            && let Err(failure) = notes.write(domain, &note)
        {
            error!("{failure}");
        }
        match platform.hypervisor.unpause(domain) {
            Ok(()) => info!("domain {domain}: no longer kept paused"),
            Err(_) if matches!(platform.store.domain_exists(domain), Ok(false)) => {}
            Err(error) => {
                error!("{error}");
                self.may_stay_paused(domain, format!("{error}; 'xl unpause {domain}' may do it"));
            }
        }
        notes.remove(domain);
    }

    fn may_stay_paused(&mut self, domain: DomId, text: String) {
        let problem = Problem::new(Cause::Guest, text).of(domain).until_unpaused();
        self.effects.push(Effect::Problem(problem));
    }

    /// Takes over guests that an earlier run kept paused.
    pub(super) fn resume(&mut self, context: &Context<'_>) {
        let notes = context.pause_notes();
        for domain in notes.domains() {
            let info = context.platform.hypervisor.domain(domain).ok();
            let note = notes.read::<Note>(domain).zip(info).filter(|(note, info)| note.guest == info.uuid);
            match note {
                Some((Note { paused: true, .. }, _)) => {
                    info!("domain {domain}: xpcid paused it before its restart");
                    self.wait_for_device_model(domain, context);
                    continue;
                }
                // Xen counts pauses but has no hypercall that returns the count, so whether the service's own pause is among them is
                // unknown.
                Some((_, info)) if info.paused && !info.has_run => {
                    let text = format!(
                        "xpcid was killed while it paused domain {domain} or let it run: if it does not start, 'xl unpause {domain}'"
                    );
                    self.may_stay_paused(domain, text);
                }
                _ => {}
            }
            notes.remove(domain);
        }
    }
}
