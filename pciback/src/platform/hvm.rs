//! HVM guests: who answers their config accesses, and what of a function is put into them.

use std::os::fd::BorrowedFd;

use super::{Edit, Pirq, Result, SharedMemory};
use crate::{Devfn, DeviceNumber, DomId};

/// The number of an ioreq server in its domain. Xen asks the server with the highest number first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServerId(pub u16);

/// What a guest wrote as the message of one of its interrupts (PCI Express 6.0, section 7.7; Intel SDM 3A, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MsiMessage {
    /// The lower half of the address: where the interrupt goes.
    pub address: u32,
    /// The upper half.
    pub address_high: u32,
    /// The data: vector, delivery and trigger mode.
    pub data: u32,
}

impl MsiMessage {
    /// The physical interrupt that the guest wants, where it wants it as an event and not by a vector. So does a system that Xen offers
    /// `XENFEAT_hvm_pirqs` (`xen/include/public/features.h`): vector 0, which no interrupt has, bits 0 to 7 of the number as the destination,
    /// the others in the upper half of the address.
    pub fn pirq(self) -> Option<Pirq> {
        let number = self.address_high & !0xff | self.address >> 12 & 0xff;
        (self.data & 0xff == 0 && number != 0).then_some(Pirq(number))
    }
}

/// Ioreq servers, and mappings and interrupts of HVM guests.
pub trait HvmDomains: Send + Sync {
    /// The ioreq servers that dom0 has in a domain, lowest number first: the device model's, and ours.
    fn servers(&self, domain: DomId) -> Result<Vec<ServerId>>;
    /// Makes one more; Xen gives it the lowest number that is free.
    fn create_server(&self, domain: DomId) -> Result<ServerId>;
    /// Ends a server: its devices no longer answer.
    fn destroy_server(&self, domain: DomId, server: ServerId) -> Result<()>;
    /// Maps the server's page, binds the event channels of the guest's vCPUs and lets requests come.
    fn connect(&self, domain: DomId, server: ServerId) -> Result<Box<dyn IoreqServer>>;
    /// Takes or gives up the config space of a function on bus 0, of which there need not be any device.
    fn claim_function(&self, domain: DomId, server: ServerId, function: Devfn, edit: Edit) -> Result<()>;
    /// Takes or gives up `bytes` of the guest's physical memory from `start` on, where the guest has no memory.
    fn claim_memory(&self, domain: DomId, server: ServerId, start: u64, bytes: u64, edit: Edit)
    -> Result<()>;

    /// Takes or gives up `count` I/O ports from `first` on.
    fn claim_ports(&self, domain: DomId, server: ServerId, first: u16, count: u16, edit: Edit) -> Result<()>;
    /// Has the guest shut down in order to start again, as a machine whose reset line is pulled.
    fn restart(&self, domain: DomId) -> Result<()>;

    /// Lets the guest reach page frames of the host at page frames of its own, or not any more. `EEXIST`: the guest has memory there.
    fn map_memory(&self, domain: DomId, guest: u64, host: u64, frames: u64, edit: Edit) -> Result<()>;
    /// Lets the guest reach I/O ports of the host at ports of its own, or not any more.
    fn map_ports(&self, domain: DomId, guest: u32, host: u32, count: u32, edit: Edit) -> Result<()>;

    /// Delivers a physical interrupt of the guest by the message that it wrote. `table` is the guest's address of the MSI-X
    /// table, through which Xen then takes the vector's mask; 0 for MSI. `masked`: the guest has masked it; one that is bound already stays as
    /// it is then. A message that names a physical interrupt is bound to that one, and comes as an event once the guest has bound it to one.
    fn bind_msi(
        &self,
        domain: DomId,
        pirq: Pirq,
        message: MsiMessage,
        table: u64,
        masked: bool,
    ) -> Result<()>;
    /// Ends that.
    fn unbind_msi(&self, domain: DomId, pirq: Pirq) -> Result<()>;
    /// Whether a physical interrupt of the guest is mapped to an interrupt of the host, whoever has mapped it. Nothing changes. `EINVAL`: it
    /// is no HVM guest.
    fn is_mapped(&self, domain: DomId, pirq: Pirq) -> Result<bool>;
    /// Delivers a physical interrupt, a line, as INTx of the device at this number, or not any more; `pin`: 0 for INTA to 3 for INTD.
    fn bind_line(&self, domain: DomId, pirq: Pirq, slot: DeviceNumber, pin: u8, edit: Edit) -> Result<()>;
}

/// A connected ioreq server; unmapped and unbound when dropped, while the server itself stays in Xen.
pub trait IoreqServer: Send {
    /// The page with a request for each vCPU, `struct ioreq` of `xen/hvm/ioreq.h`; Xen and this process write it.
    fn page(&self) -> &SharedMemory;
    /// Readable when a vCPU has sent an event.
    fn event_fd(&self) -> BorrowedFd<'_>;
    /// Takes one event, without waiting: the vCPU that sent it.
    fn take_event(&self) -> Result<Option<u16>>;
    /// Writes into the guest's memory, at a physical address; at most three pages of it.
    fn write_memory(&self, address: u64, bytes: &[u8]) -> Result<()>;
    /// Binds the event channels of vCPUs that have come since.
    fn bind_vcpus(&mut self) -> Result<()>;
    /// Notifies a vCPU that its request is answered.
    fn notify(&self, vcpu: u16) -> Result<()>;
}
