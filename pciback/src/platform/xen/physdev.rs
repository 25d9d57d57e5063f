//! Hypercalls about physical devices that libxenctrl has no function for.

use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::bindings::{
    __HYPERVISOR_physdev_op, Libraries, MAP_PIRQ_TYPE_MSI_SEG, XEN_PCI_DEV_EXTFN, XEN_PCI_DEV_PXM,
    XEN_PCI_DEV_VIRTFN, physdev_map_pirq, physdev_pci_device, physdev_pci_device_add, xen_hvm_get_mem_type,
    xencall_handle,
};
use super::hypervisor::check;
use crate::platform::MsiSource;
use crate::platform::hypervisor::{DeviceReport, ResetReach};
use crate::platform::{PlatformError, Result};
use crate::{DomId, Sbdf};

/// libxencall's handle. The library locks its cache of buffers itself, and a call is one `ioctl`.
pub struct PhysDev {
    handle: NonNull<xencall_handle>,
    libraries: Arc<Libraries>,
}

/// An argument of a hypercall: a plain C structure that Xen reads and may write.
///
/// # Safety
/// The implementing type must be the structure that Xen expects for the commands it is used with, or start with it.
pub unsafe trait Argument: Copy {}

// SAFETY: the structure of `HVMOP_get_mem_type`.
unsafe impl Argument for xen_hvm_get_mem_type {}

// SAFETY: the structure of commands 26, 27, 30 and 31.
unsafe impl Argument for physdev_pci_device {}

/// The argument of command 25 with its one optional value, the proximity domain.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct DeviceAdd {
    segment: u16,
    bus: u8,
    devfn: u8,
    flags: u32,
    physical_bus: u8,
    physical_devfn: u8,
    proximity: [u32; 1],
}

const _: () = {
    assert!(offset_of!(DeviceAdd, flags) == offset_of!(physdev_pci_device_add, flags));
    assert!(offset_of!(DeviceAdd, physical_bus) == offset_of!(physdev_pci_device_add, physfn));
    assert!(offset_of!(DeviceAdd, proximity) == offset_of!(physdev_pci_device_add, optarr));
};

// SAFETY: it is laid out as the structure of command 25, as checked above.
unsafe impl Argument for DeviceAdd {}

impl DeviceAdd {
    pub fn new(address: Sbdf, report: DeviceReport) -> Self {
        let mut flags = 0;
        if report.extended {
            flags |= XEN_PCI_DEV_EXTFN;
        }
        if report.physical_function.is_some() {
            flags |= XEN_PCI_DEV_VIRTFN;
        }
        if report.proximity.is_some() {
            flags |= XEN_PCI_DEV_PXM;
        }
        Self {
            segment: address.segment(),
            bus: address.bus(),
            devfn: address.devfn().0,
            flags,
            physical_bus: report.physical_function.map_or(0, Sbdf::bus),
            physical_devfn: report.physical_function.map_or(0, |pf| pf.devfn().0),
            proximity: [report.proximity.unwrap_or(0)],
        }
    }
}

/// `PHYSDEVOP_pci_device_reset`, which the headers have from Xen 4.20 on. Older ones are built with, too.
pub const NOTE_RESET: u32 = 32;

/// The argument of command 32, `struct pci_device_reset`: the function, then what kind of reset it was.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct DeviceReset {
    device: physdev_pci_device,
    flags: u32,
}

// Bytes 0 to 3 are the function, as in the commands about nothing else.
const _: () = assert!(size_of::<physdev_pci_device>() == 4 && size_of::<DeviceReset>() == 8);

// SAFETY: it is laid out as the structure of command 32, as checked above.
unsafe impl Argument for DeviceReset {}

impl DeviceReset {
    /// `PCI_DEVICE_RESET_HOT` and `PCI_DEVICE_RESET_FLR`.
    pub fn new(address: Sbdf, reach: ResetReach) -> Self {
        let flags = match reach {
            ResetReach::Bus => 2,
            ResetReach::Function => 3,
        };
        let device =
            physdev_pci_device { seg: address.segment(), bus: address.bus(), devfn: address.devfn().0 };
        Self { device, flags }
    }
}

/// A command that not every Xen has.
#[derive(Debug, Default)]
pub struct OptionalCommand(AtomicBool);

impl OptionalCommand {
    /// Asks Xen by `call`, but not again once it has said that it does not have the command; whether it was carried out.
    pub fn ask(
        &self,
        call: impl FnOnce() -> std::result::Result<(), Errno>,
    ) -> std::result::Result<bool, Errno> {
        let Self(absent) = self;
        if absent.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match call() {
            Ok(()) => Ok(true),
            // EINVAL: it has the command, but not for such an argument.
            Err(Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL) => {
                absent.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(errno) => Err(errno),
        }
    }
}

// SAFETY: the structure of command 13.
unsafe impl Argument for physdev_map_pirq {}

/// The argument of command 13 for a message-signalled interrupt of a function, of any segment; `pirq`: the domain's number for it, -1 for
/// a free one of Xen's choice.
pub fn map_msi(domain: DomId, address: Sbdf, source: MsiSource, pirq: i32) -> physdev_map_pirq {
    let (entry, table) = match source {
        MsiSource::Msi => (0, 0),
        MsiSource::MsiX { entry, table } => (entry, table),
    };
    physdev_map_pirq {
        domid: domain.0,
        type_: MAP_PIRQ_TYPE_MSI_SEG as i32,
        // Xen chooses a free vector.
        index: -1,
        pirq,
        // The segment is in the upper half, the sign bit included.
        bus: (u32::from(address.bus()) | u32::from(address.segment()) << 16) as i32,
        devfn: address.devfn().0.into(),
        entry_nr: entry.into(),
        table_base: table,
    }
}

// SAFETY: libxencall's handle is not bound to a thread.
unsafe impl Send for PhysDev {}
// SAFETY: libxencall is reentrant unless told otherwise when it is opened.
unsafe impl Sync for PhysDev {}

impl PhysDev {
    pub fn open(libraries: &Arc<Libraries>) -> Result<Self> {
        // SAFETY: the logger is a static, and 0 are valid flags.
        let opened = unsafe { libraries.call.xencall_open(libraries.logger, 0) };
        let handle = NonNull::new(opened)
            .ok_or_else(|| PlatformError::new("open", "Xen's hypercall interface", Errno::last()))?;
        Ok(Self { handle, libraries: Arc::clone(libraries) })
    }

    /// One physdev hypercall.
    pub fn call<A: Argument>(&self, command: u32, argument: A) -> std::result::Result<(), Errno> {
        self.ask(__HYPERVISOR_physdev_op, command, argument).map(drop)
    }

    /// One hypercall with a command and a structure; the structure as Xen leaves it.
    pub fn ask<A: Argument>(
        &self,
        hypercall: u32,
        command: u32,
        argument: A,
    ) -> std::result::Result<A, Errno> {
        let call = &self.libraries.call;
        let handle = self.handle.as_ptr();
        // SAFETY: the handle is open.
        let buffer = unsafe { call.xencall_alloc_buffer(handle, size_of::<A>()) }.cast::<A>();
        if buffer.is_null() {
            return Err(Errno::last());
        }
        // SAFETY: the buffer is page-aligned and has room for one `A`.
        unsafe { buffer.write(argument) };
        // SAFETY: the command reads and writes the structure at this address, which is as `Argument` promises.
        let answer = unsafe { call.xencall2(handle, hypercall, command.into(), buffer as u64) };
        // SAFETY: the buffer holds what was written above, and what Xen has made of it.
        let result = check(answer).map(|_| unsafe { buffer.read() });
        // SAFETY: the buffer is of this handle, and Xen keeps no reference to it.
        unsafe { call.xencall_free_buffer(handle, buffer.cast()) };
        result
    }
}

impl Drop for PhysDev {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nothing uses it any more.
        let answer = unsafe { self.libraries.call.xencall_close(self.handle.as_ptr()) };
        if let Err(errno) = check(answer) {
            log::error!("close Xen's hypercall interface: {errno}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_of_a_function_are_mapped_with_its_segment() {
        for (segment, bus) in [(0, 0x41), (2, 0x2_0041), (0xffff, 0xffff_0041_u32 as i32)] {
            let address = Sbdf::from_devfn(segment, 0x41, 0x10);
            let msi = map_msi(DomId(7), address, MsiSource::Msi, 300);
            // MAP_PIRQ_TYPE_MSI, 0, would leave the segment out.
            assert_eq!((msi.type_, msi.bus, msi.devfn), (3, bus, 0x10));
            assert_eq!((msi.domid, msi.index, msi.pirq, msi.entry_nr, msi.table_base), (7, -1, 300, 0, 0));
            let source = MsiSource::MsiX { entry: 5, table: 0xfe40_0000 };
            let msix = map_msi(DomId(7), address, source, -1);
            assert_eq!((msix.type_, msix.bus), (3, bus));
            assert_eq!((msix.index, msix.pirq, msix.entry_nr, msix.table_base), (-1, -1, 5, 0xfe40_0000));
        }
    }

    #[test]
    fn a_reset_is_noted_with_the_function_and_its_kind() {
        for (reach, flags) in [(ResetReach::Bus, 2), (ResetReach::Function, 3)] {
            let DeviceReset { device, flags: found } = DeviceReset::new(Sbdf::from_devfn(2, 1, 0x80), reach);
            assert_eq!((device.seg, device.bus, device.devfn, found), (2, 1, 0x80, flags));
        }
        assert_eq!(offset_of!(DeviceReset, flags), 4);
    }

    #[test]
    fn a_command_that_xen_does_not_have_is_asked_for_once() {
        for errno in [Errno::ENOSYS, Errno::EOPNOTSUPP, Errno::EINVAL] {
            let command = OptionalCommand::default();
            assert_eq!(command.ask(|| Err(errno)), Ok(false));
            assert_eq!(command.ask(|| panic!("asked again after {errno}")), Ok(false));
        }
        let command = OptionalCommand::default();
        assert_eq!(command.ask(|| Err(Errno::ENODEV)), Err(Errno::ENODEV));
        assert_eq!(command.ask(|| Ok(())), Ok(true));
    }

    #[test]
    fn a_vf_is_reported_with_its_pf_and_node() {
        let report = DeviceReport {
            extended: false,
            physical_function: Some(Sbdf::from_devfn(0, 1, 0)),
            proximity: Some(3),
        };
        let add = DeviceAdd::new(Sbdf::from_devfn(2, 1, 0x80), report);
        assert_eq!((add.segment, add.bus, add.devfn, add.flags), (2, 1, 0x80, 6));
        assert_eq!((add.physical_bus, add.physical_devfn, add.proximity), (1, 0, [3]));
    }
}
