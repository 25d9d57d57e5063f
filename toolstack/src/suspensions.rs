//! Guests that were suspended to be saved while they had functions, on disk, in one small file for each guest.
//!
//! A checkpoint that is made then cannot be used: the drivers in it believe that they still have the functions. Nothing shows that of the
//! checkpoint, which may be restored at any time, for example by a script when the host boots again. So these notes survive restarts of the
//! service and of the host, until the guest runs with functions again or an administrator removes the file.
//!
//! Changes apply at once; their files are written by threads that may block.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pciback::{DomId, Sbdf, Uuid};
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::journal::{JournalError, VERSION, entries, parse_versioned, read_text};
use crate::outcome::Failure;

/// The largest size of a file, in bytes; 32 functions need a twentieth of that.
const SIZE_LIMIT: u64 = 16 * 1024;
/// The number of guests that are noted; the last ones.
const MAX_GUESTS: usize = 64;

/// A guest that was suspended with functions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Suspension {
    version: u32,
    /// The guest.
    pub guest: Uuid,
    /// Its name then, for messages.
    pub name: Option<String>,
    /// Whether it was an HVM guest.
    pub hvm: bool,
    /// What it had.
    pub functions: Vec<Sbdf>,
    boot: String,
    domain: DomId,
    /// When it was suspended, in seconds since 1970.
    at: u64,
}

impl Suspension {
    /// A guest that is suspended now.
    pub fn now(guest: Uuid, name: Option<String>, hvm: bool, functions: Vec<Sbdf>) -> Self {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Self { version: VERSION, guest, name, hvm, functions, boot: String::new(), domain: DomId::DOM0, at }
    }

    /// Sets the domain that was suspended, and the boot of the host in which it was.
    pub fn as_domain(self, domain: DomId, boot: &str) -> Self {
        Self { domain, boot: boot.to_owned(), ..self }
    }

    /// Whether this domain was suspended.
    pub fn is_of(&self, domain: DomId, boot: &str) -> bool {
        self.domain == domain && self.boot == boot
    }

    /// When it was suspended.
    pub fn at(&self) -> SystemTime {
        // A file may have any number.
        UNIX_EPOCH.checked_add(Duration::from_secs(self.at)).unwrap_or(UNIX_EPOCH)
    }
}

#[derive(Debug)]
struct Noted {
    suspension: Suspension,
    /// Whether the file has it.
    written: bool,
}

/// All notes. Clones share them.
#[derive(Debug, Clone)]
pub struct Suspensions {
    directory: PathBuf,
    known: Arc<Mutex<BTreeMap<Uuid, Noted>>>,
    /// Held while a file is written or removed, so that it is left as the last change wants it.
    writer: Arc<Mutex<()>>,
}

impl Suspensions {
    /// Reads the directory, and creates it if necessary. Returns one error for each unusable file.
    pub fn open(directory: &Path) -> Result<(Self, Vec<JournalError>), JournalError> {
        let error = |source| JournalError::Io { action: "create", path: directory.to_owned(), source };
        fs::create_dir_all(directory).map_err(error)?;
        let (mut known, mut errors) = (BTreeMap::new(), Vec::new());
        for path in entries(directory)? {
            match read(&path) {
                Ok(suspension) => {
                    known.insert(suspension.guest, Noted { suspension, written: true });
                }
                Err(error) => errors.push(error),
            }
        }
        let known = Arc::new(Mutex::new(known));
        Ok((Self { directory: directory.to_owned(), known, writer: Arc::default() }, errors))
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<Uuid, Noted>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file about a guest.
    pub fn path(&self, guest: Uuid) -> PathBuf {
        self.directory.join(format!("{guest}.json"))
    }

    /// Whether no guest is noted.
    pub fn is_empty(&self) -> bool {
        self.known().is_empty()
    }

    /// The note about a guest.
    pub fn of(&self, guest: Uuid) -> Option<Suspension> {
        self.known().get(&guest).map(|noted| noted.suspension.clone())
    }

    /// All notes whose files were not removed by an administrator.
    pub fn all(&self) -> Vec<Suspension> {
        let mut known = self.known();
        known.retain(|guest, noted| !noted.written || !matches!(self.path(*guest).try_exists(), Ok(false)));
        known.values().map(|noted| noted.suspension.clone()).collect()
    }

    /// Notes a guest. Returns the guests whose files are then to be [stored](Self::store).
    #[must_use]
    pub fn note(&self, suspension: Suspension) -> Vec<Uuid> {
        let (mut known, mut changed) = (self.known(), vec![suspension.guest]);
        known.insert(suspension.guest, Noted { suspension, written: false });
        while known.len() > MAX_GUESTS {
            let oldest = known.values().min_by_key(|noted| noted.suspension.at);
            let Some(oldest) = oldest.map(|noted| noted.suspension.guest) else { break };
            known.remove(&oldest);
            changed.push(oldest);
        }
        changed
    }

    /// Forgets a guest, whose file is then to be [stored](Self::store). Returns what was noted.
    pub fn forget(&self, guest: Uuid) -> Option<Suspension> {
        self.known().remove(&guest).map(|noted| noted.suspension)
    }

    /// Writes the file about a guest, or removes it if the guest is not noted; synced to the disk.
    ///
    /// # Errors
    /// The file could not be written or removed.
    pub fn store(&self, guest: Uuid) -> Result<(), Failure> {
        let _only = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let (path, wanted) = (self.path(guest), self.of(guest));
        let (action, done) = match &wanted {
            Some(wanted) => ("write", durable::replace(&path, wanted, durable::Survives::PowerFailure)),
            None => ("remove", durable::remove(&path).and_then(|()| durable::sync(&self.directory))),
        };
        done.map_err(|source| Failure::from(JournalError::Io { action, path, source }))?;
        if let Some(noted) = self.known().get_mut(&guest) {
            noted.written = wanted.as_ref() == Some(&noted.suspension);
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<Suspension, JournalError> {
    let text = read_text(path, SIZE_LIMIT)?;
    let suspension: Suspension = parse_versioned(path, &text, |one: &Suspension| one.version)?;
    let named = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
    if named != Some(suspension.guest) {
        let reason = format!("it is about guest {}", suspension.guest);
        return Err(JournalError::Malformed { path: path.to_owned(), reason });
    }
    Ok(suspension)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VF: Sbdf = Sbdf::from_devfn(0, 1, 0x80);

    fn guest(number: u8) -> Uuid {
        Uuid([number; 16])
    }

    fn suspension(number: u8) -> Suspension {
        let now = Suspension::now(guest(number), Some("web".into()), false, vec![VF]);
        Suspension { at: u64::from(number), ..now.as_domain(DomId(4), "boot") }
    }

    fn note(notes: &Suspensions, number: u8) {
        for guest in notes.note(suspension(number)) {
            notes.store(guest).unwrap();
        }
    }

    #[test]
    fn a_note_survives_a_restart_until_it_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Suspensions::open(directory.path()).unwrap().0;
        let first = open();
        note(&first, 1);
        assert_eq!(open().all(), [suspension(1)]);
        let is_of = |domain, boot| open().of(guest(1)).unwrap().is_of(DomId(domain), boot);
        assert!(is_of(4, "boot") && !is_of(5, "boot") && !is_of(4, "next"));
        assert_eq!(first.forget(guest(1)), Some(suspension(1)));
        first.store(guest(1)).unwrap();
        assert!(first.is_empty() && open().is_empty());
    }

    #[test]
    fn the_removal_of_its_file_ends_a_note() {
        let directory = tempfile::tempdir().unwrap();
        let notes = Suspensions::open(directory.path()).unwrap().0;
        let _ = notes.note(suspension(1));
        assert_eq!(notes.all().len(), 1, "its file is not written yet");
        notes.store(guest(1)).unwrap();
        fs::remove_file(notes.path(guest(1))).unwrap();
        assert_eq!(notes.all(), []);
    }

    #[test]
    fn the_oldest_of_too_many_notes_is_dropped_with_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let notes = Suspensions::open(directory.path()).unwrap().0;
        let last = MAX_GUESTS as u8 + 1;
        (1..=last).for_each(|number| note(&notes, number));
        assert_eq!((notes.of(guest(1)), notes.all().len()), (None, MAX_GUESTS));
        assert_eq!(Suspensions::open(directory.path()).unwrap().0.all(), notes.all());
    }

    #[test]
    fn unusable_files_are_reported_and_the_others_are_used() {
        let directory = tempfile::tempdir().unwrap();
        let notes = Suspensions::open(directory.path()).unwrap().0;
        note(&notes, 1);
        fs::write(notes.path(guest(2)), "{").unwrap();
        fs::copy(notes.path(guest(1)), notes.path(guest(3))).unwrap();
        let (again, errors) = Suspensions::open(directory.path()).unwrap();
        assert_eq!((again.all().len(), errors.len()), (1, 2), "{errors:?}");
    }
}
