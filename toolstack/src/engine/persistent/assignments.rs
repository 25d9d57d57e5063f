//! Functions that the settings (`guests`) assign to guests. They are attached as with `pci-attach --persist`, from the next start of the
//! guest.

use pciback::platform::{Host, HostFunction};
use pciback::{DeviceNumber, DomId, Sbdf, Uuid};

use super::reserved::free_devfn;
use super::{Context, Effect, Event, Persistent};
use crate::device::Device;
use crate::domains;
use crate::engine;
use crate::engine::problems::Problem;
use crate::engine::tasks::TaskContext;
use crate::names;
use crate::outcome::Failure;
use crate::protocol::Cause;
use crate::reservations::Reservation;
use crate::settings::{Assigned, Settings};
use crate::spec::existing;
use crate::target::{Parent, Target};

/// What the settings assign to a guest: functions, and pools of VFs by their PF.
pub struct Assignments {
    domain: DomId,
    guest: Uuid,
    name: Option<String>,
    functions: Vec<(Assigned, Result<Target, Failure>)>,
}

/// What a guest has while the functions that are assigned to it are reserved.
struct Reserving {
    domain: DomId,
    guest: (Uuid, Option<String>),
    /// Its reservations.
    kept: Vec<Reservation>,
    /// The functions that were chosen for it.
    taken: Vec<Sbdf>,
}

impl Settings {
    /// The names under which the settings assign functions to this guest.
    fn guest(&self, name: Option<&str>, uuid: Uuid) -> impl Iterator<Item = &String> {
        let name = name.map(str::to_owned);
        self.guests.keys().filter(move |key| name.as_ref() == Some(key) || key.parse() == Ok(uuid))
    }

    /// The guest to which the settings assign a function, by its name in the settings. Names are looked up on the host.
    pub(super) fn assignee(
        &self,
        host: &dyn Host,
        function: &HostFunction,
        device: &Device,
    ) -> Option<&String> {
        let means = |one: &Assigned| names::means_one(host, &self.names, &one.target, function, device);
        self.guests.iter().find(|(_, functions)| functions.iter().any(means)).map(|(guest, _)| guest)
    }
}

/// A free VF of a PF for the domain, none of those that were chosen already.
pub(super) type FreeVf<'a> = &'a dyn Fn(Sbdf, DomId, &[Sbdf]) -> Result<Sbdf, Failure>;

/// What the settings assign to a guest, as far as it can be given to it.
pub(super) struct Assigning {
    pub domain: DomId,
    /// The reservations that are to be made or changed.
    pub new: Vec<Reservation>,
    /// Functions that cannot be reserved.
    pub unreserved: Vec<Problem>,
}

impl Context<'_> {
    /// Decides which functions are reserved for a guest by what the settings assign to it.
    pub(super) fn assigning(&self, assignments: Assignments, free_vf: FreeVf<'_>) -> Assigning {
        let Assignments { domain, guest, name, functions } = assignments;
        let kept = self.files.reservations.of(guest);
        let mut wanted = Reserving { domain, guest: (guest, name), kept, taken: vec![] };
        let mut assigning = Assigning { domain, new: Vec::new(), unreserved: Vec::new() };
        // Pools last, so that a VF that is named itself is not also taken from a pool.
        let (pools, certain): (Vec<_>, Vec<_>) =
            functions.into_iter().partition(|(one, _)| matches!(one.target, Target::Any(_)));
        for (one, found) in certain.into_iter().chain(pools) {
            match self.reserve_one(&one, found, &mut wanted, free_vf) {
                Ok(None) => {}
                Ok(Some(reservation)) => {
                    wanted.kept.push(reservation.clone());
                    assigning.new.push(reservation);
                }
                Err(failure) => {
                    let text = format!(
                        "{} is missing in domain {domain}, to which the settings assign it: {failure}",
                        one.target
                    );
                    assigning.unreserved.push(Problem::new(Cause::Persistent, text).of(domain));
                }
            }
        }
        assigning
    }

    /// The reservation for an assigned function; `None`: the guest has it already.
    fn reserve_one(
        &self,
        one: &Assigned,
        found: Result<Target, Failure>,
        wanted: &mut Reserving,
        free_vf: FreeVf<'_>,
    ) -> Result<Option<Reservation>, Failure> {
        let found = self.assigned_at(one, wanted.guest.0).map_or(found, |known| known.map(Target::from))?;
        let address = self.choose_assigned(&found, wanted, free_vf)?;
        let Reserving { guest, kept, taken, .. } = wanted;
        taken.push(address);
        let has_it = |known: &&Reservation| {
            known.address == address && one.slot.is_none_or(|slot| slot == known.devfn.device())
        };
        let promised = is_by_address(&one.target).then(|| one.target.clone());
        Ok(match kept.iter().find(has_it) {
            Some(known) if known.promised == promised || !self.is_there(known) => None,
            Some(known) => Some(known.clone().assigned_as(promised)),
            None => {
                let made = self.reserve_assigned(address, guest.clone(), one.slot, kept)?;
                Some(made.assigned_as(promised))
            }
        })
    }

    /// The address of the device that the guest first got for an assignment by address. Another device may have that address now, and it
    /// is not the one that was assigned.
    fn assigned_at(&self, one: &Assigned, guest: Uuid) -> Option<Result<Sbdf, Failure>> {
        let is_it =
            |known: &Reservation| known.guest == guest && known.promised.as_ref() == Some(&one.target);
        if !is_by_address(&one.target) {
            return None;
        }
        if let Some(known) = self.files.reservations.of(guest).into_iter().find(is_it) {
            return Some(Ok(known.address));
        }
        let (lost, _) = self.files.reservations.displaced().into_iter().find(|(known, _)| is_it(known))?;
        let text = format!("the {} that {} got as {} is missing", lost.kind(), lost.who(), one.target);
        Some(Err(Failure::refused(text).hint("name the function that is meant in 'guests' of xpcid.yaml")))
    }

    /// Whether the device of a reservation is at its address.
    fn is_there(&self, reservation: &Reservation) -> bool {
        let function = self.platform.host.function(reservation.address).ok();
        let device = function.and_then(|function| self.devices.known(&function).ok());
        device.is_some_and(|device| reservation.is_of(&device))
    }

    /// The assigned function; for a pool, a VF that the guest has or else a free one.
    fn choose_assigned(
        &self,
        found: &Target,
        Reserving { domain, kept, taken, .. }: &Reserving,
        free_vf: FreeVf<'_>,
    ) -> Result<Sbdf, Failure> {
        let pf = match found {
            Target::Any(Parent::At(pf)) => *pf,
            other => {
                return other.address().ok_or_else(|| Failure::not_found(format!("{other} was not found")));
            }
        };
        let vfs = existing(self.platform.host.as_ref(), pf)?.virtual_functions;
        let own = kept.iter().map(|known| known.address);
        let mut own = own.filter(|address| vfs.contains(address) && !taken.contains(address));
        own.next().map_or_else(|| free_vf(pf, *domain, taken), Ok)
    }

    fn reserve_assigned(
        &self,
        address: Sbdf,
        guest: (Uuid, Option<String>),
        slot: Option<DeviceNumber>,
        kept: &[Reservation],
    ) -> Result<Reservation, Failure> {
        let function = existing(self.platform.host.as_ref(), address)?;
        self.kept_for_others(address, guest.0)?;
        self.not_assigned_to_others(&function, &guest)?;
        let devfn = free_devfn(address, guest.0, slot, kept)?;
        Ok(Reservation::new(self.devices.known(&function)?, guest.0, guest.1, devfn))
    }

    /// Writes new reservations, on a thread, and has the guest examined again.
    fn keep_new(&self, domain: DomId, new: Vec<Reservation>) {
        let (reservations, inbox) = (self.files.reservations.clone(), self.inbox.clone());
        self.inbox.run("persist", move || {
            for reservation in new {
                let address = reservation.address;
                if let Err(failure) = reservations.keep(reservation) {
                    inbox.send(engine::Event::Problem(
                        Problem::failed(Cause::StateFiles, &failure).on(address).of(domain),
                    ));
                }
            }
            inbox.send(engine::Event::Persistent(Event::AssignmentsReserved(domain)));
        });
    }
}

impl Persistent {
    /// Has the functions reserved that the settings assign to a guest.
    pub(super) fn assign(&mut self, assigning: Assigning, context: &Context<'_>) {
        let Assigning { domain, new, unreserved } = assigning;
        self.note_unreserved(domain, unreserved);
        if !new.is_empty() {
            context.keep_new(domain, new);
        }
    }

    /// Searches again for functions that are assigned to running guests, because a function has appeared or become free.
    pub(super) fn search_again(&mut self, context: &Context<'_>) {
        for domain in self.unreserved.keys().copied() {
            if let Ok(info) = context.platform.hypervisor.domain(domain) {
                self.effects.push(Effect::FindAssignments(domain, info.uuid));
            }
        }
    }
}

impl Context<'_> {
    /// Refuses a function that the settings assign to another guest.
    pub fn not_assigned_to_others(
        &self,
        function: &HostFunction,
        (uuid, name): &(Uuid, Option<String>),
    ) -> Result<(), Failure> {
        let is_own = |guest: &String| self.settings.guest(name.as_deref(), *uuid).any(|own| own == guest);
        match self.assigned_to(function)?.filter(|guest| !is_own(guest)) {
            Some(other) => Err(kept_by_settings(function.address, &other)
                .hint("change 'guests' in xpcid.yaml, then restart xpcid")),
            None => Ok(()),
        }
    }

    /// The guest to which the settings assign a function, by its name in the settings; a thread has looked it up.
    pub fn assigned_to(&self, function: &HostFunction) -> Result<Option<String>, Failure> {
        match self.settings.guests.is_empty() {
            true => Ok(None),
            false => self.functions.handover().assignees.of(function),
        }
    }
}

impl TaskContext {
    /// What the settings assign to a new domain, if anything.
    pub(super) fn assignments(&self, domain: DomId, guest: Uuid) -> Option<Assignments> {
        let (host, settings) = (self.platform.host.as_ref(), &self.settings);
        let name = domains::name(self.platform.store.as_ref(), domain).ok().flatten();
        let wanted = settings.guest(name.as_deref(), guest).flat_map(|key| &settings.guests[key]);
        let find = |one: &Assigned| {
            let found = names::find(host, &settings.names, &one.target);
            (one.clone(), found.inspect(|found| self.look_up(found)))
        };
        let functions: Vec<_> = wanted.map(find).collect();
        if functions.is_empty() {
            return None;
        }
        // The guest may have an assigned device at another address by now.
        for known in self.files.reservations.of(guest) {
            self.look_up(&known.address.into());
        }
        Some(Assignments { domain, guest, name, functions })
    }

    /// What the settings give back to the guest of a reservation after that has ended, in words that follow a sentence. Names are looked up
    /// on the host.
    pub(in crate::engine) fn assigned_again(&self, reservation: &Reservation) -> Option<String> {
        let (host, names) = (self.platform.host.as_ref(), &self.settings.names);
        let function = existing(host, reservation.address).ok()?;
        let keys = self.settings.guest(reservation.name.as_deref(), reservation.guest);
        let own: Vec<&Assigned> = keys.flat_map(|key| &self.settings.guests[key]).collect();
        let device = self.devices.of(host, &function).ok()?;
        let when = "when it starts, or when xpcid restarts: 'guests' in xpcid.yaml assigns it";
        if own.iter().any(|one| names::means_one(host, names, &one.target, &function, &device)) {
            return Some(format!("; the guest gets it again {when}"));
        }
        let pool = function.physical_function.map(|pf| Target::Any(Parent::At(pf)))?;
        let is_pool = |one: &&Assigned| matches!(one.target, Target::Any(_));
        let mut pools = own.into_iter().filter(is_pool);
        let is_its = pools.any(|one| names::find(host, names, &one.target).is_ok_and(|found| found == pool));
        is_its.then(|| format!("; the guest gets a VF of the same PF again {when}"))
    }
}

/// Whether a target contains an address (its own or its PF's), which may belong to another device after a reboot of the host.
fn is_by_address(target: &Target) -> bool {
    matches!(target, Target::One(Parent::At(_)) | Target::Vf(Parent::At(_), _))
}

/// The refusal for a function that the settings assign to a guest.
pub(super) fn kept_by_settings(address: Sbdf, guest: &str) -> Failure {
    Failure::refused(format!("{address} is reserved for guest '{guest}' by the settings (guests)"))
        .on(address)
}
