//! Text output of the policy commands.

use std::fmt::Write;

use pciback::policy::{BitsLine, Explanation, RdmPolicy, RegisterLine};

use super::table::table;
use crate::protocol::{CheckedView, LearnedView, PolicyView, ReloadedView};

/// Bits of a register with the same treatment and reason.
struct Group<'a> {
    mask: u32,
    names: Vec<&'a str>,
    bits: &'a BitsLine,
}

/// All registers of some functions, after the lines that could not be read.
pub fn explanations(devices: &[Explanation], damage: &[String]) -> String {
    let damage: String = damage.iter().map(|line| format!("damaged: {line}\n")).collect();
    damage + &devices.iter().map(explanation).collect::<Vec<_>>().join("\n")
}

fn explanation(device: &Explanation) -> String {
    let kind = if device.is_virtual { "virtual" } else { "physical" };
    let mut text = format!("{} {}, a {kind} function\n", device.address, device.id);
    for (what, list) in [
        ("problem", &device.problems),
        ("unknown", &device.unknown),
        ("obstacle", &device.obstacles),
        ("refused", &device.refused),
        ("deferred", &device.deferred),
    ] {
        for line in list {
            let _ = writeln!(text, "  {what}: {line}");
        }
    }
    if let Some(why) = &device.not_assignable {
        let _ = writeln!(text, "  not assignable: {why}");
        for capability in &device.capabilities {
            let _ = writeln!(text, "  [{:02x}] {}", capability.offset, capability.name);
        }
    }
    let mut section = None;
    for register in &device.registers {
        let here = if register.offset < 0x40 { Some(0) } else { register.capability };
        if section != Some(here) {
            section = Some(here);
            let _ = writeln!(text, "\n{}", heading(device, here));
        }
        lines(&mut text, register);
    }
    text
}

fn heading(device: &Explanation, at: Option<u16>) -> String {
    match at {
        Some(0) => "Header".to_owned(),
        None => "Outside capabilities".to_owned(),
        Some(at) => {
            let capability = device.capabilities.iter().find(|capability| capability.offset == at);
            let Some(capability) = capability else { return format!("[{at:02x}]") };
            let seen = if capability.visible { "" } else { ", hidden from the guest" };
            format!("[{at:02x}] {} ({}){seen}", capability.name, capability.word)
        }
    }
}

fn lines(text: &mut String, register: &RegisterLine) {
    let groups = groups(register);
    let place = match register.width {
        1 | 2 | 4 => format!("{:03x}  {}", register.offset, register.name),
        _ => {
            format!("{:03x}-{:03x}  {}", register.offset, register.offset + register.width - 1, register.name)
        }
    };
    let _ = writeln!(text, "  {place}");
    for group in &groups {
        let BitsLine { write, rule, origin, .. } = group.bits;
        let mask = match groups.len() {
            1 => String::new(),
            _ => format!("{:0width$x} ", group.mask, width = 2 * usize::from(register.width)),
        };
        let names = match group.names.join(", ") {
            names if names.is_empty() => String::new(),
            names => format!("{names}: "),
        };
        let _ = writeln!(text, "       {mask}{names}reads {}, writes {write}", reads(group.bits));
        let _ = writeln!(text, "           {rule} [{origin}]");
    }
}

fn reads(bits: &BitsLine) -> String {
    match (bits.read.as_str(), bits.value) {
        ("fixed", Some(value)) => format!("{value:#x}"),
        ("virtual", Some(value)) => format!("virtual, {value:#x} at first"),
        (read, _) => read.to_owned(),
    }
}

fn groups(register: &RegisterLine) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for bits in &register.bits {
        let zero = |value: Option<u32>| value.is_none_or(|value| value == 0);
        let alike = |group: &&mut Group<'_>| {
            let known = group.bits;
            known.read == bits.read
                && known.write == bits.write
                && known.rule == bits.rule
                && known.origin == bits.origin
                && zero(known.value)
                && zero(bits.value)
        };
        match groups.iter_mut().find(alike) {
            Some(group) => {
                group.mask |= bits.mask;
                group.names.extend((!bits.name.is_empty()).then_some(bits.name.as_str()));
            }
            None => {
                let names = if bits.name.is_empty() { Vec::new() } else { vec![bits.name.as_str()] };
                groups.push(Group { mask: bits.mask, names, bits });
            }
        }
    }
    groups
}

/// What guests wrote without effect.
pub fn learned(functions: &[LearnedView]) -> String {
    if functions.is_empty() {
        return "the guest has no functions of xpci\n".to_owned();
    }
    let mut text = String::new();
    for view in functions {
        let guest = match &view.name {
            Some(name) => format!("'{name}' (domain {})", view.domain),
            None => format!("domain {}", view.domain),
        };
        let _ = writeln!(text, "{} of {guest}", view.address);
        let registers = &view.learned.registers;
        if registers.is_empty() {
            text.push_str("  no write was blocked\n\n");
            continue;
        }
        let titles =
            ["AT", "REGISTER", "WRITES", "KEPT", "DROPPED", "NEVER PASSES"].map(str::to_owned).to_vec();
        let rows = registers.iter().map(|register| {
            let owner = register.capability.as_deref().unwrap_or("-");
            let hex = |bits: u32| if bits == 0 { "-".to_owned() } else { format!("{bits:#x}") };
            vec![
                format!("{:03x}", register.offset),
                format!("{owner}: {}", register.name),
                register.writes.to_string(),
                hex(register.kept),
                hex(register.dropped),
                hex(register.never),
            ]
        });
        text.push_str(&table(&std::iter::once(titles).chain(rows).collect::<Vec<_>>()));
        match &view.learned.addition {
            None => text.push_str(
                "no policy can permit any of these: xpci itself carries out what the registers control\n",
            ),
            Some(addition) => {
                let _ = write!(text, "this addition to a policy permits those that may pass:\n\n{addition}");
            }
        }
        text.push('\n');
    }
    text
}

/// The policies of a function.
pub fn policy(view: &PolicyView) -> String {
    let domain = view.domain.as_ref().map(|domain| format!(" for {domain}")).unwrap_or_default();
    let mut text = format!("{} {}{domain}\n\n", view.address, view.id);
    let head = ["APPLIES", "MATCHES", "FILE"].map(str::to_owned).to_vec();
    let rows = view.files.iter().map(|file| {
        let applies = match &file.mismatch {
            None => "yes".to_owned(),
            Some(reason) => format!("no: {reason}"),
        };
        vec![applies, file.matches.clone(), file.name.clone()]
    });
    if view.files.is_empty() {
        text.push_str("no policy files; the built-in rules apply\n");
    } else {
        text.push_str(&table(&std::iter::once(head).chain(rows).collect::<Vec<_>>()));
    }
    let _ = writeln!(text, "\nprofile {}\nunknown registers: {}", view.profile, view.unknown);
    let _ = writeln!(text, "errors: {}", view.errors);
    if !view.permits.is_empty() {
        let _ = writeln!(text, "permitted: {}", view.permits.join(", "));
    }
    if let Some(methods) = &view.reset_methods {
        let _ = writeln!(text, "accepted resets: {}", methods.join(", "));
    }
    if view.reset_together {
        text.push_str("reset with all functions on its bus where it cannot be reset alone\n");
    }
    if view.without_reset {
        text.push_str("may get a new owner without a reset if Linux cannot reset it\n");
    }
    if view.rdm_policy == RdmPolicy::Strict.word() {
        let _ = writeln!(text, "reserved memory (rdm-policy): {}", view.rdm_policy);
    }
    match view.rom.as_str() {
        "" | "hide" => {}
        "device" => text
            .push_str("expansion ROM (rom): device: an HVM guest gets a copy, a PV guest the device's own\n"),
        file => _ = writeln!(text, "expansion ROM of HVM guests (rom): {file}"),
    }
    if let Some(count) = view.vfs_by_guest {
        let _ = writeln!(text, "VFs that a guest with the PF can create (virtual-functions): {count}");
    }
    if let Some(peers) = &view.mailbox {
        let _ = writeln!(text, "mailbox in a PV guest, with (mailbox): {peers}");
    }
    for rule in &view.capabilities {
        let _ = writeln!(text, "{}: {} ({}; {})", rule.capability, rule.action, rule.reason, rule.origin);
    }
    for rule in &view.registers {
        let (place, width, mask, treatment) = (&rule.place, rule.width, rule.mask, &rule.treatment);
        let _ = writeln!(
            text,
            "{place}, {width} bytes, bits {mask:#x}: {treatment} ({}; {})",
            rule.reason, rule.origin
        );
    }
    for note in &view.notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}

/// What a reload did.
pub fn reloaded(files: usize, functions: &[ReloadedView]) -> String {
    let mut text = format!("policy files in force: {files}\n");
    for view in functions {
        let what = match (&view.failure, view.changed) {
            (Some(why), _) => format!("its old filter stays in force: {why}"),
            (None, true) => "its filter changed".to_owned(),
            (None, false) => "nothing changed".to_owned(),
        };
        let _ = writeln!(text, "{}: {what}", view.address);
        for register in &view.registers {
            let _ = writeln!(text, "  {register}");
        }
        for waits in &view.deferred {
            let _ = writeln!(text, "  later: {waits}");
        }
    }
    text
}

/// Files without mistakes.
pub fn checked(files: &[CheckedView]) -> String {
    let line = |file: &CheckedView| {
        format!(
            "{}: good, {} rule{} for {}\n",
            file.name,
            file.rules,
            if file.rules == 1 { "" } else { "s" },
            file.matches
        )
    };
    files.iter().map(line).collect()
}
