//! Steps of an attachment, up to the point where the function is served: MSI-X table, owner in Xen, image.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use log::warn;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use pciback::config::{AnyId, CapabilityList, FunctionImage, FunctionSpec};
use pciback::live;
use pciback::platform::{PlatformError, Resource, Revoked};
use pciback::policy::{RdmPolicy, Subject};
use pciback::spec::{CapabilityId, legacy};
use pciback::{DomId, Sbdf};

use super::hold::joined;
use super::reset::config_failure;
use super::{Context, guest_of};
use crate::domains::{self, DomainType};
use crate::journal::Record;
use crate::outcome::{ErrorCode, Failure};
use crate::spec::SpecExt;

pub(super) fn prepare_msix(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    let host = context.platform.host.as_ref();
    let config = host.config(record.address)?;
    let spec = crate::spec::function_spec(host, record.address)?;
    if !spec.has_msix() || !table_is_placed(&spec) {
        return Ok(());
    }
    // With a hidden (malformed) MSI-X capability Xen would guard a page that is no table but other device registers.
    let filter = context.serving.filter(&spec, guest_of(record)?)?;
    let msix = AnyId::Legacy(CapabilityId::MSI_X);
    if !filter.capabilities().iter().any(|(capability, seen)| capability.id == msix && *seen) {
        return Ok(());
    }
    // Xen finds the table through the BAR, so memory decoding must be enabled.
    let decodes = live::decode_memory(config.as_ref());
    // Memory Space Enable of a VF is hardwired to 0, its PF's VF MSE applies instead; Xen's answer shows whether the table is reachable.
    let _hardwired =
        decodes.map_err(|error| config_failure("enable memory space of", record.address, &error))?;
    // Written to the journal first: without a record, the table would stay prepared.
    record.msix_prepared = true;
    context.write(record)?;
    let prepared = context.platform.hypervisor.prepare_msix(record.address);
    record.msix_prepared = matches!(prepared, Ok(true));
    prepared?;
    Ok(())
}

/// Whether the BAR with the MSI-X table has an address; otherwise Xen would guard the page at address 0.
fn table_is_placed(spec: &FunctionSpec) -> bool {
    let list = CapabilityList::walk(&spec.bytes);
    let table = list.legacy(CapabilityId::MSI_X).and_then(|msix| {
        let at = usize::from(msix.offset + legacy::MSIX_TABLE);
        spec.bytes.get(at).map(|low| low & legacy::MSIX_BAR)
    });
    table.is_some_and(|bar| spec.resources.get(usize::from(bar)).is_some_and(Resource::is_placed))
}

pub(super) fn release_msix(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    if record.msix_prepared && context.left_the_host(record) {
        // Xen released the guarded table when the function was removed.
        record.msix_prepared = false;
    }
    if record.msix_prepared {
        let hypervisor = &context.platform.hypervisor;
        let released = match hypervisor.release_msix(record.address) {
            // Either an entry is still mapped, or the service was killed after it wrote the journal and before the hypercall. Only in the
            // second case can the table be prepared, and then released.
            Err(error)
                if error.errno() == Some(Errno::EBUSY)
                    && matches!(hypervisor.prepare_msix(record.address), Ok(true)) =>
            {
                hypervisor.release_msix(record.address)
            }
            other => other,
        };
        Revoked::MsixGuard.outcome(released)?;
        record.msix_prepared = false;
    }
    Ok(())
}

pub(super) fn assign(context: &Context<'_>, record: &mut Record) -> Result<Option<String>, Failure> {
    let domain = guest_of(record)?;
    (context.progress)(&format!("assigning {} to domain {domain}", record.address));
    let relaxed = assign_in_xen(context, domain, record.address)?;
    let privilege = domains::privilege(context.platform.store.as_ref(), domain)?;
    let privileged = privilege.map(|why| {
        format!(
            "domain {domain} is privileged: it {why}; what {} lets it do affects other domains",
            record.address
        )
    });
    Ok(joined(relaxed.into_iter().chain(privileged)))
}

/// Assigns the function with strict RDM policy first, so that Xen's answer shows whether it objects to the reserved memory. If the
/// policies say `relaxed`, the assignment is repeated with that, and a warning describes the consequence.
fn assign_in_xen(context: &Context<'_>, domain: DomId, address: Sbdf) -> Result<Option<String>, Failure> {
    let hypervisor = &context.platform.hypervisor;
    let Err(error) = hypervisor.assign(domain, address, RdmPolicy::Strict) else { return Ok(None) };
    let Some(objection) = objection(context, &error, address) else {
        return Err(refusal(error, domain, address));
    };
    let function = context.platform.host.function(address)?;
    let name = domains::name(context.platform.store.as_ref(), domain)?;
    if context.policies.merge(&Subject::of_host(&function, name)).rdm == RdmPolicy::Strict {
        let text = format!(
            "assign {address} to domain {domain}: {objection}, and its policy says 'rdm-policy: strict'"
        );
        return Err(Failure::refused(text).on(address).of(domain).hint("'xl dmesg' names the memory"));
    }
    hypervisor.assign(domain, address, RdmPolicy::Relaxed).map_err(|error| {
        Failure::from(error).on(address).of(domain).hint(format!("{objection}; see 'xl dmesg'"))
    })?;
    let warning = format!(
        "{address}: {objection}; domain {domain} gets it anyway, because 'rdm-policy' is relaxed (see 'xl dmesg')"
    );
    warn!("{warning}");
    Ok(Some(warning))
}

/// Xen's objection to the function's reserved memory, if that is why it refused.
fn objection(context: &Context<'_>, error: &PlatformError, address: Sbdf) -> Option<&'static str> {
    match error.errno()? {
        Errno::EPERM => Some(
            "other functions have the same reserved memory (RMRR), so that the guest and those functions can disturb each other",
        ),
        // Xen answers EBUSY for a function that another domain owns as well.
        Errno::EBUSY if matches!(context.platform.hypervisor.assignable(address), Ok(true)) => Some(
            "the guest has memory where the function's reserved memory (RMRR) is, so that what the device does there fails or \
             damages the guest",
        ),
        _ => None,
    }
}

fn refusal(error: PlatformError, domain: DomId, address: Sbdf) -> Failure {
    let errno = error.errno();
    let failure = Failure::from(error).on(address).of(domain);
    match errno {
        Some(Errno::EINVAL | Errno::ENODEV | Errno::EXDEV | Errno::EOPNOTSUPP) => {
            Failure { code: ErrorCode::Refused, ..failure }.hint(
                "the domain was probably created without passthrough: put passthrough=\"enabled\" into its xl.cfg and \
                 create it again",
            )
        }
        Some(Errno::EBUSY) => failure.hint("another domain owns it; see 'xl pci-list'"),
        _ => failure,
    }
}

pub(super) fn deassign(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    let domain = guest_of(record)?;
    if context.left_the_host(record) && !may_be_guest_owned(context, record) {
        return Ok(());
    }
    match context.platform.hypervisor.deassign(domain, record.address) {
        Ok(()) => Ok(()),
        // When a domain ends, Xen assigns its functions to the quarantine domain; a domain without passthrough never owned the function.
        Err(error) if is_unowned(context, &error, record.address) => Ok(()),
        Err(error) => Err(Failure::from(error).on(record.address).of(domain)),
    }
}

/// Whether Xen may still have a guest as the owner of a function that left the host: the kernel may not have reported the removal yet.
fn may_be_guest_owned(context: &Context<'_>, record: &Record) -> bool {
    let hypervisor = &context.platform.hypervisor;
    hypervisor.device_known(record.address).unwrap_or(true)
        && !hypervisor.assignable(record.address).unwrap_or(false)
}

fn is_unowned(context: &Context<'_>, error: &PlatformError, address: Sbdf) -> bool {
    let hypervisor = &context.platform.hypervisor;
    matches!(error.errno(), Some(Errno::EINVAL | Errno::ENODEV | Errno::ESRCH | Errno::EOPNOTSUPP))
        && (hypervisor.assignable(address).unwrap_or(false)
            || !hypervisor.device_known(address).unwrap_or(true))
}

/// The path of a function's image.
pub fn image_path(run_directory: &Path, address: Sbdf) -> PathBuf {
    run_directory.join("images").join(address.to_string())
}

/// The path of the file of a function's mailbox.
pub fn mailbox_path(run_directory: &Path, address: Sbdf) -> PathBuf {
    run_directory.join("mailboxes").join(address.to_string())
}

pub(super) fn create_image(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    let path = image_path(&context.settings.run_directory, record.address);
    let kind = domains::kind(context.platform.store.as_ref(), guest_of(record)?)?;
    let bytes = match kind {
        DomainType::Hvm => FunctionImage::HVM_BYTES,
        _ => FunctionImage::BYTES,
    };
    let create = || -> io::Result<()> {
        // A file left by an earlier failed attempt must not be reused.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let file: File =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        // Allocated now: with a full file system, a later write to the mapping would raise SIGBUS.
        fallocate(&file, FallocateFlags::empty(), 0, bytes as i64)?;
        Ok(())
    };
    create().map_err(|error| {
        Failure::new(
            ErrorCode::Failed,
            format!("cannot create the image {} of {}: {error}", path.display(), record.address),
        )
        .on(record.address)
    })
}

pub(super) fn remove_image(context: &Context<'_>, record: &mut Record) -> Result<(), Failure> {
    let directory = &context.settings.run_directory;
    for path in [mailbox_path(directory, record.address), image_path(directory, record.address)] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let text =
                    format!("cannot remove the image {} of {}: {error}", path.display(), record.address);
                return Err(Failure::new(ErrorCode::Failed, text));
            }
            _ => {}
        }
    }
    Ok(())
}
