//! The device models of HVM guests: what they have on the guest's bus, and how a running guest is told that a function comes or goes.
//!
//! The guest's ACPI hotplug controller is the device model's, and reports only devices of the device model. So the device model is given a
//! placeholder at the device number of a function: a device whose config space nobody reaches, because an ioreq server of this service has
//! taken over config space there before.

use std::time::Duration;

use super::Result;
use crate::config::Access;
use crate::{Devfn, DeviceNumber, DomId};

/// The device models of the host's HVM guests. A guest may have taken its own over: each call has a limit in time and in what it reads.
pub trait DeviceModels: Send + Sync {
    /// The device numbers that the device model uses on bus 0, without those of placeholders.
    fn slots(&self, domain: DomId) -> Result<Vec<DeviceNumber>>;
    /// Gives it a placeholder at this device number, upon which the guest is notified that a device has come. One that is left from
    /// before is replaced. `EBUSY`: another device is there.
    fn announce(&self, domain: DomId, slot: DeviceNumber) -> Result<()>;
    /// Asks the guest to release the device, and waits until it has ejected it, which removes the placeholder; `false`: it did not within
    /// the limit. Without a placeholder, the guest has ejected the device before.
    fn request_eject(&self, domain: DomId, slot: DeviceNumber, limit: Duration) -> Result<bool>;
    /// Whether the guest, which was asked to release the device since it was announced, has ejected it; `false` at once where it was not
    /// asked. Its placeholder is gone then, and the guest must find nothing there, however late [`request_eject`](Self::request_eject) sees it.
    fn has_ejected(&self, domain: DomId, slot: DeviceNumber, limit: Duration) -> Result<bool>;
    /// Forgets that a guest was asked to release the device: it is served no more.
    fn forget(&self, domain: DomId, slot: DeviceNumber);
    /// Removes the placeholder, if there is one, without asking the guest.
    fn eject(&self, domain: DomId, slot: DeviceNumber) -> Result<()>;

    /// The functions that the device model has itself on bus 0, without placeholders, asked for within a limit.
    fn functions(&self, domain: DomId, limit: Duration) -> Result<Vec<Devfn>>;
    /// Reads a register of a function of its own, in the first 256 bytes, as the guest does through ports CF8 and CFC. What the guest has
    /// selected through these ports stays selected.
    fn read_config(&self, domain: DomId, function: Devfn, access: Access, limit: Duration) -> Result<u32>;
    /// Writes one likewise.
    fn write_config(
        &self,
        domain: DomId,
        function: Devfn,
        access: Access,
        value: u32,
        limit: Duration,
    ) -> Result<()>;
}
