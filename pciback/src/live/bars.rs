//! Putting addresses back into BARs that lost them, and switching the decoder of the expansion ROM off.

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
/// The bits of the expansion ROM's register that are no address: Enable among them (section 7.5.1.2.4).
const ROM_KIND: u32 = 0x7ff;
/// Expansion ROM Base Address.
const ROM: Access = Access::fixed::<{ header::ROM }, 4>();

/// Where the host has placed a BAR that has registers of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlacedBar {
    offset: u16,
    kind: BarKind,
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
            kind: match (bar.is_io(), bar.flags & Resource::MEMORY_64 != 0) {
                (true, _) => BarKind::Io,
                (false, true) => BarKind::Memory64,
                (false, false) => BarKind::Memory32,
            },
            start: bar.start,
        })
        .collect()
    }

    /// The expansion ROM, at the address that the host gave it.
    pub const fn of_rom(rom: &Resource) -> Self {
        Self { offset: header::ROM, kind: BarKind::Rom, start: rom.start }
    }

    /// The same of BARs as a guest is shown them, the function's own expansion ROM included where the guest has it.
    pub fn of_guest(bars: &[Bar]) -> Vec<Self> {
        let bars = bars.iter().filter(|bar| bar.start != 0);
        bars.map(|bar| Self { offset: bar.offset(), kind: bar.kind, start: bar.start }).collect()
    }

    /// The bits of its (first) register that are no address.
    const fn kind_bits(&self) -> u32 {
        match self.kind {
            BarKind::Io => IO_KIND,
            BarKind::Memory32 | BarKind::Memory64 => MEMORY_KIND,
            BarKind::Rom => ROM_KIND,
        }
    }
}

/// Sets Memory and I/O Space Enable as the placed BARs need them: an access to a BAR that is not decoded causes an Unsupported
/// Request (section 2.3.1), which may be fatal for the host.
pub fn decode_bars(config: &dyn ConfigSpace, bars: &[PlacedBar]) -> io::Result<Changed> {
    let bit = |bar: &PlacedBar| match bar.kind {
        BarKind::Io => header::COMMAND_IO,
        _ => header::COMMAND_MEMORY,
    };
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
        let registers = if bar.kind == BarKind::Memory64 { 2 } else { 1 };
        for (part, kind) in [(0u16, bar.kind_bits()), (1, 0)].into_iter().take(registers) {
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

/// Clears Enable of the expansion ROM, which dom0's kernel sets whenever it reads the ROM. A VF's register is hardwired to 0 (section
/// 9.3.4.1); what answers all ones decodes nothing.
pub fn disable_rom(config: &dyn ConfigSpace) -> io::Result<()> {
    change(config, ROM, header::ROM_ENABLE, 0)?.kept_or_silent("Expansion ROM Enable")
}
