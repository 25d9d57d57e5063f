//! HVM guests through libxendevicemodel and libxenctrl.

use std::ops::RangeInclusive;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use nix::errno::Errno;

use super::bindings::{
    __HYPERVISOR_hvm_op, HVMOP_get_mem_type, Libraries, ioservid_t, pt_irq_type_PT_IRQ_TYPE_PCI,
    xc_interface, xen_hvm_get_mem_type, xendevicemodel_handle,
};
use super::hypervisor::check;
use super::ioreq::{RequestPage, XenIoreqServer};
use super::physdev::PhysDev;
use crate::platform::{Edit, HvmDomains, IoreqServer, MsiMessage, Pirq, PlatformError, Result, ServerId};
use crate::{Devfn, DeviceNumber, DomId};

/// Servers that a domain can have (`MAX_NR_IOREQ_SERVERS` of Xen).
const SERVERS: u16 = 8;

/// The HVM guests of the running hypervisor.
pub struct XenHvmDomains {
    libraries: Arc<Libraries>,
    control: NonNull<xc_interface>,
    devicemodel: NonNull<xendevicemodel_handle>,
    calls: PhysDev,
}

// SAFETY: neither library's handle is bound to a thread.
unsafe impl Send for XenHvmDomains {}
// SAFETY: both libraries are reentrant: calls are single ioctls, and their caches of buffers are locked.
unsafe impl Sync for XenHvmDomains {}

impl XenHvmDomains {
    /// Opens the interfaces.
    pub fn open(libraries: &Arc<Libraries>) -> Result<Self> {
        // SAFETY: the logger is a static, and 0 are valid flags.
        let opened = unsafe { libraries.ctrl.xc_interface_open(libraries.logger, libraries.logger, 0) };
        let control = NonNull::new(opened)
            .ok_or_else(|| PlatformError::new("open", "Xen's control interface", Errno::last()))?;
        // SAFETY: the logger is a static, and 0 are valid flags.
        let opened = unsafe { libraries.devicemodel.xendevicemodel_open(libraries.logger, 0) };
        let Some(devicemodel) = NonNull::new(opened) else {
            let error = PlatformError::new("open", "Xen's device model interface", Errno::last());
            // SAFETY: the handle is open, and nothing else uses it.
            unsafe { libraries.ctrl.xc_interface_close(control.as_ptr()) };
            return Err(error);
        };
        let calls = PhysDev::open(libraries)?;
        Ok(Self { libraries: Arc::clone(libraries), control, devicemodel, calls })
    }

    fn control(&self) -> *mut xc_interface {
        self.control.as_ptr()
    }

    /// Whether the guest has memory of its own at a page frame.
    fn has_memory(&self, domain: DomId, frame: u64) -> std::result::Result<bool, Errno> {
        let argument = xen_hvm_get_mem_type { domid: domain.0, mem_type: 0, pad: [0; 2], pfn: frame };
        let answer = self.calls.ask(__HYPERVISOR_hvm_op, HVMOP_get_mem_type, argument)?;
        Ok(answer.mem_type != MEMORY_MMIO)
    }

    /// The highest page frame at which the guest has anything.
    fn highest_frame(&self, domain: DomId) -> std::result::Result<u64, Errno> {
        let mut highest = 0;
        // SAFETY: the handle is open, and `highest` is valid during the call.
        let answer = unsafe {
            self.libraries.ctrl.xc_domain_maximum_gpfn(self.control(), u32::from(domain.0), &raw mut highest)
        };
        check(answer).map(|_| highest)
    }

    fn model(&self) -> *mut xendevicemodel_handle {
        self.devicemodel.as_ptr()
    }

    fn claim_range(
        &self,
        domain: DomId,
        server: ServerId,
        kind: i32,
        range: RangeInclusive<u64>,
        edit: Edit,
    ) -> i32 {
        let model = &self.libraries.devicemodel;
        let (handle, (first, last)) = (self.model(), range.into_inner());
        if edit == Edit::Add {
            // SAFETY: the handle is open; the other arguments are numbers.
            unsafe {
                model.xendevicemodel_map_io_range_to_ioreq_server(
                    handle, domain.0, server.0, kind, first, last,
                )
            }
        } else {
            // SAFETY: the handle is open; the other arguments are numbers.
            unsafe {
                model.xendevicemodel_unmap_io_range_from_ioreq_server(
                    handle, domain.0, server.0, kind, first, last,
                )
            }
        }
    }
}

impl Drop for XenHvmDomains {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nothing uses it any more.
        let model = unsafe { self.libraries.devicemodel.xendevicemodel_close(self.model()) };
        // SAFETY: the handle is open, and nothing uses it any more.
        let control = unsafe { self.libraries.ctrl.xc_interface_close(self.control()) };
        for answer in [model, control] {
            if let Err(errno) = check(answer) {
                log::error!("close a control interface: {errno}");
            }
        }
    }
}

fn done(
    answer: i32,
    action: &'static str,
    subject: impl FnOnce() -> String,
) -> std::result::Result<(), PlatformError> {
    check(answer).map(drop).map_err(|errno| PlatformError::new(action, subject(), errno))
}

/// Where Xen delivers a message, in its own packing (`XEN_DOMCTL_VMSI_X86_*`): destination, redirection hint and mode of the
/// address; delivery and trigger mode of the data.
fn delivery(message: MsiMessage) -> u32 {
    let MsiMessage { address, data, .. } = message;
    (address >> 12 & 0xff)
        | (address >> 3 & 1) << 8
        | (address >> 2 & 1) << 9
        | (data >> 8 & 7) << 12
        | (data >> 15 & 1) << 15
}

/// What a range of a server is of.
const PORT_RANGE: i32 = 0;
const MEMORY_RANGE: i32 = 1;
/// `SHUTDOWN_reboot` of `sched.h`.
const SHUTDOWN_REBOOT: u32 = 1;
/// `HVMMEM_mmio_dm`: no memory.
const MEMORY_MMIO: u16 = 2;
/// `XEN_DOMCTL_VMSI_X86_UNMASKED`.
const UNMASKED: u32 = 1 << 16;

fn vector(message: MsiMessage) -> u32 {
    message.data & 0xff
}

impl HvmDomains for XenHvmDomains {
    fn servers(&self, domain: DomId) -> Result<Vec<ServerId>> {
        let mut found = Vec::new();
        for id in 0..SERVERS {
            // SAFETY: the handle is open; null pointers ask for nothing but the answer.
            let answer = unsafe {
                self.libraries.devicemodel.xendevicemodel_get_ioreq_server_info(
                    self.model(),
                    domain.0,
                    id,
                    ptr::null_mut(),
                    ptr::null_mut(),
                    ptr::null_mut(),
                )
            };
            match check(answer) {
                Ok(_) => found.push(ServerId(id)),
                // EPERM: of another domain, for example a stub domain.
                Err(Errno::ENOENT | Errno::EPERM) => {}
                Err(errno) => {
                    return Err(PlatformError::new("list the ioreq servers of domain", domain, errno));
                }
            }
        }
        Ok(found)
    }

    fn create_server(&self, domain: DomId) -> Result<ServerId> {
        let mut id: ioservid_t = 0;
        // SAFETY: the handle is open, and `id` is valid during the call. 0: no page for buffered requests.
        let answer = unsafe {
            self.libraries.devicemodel.xendevicemodel_create_ioreq_server(
                self.model(),
                domain.0,
                0,
                &raw mut id,
            )
        };
        done(answer, "create an ioreq server of domain", || domain.to_string())?;
        Ok(ServerId(id))
    }

    fn destroy_server(&self, domain: DomId, server: ServerId) -> Result<()> {
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.devicemodel.xendevicemodel_destroy_ioreq_server(self.model(), domain.0, server.0)
        };
        done(answer, "end", || format!("ioreq server {} of domain {domain}", server.0))
    }

    fn connect(&self, domain: DomId, server: ServerId) -> Result<Box<dyn IoreqServer>> {
        let page = RequestPage::map(&self.libraries, domain, server)?;
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.devicemodel.xendevicemodel_set_ioreq_server_state(
                self.model(),
                domain.0,
                server.0,
                1,
            )
        };
        done(answer, "enable", || format!("ioreq server {} of domain {domain}", server.0))?;
        Ok(Box::new(XenIoreqServer::open(&self.libraries, domain, page)?))
    }

    fn claim_function(&self, domain: DomId, server: ServerId, function: Devfn, edit: Edit) -> Result<()> {
        let model = &self.libraries.devicemodel;
        let (device, number) = (function.device().get(), function.function());
        let call = if edit == Edit::Add {
            // SAFETY: the handle is open; the other arguments are numbers.
            unsafe {
                model.xendevicemodel_map_pcidev_to_ioreq_server(
                    self.model(),
                    domain.0,
                    server.0,
                    0,
                    0,
                    device,
                    number,
                )
            }
        } else {
            // SAFETY: the handle is open; the other arguments are numbers.
            unsafe {
                model.xendevicemodel_unmap_pcidev_from_ioreq_server(
                    self.model(),
                    domain.0,
                    server.0,
                    0,
                    0,
                    device,
                    number,
                )
            }
        };
        already(call, edit, || format!("config space of 00:{function} of domain {domain}"))
    }

    fn claim_memory(
        &self,
        domain: DomId,
        server: ServerId,
        start: u64,
        bytes: u64,
        edit: Edit,
    ) -> Result<()> {
        let last = start + (bytes - 1);
        let call = self.claim_range(domain, server, MEMORY_RANGE, start..=last, edit);
        already(call, edit, || format!("memory from {start:#x} to {last:#x} of domain {domain}"))
    }

    fn claim_ports(&self, domain: DomId, server: ServerId, first: u16, count: u16, edit: Edit) -> Result<()> {
        let (start, last) = (u64::from(first), u64::from(first) + u64::from(count) - 1);
        let call = self.claim_range(domain, server, PORT_RANGE, start..=last, edit);
        already(call, edit, || format!("ports {start:#x} to {last:#x} of domain {domain}"))
    }

    fn restart(&self, domain: DomId) -> Result<()> {
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.devicemodel.xendevicemodel_shutdown(self.model(), domain.0, SHUTDOWN_REBOOT)
        };
        done(answer, "restart", || format!("domain {domain}"))
    }

    fn map_memory(&self, domain: DomId, guest: u64, host: u64, frames: u64, edit: Edit) -> Result<()> {
        let subject = || format!("{frames} page frames from {host:#x} on at {guest:#x} of domain {domain}");
        if edit == Edit::Add {
            // Xen would put the mapping in the place of the guest's memory, which is then lost to it.
            let failed = |errno| PlatformError::new(edit.verb("map", "unmap"), subject(), errno);
            let end = (guest + frames).min(self.highest_frame(domain).map_err(failed)?.saturating_add(1));
            for frame in guest..end {
                if self.has_memory(domain, frame).map_err(failed)? {
                    return Err(PlatformError::new(edit.verb("map", "unmap"), subject(), Errno::EEXIST));
                }
            }
        }
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.ctrl.xc_domain_memory_mapping(
                self.control(),
                u32::from(domain.0),
                guest,
                host,
                frames,
                edit.is_add().into(),
            )
        };
        done(answer, edit.verb("map", "unmap"), subject)
    }

    fn map_ports(&self, domain: DomId, guest: u32, host: u32, count: u32, edit: Edit) -> Result<()> {
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.ctrl.xc_domain_ioport_mapping(
                self.control(),
                u32::from(domain.0),
                guest,
                host,
                count,
                edit.is_add().into(),
            )
        };
        done(answer, edit.verb("map", "unmap"), || {
            format!("{count} I/O ports from {host:#x} on at {guest:#x} of domain {domain}")
        })
    }

    fn bind_msi(
        &self,
        domain: DomId,
        pirq: Pirq,
        message: MsiMessage,
        table: u64,
        masked: bool,
    ) -> Result<()> {
        let flags = delivery(message) | if masked { 0 } else { UNMASKED };
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.ctrl.xc_domain_update_msi_irq(
                self.control(),
                u32::from(domain.0),
                vector(message),
                pirq.0,
                flags,
                table,
            )
        };
        done(answer, "bind", || {
            format!("interrupt {} of domain {domain} to its vector {:#x}", pirq.0, vector(message))
        })
    }

    fn unbind_msi(&self, domain: DomId, pirq: Pirq) -> Result<()> {
        // Xen knows the binding by its physical interrupt.
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.ctrl.xc_domain_unbind_msi_irq(self.control(), u32::from(domain.0), 0, pirq.0, 0)
        };
        done(answer, "unbind", || format!("interrupt {} of domain {domain}", pirq.0))
    }

    fn is_mapped(&self, domain: DomId, pirq: Pirq) -> Result<bool> {
        let error = |errno| {
            PlatformError::new(
                "ask for the mapping of",
                format!("interrupt {} of domain {domain}", pirq.0),
                errno,
            )
        };
        let number = u16::try_from(pirq.0).map_err(|_| error(Errno::ERANGE))?;
        // Xen looks for the interrupt first. Then it refuses, before anything else, to unbind what no x86 machine has.
        // SAFETY: the handle is open; the other arguments are numbers.
        let answer = unsafe {
            self.libraries.ctrl.xc_domain_unbind_pt_spi_irq(self.control(), u32::from(domain.0), number, 0)
        };
        match check(answer) {
            Err(Errno::EPERM) => Ok(false),
            Err(Errno::EOPNOTSUPP) => Ok(true),
            Err(errno) => Err(error(errno)),
            Ok(_) => Err(error(Errno::EPROTO)),
        }
    }

    fn bind_line(&self, domain: DomId, pirq: Pirq, slot: DeviceNumber, pin: u8, edit: Edit) -> Result<()> {
        let subject = || format!("interrupt line {} to device {slot:x} of domain {domain}", pirq.0);
        let action = edit.verb("bind", "unbind");
        let line = u8::try_from(pirq.0).map_err(|_| PlatformError::new(action, subject(), Errno::ERANGE))?;
        let control = &self.libraries.ctrl;
        let answer = if edit == Edit::Add {
            // SAFETY: the handle is open; the other arguments are numbers.
            unsafe {
                control.xc_domain_bind_pt_pci_irq(
                    self.control(),
                    u32::from(domain.0),
                    line,
                    0,
                    slot.get(),
                    pin,
                )
            }
        } else {
            // SAFETY: the handle is open; the other arguments are numbers.
            unsafe {
                control.xc_domain_unbind_pt_irq(
                    self.control(),
                    u32::from(domain.0),
                    line,
                    pt_irq_type_PT_IRQ_TYPE_PCI as u8,
                    0,
                    slot.get(),
                    pin,
                    0,
                )
            }
        };
        done(answer, action, subject)
    }
}

/// What is claimed twice is claimed, and what is given up twice is given up.
fn already(answer: i32, edit: Edit, subject: impl FnOnce() -> String) -> Result<()> {
    match (check(answer), edit) {
        (Ok(_), _) | (Err(Errno::EEXIST), Edit::Add) | (Err(Errno::ENOENT), Edit::Remove) => Ok(()),
        (Err(errno), _) => Err(PlatformError::new(edit.verb("take over", "give up"), subject(), errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_packed_as_xen_wants_it() {
        // Vector 41h, lowest priority, level triggered, to logical destination 7fh with redirection.
        let message = MsiMessage { address: 0xfee7_f00c, address_high: 0, data: 0x8141 };
        assert_eq!((vector(message), delivery(message)), (0x41, 0x937f));
        let plain = MsiMessage { address: 0xfee0_0000, address_high: 0, data: 0x0030 };
        assert_eq!((delivery(plain), plain.pirq()), (0, None));
    }

    #[test]
    fn a_message_without_a_vector_names_a_physical_interrupt() {
        // As Linux composes it for interrupt 1234h: delivery mode ExtINT, which is 7.
        let named = MsiMessage { address: 0xfee3_4000, address_high: 0x1200, data: 0x0700 };
        assert_eq!((named.pirq(), vector(named), delivery(named)), (Some(Pirq(0x1234)), 0, 0x7034));
        // Nothing is written yet.
        assert_eq!(MsiMessage::default().pirq(), None);
    }
}
