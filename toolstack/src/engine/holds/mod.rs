//! Functions that the service holds, or gives back to dom0, by itself: what policies and administrators reserve for guests (`at_once`),
//! and what was held for one attachment only (`managed`).

mod at_once;
mod managed;

use pciback::Sbdf;

use self::at_once::AtOnce;
use self::managed::Managed;
use super::problems::Problem;
use crate::transaction::Finished;

/// What is to be held or given back without a request.
#[derive(Debug, Default)]
pub(super) struct Holds {
    at_once: AtOnce,
    managed: Managed,
}

impl Holds {
    /// Functions that could not be held, as problems for `xpci status`.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        self.at_once.problems()
    }

    /// Called when policies were reloaded: holding is tried again, except for functions that an administrator gave back.
    pub fn begin_anew(&mut self) {
        self.at_once.begin_anew();
    }

    /// Notes that a function appeared.
    pub fn appeared(&mut self, address: Sbdf) {
        self.at_once.appeared(address);
    }

    /// Notes VFs that the service has enabled.
    pub fn vfs_enabled(&mut self, vfs: &[Sbdf]) {
        self.at_once.vfs_enabled(vfs);
    }

    /// Forgets a function without a record that left the host.
    pub fn left(&mut self, address: Sbdf) {
        self.at_once.left(address);
    }

    /// Notes that an administrator gives a function back to dom0.
    pub fn gives_back(&mut self, address: Sbdf, incarnation: u64) {
        self.at_once.gives_back(address, incarnation);
    }

    /// Notes the result of a transaction.
    pub fn finished(&mut self, finished: &Finished) {
        self.at_once.finished(finished);
    }
}
