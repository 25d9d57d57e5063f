//! Notes about domains for the next run of the service: one small file per domain in the run directory.

use std::fs;
use std::io;
use std::path::PathBuf;

use log::warn;
use pciback::DomId;
use pciback::platform::ServerId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::outcome::{ErrorCode, Failure};
use crate::settings::Settings;

/// The largest size of a note, in bytes.
const SIZE_LIMIT: u64 = 64 << 10;

/// Notes of one kind.
pub(super) struct Notes(PathBuf);

impl Notes {
    /// The notes in this folder of the run directory.
    pub fn of(settings: &Settings, folder: &str) -> Self {
        Self(settings.run_directory.join(folder))
    }

    /// The domains that have a note.
    pub fn domains(&self) -> Vec<DomId> {
        let Ok(directory) = fs::read_dir(&self.0) else { return Vec::new() };
        let names = directory.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        names.map(DomId).collect()
    }

    /// The path of a domain's note.
    pub fn path(&self, domain: DomId) -> PathBuf {
        self.0.join(domain.to_string())
    }

    pub fn read<T: DeserializeOwned>(&self, domain: DomId) -> Option<T> {
        let text = durable::read(&self.path(domain), SIZE_LIMIT).ok()?;
        serde_json::from_slice(&text).map_err(|error| warn!("domain {domain}: its note: {error}")).ok()
    }

    pub fn write(&self, domain: DomId, note: &impl Serialize) -> Result<(), Failure> {
        let path = self.path(domain);
        let write = || -> io::Result<()> {
            fs::create_dir_all(&self.0)?;
            // Renamed into place, so that a reader sees it whole or not at all. Not synced: the run directory does not survive a power
            // failure anyway.
            let temporary = path.with_extension("new");
            fs::write(&temporary, serde_json::to_vec(note)?)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|error| {
            Failure::new(ErrorCode::Failed, format!("cannot write {}: {error}", path.display())).of(domain)
        })
    }

    pub fn remove(&self, domain: DomId) {
        let path = self.path(domain);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!("cannot remove {}: {error}", path.display());
            }
            _ => {}
        }
    }
}

/// The folder in the run directory with the notes about ioreq servers.
pub(super) const SERVERS: &str = "ioreq-servers";

/// The note about the ioreq servers of a domain.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServerNote {
    /// The servers that existed before ours.
    pub others: Vec<u16>,
    /// Our server, once it is created.
    pub server: Option<u16>,
}

/// The noted number of our server in a domain.
pub(super) fn noted_server(settings: &Settings, domain: DomId) -> Option<ServerId> {
    Notes::of(settings, SERVERS).read(domain).and_then(|note: ServerNote| note.server).map(ServerId)
}
