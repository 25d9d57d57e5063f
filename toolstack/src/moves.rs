//! Guests that move to or from another host, on disk, in one small file for each guest.
//!
//! `xpci migrate` and `xpci migrate-receive` can be killed at any moment, and so can the service. The notes tell which of the two hosts may
//! let the guest run then: the one that it leaves, until its note says that the guest is handed over; the other one from then on.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pciback::{DomId, Sbdf, Uuid};
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::journal::{JournalError, VERSION, entries, parse_versioned, read_text};
use crate::outcome::{Failure, excerpt};

/// The largest size of a file, in bytes; 32 functions need a twentieth of that.
const SIZE_LIMIT: u64 = 16 * 1024;

/// A guest that moves, as one of the hosts notes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Move {
    version: u32,
    /// The guest.
    pub guest: Uuid,
    /// Its name, for messages.
    pub name: Option<String>,
    /// The other host, for messages.
    pub peer: String,
    /// The functions that it has on the host that it leaves.
    pub functions: Vec<Sbdf>,
    /// Whether only the other host may let it run.
    pub handed_over: bool,
    boot: String,
    /// The domain that leaves.
    domain: Option<DomId>,
    /// The process that carries out this host's part.
    process: Process,
    /// When it began, in seconds since 1970.
    at: u64,
}

/// A process, which another one with its number is not taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Process {
    id: u32,
    /// When it started, in ticks since the boot of the host; `None`: it has ended.
    start: Option<u64>,
}

impl Process {
    /// The process that has this number now.
    fn of(id: u32) -> Self {
        Self { id, start: fs::read_to_string(format!("/proc/{id}/stat")).ok().and_then(|stat| start(&stat)) }
    }
}

/// The start of a process that has not ended, from its `stat` (proc(5)).
fn start(stat: &str) -> Option<u64> {
    // The name of its program, in parentheses, may have any characters.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    // A zombie has ended, whether or not its parent has noticed.
    fields.next().filter(|state| !matches!(*state, "Z" | "X"))?;
    fields.nth(18)?.parse().ok()
}

impl Move {
    /// A move that begins now.
    pub fn now(guest: Uuid, name: Option<String>, peer: String, process: u32, boot: &str) -> Self {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        // The other host may call itself what it likes.
        let (functions, boot, peer) = (Vec::new(), boot.to_owned(), excerpt(&peer));
        let (handed_over, domain, process) = (false, None, Process::of(process));
        Self { version: VERSION, guest, name, peer, functions, handed_over, boot, domain, process, at }
    }

    /// Sets the domain that leaves, and its functions.
    pub fn leaving_as(self, domain: DomId, functions: Vec<Sbdf>) -> Self {
        Self { domain: Some(domain), functions, ..self }
    }

    /// Notes that only the other host may let the guest run.
    pub fn hand_over(self) -> Self {
        Self { handed_over: true, ..self }
    }

    /// The domain that leaves, if this is the boot of the host in which it does.
    pub fn leaving_in(&self, boot: &str) -> Option<DomId> {
        self.domain.filter(|_| self.boot == boot)
    }

    /// Whether the process that carries out this host's part still runs.
    pub fn is_under_way(&self, boot: &str) -> bool {
        self.boot == boot && self.process.start.is_some() && Process::of(self.process.id) == self.process
    }

    /// When it began.
    pub fn at(&self) -> SystemTime {
        // A file may have any number.
        UNIX_EPOCH.checked_add(Duration::from_secs(self.at)).unwrap_or(UNIX_EPOCH)
    }

    /// The guest, for messages.
    pub fn called(&self) -> String {
        match &self.name {
            Some(name) => format!("guest '{name}' ({})", self.guest),
            None => format!("guest {}", self.guest),
        }
    }
}

/// The notes about guests that move in one direction. Clones share them.
#[derive(Debug, Clone)]
pub struct Moves {
    directory: PathBuf,
    known: Arc<Mutex<BTreeMap<Uuid, Move>>>,
}

impl Moves {
    /// Reads the directory, and creates it if necessary. Returns one error for each unusable file.
    pub fn open(directory: &Path) -> Result<(Self, Vec<JournalError>), JournalError> {
        let error = |source| JournalError::Io { action: "create", path: directory.to_owned(), source };
        fs::create_dir_all(directory).map_err(error)?;
        let (mut known, mut errors) = (BTreeMap::new(), Vec::new());
        for path in entries(directory)? {
            match read(&path) {
                Ok(noted) => drop(known.insert(noted.guest, noted)),
                Err(error) => errors.push(error),
            }
        }
        Ok((Self { directory: directory.to_owned(), known: Arc::new(Mutex::new(known)) }, errors))
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<Uuid, Move>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file about a guest.
    pub fn path(&self, guest: Uuid) -> PathBuf {
        self.directory.join(format!("{guest}.json"))
    }

    /// The note about a guest.
    pub fn of(&self, guest: Uuid) -> Option<Move> {
        self.known().get(&guest).cloned()
    }

    /// All notes whose files were not removed by an administrator.
    pub fn all(&self) -> Vec<Move> {
        let mut known = self.known();
        known.retain(|guest, _| !matches!(self.path(*guest).try_exists(), Ok(false)));
        known.values().cloned().collect()
    }

    /// Notes a guest, synced to the disk. Only for threads that may block.
    ///
    /// # Errors
    /// The file could not be written; the note is as before.
    pub fn note(&self, noted: Move) -> Result<(), Failure> {
        let mut known = self.known();
        let path = self.path(noted.guest);
        durable::replace(&path, &noted, durable::Survives::PowerFailure)
            .map_err(|source| failed("write", path, source))?;
        known.insert(noted.guest, noted);
        Ok(())
    }

    /// Forgets a guest; succeeds if it is not noted. Only for threads that may block.
    ///
    /// # Errors
    /// The file could not be removed; the note is as before.
    pub fn forget(&self, guest: Uuid) -> Result<(), Failure> {
        let mut known = self.known();
        let path = self.path(guest);
        durable::remove(&path)
            .and_then(|()| durable::sync(&self.directory))
            .map_err(|source| failed("remove", path, source))?;
        known.remove(&guest);
        Ok(())
    }
}

fn failed(action: &'static str, path: PathBuf, source: io::Error) -> Failure {
    Failure::from(JournalError::Io { action, path, source })
}

fn read(path: &Path) -> Result<Move, JournalError> {
    let text = read_text(path, SIZE_LIMIT)?;
    let noted: Move = parse_versioned(path, &text, |one: &Move| one.version)?;
    let named = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
    if named != Some(noted.guest) {
        let reason = format!("it is about guest {}", noted.guest);
        return Err(JournalError::Malformed { path: path.to_owned(), reason });
    }
    Ok(noted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Uuid = Uuid([7; 16]);

    fn noted() -> Move {
        let began = Move::now(GUEST, Some("web".into()), "other".into(), std::process::id(), "boot");
        began.leaving_as(DomId(4), vec![Sbdf::from_devfn(0, 1, 0x80)])
    }

    #[test]
    fn a_note_survives_a_restart_until_it_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Moves::open(directory.path()).unwrap().0;
        let first = open();
        first.note(noted()).unwrap();
        first.note(Move { handed_over: true, ..noted() }).unwrap();
        assert!(open().of(GUEST).unwrap().handed_over);
        first.forget(GUEST).unwrap();
        first.forget(GUEST).unwrap();
        assert_eq!((first.all().len(), open().all().len()), (0, 0));
    }

    #[test]
    fn a_note_that_cannot_be_written_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let notes = Moves::open(directory.path()).unwrap().0;
        notes.note(noted()).unwrap();
        fs::remove_dir_all(directory.path()).unwrap();
        notes.note(Move { handed_over: true, ..noted() }).unwrap_err();
        assert!(!notes.of(GUEST).unwrap().handed_over);
    }

    #[test]
    fn a_move_of_an_earlier_boot_has_neither_a_domain_nor_a_process() {
        let found = |boot| (noted().leaving_in(boot), noted().is_under_way(boot));
        assert_eq!([found("boot"), found("next")], [(Some(DomId(4)), true), (None, false)]);
        let other = Process { start: Some(1), ..noted().process };
        assert!(!Move { process: other, ..noted() }.is_under_way("boot"), "another process has its number");
    }

    #[test]
    fn a_process_that_has_ended_has_no_start() {
        let stat = |state| format!("7 (a) (b) {state} 1 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 98765 9 9");
        assert_eq!(
            [start(&stat("S")), start(&stat("Z")), start(""), start("7 (a)")],
            [Some(98765), None, None, None]
        );
        assert!(Process::of(std::process::id()).start.is_some());
        assert_eq!(Process::of(u32::MAX).start, None);
    }
}
