//! Keeping hardware as the host set it up, against changes by its guest or the function: BARs where the host placed them, decoding
//! on, INTx off where it could only reach the host.

use std::io;

use crate::config::{Access, InterruptMode};
use crate::live::{self, Changed, PlacedBar, Switch};
use crate::spec::header;

use super::function::GuestFunction;
use super::interrupts::{self, InterruptError};

impl GuestFunction {
    /// Whether a write asks for decoding or places BARs: drivers do that, too, after they have reset their function by its own registers.
    pub(super) fn is_placement(access: Access) -> bool {
        let bars = header::BAR0..header::BAR0 + 24;
        bars.contains(&access.offset()) || access.dword() == header::ROM || Self::is_command(access)
    }

    /// Whether an access covers part of Command.
    pub(super) fn is_command(access: Access) -> bool {
        access.dword() == header::COMMAND && access.offset() < header::STATUS
    }

    /// Puts BARs and decoding right in hardware, as the host has placed and granted them. What answers all ones is being reset by
    /// its own registers: the guest's driver waits for it.
    pub(super) fn restore_placement(&self) -> io::Result<()> {
        let config = self.hardware.as_ref();
        let bars = match self.space.is_virtual_function() {
            true => Vec::new(),
            false => PlacedBar::of_guest(self.space.bars()),
        };
        if bars.is_empty() || config.read(live::COMMAND)? == live::COMMAND.width().mask() {
            return Ok(());
        }
        live::place_bars(config, &bars)?;
        live::decode_bars(config, &bars)?.kept_or_silent("Command")
    }

    /// Sets hardware to match the guest's state before it is served, by this process of the service or the first one.
    pub fn keep_hardware(&mut self) -> io::Result<()> {
        if self.is_silent() {
            return Ok(());
        }
        self.restore_placement()?;
        self.apply_interrupt_disable()
    }

    /// Whether INTx of the function reaches its guest: it has a line, has switched the function on, and has not chosen messages.
    fn is_heard(&self) -> bool {
        let on = header::COMMAND_IO | header::COMMAND_MEMORY;
        let messages = matches!(self.vectors().mode, InterruptMode::Msi | InterruptMode::MsiX);
        let pin = self.space.own_register(header::INTERRUPT_PIN, 1);
        let command = self.space.own_register(header::COMMAND, 2);
        self.line != 0 && pin != 0 && command & u32::from(on) != 0 && !messages && !self.is_leaving()
    }

    /// Sets Interrupt Disable in hardware where the guest has set it, and where INTx would not be delivered but the host, whose
    /// lines it may share; clears it elsewhere. Hardware that does not have the bit shows the guest that it has not.
    pub(super) fn apply_interrupt_disable(&mut self) -> io::Result<()> {
        if self.is_silent() || self.space.is_virtual_function() {
            return Ok(());
        }
        let bit = u32::from(header::COMMAND_INTERRUPT_DISABLE);
        let disabled = self.space.own_register(header::COMMAND, 2) & bit != 0;
        let switch = if self.is_heard() && !disabled { Switch::On } else { Switch::Off };
        let changed = live::set_intx(self.hardware.as_ref(), switch)?;
        if disabled && matches!(changed, Changed::Differs { .. }) {
            self.space.clear_interrupt_disable();
        }
        Ok(())
    }

    /// The guest has written MSI or MSI-X Enable as it is already for it. A function that its driver has reset by its own registers
    /// has lost the bit and its messages: both are put back.
    pub(super) fn assert_enable(&mut self, mode: InterruptMode) -> Result<(), InterruptError> {
        let capability = self.capability_of(mode)?;
        let control = live::message_control(capability).map_err(io::Error::other)?;
        let found = self.hardware.read(control)?;
        if found & live::enable_bit(mode) == 0 && found != control.width().mask() {
            interrupts::restore(self)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
