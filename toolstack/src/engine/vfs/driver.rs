//! What the driver of a PF does with its VFs, on threads of their own: all or none come up, and all go.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use pciback::Sbdf;
use pciback::config::Unroutable;

use crate::engine;
use crate::engine::problems::Problem;
use crate::engine::tasks::TaskContext;
use crate::outcome::{ErrorCode, Failure};
use crate::protocol::{Cause, Success};
use crate::spec::vf_routing;
use crate::transaction::{PF_STUB, prepare_networks};

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
pub(super) fn create(
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
        Err(failure) => Err(none_left(context, address, failure)),
    }
}

/// Creates VFs for the guest that has the PF, all or none.
pub(super) fn create_bare(context: &TaskContext, address: Sbdf, count: u16) -> Result<(), Failure> {
    context.room_for(address, count)?;
    let (host, limit) = (&context.platform.host, context.settings.driver_limit());
    host.set_vf_autoprobe(address, false)?;
    let created = host.set_num_vfs(address, count, limit).map_err(Failure::from);
    let created = created.and_then(|()| all_known(context, address, count, limit));
    created.map(drop).map_err(|failure| none_left(context, address, failure))
}

/// Removes the VFs of a PF, which did not all come up. Returns why, with what went wrong with that.
fn none_left(context: &TaskContext, address: Sbdf, failure: Failure) -> Failure {
    match context.platform.host.set_num_vfs(address, 0, context.settings.driver_limit()) {
        Ok(()) => failure,
        Err(error) if error.errno() == Some(Errno::ENOENT) => failure,
        Err(error) => {
            let message = format!("{}; and then: {error}", failure.message);
            // Reported as a problem as well, because the VFs stay until an administrator disables them.
            let problem = format!("{address} has VFs that did not all come up: {message}");
            let problem = Problem::new(Cause::VirtualFunctions, problem).on(address);
            context.inbox.send(engine::Event::Problem(problem));
            Failure { code: ErrorCode::Failed, message, ..failure }
        }
    }
}

/// Waits until sysfs shows all VFs and Xen knows each of them.
fn all_known(context: &TaskContext, pf: Sbdf, count: u16, limit: Duration) -> Result<Vec<Sbdf>, Failure> {
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
pub(super) fn disable(context: &TaskContext, address: Sbdf) -> Result<(), Failure> {
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

pub(super) fn destroy(
    context: &TaskContext,
    address: Sbdf,
    progress: &dyn Fn(&str),
) -> Result<Success, Failure> {
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
