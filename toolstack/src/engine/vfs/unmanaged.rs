//! PFs without a driver of their own: pci-pf-stub enables VFs on them, and manages nothing.
//!
//! A note in the run directory lists the PFs that the service bound to the stub, so that they are unbound when their VFs are disabled.
//! Like the binding itself, the notes survive a restart of the service and end with the boot.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use pciback::Sbdf;
use pciback::platform::{Host, HostFunction};
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::engine::tasks::TaskContext;
use crate::outcome::{ErrorCode, Failure};
use crate::transaction::PF_STUB;

/// The largest size of a note, in bytes.
const SIZE_LIMIT: u64 = 64 << 10;

/// The state of a PF before it was bound to the stub.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Note {
    incarnation: u64,
    driver_override: Option<String>,
}

/// Refuses VFs of a PF without a driver unless they may be unmanaged, and unmanaged VFs of a PF whose driver manages them.
pub(in crate::engine) fn check(pf: &HostFunction, unmanaged: bool) -> Result<(), Failure> {
    let address = pf.address;
    match (pf.driver.as_deref(), unmanaged) {
        (None, false) => Err(Failure::refused(format!("{address} has no driver that could enable VFs")).hint(format!(
            "load its driver; or 'xpci vf create --unmanaged' binds it to {PF_STUB}: no driver manages its VFs then, and guests get \
             them only where a policy says 'permit: [untrusted-vf]'"
        ))),
        (Some(driver), true) if driver != PF_STUB => {
            Err(Failure::refused(format!("{address} is managed by {driver}, and so are its VFs"))
                .hint(format!("leave --unmanaged out; or take it from {driver} first")))
        }
        _ => Ok(()),
    }
    .map_err(|failure| failure.on(address))
}

/// The PFs for which there are notes.
pub(in crate::engine) fn noted(run_directory: &Path) -> Vec<Sbdf> {
    let entries = fs::read_dir(run_directory.join("unmanaged")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

impl TaskContext {
    fn note_path(&self, pf: Sbdf) -> PathBuf {
        self.settings.run_directory.join("unmanaged").join(pf.to_string())
    }

    /// Binds a PF without a driver to the stub.
    pub fn give_to_stub(&self, pf: &HostFunction) -> Result<(), Failure> {
        let (host, address) = (self.platform.host.as_ref(), pf.address);
        if pf.driver.is_some() {
            return Ok(());
        }
        if !host.drivers()?.iter().any(|driver| driver == PF_STUB) {
            let failure = Failure::refused(format!("bind {address} to {PF_STUB}: that driver is not loaded"));
            return Err(failure.hint(format!("run 'modprobe {PF_STUB}'")));
        }
        let (incarnation, driver_override) = (pf.incarnation, pf.driver_override.clone());
        write_note(&self.note_path(address), &Note { incarnation, driver_override })
            .map_err(|error| note_failure("write", address, &error))?;
        let bound = self.bind_to_stub(host, address);
        bound.map_err(|failure| match self.take_from_stub(address) {
            Ok(_) => failure,
            Err(second) => {
                Failure { message: format!("{}; and then: {}", failure.message, second.message), ..failure }
            }
        })
    }

    fn bind_to_stub(&self, host: &dyn Host, address: Sbdf) -> Result<(), Failure> {
        host.set_driver_override(address, Some(PF_STUB))?;
        host.probe(address, self.settings.driver_limit())?;
        match host.function(address)?.driver.as_deref() {
            Some(PF_STUB) => Ok(()),
            other => {
                let left_with = other.unwrap_or("no driver");
                let text = format!("bind {address} to {PF_STUB}: afterwards it has {left_with}");
                Err(Failure::new(ErrorCode::Failed, text).hint("see dom0's kernel log"))
            }
        }
    }

    /// Unbinds a PF from the stub if the service bound it; returns whether it did.
    pub fn take_from_stub(&self, address: Sbdf) -> Result<bool, Failure> {
        let path = self.note_path(address);
        let note: Note = match durable::read(&path, SIZE_LIMIT) {
            Ok(text) => {
                serde_json::from_slice(&text).map_err(|error| note_failure("read", address, &error.into()))?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(note_failure("read", address, &error)),
        };
        let host = &self.platform.host;
        let pf = host.function(address)?;
        if pf.num_vfs > 0 {
            // The VFs are still enabled, and only the stub can disable them.
            return Ok(false);
        }
        let ours = pf.incarnation == note.incarnation;
        if ours {
            if pf.driver.as_deref() == Some(PF_STUB) {
                host.unbind(address, self.settings.driver_limit())?;
            }
            host.set_driver_override(address, note.driver_override.as_deref())?;
        }
        fs::remove_file(&path).map_err(|error| note_failure("remove", address, &error))?;
        Ok(ours)
    }
}

/// Renamed into place, so that a reader sees it whole or not at all.
fn write_note(path: &Path, note: &Note) -> io::Result<()> {
    let directory = path.parent().unwrap_or(path);
    fs::create_dir_all(directory)?;
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_string(note)?)?;
    fs::rename(new, path)
}

fn note_failure(action: &str, address: Sbdf, error: &io::Error) -> Failure {
    Failure::new(ErrorCode::Failed, format!("{action} the note that {address} is unmanaged: {error}"))
        .hint("check the service's run directory")
}
