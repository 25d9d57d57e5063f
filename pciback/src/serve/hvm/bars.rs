//! Where an HVM guest has placed a function's BARs, and which of their pages it reaches directly. Pure.

use std::ops::Range;

use super::{ECAM_BASE, ECAM_BYTES};
use crate::config::{Bar, BarKind, BarPart, GUEST_END, MsixCapability};
use crate::platform::PAGE;
use crate::spec::header;

/// The guest's interrupt controllers, Xen's own pages and the BIOS; and the window to extended config space, which the service answers.
const RESERVED: [Range<u64>; 2] = [0xfec0_0000..0x1_0000_0000, ECAM_BASE..ECAM_BASE + ECAM_BYTES];

/// The address at which the guest wants a BAR, by the values of its register (pair) and of Command; `None` where it does not decode.
/// A register that holds the result of sizing places nothing, nor does 0.
pub fn placed(bar: &Bar, register: u64, command: u16) -> Option<u64> {
    let enable = if bar.kind == BarKind::Io { header::COMMAND_IO } else { header::COMMAND_MEMORY };
    if bar.kind == BarKind::Rom && register & u64::from(header::ROM_ENABLE) == 0 {
        return None;
    }
    let address = register & bar.address_mask();
    let end = address.checked_add(bar.size)?;
    let possible = match bar.kind {
        BarKind::Io => end <= 0x1_0000,
        BarKind::Memory32 | BarKind::Memory64 | BarKind::Rom => {
            end <= GUEST_END && RESERVED.iter().all(|range| end <= range.start || address >= range.end)
        }
    };
    (command & enable != 0 && address != 0 && possible).then_some(address)
}

/// Part of a memory BAR: from an offset, so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Where it begins in the BAR.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// How the parts of a memory BAR reach the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Parts {
    /// Whole pages, mapped.
    pub mapped: Vec<Part>,
    /// Whole pages, or a BAR that is smaller than one: each access is carried out by the service.
    pub trapped: Vec<Part>,
}

/// What of a memory BAR is mapped and what is trapped: the pages with the MSI-X table and its pending bits, BARs that do not
/// fill whole pages, because the rest of the page belongs to others, and the ROM, of which the service has a copy.
pub fn parts(bar: &Bar, msix: Option<&MsixCapability>) -> Parts {
    let mut parts = Parts::default();
    if bar.kind == BarKind::Rom || !bar.start.is_multiple_of(PAGE) || !bar.size.is_multiple_of(PAGE) {
        parts.trapped.push(Part { offset: 0, bytes: bar.size });
        return parts;
    }
    let structures = msix.into_iter().flat_map(|msix| [msix.table(), msix.pba()]);
    let special: Vec<Part> = structures.filter_map(|structure| part_of(bar, structure)).collect();
    let mut next = 0;
    let mut pages: Vec<(u64, u64)> = special
        .iter()
        .map(|part| (part.offset / PAGE * PAGE, (part.offset + part.bytes).next_multiple_of(PAGE)))
        .collect();
    pages.sort_unstable();
    for (begin, end) in pages {
        let (begin, end) = (begin.max(next), end.min(bar.size));
        if begin >= end {
            continue;
        }
        if begin > next {
            parts.mapped.push(Part { offset: next, bytes: begin - next });
        }
        parts.trapped.push(Part { offset: begin, bytes: end - begin });
        next = end;
    }
    if next < bar.size {
        parts.mapped.push(Part { offset: next, bytes: bar.size - next });
    }
    parts
}

/// The part of this BAR that a structure of MSI-X takes.
pub fn part_of(bar: &Bar, structure: BarPart) -> Option<Part> {
    let BarPart { bar: index, offset, bytes } = structure;
    (index == bar.index).then_some(Part { offset, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(kind: BarKind, start: u64, size: u64) -> Bar {
        Bar { index: 3, kind, prefetchable: false, start, size }
    }

    fn msix(table_offset: u32, pba_offset: u32, table_size: u16) -> MsixCapability {
        MsixCapability { offset: 0x70, table_size, table_bar: 3, table_offset, pba_bar: 3, pba_offset }
    }

    #[test]
    fn a_bar_is_placed_when_it_decodes_and_not_while_it_is_sized() {
        let wide = bar(BarKind::Memory64, 0xfe80_0000, 0x4000);
        assert_eq!(placed(&wide, 0xf305_000c, 2), Some(0xf305_0000));
        assert_eq!(placed(&wide, 0x12_f305_000c, 2), Some(0x12_f305_0000));
        assert_eq!(placed(&wide, 0xf305_000c, 5), None);
        assert_eq!(placed(&wide, 0x0000_000c, 2), None);
        // Sizing: the lower half, the upper half, both.
        for register in [0xffff_c00c, 0xffff_ffff_f305_000c, 0xffff_ffff_ffff_c00c, 0xffff_ffff_0000_000c] {
            assert_eq!(placed(&wide, register, 2), None, "{register:#x}");
        }
        assert_eq!(placed(&wide, 0xfdff_c00c, 2), Some(0xfdff_c000));
        for register in [0xfee0_000c, 0xfec0_000c, 0xfe00_000c, 0xfe0f_c00c] {
            assert_eq!(placed(&wide, register, 2), None, "{register:#x}");
        }
        let port = bar(BarKind::Io, 0xc000, 0x20);
        assert_eq!(placed(&port, 0xc101, 1), Some(0xc100));
        assert_eq!(placed(&port, 0xffff_ffe1, 1), None);
        assert_eq!(placed(&port, 0xc101, 2), None);
    }

    #[test]
    fn a_rom_is_placed_when_both_its_own_enable_bit_and_memory_decoding_are_set() {
        let rom = bar(BarKind::Rom, 0, 0x1_0000);
        assert_eq!(placed(&rom, 0xf300_0001, 2), Some(0xf300_0000));
        for (register, command) in [(0xf300_0000, 2), (0xf300_0001, 5), (0xffff_0001, 2), (0x0000_0001, 2)] {
            assert_eq!(placed(&rom, register, command), None, "{register:#x}, {command}");
        }
        let large = bar(BarKind::Rom, 0, 16 << 20);
        assert_eq!(placed(&large, 0xff00_0001, 2), None, "while it is sized");
        let found = parts(&rom, None);
        assert_eq!((ranges(&found.trapped), found.mapped), (vec![(0, 0x1_0000)], vec![]));
    }

    fn ranges(parts: &[Part]) -> Vec<(u64, u64)> {
        parts.iter().map(|part| (part.offset, part.bytes)).collect()
    }

    #[test]
    fn pages_with_the_msix_table_and_small_bars_are_trapped() {
        let whole = bar(BarKind::Memory64, 0xfe82_0000, 0x4000);
        let found = parts(&whole, Some(&msix(0, 0x2000, 3)));
        assert_eq!(ranges(&found.trapped), [(0, 0x1000), (0x2000, 0x1000)]);
        assert_eq!(ranges(&found.mapped), [(0x1000, 0x1000), (0x3000, 0x1000)]);
        // Both on one page; a table that reaches over the end of the BAR; overlapping nonsense.
        let found = parts(&whole, Some(&msix(0x3000, 0x3800, 64)));
        assert_eq!(
            (ranges(&found.trapped), ranges(&found.mapped)),
            (vec![(0x3000, 0x1000)], vec![(0, 0x3000)])
        );
        let found = parts(&whole, Some(&msix(0x1ff0, 0xffff_fff8, 2048)));
        assert_eq!(
            (ranges(&found.trapped), ranges(&found.mapped)),
            (vec![(0x1000, 0x3000)], vec![(0, 0x1000)])
        );
        let found = parts(&Bar { index: 0, ..whole }, Some(&msix(0, 0x2000, 3)));
        assert_eq!((ranges(&found.trapped), ranges(&found.mapped)), (vec![], vec![(0, 0x4000)]));
        for (start, size) in [(0xfe00_0100, 0x100), (0xfe00_0000, 0x800), (0xfe00_0800, 0x1000)] {
            let small = parts(&bar(BarKind::Memory32, start, size), None);
            assert_eq!((ranges(&small.trapped), small.mapped), (vec![(0, size)], vec![]));
        }
    }
}
