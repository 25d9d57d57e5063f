//! Registers of real functions, as the host's kernel reaches them: what is switched, put and looked at there, and whether hardware
//! kept it.
//!
//! A register is changed by one access of its own width, and read back. A function that answers all ones is gone, or is being reset:
//! nothing can be changed in it, and callers decide what that means ([`Changed::Silent`]).

mod bars;
mod canary;
pub mod errors;
mod kept;
mod secondary_bus;
mod switches;

use std::io;

use crate::config::{Access, AccessError, ConfigSpace};

pub use bars::{LostBar, PlacedBar, decode_bars, disable_rom, place_bars};
pub use canary::Canary;
pub use kept::KeptRegisters;
pub use secondary_bus::{notifies_of_removal, reset_secondary_bus};
pub use switches::{
    COMMAND, Switch, clear_bus_master, decode_memory, enable_bit, may_send_intx, message_control, set_intx,
    set_message_control, switch_off,
};

/// What became of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "hardware may not keep what is written"]
pub enum Changed {
    /// The bits read as wanted.
    Kept,
    /// Some do not.
    Differs {
        /// What was written.
        written: u32,
        /// What it reads.
        found: u32,
    },
    /// The register reads all ones: no device answers.
    Silent,
}

impl Changed {
    /// An error unless the bits read as wanted; `what` names them.
    pub fn kept(self, what: &str) -> io::Result<()> {
        match self {
            Self::Kept => Ok(()),
            Self::Differs { written, found } => {
                Err(io::Error::other(format!("{what} reads {found:#x} after {written:#x} was written")))
            }
            Self::Silent => Err(io::Error::other(format!("{what} reads all ones"))),
        }
    }

    /// The same, where a device that does not answer is no failure.
    pub fn kept_or_silent(self, what: &str) -> io::Result<()> {
        match self {
            Self::Silent => Ok(()),
            other => other.kept(what),
        }
    }
}

/// A register of a capability at `capability`, `size` bytes at `register` in it.
pub fn register(capability: u16, register: u16, size: u16) -> Result<Access, AccessError> {
    Access::new(u32::from(capability) + u32::from(register), size.into())
}

/// Clears and sets bits of a register; nothing is written where they are so.
pub fn change(config: &dyn ConfigSpace, access: Access, clear: u32, set: u32) -> io::Result<Changed> {
    let before = config.read(access)?;
    match before == access.width().mask() {
        true => Ok(Changed::Silent),
        false if before & (clear | set) == set => Ok(Changed::Kept),
        false => write(config, access, before & !clear | set, clear | set),
    }
}

/// Clears and sets bits of a register and writes it in any case: software that traps the write sees the wanted value.
pub fn rewrite(config: &dyn ConfigSpace, access: Access, clear: u32, set: u32) -> io::Result<Changed> {
    let before = config.read(access)?;
    match before == access.width().mask() {
        true => Ok(Changed::Silent),
        false => write(config, access, before & !clear | set, clear | set),
    }
}

/// Writes a register and reads it back; `mask`: the bits that count.
fn write(config: &dyn ConfigSpace, access: Access, value: u32, mask: u32) -> io::Result<Changed> {
    config.write(access, value)?;
    let found = config.read(access)?;
    Ok(match (found ^ value) & mask == 0 {
        true => Changed::Kept,
        false if found == access.width().mask() => Changed::Silent,
        false => Changed::Differs { written: value, found },
    })
}

#[cfg(test)]
mod tests;
