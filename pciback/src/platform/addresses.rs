//! Which addresses of the host are RAM.

use super::{Cause, PlatformError, Result};

/// A range of the host's memory that is RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamRange {
    /// The first address.
    pub first: u64,
    /// The last one.
    pub last: u64,
    /// What the kernel calls it.
    pub name: String,
}

/// What the kernel calls RAM: its own, and what Xen keeps from dom0.
const RAM: [&str; 2] = ["System RAM", "Unusable memory"];
/// More lines than any host has.
const LINES: usize = 1 << 20;

impl RamRange {
    /// Reads `/proc/iomem`. To anybody but root it shows no addresses, which is an error.
    pub fn parse_all(text: &str) -> Result<Vec<Self>> {
        let malformed = |why: &str| {
            PlatformError::new("read", "the kernel's map of memory", Cause::Malformed(why.to_owned()))
        };
        let ranges: Option<Vec<Self>> = text.lines().take(LINES).map(Self::parse).collect();
        let ranges = ranges.ok_or_else(|| malformed("a line is no range with a name"))?;
        if ranges.iter().all(|range| range.last == 0) {
            return Err(malformed("it shows no addresses, as to a process without privileges"));
        }
        Ok(ranges.into_iter().filter(|range| RAM.contains(&range.name.as_str())).collect())
    }

    fn parse(line: &str) -> Option<Self> {
        let (range, name) = line.split_once(" : ")?;
        let (first, last) = range.trim().split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let range = Self { first: number(first)?, last: number(last)?, name: name.to_owned() };
        (range.first <= range.last).then_some(range)
    }

    /// Whether they have an address in common.
    pub const fn overlaps(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_what_the_kernel_calls_so() {
        let map = "00001000-0009ffff : System RAM\n40000000-7fffffff : Unusable memory\nfe800000-fe9fffff : PCI Bus 0000:01\n  \
                   fe800000-fe81ffff : 0000:01:00.0\n";
        let ram = RamRange::parse_all(map).unwrap();
        let firsts: Vec<u64> = ram.iter().map(|range| range.first).collect();
        assert_eq!(firsts, [0x1000, 0x4000_0000]);
        assert!(ram[0].overlaps(0x9_f000, 0xa_0fff) && !ram[0].overlaps(0xa_0000, 0xa_0fff));
    }

    #[test]
    fn a_map_without_addresses_or_of_another_form_is_an_error() {
        assert!(RamRange::parse_all("00000000-00000000 : System RAM\n").is_err());
        for text in ["", "nonsense", "10-f : reversed", "zz-ff : x", "10-20 no name"] {
            assert!(RamRange::parse_all(text).is_err(), "{text}");
        }
    }
}
