//! Enabling and disabling VFs of PFs.

mod by_guest;
mod driver;
mod for_guests;
mod network;
mod unmanaged;

use std::collections::BTreeSet;
use std::time::Instant;

use pciback::platform::HostFunction;
use pciback::{FunctionState, Sbdf};

use self::by_guest::GuestVfs;
use self::driver::{create, destroy};
use self::network::NetworkChecks;
use super::problems::Problem;
use super::requests::{all_pfs, known_pf};
use super::tasks::TaskContext;
use super::{Engine, Event as EngineEvent};
use crate::journal::NetworkRecord;
use crate::outcome::Failure;
use crate::protocol::{Cause, Success};
use crate::reply::Reply;
use crate::transaction::PF_STUB;

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

    pub(super) fn create_vfs(&mut self, address: Sbdf, count: u16, unmanaged: bool, reply: Reply) {
        let pf = self.physical_function(address);
        if pf.as_ref().is_ok_and(|pf| pf.num_vfs == count && count > 0) {
            let message = format!("{address} has {count} VFs already");
            return reply.done(Ok(Success::Already { message }));
        }
        let checked = pf.and_then(|pf| {
            if pf.num_vfs > 0 {
                let text = format!("{address} has {} VFs enabled already", pf.num_vfs);
                return Err(Failure::refused(text).on(address).hint("'xpci vf destroy' disables them first"));
            }
            self.refuse_held_pf(address)?;
            unmanaged::check(&pf, unmanaged)
        });
        self.change_vfs(address, reply, checked, move |context, progress| {
            context.room_for(address, count)?;
            create(context, address, count, unmanaged, progress)
        });
    }

    pub(super) fn set_vf_count(&mut self, address: Sbdf, count: u16, reply: Reply) {
        let (mut before, mut unmanaged) = (0, false);
        let checked = self.physical_function(address).and_then(|pf| {
            before = pf.num_vfs;
            unmanaged = pf.driver.as_deref() == Some(PF_STUB);
            if before == count {
                return Ok(());
            }
            if count > 0 {
                self.refuse_held_pf(address)?;
                unmanaged::check(&pf, unmanaged)?;
            }
            self.none_in_use(&pf)
        });
        self.change_vfs(address, reply, checked, move |context, progress| {
            if before == count {
                return Ok(Success::Already { message: format!("{address} has {count} VFs") });
            }
            if count > 0 {
                // Checked before the present VFs are disabled.
                context.room_for(address, count)?;
            }
            if before > 0 {
                let gone = destroy(context, address, progress)?;
                if count == 0 {
                    return Ok(gone);
                }
            }
            create(context, address, count, unmanaged, progress)
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
        let host = std::sync::Arc::clone(&self.platform.host);
        for address in unmanaged::noted(&self.settings.run_directory) {
            let without_vfs = host.function(address).is_ok_and(|pf| {
                let wanted = self
                    .settings
                    .virtual_functions
                    .iter()
                    .any(|entry| entry.means(host.as_ref(), &self.settings.names, &pf));
                pf.num_vfs == 0 && !wanted
            });
            if without_vfs {
                let reply = self.inbox.unasked_reply(Cause::VirtualFunctions);
                self.change_vfs(address, reply, Ok(()), move |context, progress| {
                    destroy(context, address, progress)
                });
            }
        }
    }

    /// Enables the VFs that the settings ask for, on PFs that have none. Other numbers of VFs are not changed.
    pub(super) fn create_wanted_vfs(&mut self) {
        let wanted = self.settings.virtual_functions.clone();
        if wanted.is_empty() {
            return;
        }
        let host = std::sync::Arc::clone(&self.platform.host);
        let pfs = match all_pfs(host.as_ref()) {
            Ok(pfs) => pfs,
            Err(failure) => {
                let text = format!("enable the VFs that the settings ask for: {failure}");
                return self.problems.push(Problem::new(Cause::VirtualFunctions, text));
            }
        };
        for entry in wanted {
            let matching: Vec<&HostFunction> =
                pfs.iter().filter(|pf| entry.means(host.as_ref(), &self.settings.names, pf)).collect();
            if matching.is_empty() {
                let text = format!("virtual-functions: no PF matches {entry}");
                self.problems.push(Problem::new(Cause::VirtualFunctions, text));
            }
            for pf in matching {
                if pf.num_vfs == entry.count {
                    continue;
                }
                if pf.num_vfs != 0 {
                    log::warn!(
                        "{}: it has {} VFs already, not {}; they stay",
                        pf.address,
                        pf.num_vfs,
                        entry.count
                    );
                    continue;
                }
                self.create_vfs(
                    pf.address,
                    entry.count,
                    entry.unmanaged && pf.driver.is_none(),
                    self.inbox.unasked_reply(Cause::VirtualFunctions),
                );
            }
        }
    }

    pub(super) fn destroy_vfs(&mut self, address: Sbdf, reply: Reply) {
        let checked = self.physical_function(address).and_then(|pf| self.none_in_use(&pf));
        self.change_vfs(address, reply, checked, move |context, progress| {
            destroy(context, address, progress)
        });
    }

    fn physical_function(&self, address: Sbdf) -> Result<HostFunction, Failure> {
        let function = known_pf(self.platform.host.as_ref(), address)?;
        if self.vfs.is_changing(address) || self.functions.is_busy(address) {
            return Err(Failure::refused(format!("{address} is being changed right now"))
                .on(address)
                .hint("try again"));
        }
        Ok(function)
    }

    /// Refuses a PF without its driver, which enables the VFs, because it is held or a guest has it.
    fn refuse_held_pf(&self, address: Sbdf) -> Result<(), Failure> {
        let record = self.functions.records().get_or_new(address);
        if record.state == FunctionState::Host {
            return Ok(());
        }
        let text = format!(
            "cannot enable VFs of {address}: it is {}, so that no driver of dom0 has it",
            record.state
        );
        Err(Failure::refused(text)
            .on(address)
            .hint(format!("'xpci pci-assignable-remove {address}' returns it to its driver")))
    }

    /// Refuses while a VF is held or attached, because the kernel would remove it.
    fn none_in_use(&self, pf: &HostFunction) -> Result<(), Failure> {
        let used = |address: &&Sbdf| self.functions.records().state(**address) != FunctionState::Host;
        let users: Vec<String> =
            pf.virtual_functions.iter().filter(used).map(|vf| self.describe_user(*vf)).collect();
        if users.is_empty() {
            return Ok(());
        }
        Err(Failure::refused(format!("VFs of {} are in use: {}", pf.address, users.join(", ")))
            .on(pf.address)
            .hint("detach them with 'xpci pci-detach', then 'xpci pci-assignable-remove'"))
    }

    fn describe_user(&self, vf: Sbdf) -> String {
        let record = self.functions.records().get_or_new(vf);
        match record.guest {
            Some(guest) => format!("{vf} ({}, domain {})", record.state, guest.domain),
            None => format!("{vf} ({})", record.state),
        }
    }

    fn change_vfs(
        &mut self,
        address: Sbdf,
        reply: Reply,
        checked: Result<(), Failure>,
        change: impl FnOnce(&TaskContext, &dyn Fn(&str)) -> Result<Success, Failure> + Send + 'static,
    ) {
        if let Err(failure) = checked {
            return reply.done(Err(failure));
        }
        self.vfs.changing.insert(address);
        self.inventory.touch(address);
        let context = self.task_context();
        let inbox = self.inbox.clone();
        let progress = reply.clone();
        let work = move || change(&context, &|text| progress.progress(text));
        self.inbox.background(&format!("vfs {address}"), work, move |outcome| {
            let succeeded = matches!(&outcome, Ok(Ok(_)));
            inbox.send(EngineEvent::Vfs(Event::Changed(address, succeeded)));
            reply.done(outcome.and_then(|outcome| outcome).map_err(|failure| failure.on(address)));
        });
    }
}
