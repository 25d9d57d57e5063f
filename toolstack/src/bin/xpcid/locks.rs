//! Locks of the service's directories.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use toolstack::settings::Settings;

/// Makes sure that no other process serves the same guests or writes the same records, which need not be in the same place: either
/// directory may be another one.
pub struct Locks {
    _run: Flock<File>,
    _state: Flock<File>,
}

impl Locks {
    pub fn take(settings: &Settings) -> anyhow::Result<Self> {
        let (run, state) = (settings.run_directory.join("lock"), &settings.state_directory);
        let file = File::create(&run).with_context(|| format!("cannot create {}", run.display()))?;
        let run_lock = lock(file, &run)?;
        fs::create_dir_all(state).with_context(|| format!("cannot create {}", state.display()))?;
        // The directory itself: a full disk may have no room for one more file.
        let directory = File::open(state).with_context(|| format!("cannot open {}", state.display()))?;
        Ok(Self { _run: run_lock, _state: lock(directory, state)? })
    }
}

fn lock(file: File, path: &Path) -> anyhow::Result<Flock<File>> {
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, Errno::EWOULDBLOCK)) => bail!(
            "cannot lock {}: another xpcid has it; stop that one, or give this one a --run-directory and a --state-directory of its own",
            path.display()
        ),
        Err((_, errno)) => bail!("cannot lock {}: {errno}", path.display()),
    }
}
