//! Putting addresses back into BARs that lost them.

use std::io;

use super::{COMMAND, change};
use crate::config::{Access, ConfigSpace};
use crate::platform::{HostFunction, Resource};
use crate::spec::header;

/// A BAR register that did not hold the address that the host gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LostBar {
    /// The register.
    pub offset: u16,
    /// What it held.
    pub found: u32,
}

/// The bits of a BAR that say what it is (PCI Express 6.0, section 7.5.1.2.1).
const MEMORY_KIND: u32 = 0xf;
const IO_KIND: u32 = 0x3;

/// Writes the addresses that the host gave the BARs back where the registers have lost them, and returns which had: a reset of the
/// link, as Linux begins one when an error was fatal, takes them. A VF has none: its PF places its BARs.
pub fn place_bars(config: &dyn ConfigSpace, function: &HostFunction) -> io::Result<Vec<LostBar>> {
    let mut lost = Vec::new();
    if function.physical_function.is_some() {
        return Ok(lost);
    }
    let mut wanted = Vec::new();
    for (index, bar) in (0u16..).zip(function.bars()) {
        if !bar.exists() || bar.start == 0 {
            continue;
        }
        let registers = if bar.flags & Resource::MEMORY_64 != 0 { 2 } else { 1 };
        let kind = if bar.is_io() { IO_KIND } else { MEMORY_KIND };
        for (part, kind) in [(0, kind), (1, 0)].into_iter().take(registers) {
            let offset = header::BAR0 + 4 * (index + part);
            let access = Access::new(offset.into(), 4).map_err(io::Error::other)?;
            let expected = (bar.start >> (32 * u32::from(part))) as u32;
            let found = config.read(access)?;
            if found & !kind != expected {
                lost.push(LostBar { offset, found });
                wanted.push((access, expected, kind));
            }
        }
    }
    if lost.is_empty() {
        return Ok(lost);
    }
    // Nothing decodes half an address.
    let command = config.read(COMMAND)?;
    let decoding = u32::from(header::COMMAND_IO | header::COMMAND_MEMORY);
    change(config, COMMAND, decoding, 0)?.kept("Command")?;
    for (access, expected, kind) in wanted {
        config.write(access, expected)?;
        let found = config.read(access)? & !kind;
        if found != expected {
            let offset = access.offset();
            return Err(io::Error::other(format!(
                "its BAR register {offset:#x} reads {found:#x} after {expected:#x} was written"
            )));
        }
    }
    config.write(COMMAND, command)?;
    Ok(lost)
}
