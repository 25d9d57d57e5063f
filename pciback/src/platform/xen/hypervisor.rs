//! Device assignment, permissions and interrupts through libxenctrl and libxencall.
//!
//! All functions of libxenctrl used here answer 0, or -1 with `errno`. Both libraries may be used from several threads:
//! without the `NON_REENTRANT` flag they lock their cache of hypercall buffers, and their last error is per thread.

use std::process::Command;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use super::bindings::{
    __HYPERVISOR_physdev_op, Libraries, PHYSDEVOP_map_pirq, PHYSDEVOP_pci_device_add,
    PHYSDEVOP_pci_device_remove, PHYSDEVOP_prepare_msix, PHYSDEVOP_release_msix, PHYSDEVOP_restore_msi_ext,
    XEN_DOMCTL_DEV_RDM_RELAXED, XEN_DOMINF_dying, XEN_DOMINF_hap, XEN_DOMINF_hvm_guest, XEN_DOMINF_paused,
    XEN_DOMINF_shutdown, XEN_DOMINF_shutdownmask, XEN_DOMINF_shutdownshift, XEN_INVALID_DEV, XENVER_version,
    physdev_pci_device, xc_domaininfo_t, xc_interface,
};
use super::msix::has_msix;
use super::physdev::{DeviceAdd, DeviceReset, NOTE_RESET, OptionalCommand, PhysDev, map_msi};
use crate::platform::hypervisor::{DeviceReport, ResetReach};
use crate::platform::linux::programs;
use crate::platform::{Cause, DomainInfo, Edit, Host, Hypervisor, MsiSource, Pirq, PlatformError, Result};
use crate::policy::RdmPolicy;
use crate::{DomId, Sbdf, Uuid};

/// `DOMID_INVALID` of `xen.h`: asks whether a function could be assigned to any domain.
const DOMID_INVALID: u32 = 0x7ff4;

/// `SHUTDOWN_suspend` of `sched.h`.
const SHUTDOWN_SUSPEND: u32 = 2;

/// How long the toolstack may take to destroy a domain.
const DESTROY_LIMIT: Duration = Duration::from_secs(30);

/// The running hypervisor.
pub struct XenHypervisor {
    physdev: PhysDev,
    resets: OptionalCommand,
    handle: NonNull<xc_interface>,
    libraries: Arc<Libraries>,
    version: (u32, u32),
    host: Arc<dyn Host>,
}

// SAFETY: libxenctrl's handle is not bound to a thread.
unsafe impl Send for XenHypervisor {}
// SAFETY: libxenctrl is reentrant unless told otherwise when it is opened.
unsafe impl Sync for XenHypervisor {}

/// The answer of a function that returns 0, or -1 with `errno`.
pub(super) fn check(answer: i32) -> std::result::Result<i32, Errno> {
    if answer < 0 { Err(Errno::last()) } else { Ok(answer) }
}

impl XenHypervisor {
    /// Opens the hypercall interface. `host` shows whether a function has MSI-X.
    pub fn open(libraries: &Arc<Libraries>, host: Arc<dyn Host>) -> Result<Self> {
        let physdev = PhysDev::open(libraries)?;
        // SAFETY: the logger is a static, and 0 are valid flags.
        let opened = unsafe { libraries.ctrl.xc_interface_open(libraries.logger, libraries.logger, 0) };
        let handle = NonNull::new(opened)
            .ok_or_else(|| PlatformError::new("open", "Xen's control interface", Errno::last()))?;
        let mut xen = Self {
            physdev,
            resets: OptionalCommand::default(),
            handle,
            libraries: Arc::clone(libraries),
            version: (0, 0),
            host,
        };
        // SAFETY: the handle is open, and this command takes no argument.
        let answer =
            unsafe { libraries.ctrl.xc_version(xen.handle(), XENVER_version as i32, ptr::null_mut()) };
        let packed =
            check(answer).map_err(|errno| PlatformError::new("read the version of", "Xen", errno))?;
        xen.version = (packed as u32 >> 16, packed as u32 & 0xffff);
        Ok(xen)
    }

    fn handle(&self) -> *mut xc_interface {
        self.handle.as_ptr()
    }

    /// A call about the function's MSI-X table. Without that capability Xen 4.17 panics; an unknown function it refuses.
    fn msix(&self, command: u32, address: Sbdf) -> std::result::Result<(), Cause> {
        match self.host.config(address) {
            Ok(config) if !has_msix(config.as_ref()) => Err(Errno::EINVAL.into()),
            Err(PlatformError { cause, .. }) if !matches!(cause, Cause::Missing) => Err(cause),
            _ => Ok(self.physdev.call(command, device(address))?),
        }
    }

    fn irq_permission(&self, domain: DomId, gsi: u32, edit: Edit) -> std::result::Result<i32, Errno> {
        // SAFETY: the handle is open; the other arguments are numbers.
        check(unsafe {
            self.libraries.ctrl.xc_domain_irq_permission(
                self.handle(),
                u32::from(domain.0),
                gsi,
                edit == Edit::Add,
            )
        })
    }

    fn unmap(&self, domain: DomId, pirq: Pirq) -> std::result::Result<i32, Errno> {
        let Ok(number) = i32::try_from(pirq.0) else { return Err(Errno::EINVAL) };
        // SAFETY: the handle is open; the other arguments are numbers.
        check(unsafe {
            self.libraries.ctrl.xc_physdev_unmap_pirq(self.handle(), u32::from(domain.0), number)
        })
    }
}

impl Drop for XenHypervisor {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nothing uses it any more.
        let answer = unsafe { self.libraries.ctrl.xc_interface_close(self.handle()) };
        if let Err(errno) = check(answer) {
            log::error!("close Xen's control interface: {errno}");
        }
    }
}

fn device(address: Sbdf) -> physdev_pci_device {
    physdev_pci_device { seg: address.segment(), bus: address.bus(), devfn: address.devfn().0 }
}

impl Hypervisor for XenHypervisor {
    fn version(&self) -> (u32, u32) {
        self.version
    }

    fn device_known(&self, address: Sbdf) -> Result<bool> {
        let (mut devices, mut nodes) = ([device(address)], [0u32]);
        // SAFETY: the handle is open, and both arrays have the one element that is announced.
        let answer = unsafe {
            self.libraries.ctrl.xc_pcitopoinfo(self.handle(), 1, devices.as_mut_ptr(), nodes.as_mut_ptr())
        };
        check(answer).map_err(|errno| PlatformError::new("look up", format!("{address} in Xen"), errno))?;
        Ok(nodes[0] != XEN_INVALID_DEV as u32)
    }

    fn device_add(&self, address: Sbdf, report: DeviceReport) -> Result<()> {
        let error = |errno| PlatformError::new("report", format!("{address} to Xen"), errno);
        // Xen 4.17 would take the PF for known as well, without setting it up, and panic when either is withdrawn.
        if let Some(physical) = report.physical_function
            && !self.device_known(physical)?
        {
            return Err(error(Errno::ENODEV));
        }
        self.physdev.call(PHYSDEVOP_pci_device_add, DeviceAdd::new(address, report)).map_err(error)
    }

    fn device_remove(&self, address: Sbdf) -> Result<()> {
        self.physdev
            .call(PHYSDEVOP_pci_device_remove, device(address))
            .map_err(|errno| PlatformError::new("withdraw", format!("{address} from Xen"), errno))
    }

    fn assign(&self, domain: DomId, address: Sbdf, rdm: RdmPolicy) -> Result<()> {
        let flags = match rdm {
            RdmPolicy::Strict => 0,
            RdmPolicy::Relaxed => XEN_DOMCTL_DEV_RDM_RELAXED,
        };
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.ctrl.xc_assign_device(self.handle(), u32::from(domain.0), address.packed(), flags)
        };
        check(answer)
            .map(drop)
            .map_err(|errno| PlatformError::new("assign", format!("{address} to domain {domain}"), errno))
    }

    fn deassign(&self, domain: DomId, address: Sbdf) -> Result<()> {
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.ctrl.xc_deassign_device(self.handle(), u32::from(domain.0), address.packed())
        };
        check(answer)
            .map(drop)
            .map_err(|errno| PlatformError::new("deassign", format!("{address} from domain {domain}"), errno))
    }

    fn assignable(&self, address: Sbdf) -> Result<bool> {
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.ctrl.xc_test_assign_device(self.handle(), DOMID_INVALID, address.packed())
        };
        match check(answer) {
            Ok(_) => Ok(true),
            // Xen's one answer for "assigned to a guest" and "unknown".
            Err(Errno::EINVAL) => Ok(false),
            Err(errno) => Err(PlatformError::new("test the assignment of", address, errno)),
        }
    }

    fn prepare_msix(&self, address: Sbdf) -> Result<bool> {
        match self.msix(PHYSDEVOP_prepare_msix, address) {
            Ok(()) => Ok(true),
            Err(Cause::Os(Errno::EBUSY)) => Ok(false),
            Err(cause) => Err(PlatformError::new("prepare the MSI-X table of", address, cause)),
        }
    }

    fn release_msix(&self, address: Sbdf) -> Result<()> {
        self.msix(PHYSDEVOP_release_msix, address)
            .map_err(|cause| PlatformError::new("release the MSI-X table of", address, cause))
    }

    fn restore_msi(&self, address: Sbdf) -> Result<()> {
        self.physdev
            .call(PHYSDEVOP_restore_msi_ext, device(address))
            .map_err(|errno| PlatformError::new("restore the interrupts of", address, errno))
    }

    fn note_reset(&self, address: Sbdf, reach: ResetReach) -> Result<bool> {
        let noted = self.resets.ask(|| self.physdev.call(NOTE_RESET, DeviceReset::new(address, reach)));
        noted.map_err(|errno| PlatformError::new("tell Xen of the reset of", address, errno))
    }

    fn iomem_permission(&self, domain: DomId, first: u64, frames: u64, edit: Edit) -> Result<()> {
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.ctrl.xc_domain_iomem_permission(
                self.handle(),
                u32::from(domain.0),
                first,
                frames,
                edit.is_add().into(),
            )
        };
        check(answer).map(drop).map_err(|errno| {
            PlatformError::new(
                edit.verb("allow", "forbid"),
                format!("domain {domain} the {frames} page frames from {first:#x} on"),
                errno,
            )
        })
    }

    fn ioport_permission(&self, domain: DomId, first: u32, count: u32, edit: Edit) -> Result<()> {
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.ctrl.xc_domain_ioport_permission(
                self.handle(),
                u32::from(domain.0),
                first,
                count,
                edit.is_add().into(),
            )
        };
        check(answer).map(drop).map_err(|errno| {
            PlatformError::new(
                edit.verb("allow", "forbid"),
                format!("domain {domain} the {count} I/O ports from {first:#x} on"),
                errno,
            )
        })
    }

    fn map_msi(&self, domain: DomId, address: Sbdf, source: MsiSource) -> Result<Pirq> {
        let subject = || format!("{source} of {address} to domain {domain}");
        // Not by libxenctrl: before Xen 4.20.2 it leaves out the segment, and Xen takes the function of segment 0.
        let mapped = self
            .physdev
            .ask(__HYPERVISOR_physdev_op, PHYSDEVOP_map_pirq, map_msi(domain, address, source, -1))
            .map_err(|errno| PlatformError::new("map", subject(), errno))?;
        u32::try_from(mapped.pirq).map(Pirq).map_err(|_| PlatformError::new("map", subject(), Errno::ERANGE))
    }

    fn map_msi_as(&self, domain: DomId, address: Sbdf, source: MsiSource, pirq: Pirq) -> Result<()> {
        let error = |errno| {
            let subject = format!("{source} of {address} to interrupt {} of domain {domain}", pirq.0);
            PlatformError::new("map", subject, errno)
        };
        let number = i32::try_from(pirq.0).map_err(|_| error(Errno::EINVAL))?;
        let wanted = map_msi(domain, address, source, number);
        let mapped = self.physdev.ask(__HYPERVISOR_physdev_op, PHYSDEVOP_map_pirq, wanted).map_err(error)?;
        if mapped.pirq == number { Ok(()) } else { Err(error(Errno::EEXIST)) }
    }

    fn map_gsi(&self, domain: DomId, gsi: u32) -> Result<Pirq> {
        let error =
            |errno| PlatformError::new("map", format!("interrupt line {gsi} to domain {domain}"), errno);
        let index = i32::try_from(gsi).map_err(|_| error(Errno::EINVAL))?;
        let mut pirq = index;
        // SAFETY: the handle is open, and `pirq` is valid during the call.
        check(unsafe {
            self.libraries.ctrl.xc_physdev_map_pirq(self.handle(), u32::from(domain.0), index, &raw mut pirq)
        })
        .map_err(error)?;
        let pirq = Pirq(u32::try_from(pirq).map_err(|_| error(Errno::ERANGE))?);
        // The permission names the line by dom0's number for it, which for a line is the GSI.
        if let Err(errno) = self.irq_permission(domain, gsi, Edit::Add) {
            if let Err(second) = self.unmap(domain, pirq) {
                log::error!("undo mapping interrupt line {gsi} to domain {domain}: {second}");
            }
            return Err(PlatformError::new(
                "allow",
                format!("domain {domain} the interrupt line {gsi}"),
                errno,
            ));
        }
        Ok(pirq)
    }

    fn unmap_gsi(&self, domain: DomId, gsi: u32, pirq: Pirq) -> Result<()> {
        // Both are tried, so that a failure leaves as little behind as possible.
        let forbidden = self.irq_permission(domain, gsi, Edit::Remove);
        let unmapped = self.unmap(domain, pirq);
        if let (Err(_), Err(second)) = (&forbidden, &unmapped) {
            log::error!("unmap interrupt {} from domain {domain}: {second}", pirq.0);
        }
        forbidden.map_err(|errno| {
            PlatformError::new("forbid", format!("domain {domain} the interrupt line {gsi}"), errno)
        })?;
        unmapped.map(drop).map_err(|errno| {
            PlatformError::new("unmap", format!("interrupt {} from domain {domain}", pirq.0), errno)
        })
    }

    fn unmap_pirq(&self, domain: DomId, pirq: Pirq) -> Result<()> {
        self.unmap(domain, pirq).map(drop).map_err(|errno| {
            PlatformError::new("unmap", format!("interrupt {} from domain {domain}", pirq.0), errno)
        })
    }

    fn domain(&self, domain: DomId) -> Result<DomainInfo> {
        let error = |errno: Errno| PlatformError::new("look at", format!("domain {domain}"), errno);
        // The structure grows with Xen's versions; what is read here lies at its beginning, and there is room for the rest.
        let mut infos = [const { std::mem::MaybeUninit::<xc_domaininfo_t>::zeroed() }; 4];
        // SAFETY: the handle is open, and there is room for one structure of any version.
        let answer = unsafe {
            self.libraries.ctrl.xc_domain_getinfolist(
                self.handle(),
                u32::from(domain.0),
                1,
                infos.as_mut_ptr().cast(),
            )
        };
        let count = check(answer).map_err(error)?;
        // SAFETY: all bytes were zeroed, and all bit patterns are valid.
        let info = unsafe { infos[0].assume_init_ref() };
        // Xen answers with the next domain where this one does not exist.
        if count != 1 || info.domain != domain.0 {
            return Err(error(Errno::ESRCH));
        }
        Ok(DomainInfo {
            uuid: Uuid(info.handle),
            paused: info.flags & XEN_DOMINF_paused != 0,
            dying: info.flags & XEN_DOMINF_dying != 0,
            suspended: info.flags & XEN_DOMINF_shutdown != 0
                && info.flags >> XEN_DOMINF_shutdownshift & XEN_DOMINF_shutdownmask == SHUTDOWN_SUSPEND,
            has_run: info.cpu_time != 0,
            shadow_paging: info.flags & XEN_DOMINF_hvm_guest != 0 && info.flags & XEN_DOMINF_hap == 0,
        })
    }

    fn pause(&self, domain: DomId) -> Result<()> {
        // SAFETY: the handle is open; the other argument is a number.
        let answer = unsafe { self.libraries.ctrl.xc_domain_pause(self.handle(), u32::from(domain.0)) };
        let paused = check(answer).map(drop);
        paused.map_err(|errno| PlatformError::new("pause", format!("domain {domain}"), errno))
    }

    fn unpause(&self, domain: DomId) -> Result<()> {
        // SAFETY: the handle is open; the other argument is a number.
        let answer = unsafe { self.libraries.ctrl.xc_domain_unpause(self.handle(), u32::from(domain.0)) };
        let unpaused = check(answer).map(drop);
        unpaused.map_err(|errno| PlatformError::new("unpause", format!("domain {domain}"), errno))
    }

    fn destroy(&self, domain: DomId) -> Result<()> {
        // It runs no more from here on, however long the rest takes.
        if let Err(error) = self.pause(domain) {
            log::warn!("{error}");
        }
        // A domain has parts in dom0, its device model, backends and nodes, that only the toolstack which made them takes down.
        let mut command = Command::new("xl");
        let ended = programs::run(command.args(["destroy", &domain.to_string()]), DESTROY_LIMIT);
        let Err(error) = ended else { return Ok(()) };
        log::warn!(
            "domain {domain}: 'xl destroy' failed, Xen destroys it alone and leaves what it has in dom0: {error}"
        );
        // SAFETY: the handle is open; the other argument is a number.
        let answer = unsafe { self.libraries.ctrl.xc_domain_destroy(self.handle(), u32::from(domain.0)) };
        let destroyed = check(answer).map(drop);
        destroyed.map_err(|errno| PlatformError::new("destroy", format!("domain {domain}"), errno))
    }
}
