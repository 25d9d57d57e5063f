//! The journal: what the service intends, on disk, in one small file for each function with a record.
//!
//! A record is written and renamed into place before the step that it names runs, so that after a kill at any instruction the next run
//! knows what may have been done. The actual state is read from Xen, sysfs and xenstore; of a record of an earlier boot only a quarantine
//! is kept. So only the begin and the end of a quarantine are synced to the disk, which takes milliseconds. The rest need not survive a
//! power failure, after which everything belongs to dom0 anyway.

mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pciback::{DomId, Sbdf};
use serde::de::DeserializeOwned;
use thiserror::Error;

pub(crate) use record::Owner;
pub use record::{Grant, GuestPlace, NetworkRecord, Pristine, Progress, Record, RomRecord};

use crate::durable::{self, Survives};
use crate::outcome::{ErrorCode, Failure, excerpt};

/// The format version of records; others are refused.
pub const VERSION: u32 = 1;
/// The largest size of a record, in bytes.
const SIZE_LIMIT: u64 = 2 << 20;
/// The file name extension of the copy of an unusable record.
const UNUSABLE: &str = "unusable";

/// Errors of the journal.
#[derive(Debug, Error)]
pub enum JournalError {
    /// Reading or writing failed.
    #[error("cannot {action} journal file {path}: {source}")]
    Io {
        /// `read`, `write` or `remove`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A record that this version cannot read.
    #[error("journal file {path} cannot be used: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
}

impl JournalError {
    /// The file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Io { path, .. } | Self::Malformed { path, .. } => path,
        }
    }

    /// The function whose record the file is, by its file name.
    pub fn address(&self) -> Option<Sbdf> {
        self.path().file_stem()?.to_str()?.parse().ok()
    }
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Self {
        Self::new(ErrorCode::Failed, error.to_string())
            .hint("check that the disk of /var/lib/xpci has room and is writable")
    }
}

/// The journal, which is a directory.
#[derive(Debug, Clone)]
pub struct Journal {
    directory: PathBuf,
    /// Functions whose last written record is quarantined.
    quarantined: Arc<Mutex<BTreeSet<Sbdf>>>,
    granted: Arc<Mutex<Granted>>,
    owners: Arc<Mutex<Owners>>,
}

/// The owners of functions with a record. Other functions belong to dom0, or to another toolstack.
pub(crate) type Owners = BTreeMap<Sbdf, Owner>;

/// The grants of functions that guests have.
pub(crate) type Granted = BTreeMap<Sbdf, (DomId, Vec<Grant>)>;

impl Journal {
    /// Opens the directory, and creates it if necessary.
    pub fn open(directory: &Path) -> Result<Self, JournalError> {
        let error = |source| JournalError::Io { action: "create", path: directory.to_owned(), source };
        fs::create_dir_all(directory).map_err(error)?;
        Ok(Self {
            directory: directory.to_owned(),
            quarantined: Arc::default(),
            granted: Arc::default(),
            owners: Arc::default(),
        })
    }

    fn path(&self, address: Sbdf) -> PathBuf {
        self.directory.join(format!("{address}.json"))
    }

    /// Writes a record atomically: it is visible to the next run of the service when the call returns. The record of a quarantined
    /// function is also synced, to survive a power failure.
    pub fn write(&self, record: &Record) -> Result<(), JournalError> {
        let path = self.path(record.address);
        let quarantined = record.quarantine.is_some();
        let durable = quarantined || self.quarantined().contains(&record.address);
        let survives = if durable { Survives::PowerFailure } else { Survives::Exit };
        durable::replace(&path, record, survives).map_err(|source| JournalError::Io {
            action: "write",
            path,
            source,
        })?;
        self.owners().insert(record.address, record.owner());
        if quarantined {
            self.quarantined().insert(record.address);
        } else if durable {
            self.quarantined().remove(&record.address);
        }
        Ok(())
    }

    fn quarantined(&self) -> MutexGuard<'_, BTreeSet<Sbdf>> {
        self.quarantined.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The grants of all guests, locked while they are used.
    pub(crate) fn granted(&self) -> MutexGuard<'_, Granted> {
        self.granted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The owners of functions with a record.
    pub(crate) fn owners(&self) -> MutexGuard<'_, Owners> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes a function's record; succeeds if there is none.
    pub fn remove(&self, address: Sbdf) -> Result<(), JournalError> {
        self.owners().remove(&address);
        let path = self.path(address);
        let durable = self.quarantined().remove(&address);
        let removed = durable::remove(&path)
            .and_then(|()| if durable { durable::sync(&self.directory) } else { Ok(()) });
        removed.map_err(|source| JournalError::Io { action: "remove", path, source })
    }

    /// Copies an unusable record for later examination, and returns the path of the copy.
    pub fn set_aside(&self, address: Sbdf) -> Result<PathBuf, JournalError> {
        let path = self.path(address);
        let aside = path.with_extension(UNUSABLE);
        match fs::copy(&path, &aside) {
            Ok(_) => Ok(aside),
            Err(source) => Err(JournalError::Io { action: "copy", path, source }),
        }
    }

    /// All records, by address, with one error for each unusable file.
    pub fn read_all(&self) -> Result<(Vec<Record>, Vec<JournalError>), JournalError> {
        let (mut records, mut errors) = (Vec::new(), Vec::new());
        for path in entries(&self.directory)? {
            let read = read_unsynced(&path, SIZE_LIMIT, |record: &Record| (record.version, record.address));
            match read.and_then(|record| record.map(|record| checked(&path, record)).transpose()) {
                Ok(record) => records.extend(record),
                Err(error) => errors.push(error),
            }
        }
        records.sort_by_key(|record| record.address);
        let quarantined = records.iter().filter(|record| record.quarantine.is_some());
        self.quarantined().extend(quarantined.map(|record| record.address));
        let given = |record: &Record| {
            let domain = record.guest.filter(|_| !record.grants.is_empty())?.domain;
            Some((record.address, (domain, record.grants.clone())))
        };
        self.granted().extend(records.iter().filter_map(given));
        self.owners().extend(records.iter().map(|record| (record.address, record.owner())));
        Ok((records, errors))
    }
}

/// Refuses a record that no version of the service has written.
fn checked(path: &Path, record: Record) -> Result<Record, JournalError> {
    match record.check() {
        Ok(()) => Ok(record),
        Err(reason) => Err(JournalError::Malformed { path: path.to_owned(), reason }),
    }
}

/// The entries of a directory with one file for each function.
pub(crate) fn entries(directory: &Path) -> Result<Vec<PathBuf>, JournalError> {
    let error = |source| JournalError::Io { action: "read", path: directory.to_owned(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(error)? {
        let path = entry.map_err(error)?.path();
        // Temporary files are writes that were not completed.
        if path.extension().is_some_and(|extension| extension == "json") {
            paths.push(path);
        }
    }
    paths.sort_unstable();
    Ok(paths)
}

/// Reads an entry of such a directory, at most `limit` bytes; `about` returns its version and function.
pub(crate) fn read_entry<T: DeserializeOwned>(
    path: &Path,
    limit: u64,
    about: impl Fn(&T) -> (u32, Sbdf),
) -> Result<T, JournalError> {
    parse(path, &read_text(path, limit)?, about)
}

/// Reads an entry of a directory whose files are not synced. `None`: the file was removed, or its contents did not reach the disk before
/// a power failure, so that it is of an earlier boot and irrelevant.
pub(crate) fn read_unsynced<T: DeserializeOwned>(
    path: &Path,
    limit: u64,
    about: impl Fn(&T) -> (u32, Sbdf),
) -> Result<Option<T>, JournalError> {
    let text = match read_text(path, limit) {
        Err(JournalError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    if text.bytes().all(|byte| byte == 0) {
        log::info!("{}: empty, as a power failure leaves a file", path.display());
        return Ok(None);
    }
    parse(path, &text, about).map(Some)
}

/// Reads a text file, at most `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, JournalError> {
    let error = |source| JournalError::Io { action: "read", path: path.to_owned(), source };
    let mut text = String::new();
    File::open(path).map_err(error)?.take(limit).read_to_string(&mut text).map_err(error)?;
    Ok(text)
}

fn parse<T: DeserializeOwned>(
    path: &Path,
    text: &str,
    about: impl Fn(&T) -> (u32, Sbdf),
) -> Result<T, JournalError> {
    let entry = parse_versioned(path, text, |entry| about(entry).0)?;
    let (_, address) = about(&entry);
    if path.file_stem().and_then(|stem| stem.to_str()) != Some(address.to_string().as_str()) {
        let reason = format!("it is about {address}");
        return Err(JournalError::Malformed { path: path.to_owned(), reason });
    }
    Ok(entry)
}

/// Parses a file of the service, and refuses other versions.
pub(crate) fn parse_versioned<T: DeserializeOwned>(
    path: &Path,
    text: &str,
    version: impl FnOnce(&T) -> u32,
) -> Result<T, JournalError> {
    let malformed = |reason: String| JournalError::Malformed { path: path.to_owned(), reason };
    let entry: T = serde_json::from_str(text).map_err(|error| malformed(excerpt(&error.to_string())))?;
    match version(&entry) {
        VERSION => Ok(entry),
        other => Err(malformed(format!("it has version {other}, this xpcid reads {VERSION}"))),
    }
}

#[cfg(test)]
mod tests {
    use pciback::Devfn;

    use super::*;
    use crate::steps::{Kind, Step};

    fn sample() -> Record {
        let mut record = Record::new(Sbdf::from_devfn(0, 1, 0x80), "boot");
        record.guest = Some(GuestPlace { domain: DomId(4), devfn: Devfn(8) });
        record.grants =
            vec![Grant::Iomem { first: 0xfe400, frames: 4 }, Grant::Ioport { first: 0xc000, count: 32 }];
        record.transaction = Some(Progress { kind: Kind::Attach, step: Step::Assign, undoing: true });
        record
    }

    #[test]
    fn records_are_read_back_and_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(&directory.path().join("journal")).unwrap();
        let mut record = sample();
        journal.write(&record).unwrap();
        record.transaction = None;
        journal.write(&record).unwrap();
        let (records, errors) = journal.read_all().unwrap();
        assert_eq!(records, [record.clone()]);
        assert!(errors.is_empty(), "{errors:?}");
        journal.remove(record.address).unwrap();
        journal.remove(record.address).unwrap();
        assert!(journal.read_all().unwrap().0.is_empty());
    }

    #[test]
    fn a_record_with_as_many_registers_as_config_space_has_bytes_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let mut record = sample();
        let all = u32::MAX;
        let register = |offset| Pristine { offset, width: 1, mask: all, value: all, reached: all };
        record.pristine = Some((0..4096).map(register).collect());
        journal.write(&record).unwrap();
        assert_eq!(journal.read_all().unwrap().0, [record]);
    }

    #[test]
    fn a_record_with_grants_or_registers_that_cannot_be_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let refused = |change: &dyn Fn(&mut Record)| {
            let mut record = sample();
            change(&mut record);
            journal.write(&record).unwrap();
            let (records, errors) = journal.read_all().unwrap();
            assert!(records.is_empty(), "{records:?}");
            assert_eq!(errors[0].address(), Some(record.address));
        };
        for (first, frames) in [(u64::MAX, 2), (1 << 52, 1), (1, 0)] {
            refused(&|record| record.grants.push(Grant::Iomem { first, frames }));
        }
        for (first, count) in [(u32::MAX, 2), (0xfff0, 0x20), (1, 0)] {
            refused(&|record| record.grants.push(Grant::Ioport { first, count }));
        }
        for (offset, width) in [(0x1000, 4), (4, 3), (6, 4), (u16::MAX, 1)] {
            let register = Pristine { offset, width, mask: 1, value: 1, reached: 1 };
            refused(&|record| record.pristine = Some(vec![register]));
        }
    }

    #[test]
    fn a_truncated_or_damaged_record_is_refused_with_its_function() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let record = sample();
        journal.write(&record).unwrap();
        let path = journal.path(record.address);
        let good = fs::read(&path).unwrap();
        let read = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let (records, errors) = journal.read_all().unwrap();
            assert_eq!(records.len() + errors.len(), usize::from(!bytes.is_empty()));
            assert!(errors.iter().all(|error| error.address() == Some(record.address)), "{errors:?}");
            records.into_iter().next()
        };
        for length in 0..good.len() {
            assert_eq!(read(&good[..length]), None, "cut to {length} bytes");
        }
        for at in 0..good.len() {
            for byte in [0, b'"', b'{', b'9', 0x80, 0xff] {
                let mut garbled = good.clone();
                garbled[at] = byte;
                // Damaged text that still is a valid record must be about the function in the file name.
                let found = read(&garbled);
                assert!(found.is_none_or(|found| found.address == record.address), "byte {at}: {byte:#x}");
            }
        }
    }

    #[test]
    fn an_empty_record_after_a_power_failure_is_ignored_and_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let record = sample();
        for left in ["", "\0\0\0\0"] {
            fs::write(journal.path(record.address), left).unwrap();
            let (records, errors) = journal.read_all().unwrap();
            assert!(records.is_empty() && errors.is_empty(), "{records:?} {errors:?}");
        }
        journal.write(&record).unwrap();
        assert_eq!(journal.read_all().unwrap().0, [record]);
    }

    #[test]
    fn records_with_and_without_network_settings_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let mut record = sample();
        journal.write(&record).unwrap();
        // In the format that an older version writes and reads.
        assert!(!fs::read_to_string(journal.path(record.address)).unwrap().contains("network"));
        assert_eq!(journal.read_all().unwrap().0, [record.clone()]);
        let mut network = NetworkRecord::default();
        network.wished.vlan = "100:3".parse().ok();
        network.before.vlan = "0".parse().ok();
        record.network = Some(network);
        journal.write(&record).unwrap();
        assert_eq!(journal.read_all().unwrap().0, [record]);
    }

    #[test]
    fn unusable_records_are_reported_and_the_others_are_used() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        journal.write(&sample()).unwrap();
        let good = fs::read_to_string(journal.path(sample().address)).unwrap();
        fs::write(directory.path().join("0000:01:10.2.json"), &good[..good.len() / 2]).unwrap();
        fs::write(directory.path().join("0000:01:10.4.json"), &good).unwrap();
        let newer = good.replace("\"version\": 1", "\"version\": 2");
        fs::write(directory.path().join("0000:01:10.6.json"), newer).unwrap();
        fs::write(directory.path().join("0000:01:11.0.new"), "half").unwrap();
        let (records, errors) = journal.read_all().unwrap();
        assert_eq!(records, [sample()]);
        assert_eq!(errors.len(), 3, "{errors:?}");
    }
}
