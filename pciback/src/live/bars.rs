//! Putting addresses back into BARs that lost them.

use std::io;

use super::{COMMAND, Changed, change};
use crate::config::{Access, Bar, BarKind, ConfigSpace};
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

/// Where the host has placed a BAR that has registers of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlacedBar {
    offset: u16,
    io: bool,
    wide: bool,
    start: u64,
}

impl PlacedBar {
    /// The BARs that the host has placed. A VF has none of its own: its PF places its BARs.
    pub fn of_host(function: &HostFunction) -> Vec<Self> {
        if function.physical_function.is_some() {
            return Vec::new();
        }
        let bars = (0u16..).zip(function.bars()).filter(|(_, bar)| bar.is_placed());
        bars.map(|(index, bar)| Self {
            offset: header::BAR0 + 4 * index,
            io: bar.is_io(),
            wide: bar.flags & Resource::MEMORY_64 != 0,
            start: bar.start,
        })
        .collect()
    }

    /// The same of BARs as a guest is shown them.
    pub fn of_guest(bars: &[Bar]) -> Vec<Self> {
        let bars = bars.iter().filter(|bar| bar.kind != BarKind::Rom && bar.start != 0);
        bars.map(|bar| Self {
            offset: bar.offset(),
            io: bar.kind == BarKind::Io,
            wide: bar.kind == BarKind::Memory64,
            start: bar.start,
        })
        .collect()
    }
}

/// Sets Memory and I/O Space Enable as the placed BARs need them: an access to a BAR that is not decoded causes an Unsupported
/// Request (section 2.3.1), which may be fatal for the host.
pub fn decode_bars(config: &dyn ConfigSpace, bars: &[PlacedBar]) -> io::Result<Changed> {
    let bit = |bar: &PlacedBar| if bar.io { header::COMMAND_IO } else { header::COMMAND_MEMORY };
    let needed = bars.iter().fold(0, |bits, bar| bits | bit(bar));
    change(config, COMMAND, 0, needed.into())
}

/// Writes the addresses that the host gave the BARs back where the registers have lost them, and returns which had: a reset of the
/// link, as Linux begins one when an error was fatal, takes them, and so does a reset that the guest's driver makes by the
/// device's own registers.
pub fn place_bars(config: &dyn ConfigSpace, bars: &[PlacedBar]) -> io::Result<Vec<LostBar>> {
    let mut lost = Vec::new();
    let mut wanted = Vec::new();
    for bar in bars {
        let registers = if bar.wide { 2 } else { 1 };
        let kind = if bar.io { IO_KIND } else { MEMORY_KIND };
        for (part, kind) in [(0u16, kind), (1, 0)].into_iter().take(registers) {
            let offset = bar.offset + 4 * part;
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
