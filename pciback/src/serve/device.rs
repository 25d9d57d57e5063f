//! A function as a device in its guest's address space: where its BARs are, and how its interrupts arrive.

use std::io;

use super::function::GuestFunction;
use super::interrupts::{self, InterruptError};
use crate::config::{Access, SideEffect};
use crate::platform::{self, Pirq};

/// What the service places in a guest for one of its functions. What is placed is noted in the function's image, so that nothing here
/// changes; each method gets the function that has this device.
pub(super) trait GuestDevice: Send + Sync {
    /// What follows from a write to config space, which was carried out: BARs move, interrupts are bound.
    fn config_written(
        &self,
        function: &mut GuestFunction,
        access: Access,
        effect: Option<SideEffect>,
    ) -> Result<(), InterruptError>;

    /// Carries out an access to memory of BARs that is not mapped in the guest, `bytes` of it at an address of the guest's; what was read
    /// or written. `None`: the function has no such memory there.
    fn access_memory(
        &self,
        function: &mut GuestFunction,
        address: u64,
        bytes: u8,
        write: Option<u64>,
    ) -> Option<u64>;

    /// Brings what is mapped into step with the BARs and with Command.
    fn place_bars(&self, function: &mut GuestFunction) -> platform::Result<()>;
    /// Takes over what an earlier process has placed, which may have been killed before anything that its notes say: it stays there, or
    /// is taken out of the guest. Nothing is placed anywhere else.
    fn take_over_bars(&self, function: &mut GuestFunction) -> platform::Result<()>;
    /// Takes all BARs out of the guest's address space.
    fn unmap_bars(&self, function: &mut GuestFunction) -> platform::Result<()>;

    /// Other vectors are mapped for the function than before.
    fn vectors_noted(&self, function: &GuestFunction);

    /// Ends the delivery of a physical interrupt that is about to be unmapped.
    fn unbind(&self, function: &GuestFunction, pirq: Pirq);

    /// Whether a reset takes more than the function's registers from the guest, so that its driver restarts, no matter who requested it.
    fn begins_anew_after_reset(&self) -> bool;
    /// A reset has ended; registers are as after it, and the function is still silent.
    fn reset(&self, function: &mut GuestFunction) -> io::Result<()>;

    /// Takes everything out of the guest.
    fn leave(&self, function: &mut GuestFunction) -> Result<(), InterruptError>;
}

/// Nothing is placed: the guest maps BARs and binds interrupts itself, or is not there yet.
pub(super) struct Unplaced;

impl GuestDevice for Unplaced {
    fn config_written(
        &self,
        _: &mut GuestFunction,
        _: Access,
        _: Option<SideEffect>,
    ) -> Result<(), InterruptError> {
        Ok(())
    }

    fn access_memory(&self, _: &mut GuestFunction, _: u64, _: u8, _: Option<u64>) -> Option<u64> {
        None
    }

    fn place_bars(&self, _: &mut GuestFunction) -> platform::Result<()> {
        Ok(())
    }

    fn take_over_bars(&self, _: &mut GuestFunction) -> platform::Result<()> {
        Ok(())
    }

    fn unmap_bars(&self, _: &mut GuestFunction) -> platform::Result<()> {
        Ok(())
    }

    fn vectors_noted(&self, _: &GuestFunction) {}

    fn unbind(&self, _: &GuestFunction, _: Pirq) {}

    /// Xen has written the messages, and writes them again.
    fn begins_anew_after_reset(&self) -> bool {
        false
    }

    fn reset(&self, function: &mut GuestFunction) -> io::Result<()> {
        interrupts::restore(function)
    }

    fn leave(&self, _: &mut GuestFunction) -> Result<(), InterruptError> {
        Ok(())
    }
}
