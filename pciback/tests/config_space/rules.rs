//! The built-in rules as text: a change of any row changes `rules.txt`. `XPCI_BLESS=1 cargo test` writes it anew; read the
//! difference before it is committed.

use std::fmt::Write;

use pciback::config::{
    AnyId, CapabilityAction, CapabilityOverride, Filter, FunctionSpec, Origin, Policy, Rule,
};
use pciback::spec;
use xpci_test_support::reviewed;

use crate::devices;

/// A function with one capability, at 0x40 or 0x100, whose first dword's upper half (the version, in extended space) and
/// other dwords are given.
pub fn alone(id: AnyId, first_word: u16, dwords: &[(usize, u32)]) -> FunctionSpec {
    let mut spec = devices::virtio().spec;
    spec.bytes.resize(4096, 0);
    spec.bytes[0x40..].fill(0);
    let (at, header) = match id {
        AnyId::Legacy(id) => (0x40, u32::from(id.0)),
        AnyId::Extended(id) => (0x100, u32::from(id.0)),
    };
    spec.bytes[0x34] = 0x40;
    spec.bytes[0x06] = if at == 0x40 { 0x10 } else { 0 };
    for (offset, value) in [(0, header | u32::from(first_word) << 16)].iter().chain(dwords) {
        spec.bytes[at + offset..at + offset + 4].copy_from_slice(&value.to_le_bytes());
    }
    spec
}

/// The layouts that a capability has: the upper half of its first dword, and other dwords.
pub type Variant = (u16, &'static [(usize, u32)]);

/// At least one for each capability, with two of what it repeats.
pub fn variants(id: AnyId) -> &'static [Variant] {
    use pciback::spec::{CapabilityId as Legacy, ExtendedCapabilityId as Extended};
    match id {
        AnyId::Legacy(Legacy::MSI) => &[(0x0, &[]), (0x80, &[]), (0x100, &[]), (0x18a, &[])],
        // The table and the PBA are in the BAR that has memory, apart from each other.
        AnyId::Legacy(Legacy::MSI_X) => &[(0, &[(4, 0x001), (8, 0x801)])],
        AnyId::Legacy(Legacy::PCI_EXPRESS) => &[(1, &[(4, 1 << 28)]), (2, &[(4, 1 << 28)])],
        AnyId::Legacy(Legacy::ADVANCED_FEATURES) => &[(0x0306, &[])],
        AnyId::Legacy(Legacy::VENDOR_SPECIFIC) => &[(0x10, &[])],
        AnyId::Legacy(Legacy::PCI_X) => &[(0, &[]), (0x2000, &[])],
        AnyId::Legacy(Legacy::SATA) => &[(0x10, &[(4, 0x4)]), (0x10, &[(4, 0xf)])],
        // Entries of three and of five dwords.
        AnyId::Legacy(Legacy::ENHANCED_ALLOCATION) => &[(2, &[(4, 2), (0x10, 4)])],
        AnyId::Legacy(Legacy::HYPER_TRANSPORT) => &[
            (0x0000, &[]),
            (0x2000, &[]),
            (0x4000, &[]),
            (0x8000, &[]),
            (0x8800, &[]),
            (0x9000, &[]),
            (0x9800, &[]),
            (0xa002, &[]),
            (0xa200, &[]),
            (0xa800, &[]),
            (0xa802, &[]),
            (0xb000, &[]),
            (0xb800, &[]),
            (0xc000, &[]),
            (0xd000, &[]),
        ],
        AnyId::Legacy(_) => &[(0, &[])],
        AnyId::Extended(Extended::AER) => &[(2, &[]), (3, &[(0x18, 0x1_c000)])],
        AnyId::Extended(Extended::VENDOR_SPECIFIC) => &[(1, &[(4, 0x0201_0001)])],
        AnyId::Extended(Extended::DVSEC) => &[(1, &[(4, 0x0201_1e98)])],
        AnyId::Extended(Extended::ACS) => &[(1, &[]), (1, &[(4, 0x4020)])],
        AnyId::Extended(Extended::TPH_REQUESTER) => &[(1, &[(4, 0x0003_0400)]), (1, &[(4, 0x0003_0200)])],
        AnyId::Extended(Extended::RESIZABLE_BAR | Extended::VF_RESIZABLE_BAR) => &[(1, &[(8, 2 << 5)])],
        // The first has two channels and a table for each kind of arbitration.
        AnyId::Extended(Extended::VIRTUAL_CHANNEL | Extended::VIRTUAL_CHANNEL_MFVC | Extended::MFVC) => {
            &[(1, &[(4, 1), (8, 3 << 24), (0x1c, 7 << 24)]), (1, &[])]
        }
        AnyId::Extended(Extended::RC_LINK_DECLARATION) => &[(1, &[(4, 2 << 8)])],
        AnyId::Extended(Extended::RC_EVENT_COLLECTOR) => &[(1, &[]), (2, &[])],
        AnyId::Extended(Extended::DYNAMIC_POWER_ALLOCATION) => &[(1, &[(4, 5)])],
        AnyId::Extended(Extended::DPC) => &[(1, &[]), (1, &[(4, 0x20)])],
        AnyId::Extended(Extended::ALTERNATE_PROTOCOL) => &[(1, &[(4, 0x102)])],
        // Two link streams, a selective one with an address block, and one without.
        AnyId::Extended(Extended::IDE) => &[(1, &[]), (1, &[(4, 0x0001_2003), (0x1c, 1)])],
        AnyId::Extended(Extended::STREAMLINED_VIRTUAL_CHANNEL) => &[(1, &[(4, 1)])],
        AnyId::Extended(Extended::MMIO_REGISTER_BLOCK_LOCATOR) => &[(1, &[(4, 0x18)])],
        AnyId::Extended(_) => &[(1, &[])],
    }
}

/// One paragraph for each run of dwords that are treated alike.
fn describe(text: &mut String, filter: &Filter, range: std::ops::Range<u16>) {
    let mut runs: Vec<(u16, u16, String)> = Vec::new();
    let segments: Vec<_> =
        filter.segments().iter().filter(|segment| range.contains(&segment.dword)).collect();
    for dword in segments.chunk_by(|one, other| one.dword == other.dword) {
        let mut lines = String::new();
        for segment in dword {
            let Some(register) = segment.register else { continue };
            let register = &filter.registers()[usize::from(register)];
            let rule = &filter.rules()[usize::from(segment.rule)];
            let Origin::BuiltIn { section } = &rule.origin else { continue };
            let zeroed = filter.bits(segment.dword).zero_merge & segment.mask;
            let (mask, treatment) = (segment.mask, segment.treatment);
            let (register, reason) = (register.name, &rule.reason);
            writeln!(lines, "  {mask:08x} {zeroed:08x} {treatment} | {register} | {reason} | {section}")
                .unwrap();
        }
        let at = dword[0].dword;
        match runs.last_mut() {
            Some((_, last, same)) if *same == lines && *last + 4 == at => *last = at,
            _ => runs.push((at, at, lines)),
        }
    }
    for (first, last, lines) in runs.iter().filter(|(_, _, lines)| !lines.is_empty()) {
        write!(text, "{first:03x}-{:03x}\n{lines}", last + 3).unwrap();
    }
}

fn table() -> String {
    let mut text = String::from("bytes\n  mask zero-merge treatment | register | reason | section\n");
    for device in [devices::virtio(), devices::network_vf()] {
        writeln!(text, "\n# header of {}", device.name).unwrap();
        let filter = Filter::compile(&device.spec, &Policy::default()).unwrap();
        describe(&mut text, &filter, 0..0x40);
    }
    for capability in spec::capabilities() {
        let id = capability.id;
        for (word, dwords) in variants(id) {
            let spec = alone(id, *word, dwords);
            let filter = Filter::compile(&spec, &Policy::default()).unwrap();
            let visible = filter.capabilities()[0].1;
            let given: String = dwords.iter().map(|(at, value)| format!(", {at:#x}: {value:#x}")).collect();
            writeln!(text, "\n# {id} ({word:#x}{given}){}", if visible { "" } else { ", hidden" }).unwrap();
            writeln!(text, "models {:x?}", filter.models()).unwrap();
            let range = if matches!(id, AnyId::Legacy(_)) { 0x40..0x100 } else { 0x100..0x1000 };
            describe(&mut text, &filter, range.clone());
            if !visible {
                let rule = Rule { reason: "shown".into(), origin: Origin::BuiltIn { section: "test" } };
                let action = CapabilityAction::Show;
                let capabilities = vec![CapabilityOverride { which: id.into(), action, rule }];
                let policy = Policy { capabilities, ..Policy::default() };
                writeln!(text, "when shown:").unwrap();
                describe(&mut text, &Filter::compile(&spec, &policy).unwrap(), range);
            }
        }
    }
    text
}

#[test]
fn the_built_in_rules_are_as_they_were_reviewed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/config_space/rules.txt");
    reviewed::assert_is(path, &table()).unwrap();
}
