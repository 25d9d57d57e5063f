//! Saving guests: their functions are detached first, with the consent of their drivers, and attached again after a restore.
//!
//! The functions stay reserved for the guest, by its UUID. Such a reservation ends when the restored guest has the function. As long as
//! the domain that lost the function still exists, a problem is shown, because the command that was saving it may have been killed.

mod moving;
mod restoring;
mod suspended;

use std::sync::mpsc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use log::{info, warn};
use pciback::platform::{VfSettings, network::MacAddress};
use pciback::{DomId, FunctionState, Sbdf};

pub(super) use self::suspended::SuspendedGuests;
use super::guests;
use super::problems::Problem;
use super::requests::LocalClient;
use super::{Engine, Event};
use crate::domains::{self, DomainType};
use crate::journal::{GuestPlace, Record};
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Cause, DomainName, Request, Scope, Success};
use crate::reply::Reply;
use crate::reservations::Reservation;
use crate::saved::{SavedFunction, SavedGuest, Shape, VERSION};
use crate::spec::existing;
use crate::transaction::{not_released, read_network};

/// The MAC address that PF drivers report for a VF to which they assigned none.
const NO_ADDRESS: MacAddress = MacAddress([0; 6]);
/// The limit for removing a guest's nodes after its last function is held again.
const NODES_LIMIT: Duration = Duration::from_secs(30);

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The state of the thread that prepares a guest for saving.
struct Saving {
    client: LocalClient,
    domain: DomId,
    records: Vec<(Record, GuestPlace)>,
    guest: SavedGuest,
    reply: Reply,
}

impl Engine {
    /// Detaches all functions of a guest that is about to be saved, and answers with what it had.
    pub(super) fn save(&self, name: &DomainName, reply: Reply) {
        match self.saving(name, &reply) {
            Ok(saving) => {
                let done = move |outcome: Result<_, Failure>| reply.done(outcome.and_then(|outcome| outcome));
                self.inbox.background("save", move || saving.run(), done);
            }
            Err(failure) => reply.done(Err(failure)),
        }
    }

    fn saving(&self, name: &DomainName, reply: &Reply) -> Result<Saving, Failure> {
        let store = self.platform.store.as_ref();
        let domain = domains::find(store, name)?;
        let info = self.platform.hypervisor.domain(domain)?;
        let had: Vec<_> =
            self.functions.records().of(domain).map(|(record, place)| (record.clone(), place)).collect();
        if !had.is_empty() && domains::kind(store, domain)? == DomainType::Hvm {
            let text = format!("{} is an HVM guest with functions", self.called(domain));
            let hint = format!(
                "this is possible for PV guests only: detach its functions first ('xpci pci-list {domain}'), or shut it down"
            );
            return Err(Failure::refused(text).of(domain).hint(hint));
        }
        if !had.is_empty() && info.paused {
            let text = format!("{} is paused: it cannot release its functions", self.called(domain));
            return Err(Failure::refused(text).of(domain).hint(format!("'xl unpause {domain}' first")));
        }
        for (record, _) in &had {
            self.functions.idle(record.address)?;
            if record.state != FunctionState::Attached {
                let text = format!("{} of domain {domain} is {}", record.address, record.state);
                return Err(Failure::refused(text).on(record.address).of(domain).hint("see 'xpci status'"));
            }
        }
        let name = domains::name(store, domain)?;
        let guest = SavedGuest { version: VERSION, guest: info.uuid, name, functions: Vec::new() };
        let client = LocalClient::new(self.task_context());
        Ok(Saving { client, domain, records: had, guest, reply: reply.clone() })
    }

    /// Problems for guests that run without the functions that were taken to save them.
    pub(super) fn saving_problems(&self) -> impl Iterator<Item = Problem> {
        self.files.reservations.all().into_iter().filter_map(|reservation| {
            let (address, guest) = (reservation.address, reservation.guest);
            let leaving = self.files.leaving.of(guest).filter(|noted| noted.functions.contains(&address));
            if leaving.as_ref().is_some_and(|noted| noted.handed_over || noted.is_under_way(&self.boot)) {
                return None;
            }
            // What it has persistently is not reserved anew when it moves.
            let since = reservation.saved_at().or(leaving.map(|noted| noted.at()))?;
            let domain = reservation.given_in(&self.boot)?;
            let info = self.platform.hypervisor.domain(domain).ok()?;
            let has_it = self.functions.records().get_or_new(address).guest.is_some_and(|place| place.domain == domain);
            if info.uuid != guest || has_it {
                return None;
            }
            let place = reservation.devfn.device();
            let text = format!(
                "{address} was taken from {} to save it: unless 'xpci save' still runs, 'xpci pci-attach {domain} {address}@{place:x}' gives it back",
                self.called(domain)
            );
            Some(Problem::new(Cause::Guest, text).on(address).of(domain).since(since))
        })
    }
}

impl Saving {
    fn run(mut self) -> Result<Success, Failure> {
        for (record, place) in &self.records {
            let function = self.describe(record, *place)?;
            self.guest.functions.push(function);
        }
        let mut taken = Vec::new();
        for (record, place) in &self.records {
            self.reply.progress(&format!("taking {} from domain {}", record.address, self.domain));
            // Before the attempt: a function may be detached even though the request fails.
            taken.push((record.address, *place));
            if let Err(failure) = self.take(record, *place) {
                return Err(self.give_back(&taken, failure));
            }
        }
        if let Err(failure) = self.wait_until_idle() {
            return Err(self.give_back(&taken, failure));
        }
        Ok(Success::Saved { domain: self.domain, guest: self.guest })
    }

    /// Describes a function for the checkpoint, while the guest has it.
    fn describe(&self, record: &Record, place: GuestPlace) -> Result<SavedFunction, Failure> {
        let context = &self.client.context;
        let (host, address) = (context.platform.host.as_ref(), record.address);
        let function = existing(host, address)?;
        let mut network = VfSettings::default();
        if function.physical_function.is_some() {
            let wished = record.network.as_ref().map(|network| network.wanted()).unwrap_or_default();
            let seen = read_network(&context.platform, address)?.settings.unwrap_or_default();
            let mac = seen.mac.filter(|mac| *mac != NO_ADDRESS);
            network = wished.or(VfSettings { mac, vlan: seen.vlan, ..VfSettings::default() });
        }
        let kept = context.files.reservations.get(address);
        Ok(SavedFunction {
            device: context.devices.of(host, &function)?,
            slot: place.devfn.device(),
            persistent: kept.is_some_and(|kept| kept.guest == self.guest.guest && kept.saved.is_none()),
            network,
            shape: Shape::of(host, address)?,
        })
    }

    /// Detaches one function, with the consent of the guest's driver.
    fn take(&self, record: &Record, place: GuestPlace) -> Result<(), Failure> {
        let (context, address) = (&self.client.context, record.address);
        let kept = context.files.reservations.get(address);
        if kept.is_none_or(|kept| kept.guest != self.guest.guest) {
            let host = context.platform.host.as_ref();
            let device = context.devices.of(host, &existing(host, address)?)?;
            let (guest, name) = (self.guest.guest, self.guest.name.clone());
            let mut reservation = Reservation::new(device, guest, name, place.devfn);
            reservation.saved = Some(now());
            context.files.reservations.give(reservation, &record.boot, self.domain)?;
        }
        let domain = DomainName(self.domain.to_string());
        let detach = Request::PciDetach { domain, address, force: false, scope: Scope::Live };
        let warnings = match self.client.ask(detach, &format!("take {address} from {}", self.domain))? {
            Success::Changed { warnings, .. } => warnings,
            _ => Vec::new(),
        };
        match warnings.contains(&not_released(self.domain)) {
            true => {
                let text = format!("domain {} did not release {address} in time", self.domain);
                let hint = "see the guest's log; unload the function's driver in it, then try again";
                Err(Failure::new(ErrorCode::Failed, text).on(address).of(self.domain).hint(hint))
            }
            false => Ok(()),
        }
    }

    /// Waits until the guest's nodes are removed. A frontend saved with nodes would wait for a backend after the restore.
    fn wait_until_idle(&self) -> Result<(), Failure> {
        let (sender, receiver) = mpsc::channel();
        self.client.context.inbox.send(Event::Guests(guests::Event::NotifyWhenIdle(self.domain, sender)));
        receiver.recv_timeout(NODES_LIMIT).map_err(|_| {
            let text = format!("the nodes of domain {} in xenstore are not removed", self.domain);
            Failure::new(ErrorCode::Failed, text).of(self.domain).hint("see xpcid's log")
        })
    }

    /// Attaches the functions again, with the same device numbers. A function for which that fails stays reserved, and is shown as a
    /// problem.
    fn give_back(&self, taken: &[(Sbdf, GuestPlace)], failure: Failure) -> Failure {
        if self.client.is_unanswered() {
            return failure;
        }
        warn!("domain {}: not saved, it gets its functions again: {failure}", self.domain);
        let mut left = Vec::new();
        for (address, place) in taken {
            let give = Request::PciAttach {
                domain: DomainName(self.domain.to_string()),
                address: *address,
                slot: Some(place.devfn.device()),
                persist: false,
                managed: false,
                trust_former_owner: true,
                dry_run: false,
            };
            match self.client.ask(give, &format!("give {address} back to {}", self.domain)) {
                Ok(_) => info!("{address}: domain {} has it again", self.domain),
                Err(second) => left.push(second.message),
            }
        }
        let message = match left.is_empty() {
            true => format!("{}; the guest runs and has its functions again", failure.message),
            false => format!("{}; not given back: {}", failure.message, left.join("; ")),
        };
        Failure { message, code: ErrorCode::Failed, ..failure }
    }
}
