//! Functions that guests have persistently (`pci-attach --persist`), on disk: one small file for each.
//!
//! A guest that reboots is another domain for Xen, with the same UUID. A reservation says which guest a function goes to when it
//! starts again, and keeps it from all others. It outlives the service and the host's boots, so each change is synced to the disk,
//! which takes milliseconds: only threads that may block make one.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pciback::inventory::Identity;
use pciback::{DomId, Sbdf, Uuid};
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::journal::{JournalError, VERSION, entries, read_entry};
use crate::outcome::Failure;

/// No reservation is longer than this, in bytes.
const SIZE_LIMIT: u64 = 64 * 1024;

/// A function that a guest has persistently.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Reservation {
    version: u32,
    /// The function.
    pub address: Sbdf,
    /// What distinguishes it from another one at its address.
    pub identity: Identity,
    /// The guest.
    pub guest: Uuid,
    /// What the guest was called then, for people.
    pub name: Option<String>,
    /// Device and function number in the guest, on its bus 0000:00.
    pub devfn: u8,
    /// The domain that had it last: when it is taken from that one, only the next one gets it.
    given: Option<Given>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    boot: String,
    domain: DomId,
}

impl Reservation {
    /// One that no domain has had yet.
    pub fn new(address: Sbdf, identity: Identity, guest: Uuid, name: Option<String>, devfn: u8) -> Self {
        Self { version: VERSION, address, identity, guest, name, devfn, given: None }
    }

    /// Whether a domain has had it already.
    pub fn was_given(&self, boot: &str, domain: DomId) -> bool {
        self.given.as_ref().is_some_and(|given| given.boot == boot && given.domain == domain)
    }

    /// The guest, for people.
    pub fn who(&self) -> String {
        match &self.name {
            Some(name) => format!("guest '{name}' ({})", self.guest),
            None => format!("guest {}", self.guest),
        }
    }

    /// What a command calls the guest.
    pub fn called(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.guest.to_string())
    }
}

/// What a transaction does to reservations before it begins.
#[derive(Debug, Clone)]
pub enum Change {
    /// Makes one, which does not outlive a failure of the transaction.
    Reserve(Box<Reservation>),
    /// Forgets that of a function.
    Forget(Sbdf),
    /// Notes that a function is to be held persistently; likewise.
    Hold(Sbdf),
}

/// All reservations. Clones are the same.
#[derive(Debug, Clone)]
pub struct Reservations {
    directory: PathBuf,
    known: Arc<Mutex<BTreeMap<Sbdf, Reservation>>>,
    /// Files that cannot be used: which guest has their functions is not known.
    damaged: Arc<BTreeMap<Sbdf, PathBuf>>,
}

impl Reservations {
    /// Reads the directory, which is created when it is not there, with one error for each file that cannot be used.
    pub fn open(directory: &Path) -> Result<(Self, Vec<JournalError>), JournalError> {
        let error = |source| JournalError::Io { action: "create", path: directory.to_owned(), source };
        fs::create_dir_all(directory).map_err(error)?;
        let (mut known, mut damaged, mut errors) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        for path in entries(directory)? {
            match read_entry(&path, SIZE_LIMIT, |one: &Reservation| (one.version, one.address)) {
                Ok(reservation) => drop(known.insert(reservation.address, reservation)),
                Err(error) => {
                    damaged.extend(error.address().map(|address| (address, path)));
                    errors.push(error);
                }
            }
        }
        let (known, damaged) = (Arc::new(Mutex::new(known)), Arc::new(damaged));
        Ok((Self { directory: directory.to_owned(), known, damaged }, errors))
    }

    /// The file about a function that could not be used, as long as it is there.
    pub fn damaged(&self, address: Sbdf) -> Option<&Path> {
        let path = self.damaged.get(&address)?;
        (!self.known().contains_key(&address) && path.exists()).then_some(path)
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<Sbdf, Reservation>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, address: Sbdf) -> PathBuf {
        self.directory.join(format!("{address}.json"))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.known().is_empty()
    }

    /// That of a function.
    pub fn get(&self, address: Sbdf) -> Option<Reservation> {
        self.known().get(&address).cloned()
    }

    /// All, by address.
    pub fn all(&self) -> Vec<Reservation> {
        self.known().values().cloned().collect()
    }

    /// Those of a guest, by address.
    pub fn of(&self, guest: Uuid) -> Vec<Reservation> {
        self.known().values().filter(|reservation| reservation.guest == guest).cloned().collect()
    }

    /// Keeps a reservation, also over a power failure.
    pub fn keep(&self, reservation: Reservation) -> Result<(), Failure> {
        let (address, path) = (reservation.address, self.path(reservation.address));
        let written = durable::replace(&path, &reservation, true);
        written.map_err(|source| failure(address, "write", path, source))?;
        self.known().insert(address, reservation);
        Ok(())
    }

    /// Forgets that of a function, if it has one.
    pub fn forget(&self, address: Sbdf) -> Result<(), Failure> {
        let path = self.path(address);
        let removed = durable::remove(&path).and_then(|()| durable::sync(&self.directory));
        removed.map_err(|source| failure(address, "remove", path, source))?;
        self.known().remove(&address);
        Ok(())
    }

    /// Notes that a domain has the function of a reservation.
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
    fn a_reservation_outlives_the_service_and_says_who_had_it_in_this_boot() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Reservations::open(directory.path()).unwrap();
        let (first, _) = open();
        let reservation = Reservation::new(VF, Identity::default(), WEB, Some("web".into()), 0xf8);
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
    fn a_file_that_cannot_be_used_is_told_and_the_others_are_used() {
        let directory = tempfile::tempdir().unwrap();
        let (first, _) = Reservations::open(directory.path()).unwrap();
        first.keep(Reservation::new(VF, Identity::default(), WEB, None, 0xf8)).unwrap();
        fs::copy(first.path(VF), directory.path().join("0000:01:10.2.json")).unwrap();
        fs::write(directory.path().join("0000:01:10.4.json"), "{").unwrap();
        let (again, errors) = Reservations::open(directory.path()).unwrap();
        assert_eq!((again.all().len(), errors.len()), (1, 2), "{errors:?}");
    }
}
