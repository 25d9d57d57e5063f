//! The built-in rules as text: a change of any row changes `rules.txt`. `XPCI_BLESS=1 cargo test` writes it anew; read the
//! difference before it is committed.

use std::fmt::Write;

use pciback::config::{
    AnyId, CapabilityAction, CapabilityOverride, FunctionSpec, Origin, Planes, Policy, Rule,
};
use pciback::spec::{self, CapabilityId};

use crate::devices;

/// A function with one capability, at 0x40 or 0x100.
fn alone(id: AnyId, first_word: u16) -> FunctionSpec {
    let mut spec = devices::virtio().spec;
    spec.bytes.resize(4096, 0);
    spec.bytes[0x40..].fill(0);
    let (at, header) = match id {
        AnyId::Legacy(id) => (0x40, u32::from(id.0) | u32::from(first_word) << 16),
        AnyId::Extended(id) => (0x100, u32::from(id.0) | 0x1_0000),
    };
    spec.bytes[0x34] = 0x40;
    spec.bytes[0x06] = if at == 0x40 { 0x10 } else { 0 };
    spec.bytes[at..at + 4].copy_from_slice(&header.to_le_bytes());
    // Capabilities that say what they support: everything.
    if at == 0x100 || id == AnyId::Legacy(CapabilityId::PCI_EXPRESS) {
        spec.bytes[at + 4..at + 8].fill(0xff);
    }
    spec
}

/// One line for each run of dwords that are treated alike.
fn describe(text: &mut String, planes: &Planes, range: std::ops::Range<u16>) {
    let mut runs: Vec<(u16, u16, String)> = Vec::new();
    for segment in planes.segments().iter().filter(|segment| range.contains(&segment.dword)) {
        let Some(register) = segment.register else { continue };
        let register = &planes.registers()[usize::from(register)];
        let rule = &planes.rules()[usize::from(segment.rule)];
        let Origin::BuiltIn { section } = &rule.origin else { continue };
        let zeroed = planes.bits(segment.dword).zero_merge & segment.mask;
        let (mask, treatment) = (segment.mask, segment.treatment);
        let line =
            format!("{mask:08x} {zeroed:08x} {treatment} | {} | {} | {section}", register.name, rule.reason);
        match runs.last_mut() {
            Some((_, last, same)) if *same == line && *last + 4 == segment.dword => *last = segment.dword,
            _ => runs.push((segment.dword, segment.dword, line)),
        }
    }
    for (first, last, line) in runs {
        writeln!(text, "{first:03x}-{:03x} {line}", last + 3).unwrap();
    }
}

fn table() -> String {
    let mut text = String::from("bytes mask zero-merge treatment | register | reason | section\n");
    for device in [devices::virtio(), devices::network_vf()] {
        writeln!(text, "\n# header of {}", device.name).unwrap();
        let planes = Planes::compile(&device.spec, &Policy::default()).unwrap();
        describe(&mut text, &planes, 0..0x40);
    }
    for capability in spec::capabilities() {
        let id = capability.id;
        let words: &[u16] = match id {
            AnyId::Legacy(CapabilityId::MSI) => &[0x0, 0x80, 0x100, 0x18a],
            AnyId::Legacy(CapabilityId::PCI_EXPRESS) => &[1, 2],
            AnyId::Legacy(CapabilityId::ADVANCED_FEATURES) => &[0x0306],
            _ => &[0],
        };
        for word in words {
            let spec = alone(id, *word);
            let planes = Planes::compile(&spec, &Policy::default()).unwrap();
            let visible = planes.capabilities()[0].1;
            writeln!(text, "\n# {id} ({word:#x}){}", if visible { "" } else { ", hidden" }).unwrap();
            writeln!(text, "models {:x?}", planes.models()).unwrap();
            let range = if matches!(id, AnyId::Legacy(_)) { 0x40..0x100 } else { 0x100..0x1000 };
            describe(&mut text, &planes, range.clone());
            if !visible {
                let rule = Rule { reason: "shown".into(), origin: Origin::BuiltIn { section: "test" } };
                let action = CapabilityAction::Show;
                let capabilities = vec![CapabilityOverride { which: id.into(), action, rule }];
                let policy = Policy { capabilities, ..Policy::default() };
                writeln!(text, "when shown:").unwrap();
                describe(&mut text, &Planes::compile(&spec, &policy).unwrap(), range);
            }
        }
    }
    text
}

#[test]
fn the_built_in_rules_are_as_they_were_reviewed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/config_space/rules.txt");
    let table = table();
    if std::env::var_os("XPCI_BLESS").is_some() {
        std::fs::write(path, &table).unwrap();
    }
    let reviewed = std::fs::read_to_string(path).unwrap();
    for (line, (found, expected)) in table.lines().zip(reviewed.lines()).enumerate() {
        assert_eq!(found, expected, "line {}", line + 1);
    }
    assert_eq!(table.len(), reviewed.len());
}
