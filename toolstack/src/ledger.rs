//! The ledger: earlier values of registers on the paths of assigned functions, on disk, in one small file for each port or PF that has a
//! user.
//!
//! An entry is written before the first register and kept until the last register is restored, so that a killed service neither loses an
//! earlier value nor mistakes its own value for one.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pciback::Sbdf;
use pciback::config::Access;
use pciback::containment::Role;
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::journal::{JournalError, VERSION, entries, read_unsynced};

/// The largest size of an entry, in bytes: a PF may have 65,535 VFs, each a user.
const SIZE_LIMIT: u64 = 2 << 20;

/// The entry of one port or PF.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Entry {
    version: u32,
    boot: String,
    /// The port or PF.
    pub address: Sbdf,
    /// Its incarnation, which distinguishes devices that had this address since boot.
    pub incarnation: u64,
    /// Its role on the path.
    pub role: Role,
    /// The assigned functions for which it is set.
    pub users: BTreeSet<Sbdf>,
    /// The values before the first of them.
    pub before: Vec<Before>,
}

/// The earlier values of bits of one register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Before {
    /// The offset of the register in config space.
    pub offset: u16,
    /// Its width in bytes.
    pub width: u8,
    /// The bits that were changed.
    pub mask: u32,
    /// Their values.
    pub value: u32,
}

/// The ledger, which is a directory.
#[derive(Debug, Clone)]
pub struct Ledger {
    directory: PathBuf,
    boot: String,
    lock: Arc<Mutex<()>>,
}

impl Ledger {
    /// Opens the directory, and creates it if necessary. Entries of another boot, and what a power failure has left empty, are removed,
    /// because the hardware was reset since.
    pub fn open(directory: &Path, boot: &str) -> Result<Self, JournalError> {
        let error = |source| JournalError::Io { action: "create", path: directory.to_owned(), source };
        fs::create_dir_all(directory).map_err(error)?;
        let ledger = Self { directory: directory.to_owned(), boot: boot.to_owned(), lock: Arc::default() };
        for path in entries(directory)? {
            if read(&path).is_ok_and(|entry| entry.is_none_or(|entry| entry.boot != boot)) {
                ledger.remove_file(&path)?;
            }
        }
        Ok(ledger)
    }

    /// Locks the ledger, because functions that share a port must be set one after the other.
    pub fn lock(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new entry without users.
    pub fn begin(&self, address: Sbdf, incarnation: u64, role: Role) -> Entry {
        let boot = self.boot.clone();
        Entry {
            version: VERSION,
            boot,
            address,
            incarnation,
            role,
            users: BTreeSet::new(),
            before: Vec::new(),
        }
    }

    /// The entry of a port or PF, if it has one.
    pub fn entry(&self, address: Sbdf) -> Result<Option<Entry>, JournalError> {
        read(&self.path(address))
    }

    /// All entries. An unusable one is an error, because its values would be lost.
    pub fn entries(&self) -> Result<Vec<Entry>, JournalError> {
        entries(&self.directory)?.iter().filter_map(|path| read(path).transpose()).collect()
    }

    /// Writes an entry so that the next run of the service finds it when the call returns; one without users is removed. It is not
    /// synced, because a power failure also resets the registers.
    pub fn write(&self, entry: &Entry) -> Result<(), JournalError> {
        let path = self.path(entry.address);
        if entry.users.is_empty() {
            return self.remove_file(&path);
        }
        durable::replace(&path, entry, durable::Survives::Exit).map_err(|source| JournalError::Io {
            action: "write",
            path,
            source,
        })
    }

    fn path(&self, address: Sbdf) -> PathBuf {
        self.directory.join(format!("{address}.json"))
    }

    fn remove_file(&self, path: &Path) -> Result<(), JournalError> {
        durable::remove(path).map_err(|source| JournalError::Io {
            action: "remove",
            path: path.to_owned(),
            source,
        })
    }
}

fn read(path: &Path) -> Result<Option<Entry>, JournalError> {
    let entry = read_unsynced(path, SIZE_LIMIT, |entry: &Entry| (entry.version, entry.address))?;
    let is_register = |before: &&Before| Access::new(before.offset.into(), before.width.into()).is_ok();
    match entry.iter().flat_map(|entry| &entry.before).find(|before| !is_register(before)) {
        Some(Before { offset, width, .. }) => {
            let reason = format!("it has a register of {width} bytes at {offset:#x}");
            Err(JournalError::Malformed { path: path.to_owned(), reason })
        }
        None => Ok(entry),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: Sbdf = Sbdf::from_devfn(0, 0, 8);
    const USER: Sbdf = Sbdf::from_devfn(0, 1, 0x80);

    fn with_a_user(ledger: &Ledger) -> Entry {
        let mut entry = ledger.begin(PORT, 7, Role::RootPort);
        entry.users.insert(USER);
        entry.before.push(Before { offset: 4, width: 2, mask: 0x100, value: 0 });
        entry
    }

    #[test]
    fn an_entry_is_kept_while_it_has_users_and_until_a_reboot() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(directory.path(), "one").unwrap();
        assert_eq!(ledger.entry(PORT).unwrap(), None);
        let mut entry = with_a_user(&ledger);
        ledger.write(&entry).unwrap();
        let again = Ledger::open(directory.path(), "one").unwrap();
        assert_eq!(again.entries().unwrap(), [entry.clone()]);
        entry.users.clear();
        again.write(&entry).unwrap();
        assert_eq!(ledger.entry(PORT).unwrap(), None);
        ledger.write(&with_a_user(&ledger)).unwrap();
        assert!(Ledger::open(directory.path(), "two").unwrap().entries().unwrap().is_empty());
    }

    #[test]
    fn an_unusable_entry_is_an_error_and_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(directory.path(), "one").unwrap();
        let path = directory.path().join(format!("{PORT}.json"));
        let mut nowhere = with_a_user(&ledger);
        nowhere.before.push(Before { offset: 0x1000, width: 4, mask: 1, value: 1 });
        for text in ["{".to_owned(), serde_json::to_string(&nowhere).unwrap()] {
            fs::write(&path, text).unwrap();
            assert!(ledger.entry(PORT).is_err() && ledger.entries().is_err());
        }
        assert!(Ledger::open(directory.path(), "one").is_ok() && path.exists());
    }
}
