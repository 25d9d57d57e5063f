//! VFs of PFs: changes that clients and the settings ask for (`by_request`, `at_start`) or the guests that have the PFs (`by_guest`), and
//! network settings (`network`).

mod at_start;
mod by_guest;
mod by_request;
mod driver;
mod for_guests;
mod network;
mod network_checks;
mod sriov;
mod unmanaged;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use pciback::Sbdf;
use pciback::platform::Host;

pub use self::at_start::AtStart;
use self::by_guest::GuestVfs;
use self::by_request::{Change, Context};
use self::network_checks::NetworkChecks;
use super::problems::Problem;
use super::{Engine, Event as EngineEvent};
use crate::journal::NetworkRecord;
use crate::outcome::Failure;
use crate::protocol::{Cause, Success};
use crate::reply::Reply;

/// The state of VFs and their PFs.
#[derive(Default)]
pub(super) struct Vfs {
    /// PFs whose VFs are being changed.
    changing: BTreeSet<Sbdf>,
    /// PFs whose VFs were changed since the service started, while a thread finds out what is to be done about VFs at the start.
    begun_at_start: Option<BTreeSet<Sbdf>>,
    /// PFs whose guests create VFs.
    by_guest: GuestVfs,
    /// Scheduled checks of whether guests' drivers changed the network settings of their VFs.
    network_checks: NetworkChecks,
}

/// Results of background work on VFs.
pub enum Event {
    /// What is to be done about VFs when the service starts.
    FoundAtStart(Result<AtStart, Failure>),
    /// The VFs of a PF were changed; whether that succeeded.
    Changed(ChangedPf, bool),
    /// The driver of a PF has created or removed VFs for the guest that has it, or failed to.
    ChangedForGuest(ChangedPf, Result<(), Failure>),
    /// The network settings of a VF were set.
    NetworkSet(Sbdf, Option<NetworkRecord>),
    /// The state of a VF was compared with its network settings: the difference, or `None`.
    NetworkCompared(Sbdf, Option<String>),
}

/// A PF whose VFs were changed, as the thread has found it after that.
#[derive(Debug)]
pub struct ChangedPf {
    pf: Sbdf,
    /// How many VFs it has, and which; `None`: it cannot be read.
    vfs: Option<(u16, Vec<Sbdf>)>,
}

impl ChangedPf {
    fn read(host: &dyn Host, pf: Sbdf) -> Self {
        let found = host.function(pf).inspect_err(|error| log::warn!("{error}"));
        Self { pf, vfs: found.ok().map(|found| (found.num_vfs, found.virtual_functions)) }
    }
}

impl Vfs {
    /// PFs whose VFs are being changed.
    pub fn changing(&self) -> &BTreeSet<Sbdf> {
        &self.changing
    }

    /// Whether the VFs of a PF are being changed.
    pub fn is_changing(&self, pf: Sbdf) -> bool {
        self.changing.contains(&pf)
    }

    /// Whether no change of VFs is under way, nor looked for.
    pub fn is_idle(&self) -> bool {
        self.changing.is_empty() && !self.is_starting()
    }

    /// Whether a thread finds out what is to be done about VFs at the start of the service.
    pub fn is_starting(&self) -> bool {
        self.begun_at_start.is_some()
    }

    /// Such a thread starts.
    fn starts(&mut self) {
        self.begun_at_start = Some(BTreeSet::new());
    }

    /// It has ended. Returns the PFs whose VFs were changed meanwhile.
    fn has_started(&mut self) -> BTreeSet<Sbdf> {
        self.begun_at_start.take().unwrap_or_default()
    }

    /// A change of the VFs of a PF begins.
    fn begin(&mut self, pf: Sbdf) {
        self.changing.insert(pf);
        if let Some(begun) = &mut self.begun_at_start {
            begun.insert(pf);
        }
    }

    /// When the next comparison of network settings is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.network_checks.next()
    }

    /// Deviations from the requested network settings, as problems for the status.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        self.network_checks.problems()
    }

    /// Forgets a function that its guest no longer has.
    pub fn forget(&mut self, address: Sbdf) {
        self.network_checks.forget(address);
    }
}

impl Engine {
    pub(super) fn handle_vfs(&mut self, event: Event) {
        match event {
            Event::FoundAtStart(found) => self.found_at_start(found),
            Event::Changed(changed, succeeded) => self.vfs_changed(changed, succeeded),
            Event::ChangedForGuest(changed, outcome) => self.guest_vfs_changed(changed, outcome),
            Event::NetworkSet(address, network) => self.network_set(address, network),
            Event::NetworkCompared(address, differs) => self.network_compared(address, differs),
        }
    }

    fn vf_changes(&self) -> Context<'_> {
        let Self { platform, functions, vfs, .. } = self;
        Context { platform, functions, changing: &vfs.changing }
    }

    pub(super) fn create_vfs(&mut self, address: Sbdf, count: u16, unmanaged: bool, reply: Reply) {
        match self.vf_changes().creation(address, count, unmanaged).transpose() {
            Some(change) => self.change_vfs(address, change, reply),
            None => {
                let message = format!("{address} has {count} VFs already");
                reply.done(Ok(Success::Already { message }));
            }
        }
    }

    pub(super) fn set_vf_count(&mut self, address: Sbdf, count: u16, reply: Reply) {
        let change = self.vf_changes().replacement(address, count);
        self.change_vfs(address, change, reply);
    }

    pub(super) fn destroy_vfs(&mut self, address: Sbdf, reply: Reply) {
        let change = self.vf_changes().removal(address);
        self.change_vfs(address, change, reply);
    }

    /// Has a PF's driver change its VFs, on a thread.
    fn change_vfs(&mut self, pf: Sbdf, change: Result<Change, Failure>, reply: Reply) {
        let change = match change {
            Ok(change) => change,
            Err(failure) => return reply.done(Err(failure)),
        };
        self.vfs.begin(pf);
        self.inventory.touch(pf);
        let (context, inbox, progress) = (self.task_context(), self.inbox.clone(), reply.clone());
        let host = Arc::clone(&self.platform.host);
        let work = move || change.make(pf, &context, &|text| progress.progress(text));
        self.inbox.background(&format!("vfs {pf}"), work, move |outcome| {
            let succeeded = matches!(&outcome, Ok(Ok(_)));
            let changed = ChangedPf::read(host.as_ref(), pf);
            inbox.send(EngineEvent::Vfs(Event::Changed(changed, succeeded)));
            reply.done(outcome.and_then(|outcome| outcome).map_err(|failure| failure.on(pf)));
        });
    }

    /// Handles the end of a change of a PF's VFs; events about them were not handled meanwhile.
    fn vfs_changed(&mut self, ChangedPf { pf: address, vfs }: ChangedPf, succeeded: bool) {
        if succeeded {
            self.problems.resolve_of(address, &[Cause::VirtualFunctions]);
        }
        self.vfs.changing.remove(&address);
        self.inventory.examine(address);
        self.retry_assignments();
        // VFs that were removed,
        self.inventory.examine_vfs(address);
        // and VFs that appeared.
        if let Some((count, vfs)) = vfs {
            self.send_vfs_event(address, count);
            self.holds.vfs_enabled(&vfs);
            self.inventory.examine_all_of(vfs);
        }
    }
}
