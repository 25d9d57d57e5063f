//! Lists as no device should have them, and why lspci says something else of some.

use pciback::config::CapabilityList;
use pciback::dump::DumpedFunction;

use crate::composer::Composer;

/// A config space with something wrong.
pub struct Malformed {
    pub name: &'static str,
    pub function: DumpedFunction,
    /// Offsets that lspci prints and we do not list, offsets that we list and lspci does not print, and why.
    pub differs: Option<(&'static [u16], &'static [u16], &'static str)>,
    /// What we must report, in its own words; `""` for what is not wrong.
    pub problem: &'static str,
}

/// lspci follows a pointer to any place but 0; it then reads the header's registers as a capability.
const INTO_THE_HEADER: &str =
    "no capability can be in the header (PCI 3.0, 6.7; PCI Express 6.0, 7.6.1): we end the list";

fn same(composer: Composer, problem: &'static str) -> Malformed {
    let (name, function) = composer.finish();
    Malformed { name, function, differs: None, problem }
}

fn differs(
    composer: Composer,
    problem: &'static str,
    theirs: &'static [u16],
    ours: &'static [u16],
    reason: &'static str,
) -> Malformed {
    Malformed { differs: Some((theirs, ours, reason)), ..same(composer, problem) }
}

fn conventional(name: &'static str) -> Composer {
    Composer::new(name, 256, 0, 0xff_0000)
}

fn express(name: &'static str) -> Composer {
    Composer::express(name, 0xff_0000)
}

/// All of them.
pub fn all() -> Vec<Malformed> {
    let mut all = legacy();
    all.extend(extended());
    all.extend(whole());
    all
}

fn legacy() -> Vec<Malformed> {
    let two = |name| conventional(name).legacy(0x40, 0x01, &[3, 0, 0, 0, 0, 0]).legacy(0x50, 0x05, &[0, 0]);
    vec![
        same(two("legacy-loop").legacy_next(0x40), "leads back to 0x40"),
        same(two("legacy-loop-of-one").legacy_next(0x50), "leads back to 0x50"),
        same(two("legacy-misaligned").legacy(0x60, 0x09, &[4, 0]).put8(0x51, 0x63), "low bits"),
        same(two("legacy-first-misaligned").put8(0x34, 0x42), "low bits"),
        // The byte at 0x0c is the cache line size; the one behind it ends the list that lspci sees.
        differs(
            two("legacy-into-the-header").legacy_next(0x0c),
            "no capability",
            &[0x0c],
            &[],
            INTO_THE_HEADER,
        ),
        differs(
            conventional("legacy-first-into-the-header").put8(6, 0x10).put8(0x34, 0x3c),
            "no capability",
            &[0x3c],
            &[],
            INTO_THE_HEADER,
        ),
        same(two("legacy-all-ones").legacy_next(0x80).put32(0x80, u32::MAX), "all ones"),
        same(
            conventional("legacy-first-all-ones").put8(6, 0x10).put8(0x34, 0x80).put32(0x80, u32::MAX),
            "all ones",
        ),
        same(two("legacy-overlap").legacy(0x44, 0x11, &[3, 0]), "belong to another"),
        same(two("legacy-runs-over-the-end").legacy(0xfc, 0x11, &[3, 0]), "more than there are"),
        same(two("legacy-behind-the-bytes").cut(64), "behind the bytes"),
        same(two("legacy-without-the-status-bit").put8(6, 0), ""),
        same(conventional("legacy-empty").put8(6, 0x10), ""),
        same(conventional("legacy-null-only").legacy(0x40, 0, &[0, 0]), ""),
    ]
}

fn extended() -> Vec<Malformed> {
    let two = |name| express(name).extended(0x100, 0x0e, 1, &[0]).extended(0x200, 0x03, 1, &[1, 2]);
    vec![
        same(two("extended-loop").extended_next(0x200, 0x100), "leads back to 0x100"),
        same(two("extended-loop-of-one").extended_next(0x200, 0x200), "leads back to 0x200"),
        same(
            two("extended-misaligned").extended(0x300, 0x18, 1, &[0]).extended_next(0x200, 0x303),
            "low bits",
        ),
        differs(
            two("extended-into-the-header").extended_next(0x200, 0x0c),
            "no capability",
            // Cache line size, latency, header type and BIST are 0 and read as the end of the list.
            &[],
            &[],
            INTO_THE_HEADER,
        ),
        differs(
            two("extended-into-the-first-256").extended_next(0x200, 0x40),
            "no capability",
            &[0x40],
            &[],
            "extended capabilities start at 100h (PCI Express 6.0, 7.6.1): we end the list, lspci reads another kind",
        ),
        same(two("extended-all-ones").extended_next(0x200, 0x300).put32(0x300, u32::MAX), "all ones"),
        differs(
            two("extended-zeros").extended_next(0x200, 0x300),
            "",
            &[],
            &[0x300],
            "only the first header of 0 says that there is no list (PCI Express 6.0, 7.6.2); a later one is a null \
             capability that ends it, which lspci does not print",
        ),
        same(express("extended-first-null-alone").put32(0x100, 0), ""),
        same(express("extended-first-null-with-version").put32(0x100, 0x0001_0000), ""),
        same(
            express("extended-first-null-not-terminated")
                .extended(0x100, 0, 0, &[])
                .extended(0x180, 0, 0, &[])
                .extended_next(0x180, 0x100),
            "leads back to 0x100",
        ),
        same(express("extended-first-all-ones").put32(0x100, u32::MAX), ""),
        same(two("extended-overlap").extended(0x104, 0x01, 2, &[]), "belong to another"),
        same(two("extended-runs-over-the-end").extended(0xffc, 0x18, 1, &[]), "more than there are"),
        same(two("extended-cut").cut(256), ""),
        differs(
            Composer::new("extended-without-express", 4096, 0, 0xff_0000)
                .legacy(0x40, 0x05, &[0, 0])
                .extended(0x100, 0x03, 1, &[1, 2]),
            "",
            &[],
            &[0x100],
            "the host showed 4096 bytes, so they exist; lspci looks only behind a PCI Express or PCI-X capability",
        ),
    ]
}

fn whole() -> Vec<Malformed> {
    let mut ones = conventional("all-ones");
    for at in (0..256).step_by(4) {
        ones = ones.put32(at, u32::MAX);
    }
    vec![
        differs(
            ones,
            "all ones",
            &[],
            &[],
            "the header type reads 7f, of which lspci lists nothing; we say that nobody answers",
        ),
        same(conventional("all-zeros").put32(0, 0).put32(4, 0).put32(8, 0), ""),
        differs(
            conventional("unknown-header-type").legacy(0x40, 0x05, &[0, 0]).put8(0x0e, 0x05),
            "",
            &[],
            &[0x40],
            "lspci lists nothing of a header that it does not know; we read the pointer where types 0 and 1 have it, and \
             Filter::compile refuses the function",
        ),
    ]
}

/// Crowding is found by the compiler, the rest by the walk.
pub fn problems(function: &DumpedFunction) -> Vec<String> {
    let list = CapabilityList::walk(&function.bytes);
    let mut problems: Vec<String> = list.problems.iter().map(ToString::to_string).collect();
    let filter =
        pciback::config::Filter::compile(&crate::walks::spec(function), &pciback::config::Policy::default());
    problems.extend(filter.iter().flat_map(|filter| filter.problems()).map(ToString::to_string));
    problems
}
