//! Command and Message Control: what lets a function reach memory, answer and interrupt.

use std::io;

use super::{Changed, change, disable_rom, register, rewrite};
use crate::config::{Access, AccessError, CapabilityList, ConfigSpace, InterruptMode};
use crate::spec::{CapabilityId, header, legacy};

/// Command (PCI Express 6.0, section 7.5.1.1.3).
pub const COMMAND: Access = Access::fixed::<{ header::COMMAND }, 2>();

/// Whether something is switched on or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// Clears Bus Master Enable: the function sends no request, messages included. What answers all ones sends none.
pub fn clear_bus_master(config: &dyn ConfigSpace) -> io::Result<()> {
    change(config, COMMAND, header::COMMAND_BUS_MASTER.into(), 0)?.kept_or_silent("Command")
}

/// Sets Memory Space Enable. A VF has none of its own: its PF's counts.
pub fn decode_memory(config: &dyn ConfigSpace) -> io::Result<Changed> {
    change(config, COMMAND, 0, header::COMMAND_MEMORY.into())
}

/// Lets the function signal INTx, or sets Interrupt Disable. Hardware that has no pin, or is older than PCI 2.3, does not keep the bit.
pub fn set_intx(config: &dyn ConfigSpace, switch: Switch) -> io::Result<Changed> {
    let disable = header::COMMAND_INTERRUPT_DISABLE.into();
    match switch {
        Switch::On => change(config, COMMAND, disable, 0),
        Switch::Off => change(config, COMMAND, 0, disable),
    }
}

/// Whether a function, by the bytes of its config space, may signal INTx: it has a pin, Interrupt Disable is clear, and neither MSI nor
/// MSI-X is enabled, which take the place of INTx (PCI Express 6.0, section 6.1.4).
pub fn may_send_intx(bytes: &[u8]) -> bool {
    let list = CapabilityList::walk(bytes);
    let word = |at: u16| {
        let at = usize::from(at);
        bytes.get(at..at + 2).map_or(0, |word| u16::from_le_bytes([word[0], word[1]]))
    };
    let enabled = |id, enable: u16| {
        list.legacy(id).is_some_and(|at| word(at.offset + legacy::MESSAGE_CONTROL) & enable != 0)
    };
    bytes.get(usize::from(header::INTERRUPT_PIN)).is_some_and(|pin| *pin != 0)
        && word(header::COMMAND) & header::COMMAND_INTERRUPT_DISABLE == 0
        && !enabled(CapabilityId::MSI, legacy::MSI_ENABLE)
        && !enabled(CapabilityId::MSI_X, legacy::MSIX_ENABLE)
}

/// Message Control of the MSI or MSI-X capability at an offset. Two bytes: Xen takes no other write to it.
pub fn message_control(capability: u16) -> Result<Access, AccessError> {
    register(capability, legacy::MESSAGE_CONTROL, 2)
}

/// MSI Enable or MSI-X Enable in Message Control.
pub fn enable_bit(mode: InterruptMode) -> u32 {
    match mode {
        InterruptMode::MsiX => legacy::MSIX_ENABLE.into(),
        _ => legacy::MSI_ENABLE.into(),
    }
}

/// Switches MSI or MSI-X of the capability at an offset on or off: with one message of MSI, and no vector of MSI-X masked.
pub fn set_message_control(
    config: &dyn ConfigSpace,
    mode: InterruptMode,
    capability: u16,
    switch: Switch,
) -> io::Result<Changed> {
    let (enable, others) = match mode {
        InterruptMode::MsiX => (legacy::MSIX_ENABLE, legacy::MSIX_FUNCTION_MASK),
        _ => (legacy::MSI_ENABLE, legacy::MSI_MULTIPLE_ENABLE),
    };
    let set = if switch == Switch::On { enable } else { 0 };
    let control = message_control(capability).map_err(io::Error::other)?;
    rewrite(config, control, (enable | others).into(), set.into())
}

/// Switches bus mastering, all interrupts and the decoder of the expansion ROM off and makes sure of it. `Ok(false)`: it answers all
/// ones, so that nothing is known of it.
pub fn switch_off(config: &dyn ConfigSpace) -> io::Result<bool> {
    let bytes = config.read_all()?;
    if bytes.iter().all(|byte| *byte == 0xff) {
        return Ok(false);
    }
    let list = CapabilityList::walk(&bytes);
    // Bus mastering first: without it no message is sent, and nothing reaches memory.
    let mut answered = off(config, COMMAND, header::COMMAND_BUS_MASTER, "Bus Master Enable")?;
    for (id, enable, name) in [
        (CapabilityId::MSI, legacy::MSI_ENABLE, "MSI Enable"),
        (CapabilityId::MSI_X, legacy::MSIX_ENABLE, "MSI-X Enable"),
    ] {
        if let Some(capability) = list.legacy(id) {
            let control = message_control(capability.offset).map_err(io::Error::other)?;
            answered &= off(config, control, enable, name)?;
        }
    }
    // A bridge has another register there.
    if bytes.get(usize::from(header::HEADER_TYPE)).is_some_and(|kind| kind & !header::MULTI_FUNCTION == 0) {
        disable_rom(config)?;
    }
    // It may be hardwired to 0 where there is no pin, as in VFs; it is not asked for.
    let _hardwired = set_intx(config, Switch::Off)?;
    Ok(answered)
}

/// Clears bits of a register of two bytes; `false`: no device answers.
fn off(config: &dyn ConfigSpace, access: Access, bits: u16, name: &str) -> io::Result<bool> {
    let changed = change(config, access, bits.into(), 0)?;
    changed.kept_or_silent(name)?;
    Ok(changed != Changed::Silent)
}
