//! Functions that guests have persistently (`pci-attach --persist`), on disk, in one small file for each.
//!
//! A guest that reboots is another domain for Xen, with the same UUID. A reservation names the guest that gets a function when it starts
//! again, and keeps the function from all other guests. Reservations survive restarts of the service and of the host, so each change is
//! synced to the disk. That takes milliseconds, so only threads that may block make changes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pciback::inventory::Identity;
use pciback::{Devfn, DomId, Sbdf, Uuid};
use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::durable;
use crate::journal::{JournalError, VERSION, entries, read_entry};
use crate::outcome::Failure;
use crate::target::Target;

/// The largest size of a reservation, in bytes.
const SIZE_LIMIT: u64 = 64 * 1024;

/// A function that a guest has persistently.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Reservation {
    version: u32,
    /// The present address of the function; in the file, its address when the file was written.
    pub address: Sbdf,
    /// The identity of the device, to distinguish it from another one at its address.
    pub identity: Identity,
    /// The device, to recognise it at another address; early versions did not note it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    device: Option<Device>,
    /// The name of the function in the settings, if they assign it to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promised: Option<Target>,
    /// The guest.
    pub guest: Uuid,
    /// The guest's name when the reservation was made, for messages.
    pub name: Option<String>,
    /// Device and function number in the guest, on its bus 0000:00.
    pub devfn: Devfn,
    /// The last domain that had the function: if it was detached from that domain, only the next domain of this guest gets it.
    given: Option<Given>,
    /// For a saved guest: when the reservation was made, in seconds since 1970. It ends when the restored guest has the function.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    boot: String,
    domain: DomId,
}

impl Reservation {
    /// A reservation that no domain has used yet.
    pub fn new(device: Device, guest: Uuid, name: Option<String>, devfn: Devfn) -> Self {
        let (address, identity, device) = (device.address, device.identity, Some(device));
        Self {
            version: VERSION,
            address,
            identity,
            device,
            promised: None,
            guest,
            name,
            devfn,
            given: None,
            saved: None,
        }
    }

    /// Sets the name under which the settings assign the function to the guest; `None`: they name no address.
    pub fn assigned_as(self, promised: Option<Target>) -> Self {
        Self { promised, ..self }
    }

    /// Whether the reservation is for this device.
    pub fn is_of(&self, device: &Device) -> bool {
        match &self.device {
            Some(known) => known.is(device),
            None => self.address == device.address && self.identity.may_be(&device.identity),
        }
    }

    fn is_at_place_of(&self, device: &Device) -> bool {
        self.device.as_ref().is_some_and(|known| known.path == device.path)
    }

    /// The ids of the device, `vendor:device`.
    pub fn kind(&self) -> String {
        format!("{:04x}:{:04x}", self.identity.vendor, self.identity.device)
    }

    /// Whether this domain has had the function.
    pub fn was_given(&self, boot: &str, domain: DomId) -> bool {
        self.given.as_ref().is_some_and(|given| given.boot == boot && given.domain == domain)
    }

    /// The last domain that had it, if that was in this boot.
    pub fn given_in(&self, boot: &str) -> Option<DomId> {
        self.given.as_ref().filter(|given| given.boot == boot).map(|given| given.domain)
    }

    /// When it was made, for a saved guest.
    pub fn saved_at(&self) -> Option<SystemTime> {
        UNIX_EPOCH.checked_add(Duration::from_secs(self.saved?))
    }

    /// The guest, for messages.
    pub fn who(&self) -> String {
        match &self.name {
            Some(name) => format!("guest '{name}' ({})", self.guest),
            None => format!("guest {}", self.guest),
        }
    }

    /// The guest's name or UUID, as commands accept it.
    pub fn called(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.guest.to_string())
    }
}

/// Refuses a reservation that was made at a time that cannot be.
fn checked(path: &Path, reservation: Reservation) -> Result<Reservation, JournalError> {
    match reservation.saved {
        Some(seconds) if reservation.saved_at().is_none() => {
            let reason = format!("its guest was saved {seconds} s after 1970");
            Err(JournalError::Malformed { path: path.to_owned(), reason })
        }
        _ => Ok(reservation),
    }
}

/// A change of reservations that a transaction makes before it begins.
#[derive(Debug, Clone)]
pub enum Change {
    /// Makes a reservation; it is removed if the transaction fails.
    Reserve(Box<Reservation>),
    /// Removes the reservation of a function.
    Forget(Sbdf),
    /// Notes that a function is to be held persistently; undone if the transaction fails.
    Hold(Sbdf),
}

/// All reservations. Clones share them.
#[derive(Debug, Clone)]
pub struct Reservations {
    directory: PathBuf,
    known: Arc<Mutex<Known>>,
    /// Unusable files: the guests of these functions are unknown.
    damaged: Arc<BTreeMap<Sbdf, PathBuf>>,
}

/// A persistent function that was found at another address than before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Followed {
    /// The former address.
    pub from: Sbdf,
    /// The present address.
    pub to: Sbdf,
    /// The guest.
    pub guest: Uuid,
}

/// Reservations by file. A file is named after the address of its function when it was written. The present address is determined from
/// the device when it is found.
#[derive(Debug, Default)]
struct Known {
    /// The reservations, by the address in the file name.
    files: BTreeMap<Sbdf, Reservation>,
    /// The file of the function at a present address.
    at: BTreeMap<Sbdf, Sbdf>,
    /// Files whose devices were found.
    seen: BTreeSet<Sbdf>,
    /// Files whose devices were not found and whose addresses the devices of other files have now, and since when that is known.
    displaced: BTreeMap<Sbdf, SystemTime>,
}

impl Known {
    fn get(&self, address: Sbdf) -> Option<&Reservation> {
        self.files.get(self.at.get(&address)?)
    }

    fn set(&mut self, file: Sbdf, reservation: Reservation) {
        self.displaced.remove(&file);
        if let Some(other) = self.at.insert(reservation.address, file).filter(|other| *other != file) {
            self.displaced.insert(other, SystemTime::now());
        }
        self.files.insert(file, reservation);
    }

    fn remove(&mut self, file: Sbdf) -> Option<Reservation> {
        let gone = self.files.remove(&file)?;
        self.seen.remove(&file);
        if self.displaced.remove(&file).is_none() {
            self.at.remove(&gone.address);
            // A displaced reservation with the same address takes that address again.
            let other =
                self.displaced.keys().find(|other| self.files[*other].address == gone.address).copied();
            if let Some(other) = other {
                self.displaced.remove(&other);
                self.at.insert(gone.address, other);
            }
        }
        Some(gone)
    }

    /// The file for a device. A file whose device was found elsewhere is no candidate.
    fn about(&self, device: &Device) -> Option<Sbdf> {
        let found = self.files.iter().filter(|(file, one)| {
            one.is_of(device) && (one.address == device.address || !self.seen.contains(*file))
        });
        let best = found.max_by_key(|(_, one)| (one.is_at_place_of(device), one.address == device.address));
        best.map(|(file, _)| *file)
    }

    /// The files that must be written under other names before this name is free, with their new names. An error: a file that cannot be
    /// renamed, because its device was not found.
    fn in_the_way(&self, file: Sbdf) -> Result<Vec<(Sbdf, Reservation)>, Sbdf> {
        let mut moves = Vec::new();
        let mut wanted = file;
        // This ends: no two functions have the same address, and none of these has the address of the first file.
        while let Some(owner) = self.files.get(&wanted) {
            if self.displaced.contains_key(&wanted) {
                return Err(wanted);
            }
            moves.push((owner.address, owner.clone()));
            wanted = owner.address;
        }
        Ok(moves)
    }
}

impl Reservations {
    /// Reads the directory, and creates it if necessary. Returns one error for each unusable file.
    pub fn open(directory: &Path) -> Result<(Self, Vec<JournalError>), JournalError> {
        let error = |source| JournalError::Io { action: "create", path: directory.to_owned(), source };
        fs::create_dir_all(directory).map_err(error)?;
        let (mut known, mut damaged, mut errors) = (Known::default(), BTreeMap::new(), Vec::new());
        for path in entries(directory)? {
            let read = read_entry(&path, SIZE_LIMIT, |one: &Reservation| (one.version, one.address));
            match read.and_then(|reservation| checked(&path, reservation)) {
                Ok(reservation) => known.set(reservation.address, reservation),
                Err(error) => {
                    damaged.extend(error.address().map(|address| (address, path)));
                    errors.push(error);
                }
            }
        }
        let (known, damaged) = (Arc::new(Mutex::new(known)), Arc::new(damaged));
        Ok((Self { directory: directory.to_owned(), known, damaged }, errors))
    }

    /// The unusable file of a function, as long as it exists.
    pub fn damaged(&self, address: Sbdf) -> Option<&Path> {
        let path = self.damaged.get(&address)?;
        (!self.known().files.contains_key(&address) && path.exists()).then_some(path)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, address: Sbdf) -> PathBuf {
        self.directory.join(format!("{address}.json"))
    }

    /// Whether there are no reservations.
    pub fn is_empty(&self) -> bool {
        self.known().files.is_empty()
    }

    /// The reservation of a function.
    pub fn get(&self, address: Sbdf) -> Option<Reservation> {
        self.known().get(address).cloned()
    }

    /// All reservations, by address.
    pub fn all(&self) -> Vec<Reservation> {
        let known = self.known();
        known.at.keys().filter_map(|address| known.get(*address)).cloned().collect()
    }

    /// The reservations of a guest, by address.
    pub fn of(&self, guest: Uuid) -> Vec<Reservation> {
        self.all().into_iter().filter(|reservation| reservation.guest == guest).collect()
    }

    /// Reservations whose devices were not found and whose addresses other reserved devices have.
    pub fn displaced(&self) -> Vec<(Reservation, SystemTime)> {
        let known = self.known();
        let displaced = known.displaced.iter();
        displaced.filter_map(|(file, since)| Some((known.files.get(file)?.clone(), *since))).collect()
    }

    /// Whether one of the reservations may be this device's, or be at its address.
    pub fn may_concern(&self, device: &Device) -> bool {
        let known = self.known();
        known.get(device.address).is_some() || known.files.values().any(|one| one.is_of(device))
    }

    /// Notes devices that were found; first those at their noted path, so that no other file claims them.
    pub fn found_all(&self, mut devices: Vec<Device>) -> Result<(), Failure> {
        let known = self.known();
        devices.sort_by_key(|device| {
            !known.files.values().any(|one| one.is_of(device) && one.is_at_place_of(device))
        });
        drop(known);
        devices.iter().try_for_each(|device| self.found(device).map(drop))
    }

    /// Notes a device that was found, and moves its reservation to the present address. A reservation of an earlier version is completed
    /// with the device.
    pub fn found(&self, device: &Device) -> Result<Option<Followed>, Failure> {
        let mut known = self.known();
        let Some(file) = known.about(device) else { return Ok(None) };
        let Some(before) = known.remove(file) else { return Ok(None) };
        known.seen.insert(file);
        let (is_new, address) = (before.device.is_none(), before.address);
        let reservation = Reservation {
            address: device.address,
            device: before.device.or_else(|| Some(device.clone())),
            ..before
        };
        // Another file with the same device: the service was killed while it renamed the file.
        let copies =
            known.files.iter().filter(|(other, one)| **other != file && one.device == reservation.device);
        let copies: Vec<Sbdf> = copies.map(|(other, _)| *other).collect();
        copies.iter().for_each(|copy| drop(known.remove(*copy)));
        known.set(file, reservation.clone());
        // The lock is kept during the writes, so that the reservation is not removed meanwhile. They happen at most once per file.
        copies.into_iter().try_for_each(|copy| self.remove(copy))?;
        if is_new {
            self.write(file, &reservation)?;
        }
        drop(known);
        let (from, to, guest) = (address, device.address, reservation.guest);
        Ok((from != to).then_some(Followed { from, to, guest }))
    }

    /// Notes that no function is at an address any more.
    pub fn left(&self, address: Sbdf) {
        let mut known = self.known();
        if let Some(file) = known.at.get(&address).copied() {
            known.seen.remove(&file);
        }
    }

    /// Stores a reservation, synced to the disk.
    pub fn keep(&self, reservation: Reservation) -> Result<(), Failure> {
        let known = self.known();
        let (file, moves) = match known.at.get(&reservation.address) {
            Some(file) => (*file, Vec::new()),
            None => {
                let moves = known.in_the_way(reservation.address).map_err(|file| {
                    let file = self.path(file);
                    let text =
                        format!("{} is the reservation of another device, which is missing", file.display());
                    Failure::refused(text).on(reservation.address).hint("remove the file, then restart xpcid")
                })?;
                (reservation.address, moves)
            }
        };
        drop(known);
        // In this order each file name is free when it is written.
        for (file, other) in moves.iter().rev() {
            self.write(*file, other)?;
        }
        self.write(file, &reservation)?;
        let mut known = self.known();
        for (file, other) in moves.into_iter().rev() {
            known.seen.insert(file);
            known.set(file, other);
        }
        known.seen.insert(file);
        known.set(file, reservation);
        Ok(())
    }

    fn write(&self, file: Sbdf, reservation: &Reservation) -> Result<(), Failure> {
        let path = self.path(file);
        let noted = Reservation { address: file, ..reservation.clone() };
        let written = durable::replace(&path, &noted, durable::Survives::PowerFailure);
        written.map_err(|source| failure(reservation.address, "write", path, source))
    }

    fn remove(&self, file: Sbdf) -> Result<(), Failure> {
        let path = self.path(file);
        let removed = durable::remove(&path).and_then(|()| durable::sync(&self.directory));
        removed.map_err(|source| failure(file, "remove", path, source))
    }

    /// Removes the reservation of a function, if it has one.
    pub fn forget(&self, address: Sbdf) -> Result<(), Failure> {
        let file = self.known().at.get(&address).copied().unwrap_or(address);
        self.remove(file)?;
        drop(self.known().remove(file));
        Ok(())
    }

    /// Notes that a domain has got the function of a reservation.
    pub fn give(&self, reservation: Reservation, boot: &str, domain: DomId) -> Result<(), Failure> {
        self.keep(Reservation { given: Some(Given { boot: boot.to_owned(), domain }), ..reservation })
    }
}

fn failure(address: Sbdf, action: &'static str, path: PathBuf, source: io::Error) -> Failure {
    Failure::from(JournalError::Io { action, path, source }).on(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VF: Sbdf = Sbdf::from_devfn(0, 1, 0x80);
    const WEB: Uuid = Uuid([7; 16]);

    #[test]
    fn a_reservation_survives_a_restart_and_has_the_last_domain_of_this_boot() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Reservations::open(directory.path()).unwrap();
        let (first, _) = open();
        let reservation =
            Reservation::new(device(VF, "0000:00:01.0/00.0"), WEB, Some("web".into()), Devfn(0xf8));
        first.keep(reservation.clone()).unwrap();
        assert_eq!(open().0.get(VF).as_ref(), Some(&reservation));
        assert_eq!(open().0.of(WEB).len(), 1);
        first.give(reservation, "one", DomId(4)).unwrap();
        let given = open().0.get(VF).unwrap();
        let had = [("one", 4), ("one", 5), ("two", 4)].map(|(boot, id)| given.was_given(boot, DomId(id)));
        assert_eq!(had, [true, false, false]);
        first.forget(VF).unwrap();
        first.forget(VF).unwrap();
        assert!(first.is_empty() && open().0.is_empty());
    }

    #[test]
    fn a_reservation_of_a_guest_that_was_saved_at_no_time_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut reservation = Reservation::new(device(VF, "0000:00:01.0/00.0"), WEB, None, Devfn(8));
        for (seconds, usable) in [(1_700_000_000, true), (u64::MAX, false)] {
            reservation.saved = Some(seconds);
            let (first, _) = Reservations::open(directory.path()).unwrap();
            first.keep(reservation.clone()).unwrap();
            let (found, errors) = Reservations::open(directory.path()).unwrap();
            assert_eq!((found.get(VF).is_some(), errors.is_empty()), (usable, usable), "{seconds}");
            assert_eq!(found.damaged(VF).is_none(), usable, "{seconds}");
        }
    }

    fn device(address: Sbdf, path: &str) -> Device {
        let identity = Identity { vendor: 0x8086, device: 0x10d3, ..Identity::default() };
        Device { address, identity, path: path.parse().unwrap(), function: 0, vf: None }
    }

    /// The paths and addresses of all reservations.
    fn all(known: &Reservations) -> Vec<(String, Sbdf)> {
        let path = |one: &Reservation| one.device.as_ref().unwrap().path.to_string();
        known.all().iter().map(|one| (path(one), one.address)).collect()
    }

    const PATHS: [&str; 3] = ["0000:00:01.0", "0000:00:02.0", "0000:00:03.0"];

    fn places() -> [Sbdf; 4] {
        ["04:00.0", "05:00.0", "06:00.0", "07:00.0"].map(|address| address.parse().unwrap())
    }

    #[test]
    fn devices_that_exchange_addresses_keep_their_reservations() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Reservations::open(directory.path()).unwrap().0;
        let [a, b, c, d] = places();
        let first = open();
        for (path, address) in PATHS.into_iter().zip([a, b, c]) {
            first.keep(Reservation::new(device(address, path), WEB, None, Devfn(8))).unwrap();
        }
        let second = open();
        let now =
            PATHS.into_iter().zip([b, a, d]).map(|(path, address)| device(address, path)).collect::<Vec<_>>();
        second.found_all(now.clone()).unwrap();
        let swapped = [(PATHS[1].to_owned(), a), (PATHS[0].to_owned(), b), (PATHS[2].to_owned(), d)];
        assert_eq!(all(&second), swapped);
        // The two devices that changed places, and a further device at the address that the third has left.
        for reservation in second.all() {
            second.give(reservation, "boot", DomId(4)).unwrap();
        }
        second.keep(Reservation::new(device(c, "0000:00:09.0"), WEB, None, Devfn(16))).unwrap();
        let third = open();
        third.found_all([&now[..], &[device(c, "0000:00:09.0")]].concat()).unwrap();
        assert_eq!(all(&third).len(), 4);
        assert!(swapped.iter().all(|one| all(&third).contains(one)), "{:?}", all(&third));
        assert!(
            third.displaced().is_empty()
                && third.all().iter().filter(|one| one.was_given("boot", DomId(4))).count() == 3
        );
    }

    #[test]
    fn a_missing_device_is_displaced_while_another_reserved_one_has_its_address() {
        let directory = tempfile::tempdir().unwrap();
        let (known, _) = Reservations::open(directory.path()).unwrap();
        let [a, b, ..] = places();
        for (path, address) in PATHS.into_iter().zip([a, b]) {
            known.keep(Reservation::new(device(address, path), WEB, None, Devfn(8))).unwrap();
        }
        assert_eq!(known.found(&device(b, PATHS[0])).unwrap(), None, "it is where it was");
        known.left(a);
        let followed = known.found(&device(b, PATHS[0])).unwrap().unwrap();
        assert_eq!((followed.from, followed.to), (a, b));
        let displaced = known.displaced();
        assert_eq!(displaced.len(), 1);
        assert!(displaced[0].0.is_of(&device(b, PATHS[1])));
        known.forget(b).unwrap();
        assert_eq!(all(&known), [(PATHS[1].to_owned(), b)]);
    }

    #[test]
    fn a_reservation_of_an_earlier_version_follows_its_device_after_that_was_found() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Reservations::open(directory.path()).unwrap().0;
        let [a, b, ..] = places();
        let noted = Reservation::new(device(a, PATHS[0]), WEB, None, Devfn(8));
        open().keep(Reservation { device: None, ..noted }).unwrap();
        assert_eq!(open().found(&device(b, PATHS[0])).unwrap(), None, "nobody knows that it is this one");
        assert_eq!(open().found(&device(a, PATHS[0])).unwrap(), None);
        let known = open();
        assert_eq!(known.found(&device(b, PATHS[0])).unwrap().map(|followed| followed.to), Some(b));
    }

    #[test]
    fn an_unusable_file_is_reported_and_the_others_are_used() {
        let directory = tempfile::tempdir().unwrap();
        let (first, _) = Reservations::open(directory.path()).unwrap();
        first.keep(Reservation::new(device(VF, "0000:00:01.0/00.0"), WEB, None, Devfn(0xf8))).unwrap();
        fs::copy(first.path(VF), directory.path().join("0000:01:10.2.json")).unwrap();
        fs::write(directory.path().join("0000:01:10.4.json"), "{").unwrap();
        let (again, errors) = Reservations::open(directory.path()).unwrap();
        assert_eq!((again.all().len(), errors.len()), (1, 2), "{errors:?}");
    }
}
