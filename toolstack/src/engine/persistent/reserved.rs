//! Functions that guests have persistently: what their reservations say about a request.

use pciback::platform::HostFunction;
use pciback::{Devfn, DeviceNumber, DomId, Sbdf, Uuid};

use super::{Context, kept_by_settings};
use crate::domains;
use crate::engine::requests::{how_to_forget, kept_for};
use crate::moves::Move;
use crate::outcome::Failure;
use crate::protocol::{DomainName, Scope};
use crate::reservations::Reservation;
use crate::spec::existing;

impl Context<'_> {
    /// Refuses an attachment to a domain if another guest has the function persistently, or if the function is another device than the
    /// one that the guest has persistently.
    pub fn not_reserved(&self, function: &HostFunction, domain: DomId) -> Result<(), Failure> {
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
        let is_same = reservation.is_of(&self.devices.known(function)?);
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
    pub fn may_be_released(&self, address: Sbdf) -> Result<(), Failure> {
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
    pub(super) fn reserved(&self, address: Sbdf) -> Option<Reservation> {
        let reservation = self.files.reservations.get(address)?;
        let function = self.platform.host.function(address).ok()?;
        reservation.is_of(&self.devices.known(&function).ok()?).then_some(reservation)
    }

    /// Makes a reservation of a function for the guest that runs as this domain.
    pub fn reservation(&self, address: Sbdf, domain: DomId, devfn: Devfn) -> Result<Reservation, Failure> {
        let device = self.devices.known(&existing(self.platform.host.as_ref(), address)?)?;
        let guest = self.platform.hypervisor.domain(domain)?.uuid;
        let name = domains::name(self.platform.store.as_ref(), domain)?;
        Ok(Reservation::new(device, guest, name, devfn))
    }

    /// The UUID and name of a guest that does not run: named by its UUID, or by a name that a reservation has.
    pub fn absent_guest(
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
        let leaving = self.leaving(uuid).map(|(domain, _)| domain);
        for domain in domains::present(self.platform.store.as_ref())? {
            if Some(domain) != leaving
                && self.platform.hypervisor.domain(domain).is_ok_and(|info| info.uuid == uuid)
            {
                let called = domains::called(self.platform.store.as_ref(), domain);
                let text = format!("guest {uuid} runs, as {called}");
                return Err(Failure::refused(text).of(domain).hint("name it by name or number"));
            }
        }
        Ok((uuid, name))
    }

    /// The reservation of a function for a guest that does not run; `found`: other obstacles to it.
    pub fn absent_reservation(
        &self,
        (guest, name): (Uuid, Option<String>),
        function: &HostFunction,
        slot: Option<DeviceNumber>,
        mut found: Vec<Failure>,
    ) -> Result<Reservation, Failure> {
        let address = function.address;
        let known = self.reserved(address);
        found.extend(self.kept_for_others(address, guest).err());
        found.extend(self.not_assigned_to_others(function, &(guest, name.clone())).err());
        Failure::refuse_for(&format!("keep {address} for guest {guest}"), found)?;
        let own = known.filter(|known| slot.is_none_or(|slot| slot == known.devfn.device()));
        if let Some(own) = own {
            return Ok(own);
        }
        let devfn = free_devfn(address, guest, slot, &self.reserved_for(guest, None))?;
        let device = self.devices.known(function)?;
        Ok(Reservation::new(device, guest, name, devfn))
    }

    /// Refuses a function that another guest has persistently.
    pub fn kept_for_others(&self, address: Sbdf, guest: Uuid) -> Result<(), Failure> {
        match self.reserved(address).filter(|known| known.guest != guest) {
            Some(other) => Err(Failure::refused(kept_for(&other)).on(address).hint(how_to_forget(&other))),
            None => Ok(()),
        }
    }

    /// The reservation of a function for the guest that a command names, by name, number or UUID; the guest need not run.
    pub fn reservation_of(&self, guest: &DomainName, address: Sbdf) -> Option<Reservation> {
        let uuids = self.uuids_of(guest);
        self.files.reservations.get(address).filter(|reservation| means(reservation, guest, uuids))
    }

    /// The reservations of the guest that runs as this domain.
    pub fn reserved_in(&self, domain: DomId) -> Result<Vec<Reservation>, Failure> {
        if self.files.reservations.is_empty() {
            return Ok(Vec::new());
        }
        Ok(self.reserved_for(self.platform.hypervisor.domain(domain)?.uuid, Some(domain)))
    }

    /// The domain of a guest that leaves this host, as long as it exists, and what is noted of it.
    pub fn leaving(&self, guest: Uuid) -> Option<(DomId, Move)> {
        let noted = self.files.leaving.of(guest)?;
        let domain = noted.leaving_in(self.boot)?;
        let info = self.platform.hypervisor.domain(domain).ok()?;
        (info.uuid == guest).then_some((domain, noted))
    }

    /// The reservations of a guest for a domain of it; `None`: for one that is yet to come. While a guest moves within this host, they
    /// differ from those of the domain that leaves.
    pub fn reserved_for(&self, guest: Uuid, domain: Option<DomId>) -> Vec<Reservation> {
        let mut all = self.files.reservations.of(guest);
        if let Some((leaving, noted)) = self.leaving(guest) {
            let leaves = domain == Some(leaving);
            all.retain(|one| noted.functions.contains(&one.address) == leaves);
        }
        all
    }

    /// Whether a domain gets its functions by requests only, because its guest moves.
    pub(super) fn is_moving(&self, guest: Uuid, domain: DomId) -> bool {
        self.leaving(guest).is_some_and(|(leaving, _)| leaving == domain)
            || [&self.files.leaving, &self.files.arriving]
                .iter()
                .any(|notes| notes.of(guest).is_some_and(|noted| noted.is_under_way(self.boot)))
    }

    /// Whether a guest has a function persistently that is not attached to it now.
    pub fn is_only_reserved(&self, guest: &DomainName, address: Sbdf, scope: Scope) -> bool {
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

    /// All reservations, or those of one guest.
    pub fn listed(&self, guest: Option<&DomainName>) -> Vec<Reservation> {
        let uuid = guest.and_then(|guest| self.uuids_of(guest));
        let listed = self.files.reservations.all().into_iter();
        listed.filter(|one| guest.is_none_or(|guest| means(one, guest, uuid))).collect()
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
