//! VFs of PFs: changes that clients and the settings ask for (`by_request`) or the guests that have the PFs (`by_guest`), and network
//! settings (`network`).

mod by_guest;
mod by_request;
mod driver;
mod for_guests;
mod network;
mod network_checks;
mod unmanaged;

use std::collections::BTreeSet;
use std::time::Instant;

use pciback::Sbdf;

use self::by_guest::GuestVfs;
use self::by_request::{Change, Context, WantedPf};
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
    /// PFs whose guests create VFs.
    by_guest: GuestVfs,
    /// Scheduled checks of whether guests' drivers changed the network settings of their VFs.
    network_checks: NetworkChecks,
}

/// Results of background work on VFs.
pub enum Event {
    /// The VFs of a PF were changed; whether that succeeded.
    Changed(Sbdf, bool),
    /// The driver of a PF has created or removed VFs for the guest that has it, or failed to.
    ChangedForGuest(Sbdf, Result<(), Failure>),
    /// The network settings of a VF were set.
    NetworkSet(Sbdf, Option<NetworkRecord>),
    /// The state of a VF was compared with its network settings: the difference, or `None`.
    NetworkCompared(Sbdf, Option<String>),
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
            Event::Changed(pf, succeeded) => self.vfs_changed(pf, succeeded),
            Event::ChangedForGuest(pf, outcome) => self.guest_vfs_changed(pf, outcome),
            Event::NetworkSet(address, network) => self.network_set(address, network),
            Event::NetworkCompared(address, differs) => self.network_compared(address, differs),
        }
    }

    fn vf_changes(&self) -> Context<'_> {
        let Self { platform, settings, functions, vfs, .. } = self;
        Context { platform, settings, functions, changing: &vfs.changing }
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
        self.vfs.changing.insert(pf);
        self.inventory.touch(pf);
        let (context, inbox, progress) = (self.task_context(), self.inbox.clone(), reply.clone());
        let work = move || change.make(pf, &context, &|text| progress.progress(text));
        self.inbox.background(&format!("vfs {pf}"), work, move |outcome| {
            let succeeded = matches!(&outcome, Ok(Ok(_)));
            inbox.send(EngineEvent::Vfs(Event::Changed(pf, succeeded)));
            reply.done(outcome.and_then(|outcome| outcome).map_err(|failure| failure.on(pf)));
        });
    }

    /// Handles the end of a change of a PF's VFs; events about them were not handled meanwhile.
    fn vfs_changed(&mut self, address: Sbdf, succeeded: bool) {
        if succeeded {
            self.problems.resolve_of(address, &[Cause::VirtualFunctions]);
        }
        self.vfs.changing.remove(&address);
        self.inventory.examine(address);
        self.retry_assignments();
        // VFs that were removed,
        self.inventory.examine_vfs(address);
        // and VFs that appeared.
        match self.platform.host.function(address) {
            Ok(pf) => {
                self.send_vfs_event(address, pf.num_vfs);
                self.holds.vfs_enabled(&pf.virtual_functions);
                self.inventory.examine_all_of(pf.virtual_functions);
            }
            Err(error) => log::warn!("{error}"),
        }
    }

    /// Unbinds PFs from pci-pf-stub that a killed earlier run bound to it and that have no VFs enabled.
    pub(super) fn take_back_stubs(&mut self) {
        for pf in self.vf_changes().left_to_stub() {
            let reply = self.inbox.unasked_reply(Cause::VirtualFunctions);
            self.change_vfs(pf, Ok(Change::Destroy), reply);
        }
    }

    /// Enables the VFs that the settings ask for.
    pub(super) fn create_wanted_vfs(&mut self) {
        let (wanted, problems) = self.vf_changes().wanted_by_settings();
        self.problems.extend(problems);
        for WantedPf { pf, count, unmanaged } in wanted {
            let reply = self.inbox.unasked_reply(Cause::VirtualFunctions);
            self.create_vfs(pf, count, unmanaged, reply);
        }
    }
}
