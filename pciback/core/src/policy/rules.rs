//! The rules of a policy file: capabilities and registers.

use super::diagnostic::{Diagnostics, Spot};
use super::names;
use super::read::{self, KeyWord, key};
use super::yaml::{Key, Node, Value};
use crate::config::{
    CapabilityAction, CapabilityOverride, EXTENDED_SIZE, Initial, Origin, Place, RegisterOverride, Rule,
    Selector, Treatment, is_guarded,
};
use crate::spec::{self, Register, header};

/// What a policy does with a capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WholeAction {
    BuiltIn,
    Show,
    Hide,
    Pass,
    ReadOnly,
    Virtual,
}

impl WholeAction {
    pub const WORDS: &[(&str, Self)] = &[
        ("built-in", Self::BuiltIn),
        ("show", Self::Show),
        ("hide", Self::Hide),
        ("pass", Self::Pass),
        ("read-only", Self::ReadOnly),
        ("virtual", Self::Virtual),
    ];
    pub const HELP: &str = "built-in: as without this entry. show: as built in, visible even where xpci hides it. hide: taken out \
                            of the list. pass: all its registers pass, both ways. read-only: they show hardware, writes are \
                            dropped. virtual: the guest reads what it wrote, hardware sees nothing.";
}

/// What a policy does with a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RegisterAction {
    Pass,
    ReadOnly,
    Hide,
    Virtual,
    Fixed,
}

impl RegisterAction {
    pub const WORDS: &[(&str, Self)] = &[
        ("pass", Self::Pass),
        ("read-only", Self::ReadOnly),
        ("hide", Self::Hide),
        ("virtual", Self::Virtual),
        ("fixed", Self::Fixed),
    ];
    pub const HELP: &str = "pass: reads and writes reach hardware. read-only: reads show hardware, writes are dropped. hide: reads \
                            0, writes are dropped. virtual: the guest reads what it wrote; it begins with 'value', or as \
                            hardware shows it. fixed: reads 'value', writes are dropped.";
}

/// What a policy does with unknown registers.
pub(super) const UNKNOWN_WORDS: &[(&str, Treatment)] =
    &[("pass", Treatment::Pass), ("read-only", Treatment::ReadOnly), ("hide", Treatment::ZERO)];

pub(super) const UNKNOWN_KEYS: &[KeyWord] = &[
    key("action", "pass, read-only, or hide: reads 0, writes are dropped."),
    key("reason", "Why, for those who read 'xpci policy explain'."),
];

pub(super) const CAPABILITY_KEYS: &[KeyWord] = &[
    key("action", WholeAction::HELP),
    key("reason", "Why, for those who read 'xpci policy explain'."),
    key(
        "registers",
        "Single registers, by their name in the specification or their offset in the capability.",
    ),
];

pub(super) const REGISTER_KEYS: &[KeyWord] = &[
    key(
        "at",
        "Which register: its name in the specification, its offset, or a range of offsets such as 0xe0-0xef.",
    ),
    key("width", "Its width in bytes, 1, 2 or 4; needed with an offset."),
    key("mask", "Which of its bits are meant; all of them without this."),
    key("action", RegisterAction::HELP),
    key("value", "What it reads (fixed) or reads at first (virtual)."),
    key(
        "write-mask",
        "Of the bits that are meant, those that may be written; without this, all. With pass and virtual only.",
    ),
    key("reason", "Why, for those who read 'xpci policy explain'."),
];

/// A rule of a file; without a reason it stands for itself.
pub(super) fn rule(reason: Option<String>, file: &str, at: Spot) -> Rule {
    let reason = reason.unwrap_or_else(|| "the policy says so".to_owned());
    Rule { reason: reason.into(), origin: Origin::Policy { file: file.to_owned(), line: at.line } }
}

/// `unknown: WORD`, or a mapping with a reason.
pub(super) fn unknown(node: &Node, file: &str, diagnostics: &mut Diagnostics) -> Option<(Treatment, Rule)> {
    let (mut action, mut reason) = (None, None);
    if let Value::Map(_) = node.value {
        for (key, node) in read::entries(node, "'unknown'", UNKNOWN_KEYS, diagnostics) {
            match key {
                "action" => {
                    action = read::choice(node, "action for unknown registers", UNKNOWN_WORDS, diagnostics)
                }
                _ => reason = read::text(node, "a reason", diagnostics),
            }
        }
    } else {
        action = read::choice(node, "action for unknown registers", UNKNOWN_WORDS, diagnostics);
    }
    action.map(|action| (action, rule(reason, file, node.at)))
}

/// One entry of `capabilities`.
pub(super) fn capability(
    name: &Key,
    node: &Node,
    file: &str,
    diagnostics: &mut Diagnostics,
) -> (Option<CapabilityOverride>, Vec<RegisterOverride>) {
    let Some(which) = names::selector(&name.text) else {
        let words = names::CAPABILITIES.iter().map(|(word, _)| *word);
        diagnostics.unknown(name.at, "capability", &name.text, words);
        return (None, Vec::new());
    };
    let (mut action, mut reason, mut registers) = (None, None, Vec::new());
    if let Value::Map(_) = node.value {
        for (key, node) in read::entries(node, "a capability", CAPABILITY_KEYS, diagnostics) {
            match key {
                "action" => {
                    let word = read::choice(node, "action for a capability", WholeAction::WORDS, diagnostics);
                    action = word.map(|word| (word, node.at));
                }
                "reason" => reason = read::text(node, "a reason", diagnostics),
                _ => registers = self::registers(node, Some(&which), file, diagnostics),
            }
        }
    } else {
        let word = read::choice(node, "action for a capability", WholeAction::WORDS, diagnostics);
        action = word.map(|word| (word, node.at));
    }
    let Some((word, at)) = action else { return (None, registers) };
    let action = match word {
        WholeAction::BuiltIn => return (None, registers),
        WholeAction::Show => CapabilityAction::Show,
        WholeAction::Hide => CapabilityAction::Hide,
        WholeAction::Pass => CapabilityAction::Treat(Treatment::Pass),
        WholeAction::ReadOnly => CapabilityAction::Treat(Treatment::ReadOnly),
        WholeAction::Virtual => CapabilityAction::Treat(Treatment::Virtual(Initial::Hardware)),
    };
    if matches!(action, CapabilityAction::Treat(_)) && is_guarded(which.id) {
        let name = &name.text;
        diagnostics.say(
            at,
            format!("{name} is guarded: xpci itself carries out what it controls; it can only be hidden"),
        );
        return (None, registers);
    }
    (Some(CapabilityOverride { which, action, rule: rule(reason, file, at) }), registers)
}

/// A list of registers, of a capability or of config space.
pub(super) fn registers(
    node: &Node,
    capability: Option<&Selector>,
    file: &str,
    diagnostics: &mut Diagnostics,
) -> Vec<RegisterOverride> {
    if let Some(which) = capability
        && is_guarded(which.id)
    {
        let name = names::selector_word(which);
        diagnostics.say(
            node.at,
            format!("the registers of {name} are guarded: xpci itself carries out what they control"),
        );
        return Vec::new();
    }
    let entries = read::items(node).iter();
    entries.flat_map(|node| register(node, capability, file, diagnostics)).collect()
}

/// A register, or a range of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Span {
    Register { offset: u16, width: Option<u8> },
    Range { first: u16, last: u16 },
}

fn register(
    node: &Node,
    capability: Option<&Selector>,
    file: &str,
    diagnostics: &mut Diagnostics,
) -> Vec<RegisterOverride> {
    let (mut span, mut width, mut action, mut reason) = (None, None, None, None);
    let (mut mask, mut value, mut write_mask) = (None, None, None);
    let mut complete = true;
    for (key, node) in read::entries(node, "a register", REGISTER_KEYS, diagnostics) {
        let bits = |node: &Node, diagnostics: &mut Diagnostics| {
            read::number(node, key, u32::MAX, diagnostics).map(|number| (number, node.at))
        };
        let before = complete;
        complete = match key {
            "at" => keep(&mut span, place(node, capability, diagnostics)),
            "width" => {
                let words = [("1", 1), ("2", 2), ("4", 4)];
                keep(&mut width, read::choice(node, "width in bytes", &words, diagnostics))
            }
            "mask" => keep(&mut mask, bits(node, diagnostics)),
            "action" => keep(
                &mut action,
                read::choice(node, "action for a register", RegisterAction::WORDS, diagnostics),
            ),
            "value" => keep(&mut value, bits(node, diagnostics)),
            "write-mask" => keep(&mut write_mask, bits(node, diagnostics)),
            _ => keep(&mut reason, read::text(node, "a reason", diagnostics)),
        } && before;
    }
    if !complete {
        return Vec::new();
    }
    let (Some(span), Some(action)) = (span, action) else {
        let missing = if span.is_none() { "at" } else { "action" };
        diagnostics.say(node.at, format!("a register without '{missing}'"));
        return Vec::new();
    };
    let entry = Entry { capability, action, mask, value, write_mask, rule: rule(reason, file, node.at) };
    match span {
        Span::Range { first, last } => {
            let single = [mask, value, write_mask].into_iter().flatten().next();
            if width.is_some() || single.is_some() || action == RegisterAction::Fixed {
                let text = "a range takes no width, mask, value or write-mask: its bytes are treated alike";
                diagnostics.say(single.map_or(node.at, |(_, at)| at), text.to_owned());
                return Vec::new();
            }
            entry.over_range(first, last)
        }
        Span::Register { offset, width: known } => match known.or(width) {
            None => {
                diagnostics
                    .say(node.at, "a register given by its offset needs a 'width' of 1, 2 or 4".to_owned());
                Vec::new()
            }
            Some(width) => entry.over_register(offset, width, node.at, diagnostics),
        },
    }
}

/// Keeps what was read; `false` where nothing was, and the reason was said.
fn keep<T>(slot: &mut Option<T>, read: Option<T>) -> bool {
    *slot = read;
    slot.is_some()
}

/// Where a register is, by name, offset or range.
fn place(node: &Node, capability: Option<&Selector>, diagnostics: &mut Diagnostics) -> Option<Span> {
    let text = read::scalar(node, "'at'", diagnostics)?;
    let starts_with_digit = text.starts_with(|sign: char| sign.is_ascii_digit());
    let (first, last) = match text.split_once('-') {
        Some((first, last)) if starts_with_digit => {
            (read::parse_number(first.trim()), Some(read::parse_number(last.trim())))
        }
        _ if starts_with_digit => (read::parse_number(text), None),
        _ => return by_name(text, node.at, capability, diagnostics),
    };
    let in_space =
        |number: Option<u32>| number.and_then(|it| u16::try_from(it).ok()).filter(|it| *it < EXTENDED_SIZE);
    let (start, end) = (in_space(first), last.map(in_space));
    let header = if capability.is_some() { 0 } else { header::SIZE };
    let span = match (start, end) {
        (Some(offset), None) => Some(Span::Register { offset, width: None }),
        (Some(first), Some(Some(last))) if first <= last => Some(Span::Range { first, last }),
        _ => None,
    };
    match (span, start) {
        (None, _) => {
            let found: String = text.chars().take(60).collect();
            let text = format!(
                "'{found}' is not a valid place: an offset from 0 to {:#x} or a range of two is expected",
                EXTENDED_SIZE - 1
            );
            diagnostics.say(node.at, text);
            None
        }
        (Some(_), Some(start)) if start < header => {
            let text = "the header is guarded: the guest sees virtual BARs and a filtered Command, whatever a policy says";
            diagnostics.say(node.at, text.to_owned());
            None
        }
        (span, _) => span,
    }
}

/// A register by its name in the specification: letters and digits count.
fn by_name(
    name: &str,
    at: Spot,
    capability: Option<&Selector>,
    diagnostics: &mut Diagnostics,
) -> Option<Span> {
    let Some(which) = capability else {
        let text =
            "a register of config space is given by its offset; one with a name stands with its capability";
        diagnostics.say(at, text.to_owned());
        return None;
    };
    let registers: &'static [Register] =
        spec::capability(which.id).map_or(&[], |capability| capability.registers);
    let plain = |name: &str| -> String {
        name.chars().filter(char::is_ascii_alphanumeric).map(|sign| sign.to_ascii_lowercase()).collect()
    };
    let found = registers.iter().find(|register| plain(register.name) == plain(name));
    if found.is_none() {
        let what = format!("register of {}", names::selector_word(which));
        diagnostics.unknown(at, &what, name, registers.iter().map(|register| register.name));
    }
    found.map(|register| Span::Register { offset: register.offset, width: Some(register.width) })
}

/// What an entry says, independent of the rules that it modifies.
struct Entry<'a> {
    capability: Option<&'a Selector>,
    action: RegisterAction,
    mask: Option<(u32, Spot)>,
    value: Option<(u32, Spot)>,
    write_mask: Option<(u32, Spot)>,
    rule: Rule,
}

impl Entry<'_> {
    fn over(&self, offset: u16, width: u8, mask: u32, treatment: Treatment) -> RegisterOverride {
        let place = match self.capability {
            Some(which) => Place::In(*which, offset),
            None => Place::Absolute(offset),
        };
        RegisterOverride { place, width, mask, treatment, rule: self.rule.clone() }
    }

    fn over_range(&self, first: u16, last: u16) -> Vec<RegisterOverride> {
        let treatment = self.treatment();
        let mut pieces = Vec::new();
        let mut offset = u32::from(first);
        let end = u32::from(last) + 1;
        while offset < end {
            let width = [4u8, 2, 1]
                .into_iter()
                .find(|width| offset.is_multiple_of(u32::from(*width)) && offset + u32::from(*width) <= end);
            let width = width.unwrap_or(1);
            pieces.push(self.over(offset as u16, width, u32::MAX, treatment));
            offset += u32::from(width);
        }
        pieces
    }

    fn over_register(
        &self,
        offset: u16,
        width: u8,
        at: Spot,
        diagnostics: &mut Diagnostics,
    ) -> Vec<RegisterOverride> {
        let full = u32::MAX >> (32 - 8 * u32::from(width));
        if !offset.is_multiple_of(u16::from(width)) {
            diagnostics.say(at, format!("offset {offset:#x} is not a multiple of the width, {width}"));
            return Vec::new();
        }
        for (what, bits) in [("mask", self.mask), ("value", self.value), ("write-mask", self.write_mask)] {
            if let Some((bits, at)) = bits.filter(|(bits, _)| bits & !full != 0) {
                diagnostics.say(at, format!("{what} {bits:#x} has bits beyond the register's {width} bytes"));
                return Vec::new();
            }
        }
        let takes_value = matches!(self.action, RegisterAction::Fixed | RegisterAction::Virtual);
        if let Some((_, at)) = self.value.filter(|_| !takes_value) {
            diagnostics.say(at, "a value belongs to 'fixed' and 'virtual' only".to_owned());
            return Vec::new();
        }
        if self.action == RegisterAction::Fixed && self.value.is_none() {
            diagnostics.say(at, "'fixed' needs a 'value'".to_owned());
            return Vec::new();
        }
        let may_write = matches!(self.action, RegisterAction::Pass | RegisterAction::Virtual);
        if let Some((_, at)) = self.write_mask.filter(|_| !may_write) {
            diagnostics.say(at, "a write-mask belongs to 'pass' and 'virtual' only".to_owned());
            return Vec::new();
        }
        let mask = self.mask.map_or(full, |(mask, _)| mask);
        let writable = self.write_mask.map_or(mask, |(bits, _)| bits & mask);
        let mut overrides = Vec::new();
        if writable != 0 {
            overrides.push(self.over(offset, width, writable, self.treatment()));
        }
        if mask & !writable != 0 {
            overrides.push(self.over(offset, width, mask & !writable, self.unwritable()));
        }
        if overrides.is_empty() {
            diagnostics.say(self.mask.map_or(at, |(_, at)| at), "the mask is 0: no bit is meant".to_owned());
        }
        overrides
    }

    fn treatment(&self) -> Treatment {
        let value = self.value.map(|(value, _)| value);
        match self.action {
            RegisterAction::Pass => Treatment::Pass,
            RegisterAction::ReadOnly => Treatment::ReadOnly,
            RegisterAction::Hide => Treatment::ZERO,
            RegisterAction::Virtual => Treatment::Virtual(value.map_or(Initial::Hardware, Initial::Value)),
            RegisterAction::Fixed => Treatment::Fixed(value.unwrap_or(0)),
        }
    }

    /// The same for bits outside the write mask.
    fn unwritable(&self) -> Treatment {
        match (self.action, self.value) {
            (RegisterAction::Virtual, Some((value, _))) => Treatment::Fixed(value),
            (RegisterAction::Virtual, None) => Treatment::Static,
            _ => Treatment::ReadOnly,
        }
    }
}
