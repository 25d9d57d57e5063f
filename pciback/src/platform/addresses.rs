//! What the host has at its memory addresses and I/O ports.

use super::{Cause, PAGE, PlatformError, Resource, Result};
use crate::Sbdf;

/// A range of addresses, as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressRange {
    /// The first address.
    pub first: u64,
    /// The last one.
    pub last: u64,
    /// What the kernel calls it: a function's address for a BAR, a driver's name for what it claims.
    pub name: String,
}

/// All ranges of one kind, each behind those that it lies within.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressMap(Vec<AddressRange>);

/// Why a guest must not be given a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Foreign<'a> {
    /// The kernel does not list it as this function's.
    NotListed,
    /// Something else is there.
    Occupied(&'a AddressRange),
}

/// What the kernel calls RAM: its own, what Xen keeps from dom0, what firmware keeps its tables in, and what keeps its content.
const RAM: [&str; 7] = [
    "System RAM",
    "Unusable memory",
    "ACPI Tables",
    "ACPI Non-volatile Storage",
    "Persistent Memory",
    "Persistent Memory (legacy)",
    "Soft Reserved",
];
/// What firmware has marked, which does not show that any part of a BAR is in use.
const RESERVED: &str = "reserved";
/// Windows of bridges: ranges in which functions lie.
const WINDOW: &str = "PCI Bus ";
/// More lines than any host has.
const LINES: usize = 1 << 20;

impl AddressMap {
    /// Reads `/proc/iomem` or `/proc/ioports`. To anybody but root they show no addresses, which is an error.
    pub fn parse(what: &'static str, text: &str) -> Result<Self> {
        let malformed = |why: &str| PlatformError::new("read", what, Cause::Malformed(why.to_owned()));
        let ranges: Option<Vec<_>> = text.lines().take(LINES).map(AddressRange::parse).collect();
        let ranges = ranges.ok_or_else(|| malformed("a line is no range with a name"))?;
        if ranges.iter().all(|range| range.last == 0) {
            return Err(malformed("it shows no addresses, as to a process without privileges"));
        }
        Ok(Self(ranges))
    }

    /// What keeps a guest from being given a BAR of a function: memory in whole pages, ports exactly. Other functions' BARs are not
    /// reported; this map does not show which functions own them.
    pub fn foreign(&self, function: Sbdf, bar: &Resource) -> Option<Foreign<'_>> {
        let (first, last) = (bar.start, bar.start.saturating_add(bar.size.saturating_sub(1)));
        let (from, to) = if bar.is_io() { (first, last) } else { (first / PAGE * PAGE, last | (PAGE - 1)) };
        if let Some(ram) = self.0.iter().find(|range| range.is_ram() && range.overlaps(from, to)) {
            return Some(Foreign::Occupied(ram));
        }
        let is_own = |range: &AddressRange| {
            (range.first, range.last) == (first, last) && range.name.parse() == Ok(function)
        };
        let Some(own) = self.0.iter().position(is_own) else { return Some(Foreign::NotListed) };
        let is_foreign = |(index, range): &(usize, &AddressRange)| {
            // What is listed before it and contains it is what it lies within.
            let surrounds = *index < own && range.first <= first && last <= range.last;
            let is_mark =
                first <= range.first && range.last <= last && range.name.eq_ignore_ascii_case(RESERVED);
            range.overlaps(from, to)
                && !surrounds
                && !is_mark
                && !range.name.starts_with(WINDOW)
                && range.name.parse::<Sbdf>().is_err()
        };
        self.0.iter().enumerate().find(is_foreign).map(|(_, range)| Foreign::Occupied(range))
    }
}

/// The first of a function's BARs, or its expansion ROM, that a guest must not be given, and why.
pub fn foreign_bar<'a>(
    function: Sbdf,
    bars: &[Resource],
    memory: &'a AddressMap,
    ports: &'a AddressMap,
) -> Option<(Resource, Foreign<'a>)> {
    let placed = bars.iter().filter(|bar| bar.is_placed());
    placed.into_iter().find_map(|bar| {
        let map = if bar.is_io() { ports } else { memory };
        map.foreign(function, bar).map(|why| (*bar, why))
    })
}

impl AddressRange {
    fn parse(line: &str) -> Option<Self> {
        let (range, name) = line.split_once(" : ")?;
        let (first, last) = range.trim().split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let range = Self { first: number(first)?, last: number(last)?, name: name.to_owned() };
        (range.first <= range.last).then_some(range)
    }

    fn is_ram(&self) -> bool {
        RAM.contains(&self.name.as_str())
    }

    const fn overlaps(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FUNCTION: Sbdf = Sbdf::from_devfn(0, 1, 0);

    /// A BAR of 256 bytes at fe800400, with a map that has `more` behind it.
    fn found(more: &str) -> Option<String> {
        let text = format!(
            "00001000-0009ffff : System RAM\nfe800000-fe9fffff : PCI Bus 0000:01\n  fe800400-fe8004ff : 0000:01:00.0\n{more}"
        );
        let map = AddressMap::parse("map", &text).unwrap();
        let bar = Resource { start: 0xfe80_0400, size: 0x100, flags: Resource::MEMORY };
        map.foreign(FUNCTION, &bar).map(|why| match why {
            Foreign::NotListed => "not listed".to_owned(),
            Foreign::Occupied(range) => range.name.clone(),
        })
    }

    #[test]
    fn a_bar_in_a_page_with_nothing_but_functions_may_be_given() {
        for more in [
            "",
            "  fe800800-fe8008ff : 0000:01:00.1\n",
            "    fe800400-fe80043f : Reserved\n",
            "fe801000-fe801fff : HPET 0\n",
        ] {
            assert_eq!(found(more), None, "{more}");
        }
    }

    #[test]
    fn what_else_is_in_the_page_of_a_bar_keeps_it_from_guests() {
        for (more, name) in [
            ("  fe800c00-fe800fff : IOAPIC 1\n", "IOAPIC 1"),
            ("  fe800000-fe8003ff : Reserved\n", "Reserved"),
            // A driver's claim of the whole BAR.
            ("    fe800400-fe8004ff : efifb\n", "efifb"),
            ("fe800f00-fe800fff : ACPI Tables\n", "ACPI Tables"),
        ] {
            assert_eq!(found(more).as_deref(), Some(name));
        }
    }

    #[test]
    fn what_the_kernel_lists_as_another_functions_or_not_at_all_is_not_given() {
        let map =
            AddressMap::parse("map", "fe800000-fe800fff : 0000:02:00.0\nc000-c01f : 0000:01:00.0\n").unwrap();
        let bar = |start, size, flags| Resource { start, size, flags };
        let foreign = |bar| map.foreign(FUNCTION, &bar);
        assert_eq!(foreign(bar(0xfe80_0000, 0x1000, Resource::MEMORY)), Some(Foreign::NotListed));
        assert_eq!(foreign(bar(0xd000, 0x20, Resource::IO)), Some(Foreign::NotListed));
        assert_eq!(foreign(bar(0xc000, 0x40, Resource::IO)), Some(Foreign::NotListed), "longer than it is");
        assert_eq!(foreign(bar(0xc000, 0x20, Resource::IO)), None);
    }

    #[test]
    fn a_map_without_addresses_or_of_another_form_is_an_error() {
        assert!(AddressMap::parse("map", "00000000-00000000 : System RAM\n").is_err());
        for text in ["", "nonsense", "10-f : reversed", "zz-ff : x", "10-20 no name"] {
            assert!(AddressMap::parse("map", text).is_err(), "{text}");
        }
    }
}
