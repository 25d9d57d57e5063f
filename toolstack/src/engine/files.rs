//! The state files of the service. Their handles are shared with background threads.

use std::io;

use super::problems::Problem;
use crate::former_owners::FormerOwners;
use crate::journal::Journal;
use crate::ledger::Ledger;
use crate::moves::Moves;
use crate::persistent_settings::PersistentSettings;
use crate::reservations::Reservations;
use crate::settings::Settings;
use crate::suspensions::Suspensions;

/// What the service keeps on disk.
#[derive(Clone)]
pub(super) struct StateFiles {
    /// What the service intends for each function.
    pub journal: Journal,
    /// What was in the registers of ports and PFs before they were set.
    pub ledger: Ledger,
    /// PV guests that may still have BARs mapped.
    pub former_owners: FormerOwners,
    /// Functions that are assigned to guests persistently.
    pub reservations: Reservations,
    /// Functions that are held persistently, and persistent network settings of VFs.
    pub persistent_settings: PersistentSettings,
    /// Guests that were suspended while they had functions.
    pub suspensions: Suspensions,
    /// Guests that leave this host for another one.
    pub leaving: Moves,
    /// Guests that come here from another host.
    pub arriving: Moves,
}

impl StateFiles {
    /// Opens the files other than the journal. Those that cannot be used are problems.
    pub fn open(journal: Journal, settings: &Settings, boot: &str) -> io::Result<(Self, Vec<Problem>)> {
        let directory = &settings.state_directory;
        let ledger = Ledger::open(&directory.join("path"), boot).map_err(io::Error::other)?;
        let former_owners = FormerOwners::open(&directory.join("former-owners"), boot);
        let (former_owners, damaged) = former_owners.map_err(io::Error::other)?;
        let reservations = Reservations::open(&directory.join("persistent"));
        let (reservations, unusable) = reservations.map_err(io::Error::other)?;
        let (persistent_settings, unreadable) = PersistentSettings::open(directory.join("wanted"));
        let suspensions = Suspensions::open(&directory.join("suspended"));
        let (suspensions, unknown) = suspensions.map_err(io::Error::other)?;
        let leaving = Moves::open(&directory.join("leaving"));
        let (leaving, unknown_leaving) = leaving.map_err(io::Error::other)?;
        let arriving = Moves::open(&directory.join("arriving"));
        let (arriving, unknown_arriving) = arriving.map_err(io::Error::other)?;
        let errors = damaged.iter().chain(&unusable).chain(&unreadable).chain(&unknown);
        let errors = errors.chain(&unknown_leaving).chain(&unknown_arriving);
        let problems = errors.map(Problem::unusable).collect();
        let files = Self {
            journal,
            ledger,
            former_owners,
            reservations,
            persistent_settings,
            suspensions,
            leaving,
            arriving,
        };
        Ok((files, problems))
    }
}
