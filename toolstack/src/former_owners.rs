//! PV guests that may still reach the memory BARs, or the expansion ROM, of a function that they no longer have.
//!
//! Xen revokes a PV guest's permission to map frames, but leaves its page table entries: a guest that has mapped a BAR can still access
//! the device's registers, and program DMA in the context of the next owner. Only the end of the domain removes such a mapping. So each
//! range is noted here before a PV domain may map it, and a function whose BARs overlap a noted range gets no other owner while that
//! domain exists.
//!
//! HVM guests reach BARs through second-stage page tables, from which Xen removes the frames. I/O ports are checked at each access.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use pciback::platform::{HostFunction, Hypervisor, PAGE, PlatformError};
use pciback::{DomId, Sbdf, Uuid};
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::journal::{JournalError, VERSION, entries, read_unsynced};
use crate::outcome::{Failure, refused_to};

/// The largest size of a file, in bytes.
const SIZE_LIMIT: u64 = 1 << 20;

/// A range of page frames that a PV domain was allowed to map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Range {
    domain: DomId,
    /// Domain ids are reused; the UUID distinguishes domains with the same id.
    uuid: Uuid,
    first: u64,
    frames: u64,
}

/// The ranges granted for one function since the host booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    version: u32,
    boot: String,
    address: Sbdf,
    ranges: Vec<Range>,
}

/// A domain that may still reach a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FormerOwner {
    /// The domain, which exists.
    pub domain: DomId,
    /// The function whose BARs it was allowed to map.
    pub had: Sbdf,
}

#[derive(Debug, Default)]
struct Known {
    entries: BTreeMap<Sbdf, Entry>,
    /// Unusable files: it is unknown which domains can reach these functions.
    damaged: BTreeMap<Sbdf, PathBuf>,
}

/// All former owners, on disk, in one small file for each function. Clones share them.
#[derive(Debug, Clone)]
pub struct FormerOwners {
    directory: PathBuf,
    boot: String,
    known: Arc<Mutex<Known>>,
}

impl FormerOwners {
    /// Reads the directory, and creates it if necessary. Files of an earlier boot are removed. Returns one error for each unusable file;
    /// its function counts as reachable by an unknown guest.
    pub fn open(directory: &Path, boot: &str) -> Result<(Self, Vec<JournalError>), JournalError> {
        let create = |source| JournalError::Io { action: "create", path: directory.to_owned(), source };
        fs::create_dir_all(directory).map_err(create)?;
        let (mut known, mut errors) = (Known::default(), Vec::new());
        for path in entries(directory)? {
            match read_unsynced(&path, SIZE_LIMIT, |entry: &Entry| (entry.version, entry.address)) {
                Ok(Some(entry)) if entry.boot == boot => drop(known.entries.insert(entry.address, entry)),
                Ok(_) => durable::remove(&path).map_err(|source| JournalError::Io {
                    action: "remove",
                    path: path.clone(),
                    source,
                })?,
                Err(error) => {
                    let stem = path.file_stem().and_then(|stem| stem.to_str());
                    if let Some(address) = stem.and_then(|stem| stem.parse().ok()) {
                        known.damaged.insert(address, path);
                    }
                    errors.push(error);
                }
            }
        }
        let (directory, boot) = (directory.to_owned(), boot.to_owned());
        Ok((Self { directory, boot, known: Arc::new(Mutex::new(known)) }, errors))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, address: Sbdf) -> PathBuf {
        self.directory.join(format!("{address}.json"))
    }

    /// Notes ranges of page frames (first, count) of a function before a PV domain may map them, so that a killed service leaves the
    /// note. Ranges of domains that no longer exist are dropped.
    pub fn note(
        &self,
        hypervisor: &dyn Hypervisor,
        address: Sbdf,
        domain: DomId,
        frames: &[(u64, u64)],
    ) -> Result<(), Failure> {
        let uuid = match hypervisor.domain(domain) {
            Ok(found) => found.uuid,
            // A domain that does not exist maps nothing.
            Err(error) if error.errno() == Some(Errno::ESRCH) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let mut known = self.known();
        let before = known.entries.get(&address).map_or(&[][..], |entry| &entry.ranges);
        let mut ranges = Vec::with_capacity(before.len() + frames.len());
        for range in before {
            if exists(hypervisor, range)? {
                ranges.push(*range);
            }
        }
        for &(first, frames) in frames {
            let range = Range { domain, uuid, first, frames };
            if !ranges.contains(&range) {
                ranges.push(range);
            }
        }
        if ranges == before {
            return Ok(());
        }
        let entry = Entry { version: VERSION, boot: self.boot.clone(), address, ranges };
        let path = self.path(address);
        durable::replace(&path, &entry, durable::Survives::Exit).map_err(|source| {
            Failure::from(JournalError::Io { action: "write", path, source }).on(address)
        })?;
        known.entries.insert(address, entry);
        Ok(())
    }

    /// The domains, except `but`, that may still reach a memory BAR or the expansion ROM of a function, each with the function that it had.
    pub fn of(
        &self,
        hypervisor: &dyn Hypervisor,
        function: &HostFunction,
        but: Option<DomId>,
    ) -> Result<Vec<FormerOwner>, PlatformError> {
        let bars: Vec<(u64, u64)> = function
            .guest_ranges()
            .iter()
            .filter(|bar| bar.is_placed() && !bar.is_io())
            .map(|bar| (bar.start / PAGE, (bar.start + bar.size).div_ceil(PAGE)))
            .collect();
        let known = self.known();
        let mut owners = Vec::new();
        for (had, entry) in &known.entries {
            for range in &entry.ranges {
                let owner = FormerOwner { domain: range.domain, had: *had };
                let end = range.first.saturating_add(range.frames);
                let meets = bars.iter().any(|(first, past)| range.first < *past && *first < end);
                if meets
                    && but != Some(range.domain)
                    && !owners.contains(&owner)
                    && exists(hypervisor, range)?
                {
                    owners.push(owner);
                }
            }
        }
        Ok(owners)
    }

    /// The unusable file of a function, if there is one.
    fn damaged(&self, address: Sbdf) -> Option<PathBuf> {
        self.known().damaged.get(&address).cloned()
    }

    /// Refuses an action that gives a function to another owner while a PV guest, except `but`, may still reach it. `action` is in words
    /// that follow "to".
    pub fn refuse(
        &self,
        hypervisor: &dyn Hypervisor,
        function: &HostFunction,
        but: Option<DomId>,
        action: &str,
        name: impl Fn(DomId) -> Option<String>,
    ) -> Result<(), Failure> {
        let address = function.address;
        if let Some(path) = self.damaged(address) {
            let text = format!(
                "{}{} is damaged, so it is unknown which PV guests can still reach the BARs of {address}",
                refused_to(action),
                path.display()
            );
            let hint = "shut down the PV guests that had it, then move that file away and restart xpcid; or accept \
                        the risk with --trust-former-owner";
            return Err(Failure::refused(text).on(address).hint(hint));
        }
        let owners = self.of(hypervisor, function, but)?;
        let Some(first) = owners.first() else { return Ok(()) };
        let named = |owner: &FormerOwner| {
            let had = if owner.had == address { String::new() } else { format!(", which had {}", owner.had) };
            match name(owner.domain) {
                Some(name) => format!("'{name}' (domain {}{had})", owner.domain),
                None => format!("domain {}{had}", owner.domain),
            }
        };
        let names: Vec<String> = owners.iter().map(named).collect();
        let (who, it) = match names.len() {
            1 => (format!("PV guest {}", names[0]), "shut it down"),
            _ => (format!("PV guests {}", names.join(", ")), "shut them down"),
        };
        let text = format!(
            "{}{who} may still have the BARs of {address} mapped, which Xen cannot revoke",
            refused_to(action)
        );
        let hint = format!(
            "{it}; or accept that it can reach the device of the next owner, with --trust-former-owner or by a policy with \
             'reuse: trusted'"
        );
        Err(Failure::refused(text).on(address).of(first.domain).hint(hint))
    }
}

/// Whether the domain of a range still exists and can run.
fn exists(hypervisor: &dyn Hypervisor, range: &Range) -> Result<bool, PlatformError> {
    match hypervisor.domain(range.domain) {
        Ok(found) => Ok(found.uuid == range.uuid && !found.dying),
        Err(error) if error.errno() == Some(Errno::ESRCH) => Ok(false),
        Err(error) => Err(error),
    }
}
