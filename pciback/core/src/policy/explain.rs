//! What a guest sees of a function, register by register, and which rule says so.

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::names;
use super::obstacles::BRIDGE;
use crate::Sbdf;
use crate::config::{
    AnyId, Capability, CapabilityList, Deferred, Filter, FunctionSpec, Initial, Policy, Segment, Treatment,
};

/// A function explained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Explanation {
    /// Where it is.
    pub address: Sbdf,
    /// `vendor:device`, as the guest reads them.
    pub id: String,
    /// Whether it is a VF.
    pub is_virtual: bool,
    /// Why no guest can have it; absent where one can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_assignable: Option<String>,
    /// The capabilities that hardware has, in the order of their lists.
    pub capabilities: Vec<CapabilityLine>,
    /// The registers, by offset: every byte of config space is in one of them.
    pub registers: Vec<RegisterLine>,
    /// What is wrong with the lists of capabilities.
    pub problems: Vec<String>,
    /// What the policy asked for and the function cannot have: registers that no policy can change, or that are not there; a mailbox.
    pub refused: Vec<String>,
    /// What stands in the way of giving it to a guest, and what to do about each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub obstacles: Vec<String>,
    /// What is not known of it, so that registers may be shown wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unknown: Vec<String>,
    /// What waits until the guest has released the function.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deferred: Vec<String>,
}

/// One capability.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CapabilityLine {
    /// Where its header is.
    pub offset: u16,
    /// Its id.
    pub id: u16,
    /// Whether it stands in the extended list.
    pub extended: bool,
    /// The version of an extended one, 0 of others.
    pub version: u8,
    /// What the specification calls it.
    pub name: String,
    /// How policy files call it.
    pub word: String,
    /// Whether the guest's list leads to it.
    pub visible: bool,
}

/// One register, or a run of unknown bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct RegisterLine {
    /// Where it is in config space.
    pub offset: u16,
    /// Bytes.
    pub width: u16,
    /// What the specification calls it; `unknown` for unknown bytes.
    pub name: String,
    /// The offset of the capability it belongs to; absent for the header and for bytes outside capabilities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capability: Option<u16>,
    /// What reads show: `hardware`, `constant` (hardware's, taken once), `virtual` (the guest's own) or `fixed`; several joined by
    /// `+` where its bits differ, from bit 0 on.
    pub read: String,
    /// Where writes go: `hardware`, `virtual` or `dropped`; joined likewise.
    pub write: String,
    /// The rules in force, joined by `; `.
    pub rule: String,
    /// The bits that are treated alike, from bit 0 on.
    pub bits: Vec<BitsLine>,
}

/// Bits of a register that one rule treats alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BitsLine {
    /// Which bits of the register.
    pub mask: u32,
    /// What the specification calls them.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// As in [`RegisterLine::read`].
    pub read: String,
    /// As in [`RegisterLine::write`].
    pub write: String,
    /// What they read, or read at first, where the rule says it; in place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<u32>,
    /// Why.
    pub rule: String,
    /// The section or the policy file and line that says so.
    pub origin: String,
}

/// Explains a function. One that no guest can have is explained as far as its lists go. `visible`: the capabilities that a guest
/// relies on, where one has the function.
pub fn explain(spec: &FunctionSpec, policy: &Policy, visible: Option<&[u16]>) -> Explanation {
    let id = format!("{:04x}:{:04x}", spec.identity.vendor, spec.identity.device);
    let mut explanation = Explanation {
        address: spec.address,
        id,
        is_virtual: spec.is_virtual(),
        not_assignable: None,
        capabilities: Vec::new(),
        registers: Vec::new(),
        problems: Vec::new(),
        refused: Vec::new(),
        obstacles: Vec::new(),
        unknown: Vec::new(),
        deferred: Vec::new(),
    };
    let compiled = Filter::compile_keeping(spec, policy, visible).map_err(|error| error.to_string());
    let bridge = "it is a bridge (base class 06), and bridges stay with the host".to_owned();
    match if spec.identity.class >> 16 == BRIDGE { Err(bridge) } else { compiled } {
        Ok(filter) => {
            let line = |(capability, visible): &(Capability, bool)| capability_line(capability, *visible);
            explanation.capabilities = filter.capabilities().iter().map(line).collect();
            explanation.registers = registers(&filter, spec);
            explanation.problems = filter.problems().iter().map(ToString::to_string).collect();
            explanation.refused = refused(&filter, policy);
            explanation.deferred = filter.deferred().iter().map(deferred).collect();
        }
        Err(error) => {
            let list = CapabilityList::walk(&spec.bytes);
            explanation.not_assignable = Some(error);
            explanation.capabilities =
                list.capabilities.iter().map(|capability| capability_line(capability, false)).collect();
            explanation.problems = list.problems.iter().map(ToString::to_string).collect();
        }
    }
    explanation
}

fn capability_line(capability: &Capability, visible: bool) -> CapabilityLine {
    let (id, extended) = match capability.id {
        AnyId::Legacy(id) => (u16::from(id.0), false),
        AnyId::Extended(id) => (id.0, true),
    };
    let (offset, version) = (capability.offset, capability.version);
    let (name, word) = (capability.id.to_string(), names::word(capability.id));
    CapabilityLine { offset, id, extended, version, name, word, visible }
}

fn refused(filter: &Filter, policy: &Policy) -> Vec<String> {
    let mailbox = filter.mailbox_refused().map(|why| {
        let wish = policy.mailbox.as_ref();
        let origin = wish.map_or_else(String::new, |wish| wish.rule.origin.to_string());
        format!("{origin}: it cannot have a mailbox: {why}")
    });
    let refused = filter.refused().iter();
    let registers = refused
        .map(|refused| {
            let origin = policy.registers.get(refused.index).map_or_else(String::new, |entry| entry.rule.origin.to_string());
            let (offset, mask) = (refused.offset, refused.mask);
            format!("{origin}: the register at {offset:#x} is guarded or not there: its bits {mask:#x} stay as built in")
        });
    mailbox.into_iter().chain(registers).collect()
}

/// What waits for detach, for people.
pub fn deferred(deferred: &Deferred) -> String {
    let Capability { offset, id, .. } = deferred.capability;
    let what = if deferred.show { "appears" } else { "disappears" };
    format!("{id} at {offset:#x} {what} when the guest has let go of the function")
}

/// What a treatment is to who reads and to who writes.
fn words(treatment: Treatment) -> (&'static str, &'static str, Option<u32>) {
    match treatment {
        Treatment::Pass => ("hardware", "hardware", None),
        Treatment::Event => ("hardware", "cleared", None),
        Treatment::ReadOnly => ("hardware", "dropped", None),
        Treatment::Static => ("constant", "dropped", None),
        Treatment::Virtual(Initial::Hardware) => ("virtual", "virtual", None),
        Treatment::Virtual(Initial::Value(value)) => ("virtual", "virtual", Some(value)),
        Treatment::Fixed(value) => ("fixed", "dropped", Some(value)),
    }
}

fn registers(filter: &Filter, spec: &FunctionSpec) -> Vec<RegisterLine> {
    let list = CapabilityList::walk(&spec.bytes);
    let capabilities = filter.capabilities().iter();
    let extents: Vec<(AnyId, Range<u16>)> =
        capabilities.map(|(capability, _)| (capability.id, list.extent(capability, &spec.bytes))).collect();
    let mut lines: Vec<RegisterLine> = Vec::new();
    for segment in filter.segments() {
        let owner = extents.iter().find(|(_, extent)| extent.contains(&first_byte(segment)));
        let joined = match segment.register {
            Some(index) => {
                let line = known(filter, segment, index, owner);
                // A register that is treated in several ways may be interrupted by another of its dword.
                let same = lines.iter_mut().rev().take(4).find(|other| is_same(other, &line));
                same.map(|same| same.bits.extend(line.bits.clone())).is_none().then_some(line)
            }
            None => {
                let line = unknown(filter, segment, owner);
                (!lines.last_mut().is_some_and(|run| extend(run, &line))).then_some(line)
            }
        };
        lines.extend(joined);
    }
    let mut lines: Vec<RegisterLine> = lines.into_iter().flat_map(split).collect();
    lines.iter_mut().for_each(summarize);
    lines.sort_by_key(|line| line.offset);
    lines
}

fn is_same(a: &RegisterLine, b: &RegisterLine) -> bool {
    a.offset == b.offset && a.width == b.width && a.name == b.name
}

fn first_byte(segment: &Segment) -> u16 {
    segment.dword + (segment.mask.trailing_zeros() / 8) as u16
}

fn bits_line(filter: &Filter, segment: &Segment, shift: u32) -> BitsLine {
    let (read, write, value) = words(segment.treatment);
    let rule = &filter.rules()[usize::from(segment.rule)];
    BitsLine {
        mask: segment.mask >> shift,
        name: segment.field.unwrap_or_default().to_owned(),
        read: read.to_owned(),
        write: write.to_owned(),
        value: value.map(|value| value >> shift),
        rule: rule.reason.clone().into_owned(),
        origin: rule.origin.to_string(),
    }
}

fn known(
    filter: &Filter,
    segment: &Segment,
    index: u16,
    owner: Option<&(AnyId, Range<u16>)>,
) -> RegisterLine {
    let register = &filter.registers()[usize::from(index)];
    let shift = 8 * u32::from(register.offset & 3);
    let base = owner.filter(|(id, _)| register.capability == Some(*id)).map(|(_, extent)| extent.start);
    RegisterLine {
        offset: register.offset,
        width: u16::from(register.width),
        name: register.name.to_owned(),
        capability: base,
        read: String::new(),
        write: String::new(),
        rule: String::new(),
        bits: vec![bits_line(filter, segment, shift)],
    }
}

fn unknown(filter: &Filter, segment: &Segment, owner: Option<&(AnyId, Range<u16>)>) -> RegisterLine {
    let first = segment.mask.trailing_zeros() / 8;
    let last = (31 - segment.mask.leading_zeros()) / 8;
    RegisterLine {
        offset: segment.dword + first as u16,
        width: (last - first + 1) as u16,
        name: "unknown".to_owned(),
        capability: owner.map(|(_, extent)| extent.start),
        read: String::new(),
        write: String::new(),
        rule: String::new(),
        bits: vec![bits_line(filter, segment, 8 * first)],
    }
}

/// Lets a run of unknown bytes take in the ones that follow it, when they are treated alike.
fn extend(run: &mut RegisterLine, next: &RegisterLine) -> bool {
    let alike = |a: &BitsLine, b: &BitsLine| {
        a.read == b.read && a.write == b.write && a.rule == b.rule && a.origin == b.origin
    };
    let unknown = run.name == next.name;
    let follows = unknown && run.offset + run.width == next.offset && run.capability == next.capability;
    let joined = follows && run.bits.len() == 1 && alike(&run.bits[0], &next.bits[0]);
    if joined {
        run.width += next.width;
        run.bits[0].mask = u32::MAX;
    }
    joined
}

/// Leaves out the bytes that belong to another register: what a specification lists only as further ones may have named ones in it.
fn split(line: RegisterLine) -> Vec<RegisterLine> {
    let covered = line.bits.iter().fold(0, |all, bits| all | bits.mask);
    let own = |byte: u16| covered >> (8 * byte) & 0xff != 0;
    if line.width > 4 || (0..line.width).all(own) {
        return vec![line];
    }
    let mut pieces: Vec<RegisterLine> = Vec::new();
    for byte in (0..line.width).filter(|byte| own(*byte)) {
        let offset = line.offset + byte;
        if pieces.last().is_none_or(|piece| piece.offset + piece.width != offset) {
            pieces.push(RegisterLine { offset, width: 0, bits: Vec::new(), ..line.clone() });
        }
        if let Some(piece) = pieces.last_mut() {
            piece.width += 1;
        }
    }
    for piece in &mut pieces {
        let shift = 8 * (piece.offset - line.offset);
        let mask = u32::MAX >> (32 - 8 * piece.width);
        let of_piece = line.bits.iter().map(|bits| BitsLine {
            mask: bits.mask >> shift & mask,
            value: bits.value.map(|value| value >> shift & mask),
            ..bits.clone()
        });
        piece.bits = of_piece.filter(|bits| bits.mask != 0).collect();
    }
    pieces
}

fn summarize(line: &mut RegisterLine) {
    line.bits.sort_by_key(|bits| bits.mask.trailing_zeros());
    let joined = |text: fn(&BitsLine) -> &str, with: &str| {
        let mut words: Vec<&str> = Vec::new();
        for bits in &line.bits {
            if !words.contains(&text(bits)) {
                words.push(text(bits));
            }
        }
        words.join(with)
    };
    let (read, write) = (joined(|bits| &bits.read, "+"), joined(|bits| &bits.write, "+"));
    line.rule = joined(|bits| &bits.rule, "; ");
    (line.read, line.write) = (read, write);
}

#[cfg(test)]
mod tests;
