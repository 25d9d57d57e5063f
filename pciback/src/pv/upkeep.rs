//! Keeping hardware as the host set it up, whatever its guest or the function itself does: BARs where the host placed them, decoding
//! on, INTx off where nobody but the host would hear it.

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
        bars.contains(&access.offset()) || Self::is_command(access)
    }

    /// Whether an access covers part of Command.
    pub(super) fn is_command(access: Access) -> bool {
        access.dword() == header::COMMAND && access.offset() < header::STATUS
    }

    /// Puts BARs and decoding right in hardware, as the host has placed and granted them. What answers all ones is being reset by
    /// its own registers: the guest's driver waits for it.
    pub(crate) fn restore_placement(&self) -> io::Result<()> {
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

    /// Brings hardware into step with what its guest has: before it is served, by this life of the service or the first one.
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
    pub(crate) fn apply_interrupt_disable(&mut self) -> io::Result<()> {
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
    pub(crate) fn assert_enable(&mut self, mode: InterruptMode) -> Result<(), InterruptError> {
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
mod tests {
    use crate::Sbdf;
    use crate::pv::function::GuestFunction;
    use crate::pv::machine::{DEVICE_CONTROL, MSI, Machine, op};
    use crate::pv::wire::Command;

    const ADDRESS: Sbdf = Sbdf::from_devfn(0, 1, 0x10);
    const LINE: u32 = 17;
    const COMMAND: u16 = 4;
    const DECODING: u16 = 3;
    const BUS_MASTER: u16 = 4;
    const INTX_OFF: u16 = 0x400;

    fn write(function: &mut GuestFunction, offset: u16, size: u32, value: u32) {
        let (answer, _) = function.execute(&op(Command::CONF_WRITE.0, offset, size, value));
        assert_eq!(answer.error.number(), 0, "{offset:#x}: {value:#x}");
    }

    fn read(function: &mut GuestFunction, offset: u16) -> u16 {
        function.execute(&op(Command::CONF_READ.0, offset, 2, 0)).0.value as u16
    }

    #[test]
    fn hardware_goes_on_decoding_what_the_guest_switches_off() {
        let machine = Machine::new();
        let mut function = machine.open(ADDRESS);
        for (written, on) in [(0x0002u32, 2), (0, 0), (0x0006, 2), (0x0400, 0)] {
            write(&mut function, COMMAND, 2, written);
            assert_eq!(machine.word(ADDRESS, COMMAND) & DECODING, 2, "hardware after {written:#x}");
            assert_eq!(read(&mut function, COMMAND) & DECODING, on, "the guest after {written:#x}");
        }
        write(&mut function, COMMAND, 1, 0);
        assert_eq!(machine.word(ADDRESS, COMMAND) & DECODING, 2);
    }

    #[test]
    fn a_function_that_reset_itself_gets_its_bars_and_decoding_back_when_its_driver_writes_them() {
        let machine = Machine::new();
        let mut function = machine.open(ADDRESS);
        write(&mut function, COMMAND, 2, 6);
        let restores: [fn(&mut GuestFunction); 2] =
            [|function| write(function, 0x10, 4, 0xfe00_0000), |function| write(function, COMMAND, 2, 6)];
        for restore in restores {
            for offset in [COMMAND, 0x10, 0x12] {
                machine.set_word(ADDRESS, offset, 0);
            }
            restore(&mut function);
            assert_eq!((machine.word(ADDRESS, 0x12), machine.word(ADDRESS, 0x10)), (0xfe00, 0));
            assert_eq!(machine.word(ADDRESS, COMMAND) & DECODING, 2);
        }
        assert_eq!(machine.word(ADDRESS, COMMAND) & BUS_MASTER, BUS_MASTER);
    }

    #[test]
    fn a_function_that_reset_itself_gets_its_message_back_when_its_driver_writes_msi_enable() {
        let machine = Machine::new();
        let mut function = machine.open(ADDRESS);
        assert_eq!(function.execute(&op(Command::ENABLE_MSI.0, 0, 0, 0)).0.error.number(), 0);
        for offset in [MSI + 2, MSI + 4] {
            machine.set_word(ADDRESS, offset, 0);
        }
        // As Linux restores MSI: first off, then on.
        let control = u32::from(read(&mut function, MSI + 2));
        write(&mut function, MSI + 2, 2, control & !1);
        write(&mut function, MSI + 2, 2, control | 1);
        assert_eq!((machine.word(ADDRESS, MSI + 2) & 1, machine.word(ADDRESS, MSI + 4)), (1, 0xfee0));
    }

    #[test]
    fn intx_is_masked_in_hardware_where_the_guest_masks_it_or_cannot_hear_it() {
        for (line, command, masked) in [
            (LINE, 0x0002, false),
            (LINE, 0x0402, true),
            (LINE, 0x0000, true),
            (LINE, 0x0003, false),
            (0, 0x0002, true),
        ] {
            let machine = Machine::new();
            let mut function = machine.open_with_line(ADDRESS, line);
            function.keep_hardware().unwrap();
            assert_ne!(machine.word(ADDRESS, COMMAND) & INTX_OFF, 0, "before its driver starts");
            write(&mut function, COMMAND, 2, command);
            let found = machine.word(ADDRESS, COMMAND) & INTX_OFF != 0;
            assert_eq!(found, masked, "line {line}, Command {command:#x}");
            assert_eq!(read(&mut function, COMMAND) & INTX_OFF, command as u16 & INTX_OFF);
        }
    }

    /// As uio_pci_generic and vfio-pci ask whether Interrupt Disable works: toggled by one write, read back, toggled back.
    #[test]
    fn drivers_that_mask_intx_by_command_find_that_it_works() {
        let machine = Machine::new();
        let mut function = machine.open_with_line(ADDRESS, LINE);
        write(&mut function, COMMAND, 2, 2);
        let before = read(&mut function, COMMAND);
        write(&mut function, COMMAND, 2, u32::from(before ^ INTX_OFF));
        let after = read(&mut function, COMMAND);
        assert_eq!((after ^ before, machine.word(ADDRESS, COMMAND) & INTX_OFF), (INTX_OFF, INTX_OFF));
        write(&mut function, COMMAND, 2, before.into());
        assert_eq!((read(&mut function, COMMAND), machine.word(ADDRESS, COMMAND) & INTX_OFF), (before, 0));
    }

    #[test]
    fn intx_is_masked_while_messages_are_enabled_and_when_the_guest_loses_the_function() {
        let machine = Machine::new();
        let mut function = machine.open_with_line(ADDRESS, LINE);
        write(&mut function, COMMAND, 2, 6);
        let masked = || machine.word(ADDRESS, COMMAND) & INTX_OFF != 0;
        assert!(!masked());
        function.execute(&op(Command::ENABLE_MSI.0, 0, 0, 0));
        assert!(masked(), "with MSI");
        function.execute(&op(Command::DISABLE_MSI.0, 0, 0, 0));
        assert!(!masked(), "without MSI");
        function.quiesce().unwrap();
        assert!(masked(), "quiesced");
        assert_eq!(machine.word(ADDRESS, COMMAND) & DECODING, 2, "a guest may still reach its BARs");
    }

    #[test]
    fn a_reset_leaves_the_function_decoding_for_the_host_and_switched_off_for_the_guest() {
        let machine = Machine::new();
        let mut function = machine.open_with_line(ADDRESS, LINE);
        write(&mut function, COMMAND, 2, 6);
        write(&mut function, DEVICE_CONTROL, 2, 0x8000);
        machine.set_word(ADDRESS, COMMAND, 0);
        function.reset_done().unwrap();
        assert_eq!(read(&mut function, COMMAND) & (DECODING | BUS_MASTER), 0);
        assert_eq!(machine.word(ADDRESS, COMMAND) & (DECODING | INTX_OFF), 2 | INTX_OFF);
    }
}
