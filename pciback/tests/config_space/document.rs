//! `docs/capabilities.md`: what the filter does with each field, for people. It is written from compiled filters, so that it
//! cannot differ from what they do; `XPCI_BLESS=1 cargo test` writes it anew.

use std::fmt::Write;

use pciback::config::{
    AnyId, CapabilityAction, CapabilityOverride, Filter, Initial, NamedRegister, Origin, Policy, Rule,
    Segment, Treatment,
};
use pciback::spec::{self, Field, Group, Kind, Register, header};
use xpci_test_support::reviewed;

use crate::devices;
use crate::peers;
use crate::rules::{alone, variants};

const INTRODUCTION: &str = "\
# What a guest sees in config space

This file is written by a test (`pciback/tests/config_space/document.rs`) from compiled filters: change the tables in
`pciback/core/src/spec` and `pciback/core/src/config/rules`, then run `XPCI_BLESS=1 cargo test -p pciback --test config_space`.

It shows what is built in. A policy can hide and show capabilities and treat registers otherwise, but for the guarded ones.

**Kind** is what hardware does with a field: `RO` cannot change; `status` is changed by hardware; `RW` is stored;
`RW1C` is cleared by writing 1; `trigger` starts something when 1 is written; `RsvdP` is reserved and preserved, `RsvdZ`
reserved and zero. A write of the guest that takes only some bits of a register to hardware carries the others as hardware
holds them, but 0 for `RW1C`, `RsvdZ` and `trigger`: nothing is cleared or started that the guest did not write.

**The guest**:

| | reads | its writes |
|---|---|---|
| hardware, both ways | hardware | reach hardware |
| hardware, cleared in its view | hardware; 0 once the guest has written 1, until the host has cleared hardware | stay with the guest |
| hardware, read only | hardware | are dropped |
| first value | what hardware showed when the guest got the function | are dropped |
| its own, as hardware showed it | what it wrote; at first what hardware showed | stay with the guest |
| its own, from *n* | what it wrote; at first *n* | stay with the guest |
| always *n* | *n* | are dropped |

Offsets are relative to the capability; `0x10, 0x1c ...` marks registers that repeat. Where a
capability has several layouts, each table has what differs from those before it. Ids that are not listed here, and bytes that
belong to no capability, follow the policy for unknown bytes.
";

/// One line of a table.
#[derive(PartialEq)]
struct Line {
    /// Where the register was first, and where it was again.
    offset: u16,
    again: Option<u16>,
    width: u8,
    register: &'static str,
    bits: u32,
    field: String,
    kind: &'static str,
    guest: String,
    reason: String,
}

impl Line {
    fn is_like(&self, other: &Self) -> bool {
        let key = |line: &Self| (line.register, line.bits, line.field.clone(), line.guest.clone());
        key(self) == key(other) && self.reason == other.reason && self.kind == other.kind
    }
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Constant => "RO",
        Kind::Status => "status",
        Kind::Control => "RW",
        Kind::Rw1c => "RW1C",
        Kind::RsvdZ => "RsvdZ",
        Kind::Trigger => "trigger",
    }
}

fn guest(treatment: Treatment, shift: u32) -> String {
    match treatment {
        Treatment::Pass => "hardware, both ways".into(),
        Treatment::Event => "hardware, cleared in its view".into(),
        Treatment::ReadOnly => "hardware, read only".into(),
        Treatment::Static => "first value".into(),
        Treatment::Virtual(Initial::Hardware) => "its own, as hardware showed it".into(),
        Treatment::Virtual(Initial::Value(value)) => format!("its own, from {:#x}", value >> shift),
        Treatment::Fixed(value) => format!("always {:#x}", value >> shift),
    }
}

/// Runs of bits, the highest first: `31:16, 3`.
fn bits(mask: u32) -> String {
    let mut runs = Vec::new();
    let mut rest = mask;
    while rest != 0 {
        let high = 31 - rest.leading_zeros();
        let low = high + 1 - (rest << (31 - high)).leading_ones();
        runs.push(if high == low { format!("{high}") } else { format!("{high}:{low}") });
        rest &= (1u32 << low) - 1;
    }
    runs.join(", ")
}

/// What is described of a register that a filter names.
fn described(registers: &[Register], groups: &[Group], named: &NamedRegister, base: u16) -> Option<Register> {
    let is_it = |register: &&Register| register.name == named.name && register.width == named.width;
    let here = |register: &&Register| is_it(register) && register.offset + base == named.offset;
    let mut grouped = groups.iter().filter_map(|group| {
        let register = group.registers.iter().find(here);
        let register = register.or_else(|| group.registers.iter().find(is_it)).copied();
        register.or_else(|| described(&[], group.groups, named, base))
    });
    registers.iter().find(here).copied().or_else(|| grouped.next())
}

/// The lines for one segment, one for each field that it touches.
fn lines(
    filter: &Filter,
    segment: &Segment,
    base: u16,
    fields: &[Field],
    named: &NamedRegister,
) -> Vec<Line> {
    let rule = &filter.rules()[usize::from(segment.rule)];
    let shift = 8 * u32::from(named.offset & 3);
    let mask = segment.mask >> shift;
    let line = |bits: u32, field: &str, kind| Line {
        offset: named.offset - base,
        again: None,
        width: named.width,
        register: named.name,
        bits,
        field: field.to_owned(),
        kind,
        guest: guest(segment.treatment, shift),
        reason: rule.reason.to_string(),
    };
    let mut lines: Vec<_> = fields
        .iter()
        .filter(|field| field.mask & mask != 0)
        .map(|field| line(field.mask & mask, field.name, kind(field.kind)))
        .collect();
    let unnamed = mask & !fields.iter().fold(0, |all, field| all | field.mask);
    if unnamed != 0 {
        let reserved = rule.reason.starts_with("reserved");
        lines.push(if reserved { line(unnamed, "reserved", "RsvdP") } else { line(unnamed, "", "") });
    }
    lines
}

/// What a filter does in a range, but for what is there already.
fn describe(
    known: &[Line],
    filter: &Filter,
    range: std::ops::Range<u16>,
    registers: &[Register],
    groups: &[Group],
) -> Vec<Line> {
    let mut found: Vec<Line> = Vec::new();
    for segment in filter.segments().iter().filter(|segment| range.contains(&segment.dword)) {
        let Some(register) = segment.register else { continue };
        let named = &filter.registers()[usize::from(register)];
        if named.name == "Capability Header" {
            continue;
        }
        let base = range.start;
        let fields = described(registers, groups, named, base).map_or(&[][..], |register| register.fields);
        for line in lines(filter, segment, base, fields, named) {
            match found.iter_mut().find(|other| other.is_like(&line)) {
                Some(first) if first.again.is_none() && line.offset > first.offset => {
                    first.again = Some(line.offset);
                }
                Some(_) => {}
                None => found.push(line),
            }
        }
    }
    found.retain(|line| !known.iter().any(|other| other.is_like(line) && other.offset == line.offset));
    found
}

fn table(text: &mut String, all: &mut [Line]) {
    all.sort_by_key(|line| (line.offset, line.register, line.bits.trailing_zeros()));
    text.push_str(
        "| offset | register | bits | field | kind | the guest | why |\n|---|---|---|---|---|---|---|\n",
    );
    for line in all.iter() {
        let Line { offset, again, width, register, field, kind, guest, reason, .. } = line;
        let repeats = again.map(|again| format!(", {again:#04x} ...")).unwrap_or_default();
        let bits = bits(line.bits);
        writeln!(
            text,
            "| {offset:#04x}{repeats} | {register} ({}) | {bits} | {field} | {kind} | {guest} | {reason} |",
            8 * width
        )
        .unwrap();
    }
}

/// What xen-pciback, xen_pt and vfio-pci do.
fn elsewhere([pciback, xen_pt, vfio]: [&str; 3]) -> String {
    let mut text = String::from("\n**Elsewhere**:\n\n");
    for (peer, what) in [("xen-pciback", pciback), ("xen_pt", xen_pt), ("vfio-pci", vfio)] {
        push_item(&mut text, &format!("{peer}: {what}."));
    }
    text
}

/// Adds an item of a list, in lines of at most 150 characters.
fn push_item(text: &mut String, item: &str) {
    let mut line = String::from("-");
    for word in item.split(' ') {
        if line.len() + 1 + word.len() > 150 {
            writeln!(text, "{line}").unwrap();
            line = String::from(" ");
        }
        line.push(' ');
        line.push_str(word);
    }
    writeln!(text, "{line}").unwrap();
}

fn name(id: AnyId) -> (u32, &'static str, String) {
    match id {
        AnyId::Legacy(number) => (u32::from(number.0), "PCI", id.to_string()),
        AnyId::Extended(number) => (u32::from(number.0), "extended", id.to_string()),
    }
}

fn document() -> String {
    let mut overview =
        String::from("\n| id | list | capability | specified in | guests |\n|---|---|---|---|---|\n");
    let mut text = String::new();
    for (title, device) in [("physical", devices::virtio()), ("virtual", devices::network_vf())] {
        writeln!(text, "\n## Header of a {title} function\n").unwrap();
        let filter = Filter::compile(&device.spec, &Policy::default()).unwrap();
        let mut all = describe(&[], &filter, 0..header::SIZE, header::REGISTERS, &[]);
        // What the composed device's own BARs and list are is no rule.
        all.retain(|line| !(line.register == "Base Address Register" && line.guest == "always 0x0"));
        table(&mut text, &mut all);
        text.push_str(&elsewhere(peers::HEADER));
    }
    let mut capabilities: Vec<_> = spec::capabilities().collect();
    capabilities.sort_by_key(|capability| capability.id);
    for capability in capabilities {
        let id = capability.id;
        let (number, list, name) = name(id);
        let section = capability.section;
        let (mut all, mut hidden, mut tables) = (Vec::new(), None, String::new());
        for (word, dwords) in variants(id) {
            let spec = alone(id, *word, dwords);
            let mut filter = Filter::compile(&spec, &Policy::default()).unwrap();
            let range = if list == "PCI" { 0x40..0x100 } else { 0x100..0x1000 };
            if !filter.capabilities()[0].1 {
                let segment = filter.segments().iter().rfind(|segment| {
                    let register = segment.register.map(|index| &filter.registers()[usize::from(index)]);
                    register.is_some_and(|register| register.name == "hidden")
                });
                let rule = segment.map(|segment| &filter.rules()[usize::from(segment.rule)]);
                hidden = rule.map(|rule| rule.reason.to_string());
                let rule = Rule { reason: "shown".into(), origin: Origin::BuiltIn { section: "test" } };
                let capabilities =
                    vec![CapabilityOverride { which: id.into(), action: CapabilityAction::Show, rule }];
                filter = Filter::compile(&spec, &Policy { capabilities, ..Policy::default() }).unwrap();
            }
            let mut found = describe(&all, &filter, range, capability.registers, capability.groups);
            if found.is_empty() {
                continue;
            }
            if !all.is_empty() {
                let dwords: String =
                    dwords.iter().map(|(at, value)| format!(", {value:#x} at {at:#04x}")).collect();
                let word = match id {
                    AnyId::Legacy(_) => format!("{word:#x} at 0x02"),
                    AnyId::Extended(_) => format!("version {word}"),
                };
                writeln!(tables, "\nWith {word}{dwords}:\n").unwrap();
            }
            table(&mut tables, &mut found);
            all.append(&mut found);
        }
        let seen = if hidden.is_some() { "do not see it" } else { "see it" };
        writeln!(overview, "| {number:#06x} | {list} | {name} | {section} | {seen} |").unwrap();
        writeln!(text, "\n## {name} ({list}, {number:#06x})\n\n{section}.").unwrap();
        if let Some(reason) = hidden {
            writeln!(text, "\n**Hidden**: {reason}. When a policy shows it:").unwrap();
        }
        if !capability.is_specified() {
            text.push_str(
                "\nWhat follows is the vendor's: it is treated as the policy treats unknown bytes.\n",
            );
        }
        writeln!(text, "\n{}", tables.trim_end()).unwrap();
        text.push_str(&elsewhere(peers::peers(id)));
    }
    format!("{INTRODUCTION}{}{overview}{text}", peers::INTRODUCTION)
}

#[test]
fn the_document_says_what_the_filter_does() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/capabilities.md");
    reviewed::assert_is(path, &document()).unwrap();
}

#[test]
fn bits_are_written_as_runs_from_the_highest() {
    assert_eq!(bits(0x8000_0001), "31, 0");
    assert_eq!(bits(u32::MAX), "31:0");
    assert_eq!(bits(0x0f0c), "11:8, 3:2");
}
