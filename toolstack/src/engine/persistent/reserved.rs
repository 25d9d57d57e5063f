//! Functions that guests have persistently: access checks, reservation, listing and removal.

use pciback::platform::HostFunction;
use pciback::policy::Reuse;
use pciback::{Devfn, DeviceNumber, DomId, FunctionState, Sbdf, Uuid};

use super::kept_by_settings;
use crate::domains;
use crate::engine::Engine;
use crate::engine::requests::{AttachOptions, Plan, how_to_forget, kept_for, persistent_view};
use crate::engine::tasks::Course;
use crate::journal::Record;
use crate::outcome::Failure;
use crate::protocol::{DomainName, FunctionView, Placed, Scope, Success};
use crate::reply::Reply;
use crate::reservations::{Change, Reservation};
use crate::spec::existing;

impl Engine {
    /// Refuses an attachment to a domain if another guest has the function persistently, or if the function is another device than the
    /// one that the guest has persistently.
    pub(in crate::engine) fn not_reserved(
        &self,
        function: &HostFunction,
        domain: DomId,
    ) -> Result<(), Failure> {
        let address = function.address;
        if let Some(path) = self.files.reservations.damaged(address) {
            let text = format!(
                "it is unknown for which guest {address} is persistent: {} cannot be used",
                path.display()
            );
            let hint = "see xpcid's log; remove the file if the function is not to be persistent for a guest";
            return Err(Failure::refused(text).on(address).of(domain).hint(hint));
        }
        let Some(reservation) = self.files.reservations.get(address) else {
            if self.settings.guests.is_empty() {
                return Ok(());
            }
            let uuid = self.platform.hypervisor.domain(domain)?.uuid;
            let name = domains::name(self.platform.store.as_ref(), domain)?;
            return self.not_assigned_to_others(function, &(uuid, name)).map_err(|other| other.of(domain));
        };
        let is_guest = self.platform.hypervisor.domain(domain)?.uuid == reservation.guest;
        let is_same = reservation.is_of(&self.devices.of(self.platform.host.as_ref(), function)?);
        let text = match (is_guest, is_same) {
            // The reserved device is elsewhere; the device at its address is not reserved.
            (true, true) | (false, false) => return Ok(()),
            (true, false) => {
                let was = reservation.kind();
                let what = match was == format!("{:04x}:{:04x}", function.vendor, function.device) {
                    true => format!("another {was} than"),
                    false => format!("{:04x}:{:04x}, not", function.vendor, function.device),
                };
                format!("{address} is {what} the {was} that {} has persistently", reservation.who())
            }
            (false, true) => kept_for(&reservation),
        };
        Err(Failure::refused(text).on(address).of(domain).hint(how_to_forget(&reservation)))
    }

    /// Refuses to give a function back to dom0 that a guest has persistently.
    pub(in crate::engine) fn may_be_released(&self, address: Sbdf) -> Result<(), Failure> {
        match self.reserved(address) {
            Some(reservation) => {
                let hint = format!("{}, and so does --force here", how_to_forget(&reservation));
                Err(Failure::refused(kept_for(&reservation)).on(address).hint(hint))
            }
            None => {
                let function = existing(self.platform.host.as_ref(), address)?;
                let Some(guest) = self.assigned_to(&function)? else { return Ok(()) };
                Err(kept_by_settings(address, &guest).hint("change 'guests' in xpcid.yaml, or use --force"))
            }
        }
    }

    /// The reservation of a function, if its device is at the address.
    fn reserved(&self, address: Sbdf) -> Option<Reservation> {
        let reservation = self.files.reservations.get(address)?;
        let host = self.platform.host.as_ref();
        let function = host.function(address).ok()?;
        reservation.is_of(&self.devices.of(host, &function).ok()?).then_some(reservation)
    }

    /// Makes a reservation of a function for the guest that runs as this domain.
    pub(in crate::engine) fn reservation(
        &self,
        address: Sbdf,
        domain: DomId,
        devfn: Devfn,
    ) -> Result<Reservation, Failure> {
        let host = self.platform.host.as_ref();
        let device = self.devices.of(host, &existing(host, address)?)?;
        let guest = self.platform.hypervisor.domain(domain)?.uuid;
        let name = domains::name(self.platform.store.as_ref(), domain)?;
        Ok(Reservation::new(device, guest, name, devfn))
    }

    /// The record of a function that the guest has already, at the requested device number.
    pub(in crate::engine) fn attached_already(
        &self,
        domain: &DomainName,
        address: Sbdf,
        slot: Option<DeviceNumber>,
    ) -> Option<Record> {
        let domain = domains::find(self.platform.store.as_ref(), domain).ok()?;
        let record = self.functions.records().get(address)?;
        let place = record.guest.filter(|place| place.domain == domain)?;
        let here = slot.is_none_or(|slot| slot == place.devfn.device());
        (record.state == FunctionState::Attached && here && !self.functions.is_busy(address))
            .then(|| record.clone())
    }

    /// The answer to an attachment of a function that the guest has already.
    pub(in crate::engine) fn has_it(&self, record: &Record) -> Success {
        let place = record.guest.map(|place| (place.domain, Sbdf::in_guest(place.devfn)));
        let text = place.map_or_else(
            || format!("{} is attached already", record.address),
            |(domain, seen)| {
                format!("{} has {} already, and sees it at {seen}", self.called(domain), record.address)
            },
        );
        Success::Already { message: text }
    }

    /// Makes an existing attachment persistent.
    pub(in crate::engine) fn make_persistent(&self, record: &Record, reply: Reply) {
        let Some(place) = record.guest else { return };
        let (address, domain) = (record.address, place.domain);
        let wanted = match self.reservation(address, domain, place.devfn) {
            Ok(wanted) => wanted,
            Err(failure) => return reply.done(Err(failure)),
        };
        let known = self.files.reservations.get(address);
        let is_same = |known: &Reservation| {
            known.saved.is_none() && known.guest == wanted.guest && known.devfn == wanted.devfn
        };
        if known.as_ref().is_some_and(is_same) {
            let message =
                format!("domain {domain} has {address} already, and gets it again whenever it starts");
            return reply.done(Ok(Success::Already { message }));
        }
        let (reservations, boot) = (self.files.reservations.clone(), self.boot.clone());
        self.background("persist", move || {
            let message = format!("domain {domain} has {address}, and gets it again whenever it starts");
            let kept = reservations.give(wanted, &boot, domain);
            let changed = Success::Changed { message, warnings: Vec::new(), functions: Vec::new() };
            reply.done(kept.map(|()| changed));
        });
    }

    /// The UUID and name of a guest that does not run: named by its UUID, or by a name that a reservation has.
    pub(in crate::engine) fn absent_guest(
        &self,
        guest: &DomainName,
        not_found: Failure,
    ) -> Result<(Uuid, Option<String>), Failure> {
        let known = self.files.reservations.all().into_iter().find(|known| means(known, guest, None));
        let (uuid, name) = match (known, guest.0.parse()) {
            (Some(known), _) => (known.guest, known.name),
            (None, Ok(uuid)) => (uuid, None),
            (None, Err(_)) => {
                return Err(not_found.hint("name a guest that does not run by its UUID, as in its xl.cfg"));
            }
        };
        for domain in domains::present(self.platform.store.as_ref())? {
            if self.platform.hypervisor.domain(domain).is_ok_and(|info| info.uuid == uuid) {
                let text = format!("guest {uuid} runs, as {}", self.called(domain));
                return Err(Failure::refused(text).of(domain).hint("name it by name or number"));
            }
        }
        Ok((uuid, name))
    }

    /// Reserves a function for a guest that does not run, which gets it when it starts.
    pub(in crate::engine) fn reserve_for_absent(
        &self,
        guest: Result<(Uuid, Option<String>), Failure>,
        function: Placed,
        options: AttachOptions,
        reply: Reply,
    ) {
        let Placed { address, slot } = function;
        let wanted = guest.and_then(|(guest, name)| self.absent_reservation(guest, name, address, slot));
        let wanted = match wanted {
            Ok(wanted) => wanted,
            Err(failure) => return reply.done(Err(failure)),
        };
        let seen = Sbdf::in_guest(wanted.devfn);
        let message =
            format!("{address} is reserved for {}, which sees it at {seen} when it starts", wanted.who());
        if self.files.reservations.get(address).as_ref() == Some(&wanted) {
            return reply.done(Ok(Success::Already { message }));
        }
        if options.dry_run {
            let message = format!("nothing was changed; without --dry-run: {message}");
            return reply.done(Ok(Success::Possible { message }));
        }
        let reservations = self.files.reservations.clone();
        self.background("persist", move || {
            let changed = Success::Changed { message, warnings: Vec::new(), functions: Vec::new() };
            reply.done(reservations.keep(wanted).map(|()| changed));
        });
    }

    fn absent_reservation(
        &self,
        guest: Uuid,
        name: Option<String>,
        address: Sbdf,
        slot: Option<DeviceNumber>,
    ) -> Result<Reservation, Failure> {
        let host = self.platform.host.as_ref();
        let function = existing(host, address)?;
        self.idle(address)?;
        // Former owners that may still reach the function are checked when the guest starts.
        let mut found = self.attach_obstacles(&function, None, Reuse::Trusted);
        let known = self.reserved(address);
        found.extend(self.kept_for_others(address, guest).err());
        found.extend(self.not_assigned_to_others(&function, &(guest, name.clone())).err());
        Failure::refuse_for(&format!("keep {address} for guest {guest}"), found)?;
        let own = known.filter(|known| slot.is_none_or(|slot| slot == known.devfn.device()));
        if let Some(own) = own {
            return Ok(own);
        }
        let devfn = free_devfn(address, guest, slot, &self.files.reservations.of(guest))?;
        Ok(Reservation::new(self.devices.of(host, &function)?, guest, name, devfn))
    }

    /// Refuses a function that another guest has persistently.
    pub(super) fn kept_for_others(&self, address: Sbdf, guest: Uuid) -> Result<(), Failure> {
        match self.reserved(address).filter(|known| known.guest != guest) {
            Some(other) => Err(Failure::refused(kept_for(&other)).on(address).hint(how_to_forget(&other))),
            None => Ok(()),
        }
    }

    /// The reservation of a function for the guest that a command names, by name, number or UUID; the guest need not run.
    pub(in crate::engine) fn reservation_of(&self, guest: &DomainName, address: Sbdf) -> Option<Reservation> {
        let uuids = self.uuids_of(guest);
        self.files.reservations.get(address).filter(|reservation| means(reservation, guest, uuids))
    }

    /// The reservations of the guest that runs as this domain.
    pub(in crate::engine) fn reserved_in(&self, domain: DomId) -> Result<Vec<Reservation>, Failure> {
        if self.files.reservations.is_empty() {
            return Ok(Vec::new());
        }
        Ok(self.files.reservations.of(self.platform.hypervisor.domain(domain)?.uuid))
    }

    /// Whether a guest has a function persistently that is not attached to it now.
    pub(in crate::engine) fn is_only_reserved(
        &self,
        guest: &DomainName,
        address: Sbdf,
        scope: Scope,
    ) -> bool {
        let domain = domains::find(self.platform.store.as_ref(), guest).ok();
        let place = self.functions.records().place(address);
        let attached = place.is_some_and(|place| Some(place.domain) == domain);
        scope == Scope::All && !attached && self.reservation_of(guest, address).is_some()
    }

    /// The UUID of the running domain with this name or number.
    fn uuids_of(&self, guest: &DomainName) -> Option<Uuid> {
        let domain = domains::find(self.platform.store.as_ref(), guest).ok()?;
        self.platform.hypervisor.domain(domain).ok().map(|info| info.uuid)
    }

    /// Removes a function from those that the guest has persistently.
    pub(in crate::engine) fn forget_reservation(&mut self, guest: &DomainName, address: Sbdf, reply: Reply) {
        let Some(reservation) = self.reservation_of(guest, address) else {
            let shown: String = guest.0.chars().take(64).collect();
            let text = format!("{address} is not persistent for a guest '{shown}'");
            let hint = "'xpci pci-list --persistent' shows what is";
            return reply.done(Err(Failure::not_found(text).on(address).hint(hint)));
        };
        self.stop_waiting_for(address);
        let context = self.task_context();
        self.background("forget", move || {
            let again = context.assigned_again(&reservation).unwrap_or_default();
            let message = format!("{address} is no longer persistent for {}{again}", reservation.who());
            let forgotten = context.files.reservations.forget(address);
            let changed = Success::Changed { message, warnings: Vec::new(), functions: Vec::new() };
            reply.done(forgotten.map(|()| changed));
        });
    }

    /// Plans to give a function back to dom0; its reservation and its persistent settings end with that.
    pub(in crate::engine) fn release_of(&mut self, record: Record, message: String) -> Plan {
        let reservation = self.reserved(record.address);
        let message = match &reservation {
            Some(reservation) => {
                format!("{message}; it is no longer persistent for {}", reservation.who())
            }
            None => message,
        };
        if reservation.is_some() {
            self.stop_waiting_for(record.address);
        }
        let host = self.platform.host.as_ref();
        let wished = host
            .function(record.address)
            .ok()
            .and_then(|function| self.files.persistent_settings.of(host, &function));
        let message = match wished {
            Some(_) => format!("{message}; its persistent settings are deleted"),
            None => message,
        };
        let change = reservation.map(|reservation| Change::Forget(reservation.address));
        Plan::Transaction(Course::GiveBack, Box::new(record), message.into(), change)
    }

    /// Lists all reservations, or those of one guest.
    pub(in crate::engine) fn reserved_list(&self, guest: Option<&DomainName>, reply: Reply) {
        let uuid = guest.and_then(|guest| self.uuids_of(guest));
        let listed = self.files.reservations.all().into_iter();
        let listed: Vec<Reservation> =
            listed.filter(|one| guest.is_none_or(|guest| means(one, guest, uuid))).collect();
        self.show(reply, move |shown| {
            let view = |reservation: &Reservation| {
                let view = shown.view(reservation.address);
                let guest_address = view.guest_address.or(Some(Sbdf::in_guest(reservation.devfn)));
                FunctionView { guest_address, persistent: Some(persistent_view(reservation)), ..view }
            };
            Ok(Success::Functions { functions: listed.iter().map(view).collect() })
        });
    }
}

/// The device and function number of a function for a guest that does not run: the requested device number, or one that its other
/// reservations leave free.
pub(super) fn free_devfn(
    address: Sbdf,
    guest: Uuid,
    slot: Option<DeviceNumber>,
    kept: &[Reservation],
) -> Result<Devfn, Failure> {
    let others = kept.iter().filter(|other| other.address != address);
    let is_free = |slot: &DeviceNumber| others.clone().all(|other| other.devfn.device() != *slot);
    // From the highest number down: an HVM guest's device model uses the lowest ones.
    let free = match slot {
        Some(slot) => Some(slot).filter(is_free),
        None => DeviceNumber::all().rev().find(is_free),
    };
    free.map(DeviceNumber::devfn).ok_or_else(|| {
        let text = format!("guest {guest} has no free device number for {address}");
        Failure::refused(text).on(address).hint("'xpci pci-list --persistent' shows what it has")
    })
}

/// Whether a reservation belongs to the guest that a command names; `running`: the UUID of the running domain with that name.
fn means(reservation: &Reservation, guest: &DomainName, running: Option<Uuid>) -> bool {
    match running {
        Some(uuid) => reservation.guest == uuid,
        None => reservation.name.as_ref() == Some(&guest.0) || guest.0.parse() == Ok(reservation.guest),
    }
}
