//! Guests that are suspended while they have functions, by another program than `xpci save`: `xl save`, libvirt, a script that saves all
//! guests when the host shuts down.
//!
//! The service is not asked before, and the checkpoint is made from the memory of the suspended guest: nothing can be corrected in it any
//! more. It remains to say so, before that guest is restored.

use std::collections::BTreeSet;

use log::{error, info, warn};
use pciback::platform::DomainInfo;
use pciback::{DomId, Sbdf, Uuid};

use crate::domains::{self, DomainType};
use crate::engine::Engine;
use crate::engine::problems::Problem;
use crate::outcome::few;
use crate::protocol::Cause;
use crate::suspensions::Suspension;

/// The number of functions that a message names.
const SHOWN: usize = 4;

/// What was reported of suspended guests.
#[derive(Default)]
pub(in crate::engine) struct SuspendedGuests {
    /// The domains that were suspended when the service last looked; `None`: this run has not looked yet.
    seen: Option<BTreeSet<DomId>>,
    /// Domains of guests that were suspended as an earlier domain.
    returned: BTreeSet<DomId>,
}

/// Where a guest is that was suspended with functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whereabouts {
    /// Suspended still.
    Suspended(DomId),
    /// It runs on as the domain that was suspended.
    RunsOn(DomId),
    /// It is another domain now, restored or started anew: nothing that Xen or xenstore show tells which.
    Another(DomId),
    /// It is no domain of this host.
    Ended,
}

impl Engine {
    /// Finds guests that are suspended, and those that have returned. Called when domains appear, shut down or end.
    pub(in crate::engine) fn find_suspended(&mut self) {
        let users: BTreeSet<DomId> =
            self.functions.records().all().filter_map(|record| Some(record.guest?.domain)).collect();
        let present = self.present_domains(&users);
        let before = self.suspended.seen.replace(BTreeSet::new());
        for (domain, info) in present.iter().filter(|(_, info)| info.suspended) {
            let noted = self.files.suspensions.of(info.uuid);
            self.suspended.seen.get_or_insert_default().insert(*domain);
            match (&before, noted) {
                (_, Some(_)) if !users.contains(domain) => {
                    self.forget_suspension(info.uuid, "it is suspended without functions");
                }
                (None, Some(noted)) if noted.is_of(*domain, &self.boot) => {}
                (Some(before), Some(noted))
                    if before.contains(domain) && noted.is_of(*domain, &self.boot) => {}
                _ if users.contains(domain) => self.note_suspension(*domain, info.uuid),
                _ => {}
            }
        }
        self.forget_renewed(&present);
        self.report_returned(&present);
    }

    /// Forgets guests that were started anew with another UUID, as xl does where their xl.cfg has none: a restored guest has its old one.
    fn forget_renewed(&self, present: &[(DomId, DomainInfo)]) {
        let ended = |noted: &Suspension| self.whereabouts(noted, present) == Whereabouts::Ended;
        let ended: Vec<_> = self.files.suspensions.all().into_iter().filter(ended).collect();
        if ended.is_empty() {
            return;
        }
        let store = self.platform.store.as_ref();
        let names: BTreeSet<String> =
            present.iter().filter_map(|(domain, _)| domains::name(store, *domain).ok().flatten()).collect();
        for noted in
            ended.into_iter().filter(|noted| noted.name.as_ref().is_some_and(|name| names.contains(name)))
        {
            self.forget_suspension(noted.guest, "a guest of this name was started anew");
        }
    }

    /// The domains with functions; all domains of the host, if there are guests that were suspended before.
    fn present_domains(&self, users: &BTreeSet<DomId>) -> Vec<(DomId, DomainInfo)> {
        let mut present = users.clone();
        if !self.files.suspensions.is_empty() {
            match domains::present(self.platform.store.as_ref()) {
                Ok(all) => present.extend(all),
                Err(error) => warn!("look for guests that were suspended: {error}"),
            }
        }
        // A domain that has just ended is unknown to Xen.
        let known = |domain: DomId| Some((domain, self.platform.hypervisor.domain(domain).ok()?));
        present.into_iter().filter_map(known).collect()
    }

    fn note_suspension(&mut self, domain: DomId, guest: Uuid) {
        let store = self.platform.store.as_ref();
        let name = domains::name(store, domain).unwrap_or_default();
        let hvm = matches!(domains::kind(store, domain), Ok(DomainType::Hvm));
        let functions: Vec<Sbdf> =
            self.functions.records().of(domain).map(|(record, _)| record.address).collect();
        let suspension = Suspension::now(guest, name, hvm, functions).as_domain(domain, &self.boot);
        error!("{}", self.describe(&suspension, Whereabouts::Suspended(domain)));
        for address in &suspension.functions {
            let text =
                "its guest was suspended with it, not by 'xpci save', and cannot be restored".to_owned();
            self.note_outcome(*address, Err(text));
        }
        for guest in self.files.suspensions.note(suspension) {
            self.store_suspension(guest);
        }
    }

    /// Logs domains of guests that may have been restored from such a checkpoint.
    fn report_returned(&mut self, present: &[(DomId, DomainInfo)]) {
        self.suspended.returned.retain(|returned| present.iter().any(|(domain, _)| domain == returned));
        for (domain, info) in present {
            if let Some(suspension) = self.files.suspensions.of(info.uuid)
                && let Whereabouts::Another(newest) = self.whereabouts(&suspension, present)
                && newest == *domain
                && self.suspended.returned.insert(newest)
            {
                error!("{}", self.describe(&suspension, Whereabouts::Another(newest)));
            }
        }
    }

    /// A guest's kernel has connected to its ring, or a driver in it has started: it was not restored from an unusable checkpoint.
    pub(in crate::engine) fn runs_again(&mut self, domain: DomId) {
        if self.files.suspensions.is_empty() {
            return;
        }
        if let Ok(info) = self.platform.hypervisor.domain(domain)
            && let Some(noted) = self.files.suspensions.of(info.uuid)
            && !noted.is_of(domain, &self.boot)
        {
            self.forget_suspension(info.uuid, &format!("domain {domain} uses its functions"));
        }
    }

    fn forget_suspension(&self, guest: Uuid, why: &str) {
        if let Some(noted) = self.files.suspensions.forget(guest) {
            info!("{}: that it was suspended with functions is forgotten: {why}", called(&noted));
            self.store_suspension(guest);
        }
    }

    fn store_suspension(&self, guest: Uuid) {
        let (suspensions, inbox) = (self.files.suspensions.clone(), self.inbox.clone());
        self.background("suspended", move || {
            if let Err(failure) = suspensions.store(guest) {
                inbox.send(crate::engine::Event::Problem(Problem::failed(Cause::StateFiles, &failure)));
            }
        });
    }

    fn whereabouts(&self, suspension: &Suspension, present: &[(DomId, DomainInfo)]) -> Whereabouts {
        // The highest number is the newest domain: while a guest moves within this host, there are two of it.
        let newest = present
            .iter()
            .filter(|(_, info)| info.uuid == suspension.guest)
            .max_by_key(|(domain, _)| *domain);
        match newest {
            None => Whereabouts::Ended,
            Some((domain, _)) if !suspension.is_of(*domain, &self.boot) => Whereabouts::Another(*domain),
            Some((domain, info)) if info.suspended => Whereabouts::Suspended(*domain),
            Some((domain, _)) => Whereabouts::RunsOn(*domain),
        }
    }

    /// Problems for guests that were suspended while they had functions.
    pub(in crate::engine) fn suspension_problems(&self) -> Vec<Problem> {
        let noted = self.files.suspensions.all();
        if noted.is_empty() {
            return Vec::new();
        }
        let present = self.present_domains(&BTreeSet::new());
        let problem = |suspension: &Suspension| {
            let whereabouts = self.whereabouts(suspension, &present);
            let problem =
                Problem::new(Cause::Guest, self.describe(suspension, whereabouts)).since(suspension.at());
            match whereabouts {
                Whereabouts::Suspended(domain)
                | Whereabouts::RunsOn(domain)
                | Whereabouts::Another(domain) => problem.of(domain),
                Whereabouts::Ended => problem,
            }
        };
        noted.iter().map(problem).collect()
    }

    fn describe(&self, suspension: &Suspension, whereabouts: Whereabouts) -> String {
        let functions: Vec<String> = suspension.functions.iter().map(Sbdf::to_string).collect();
        let functions = few(&functions, SHOWN);
        let was = format!("was suspended with {functions}, not by 'xpci save'");
        let fate = if suspension.hvm { "has lost them" } else { "hangs" };
        // A PV guest may only read the MSI-X table.
        let unless =
            if suspension.hvm { "" } else { ", unless it crashed, as Linux does whose driver uses MSI-X" };
        let path = self.files.suspensions.path(suspension.guest);
        let end = format!("'rm {}' ends this message", path.display());
        match whereabouts {
            Whereabouts::Suspended(domain) => format!(
                "{} {was}: what is restored from this checkpoint {fate}; start the guest anew instead, by 'xl create'",
                self.called(domain)
            ),
            Whereabouts::RunsOn(domain) => format!(
                "{} {was}, and runs on with its functions{unless}: what is restored from that checkpoint {fate}; 'xpci save -c {domain} FILE' makes one that can be restored; {end}",
                self.called(domain)
            ),
            Whereabouts::Another(domain) => format!(
                "{} {was}, as an earlier domain: if it was restored from that checkpoint, it {fate}: 'xl destroy {domain}', then start it anew by 'xl create'; if it was not, {end}",
                self.called(domain)
            ),
            Whereabouts::Ended => format!(
                "{} {was}: what is restored from that checkpoint {fate}; start it anew by 'xl create'; {end}",
                called(suspension)
            ),
        }
    }
}

/// The guest, for messages, where it is no domain.
fn called(suspension: &Suspension) -> String {
    match &suspension.name {
        Some(name) => format!("guest '{name}' ({})", suspension.guest),
        None => format!("guest {}", suspension.guest),
    }
}
