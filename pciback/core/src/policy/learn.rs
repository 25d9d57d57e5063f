//! Evaluates a guest's masked writes: the smallest addition to a policy that would permit them, and its risks.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::names;
use crate::config::{AnyId, CapabilityList, Filter, FunctionSpec, MaskedWrite, Treatment};
use crate::spec;

const PARTIAL: &str =
    "it passes only as a whole: a part of it may start what the rest of it does not ask for";

/// One register whose bits a guest wrote without effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct LearnedRegister {
    /// Where it is in config space.
    pub offset: u16,
    /// Bytes.
    pub width: u8,
    /// What the specification calls it; `unknown` for unknown bytes.
    pub name: String,
    /// The word of the capability that it belongs to; absent in the header and outside capabilities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capability: Option<String>,
    /// How many writes to its dword lost a bit since the function was attached or the service started.
    pub writes: u64,
    /// The bits that the guest changed for itself only: it reads them back, hardware does not know.
    pub kept: u32,
    /// The bits whose new value was dropped.
    pub dropped: u32,
    /// Of these, the bits that no policy can let through: xpci itself carries out what they control.
    pub never: u32,
    /// Why they are masked: what letting them through would risk.
    pub risk: String,
}

/// What can be learned from one guest's use of one function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Learned {
    /// The registers, by offset.
    pub registers: Vec<LearnedRegister>,
    /// The smallest policy file that would let through what a policy may; absent where there is nothing of that kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addition: Option<String>,
}

/// Makes sense of counted writes.
pub fn learn<'a>(
    spec: &FunctionSpec,
    filter: &Filter,
    masked: impl Iterator<Item = &'a MaskedWrite>,
) -> Learned {
    let mut registers = Vec::new();
    for entry in masked {
        of_dword(filter, entry, &mut registers);
    }
    registers.sort_by_key(|register| (register.offset, register.width));
    let addition = addition(spec, &registers);
    Learned { registers, addition }
}

fn of_dword(filter: &Filter, entry: &MaskedWrite, registers: &mut Vec<LearnedRegister>) {
    let lost = entry.kept | entry.dropped;
    let guarded = filter.guarded(entry.dword);
    for segment in filter.segments().iter().filter(|segment| segment.dword == entry.dword) {
        if segment.mask & lost == 0 {
            continue;
        }
        let named = segment.register.map(|index| &filter.registers()[usize::from(index)]);
        let (offset, width, name, capability) = match named {
            Some(register) => (register.offset, register.width, register.name, register.capability),
            None => (entry.dword, 4, "unknown", None),
        };
        let shift = 8 * u32::from(offset & 3);
        let bits = |of: u32| (of & segment.mask) >> shift;
        // Bits that pass and were lost all the same were part of a write that passes only as a whole.
        let withheld = segment.treatment == Treatment::Pass;
        let reason = match withheld {
            true => PARTIAL,
            false => filter.rules()[usize::from(segment.rule)].reason.as_ref(),
        };
        let found = registers
            .iter_mut()
            .find(|known| (known.offset, known.width, known.name.as_str()) == (offset, width, name));
        let register = match found {
            Some(register) => register,
            None => {
                registers.push(LearnedRegister {
                    offset,
                    width,
                    name: name.to_owned(),
                    capability: capability.map(names::word),
                    writes: 0,
                    kept: 0,
                    dropped: 0,
                    never: 0,
                    risk: String::new(),
                });
                let Some(register) = registers.last_mut() else { return };
                register
            }
        };
        register.writes = register.writes.max(entry.writes);
        register.kept |= bits(entry.kept);
        register.dropped |= bits(entry.dropped);
        register.never |= bits(if withheld { lost } else { lost & guarded });
        if !register.risk.contains(reason) {
            let separator = if register.risk.is_empty() { "" } else { "; " };
            let _ = write!(register.risk, "{separator}{reason}");
        }
    }
}

/// The policy file that lets through what may pass.
fn addition(spec: &FunctionSpec, registers: &[LearnedRegister]) -> Option<String> {
    let wanted = |register: &LearnedRegister| (register.kept | register.dropped) & !register.never;
    let list = CapabilityList::walk(&spec.bytes);
    let mut by_capability: Vec<(String, Vec<String>)> = Vec::new();
    let mut single = Vec::new();
    for register in registers.iter().filter(|register| wanted(register) != 0) {
        let mask = wanted(register);
        let risk = format!("# risk: {}", register.risk.replace('\n', " "));
        let owner = register.capability.as_ref().and_then(|word| {
            let id = names::selector(word)?.id;
            let owner = list.capabilities.iter().filter(|capability| capability.id == id);
            Some((
                word,
                id,
                owner.map(|capability| capability.offset).filter(|at| *at <= register.offset).max()?,
            ))
        });
        match owner {
            Some((word, id, base)) => {
                let entry = format!("{}, mask: {mask:#x}, action: pass}}", at(register, id, base));
                let lines = vec![format!("      {risk}"), format!("      - {entry}")];
                match by_capability.iter_mut().find(|(known, _)| known == word) {
                    Some((_, known)) => known.extend(lines),
                    None => by_capability.push((word.clone(), lines)),
                }
            }
            None => {
                let (offset, width) = (register.offset, register.width);
                single.push(format!("  {risk}"));
                single
                    .push(format!("  - {{at: {offset:#x}, width: {width}, mask: {mask:#x}, action: pass}}"));
            }
        }
    }
    if by_capability.is_empty() && single.is_empty() {
        return None;
    }
    let kind = if spec.is_virtual() { "virtual" } else { "physical" };
    let identity = spec.identity;
    let mut text = format!(
        "match:\n  vendor: {:04x}\n  device: {:04x}\n  function: {kind}\n",
        identity.vendor, identity.device
    );
    if !by_capability.is_empty() {
        text.push_str("capabilities:\n");
        for (word, lines) in by_capability {
            let _ = writeln!(text, "  {word}:\n    registers:\n{}", lines.join("\n"));
        }
    }
    if !single.is_empty() {
        let _ = writeln!(text, "registers:\n{}", single.join("\n"));
    }
    Some(text)
}

/// The beginning of an entry: by name where the specification names the register.
fn at(register: &LearnedRegister, id: AnyId, base: u16) -> String {
    let offset = register.offset - base;
    let named = spec::capability(id)
        .and_then(|capability| capability.registers.iter().find(|known| known.name == register.name));
    match named.filter(|known| known.offset == offset && known.width == register.width) {
        Some(known)
            if known.name.chars().all(|sign| sign.is_ascii_alphanumeric() || " _-/".contains(sign)) =>
        {
            format!("{{at: {}", known.name)
        }
        _ => format!("{{at: {offset:#x}, width: {}", register.width),
    }
}
