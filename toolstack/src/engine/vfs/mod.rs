//! Enabling and disabling VFs of PFs.

mod by_guest;
mod network;
mod unmanaged;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use pciback::config::Unroutable;
use pciback::platform::HostFunction;
use pciback::{FunctionState, Sbdf};

use self::by_guest::GuestVfs;
use self::network::NetworkChecks;
use super::problems::Problem;
use super::requests::{all_pfs, known_pf};
use super::tasks::TaskContext;
use super::{Engine, Event as EngineEvent};
use crate::journal::NetworkRecord;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Cause, Success};
use crate::reply::Reply;
use crate::spec::vf_routing;
use crate::transaction::{PF_STUB, prepare_networks};

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

impl TaskContext {
    /// Whether a PF can have this many VFs: by its TotalVFs, by the limit of functions in the settings, and by the bus numbers and ARI
    /// above it.
    pub(super) fn room_for(&self, address: Sbdf, count: u16) -> Result<(), Failure> {
        let pf = self.platform.host.function(address)?;
        if count == 0 || count > pf.total_vfs {
            let text = format!("{address} can have 1 to {} VFs, not {count}", pf.total_vfs);
            return Err(Failure::refused(text).on(address));
        }
        let limit = self.settings.function_limit;
        let others = self.platform.host.functions()?.len() - pf.virtual_functions.len();
        if others + usize::from(count) > limit as usize {
            let text = format!(
                "{count} VFs of {address} would make {} functions, more than function-limit allows, {limit}",
                others + usize::from(count)
            );
            return Err(Failure::refused(text)
                .on(address)
                .hint("raise 'function-limit' in xpcid.yaml if Xen has the memory"));
        }
        self.reachable(address, count).map_err(|failure| failure.on(address))
    }

    /// Whether the VFs' routing IDs are reachable, from the current registers of the PF and the port above it.
    fn reachable(&self, address: Sbdf, count: u16) -> Result<(), Failure> {
        vf_routing(self.platform.host.as_ref(), address, count)?.map_err(|why| {
            let failure = Failure::refused(why.to_string());
            match why {
                Unroutable::Buses { .. } => failure.hint(
                    "enable fewer VFs; or have more buses reserved below that bridge, by the firmware's settings or the kernel's \
                     'pci=assign-busses'",
                ),
                Unroutable::Ari { .. } => failure.hint("enable ARI in the firmware's settings, or use another slot"),
                Unroutable::NoAddresses { .. } | Unroutable::Segment { .. } => {
                    failure.hint("its SR-IOV capability says so; see 'lspci -vv'")
                }
            }
        })
    }
}

/// Enables VFs, all or none: if some do not appear, all are disabled again.
fn create(
    context: &TaskContext,
    address: Sbdf,
    count: u16,
    unmanaged: bool,
    progress: &dyn Fn(&str),
) -> Result<Success, Failure> {
    if unmanaged {
        progress(&format!("binding {address} to {PF_STUB}"));
        context.give_to_stub(&context.platform.host.function(address)?)?;
    }
    enable(context, address, count, progress).map_err(|failure| match context.take_from_stub(address) {
        Ok(_) => failure,
        Err(second) => {
            Failure { message: format!("{}; and then: {}", failure.message, second.message), ..failure }
        }
    })
}

fn enable(
    context: &TaskContext,
    address: Sbdf,
    count: u16,
    progress: &dyn Fn(&str),
) -> Result<Success, Failure> {
    let (host, limit) = (&context.platform.host, context.settings.driver_limit());
    let probed = host.set_vf_autoprobe(address, false)?;
    progress(&format!("enabling {count} VFs of {address}"));
    let enabled = host.set_num_vfs(address, count, limit);
    // Restored at once: while it is off, dom0's drivers do not bind to VFs that others enable, either.
    let put_back = host.set_vf_autoprobe(address, probed);
    // VFs answer config accesses 100 ms after VF Enable was set (PCI Express 6.0, section 9.3.3.3.1). The kernel waits that long, within
    // the write to sysfs, before it scans for them.
    let came_up = enabled.and(put_back).map_err(Failure::from);
    let came_up = came_up.and_then(|_| all_known(context, address, count, limit)).and_then(|vfs| {
        prepare_networks(
            &context.platform,
            (&context.settings, &context.files.persistent_settings),
            address,
            &vfs,
        )?;
        Ok(vfs)
    });
    match came_up {
        Ok(vfs) => {
            let names: Vec<String> = vfs.iter().map(ToString::to_string).collect();
            let functions =
                vfs.iter().map(|vf| context.view_of(&crate::journal::Record::new(*vf, ""))).collect();
            let message = format!("{address} has {count} VFs: {}", names.join(" "));
            Ok(Success::Changed { message, warnings: Vec::new(), functions })
        }
        Err(failure) => match host.set_num_vfs(address, 0, limit) {
            Ok(()) => Err(failure),
            Err(error) if error.errno() == Some(Errno::ENOENT) => Err(failure),
            Err(error) => {
                let message = format!("{}; and then: {error}", failure.message);
                // Reported as a problem as well, because the VFs stay until an administrator disables them.
                let problem = format!("{address} has VFs that did not all come up: {message}");
                let problem = Problem::new(Cause::VirtualFunctions, problem).on(address);
                context.inbox.send(EngineEvent::Problem(problem));
                Err(Failure { message, ..failure })
            }
        },
    }
}

/// Waits until sysfs shows all VFs and Xen knows each of them.
pub(super) fn all_known(
    context: &TaskContext,
    pf: Sbdf,
    count: u16,
    limit: Duration,
) -> Result<Vec<Sbdf>, Failure> {
    let platform = &context.platform;
    let deadline = Instant::now() + limit;
    loop {
        let seen = context.changes.count();
        let vfs = platform.host.function(pf)?.virtual_functions;
        let mut unknown = None;
        for vf in &vfs {
            if !platform.hypervisor.device_known(*vf)? {
                unknown = Some(*vf);
                break;
            }
        }
        let missing = match unknown {
            Some(vf) => format!("Xen does not know {vf}"),
            None if vfs.len() < usize::from(count) => format!("{} of {count} VFs appeared", vfs.len()),
            None => return Ok(vfs),
        };
        if Instant::now() >= deadline {
            let failure = Failure::new(ErrorCode::Failed, format!("enable {count} VFs of {pf}: {missing}"));
            return Err(failure.hint("see dom0's kernel log and 'xl dmesg'"));
        }
        // The kernel reports a function to Xen before it sends the event, so a missing one comes with an event.
        context.changes.wait(seen, deadline);
    }
}

/// Has the driver of a PF remove its VFs, and makes sure that none is left.
fn disable(context: &TaskContext, address: Sbdf) -> Result<(), Failure> {
    let host = &context.platform.host;
    host.set_num_vfs(address, 0, context.settings.driver_limit())?;
    let after = host.function(address)?.num_vfs;
    if after == 0 {
        return Ok(());
    }
    let failure =
        Failure::new(ErrorCode::Failed, format!("disable the VFs of {address}: {after} are still there"));
    Err(failure
        .hint("the PF's driver refused, see dom0's kernel log: it counts a VF held by xen-pciback as in use"))
}

fn destroy(context: &TaskContext, address: Sbdf, progress: &dyn Fn(&str)) -> Result<Success, Failure> {
    let host = &context.platform.host;
    let before = host.function(address)?.num_vfs;
    if before == 0 {
        if context.take_from_stub(address)? {
            let message = format!("{address} has no VFs enabled; it was taken from {PF_STUB}");
            return Ok(Success::Changed { message, warnings: Vec::new(), functions: Vec::new() });
        }
        return Ok(Success::Already { message: format!("{address} has no VFs enabled") });
    }
    progress(&format!("disabling {before} VFs of {address}"));
    disable(context, address)?;
    context.take_from_stub(address)?;
    let message = format!("{address} has no VFs now");
    Ok(Success::Changed { message, warnings: Vec::new(), functions: Vec::new() })
}
