//! The built-in policy: how each capability's registers are treated and why. Rows of data, no code.

mod devices;
mod extended;
mod header;
mod legacy;

pub(super) use devices::device_rules;
pub(super) use header::{
    BAR_REASON, HEADER, HOST_ROM_ENABLE_REASON, HOST_ROM_REASON, NO_LINE, ROM_COPY_REASON, ROM_REASON,
    SECTION as HEADER_SECTION, VF_COMMAND,
};

use super::compile::EVENT;
use super::policy::Treatment;
use crate::spec::AnyId;

/// Some bits of one register that are not treated as their kind usually is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    /// The register, relative to its capability.
    pub offset: u16,
    /// Which of its bits.
    pub mask: u32,
    /// How.
    pub treatment: Treatment,
    /// Why.
    pub reason: &'static str,
}

/// One capability.
#[derive(Debug)]
pub(super) struct CapabilityRules {
    pub id: AnyId,
    /// Why it is taken out of the list; `None` where guests see it.
    pub hidden: Option<&'static str>,
    /// How control bits are treated that no row names, and why.
    pub controls: (Treatment, &'static str),
    /// How bits are treated that a write of 1 clears and that no row names, and why.
    pub events: (Treatment, &'static str),
    /// The exceptions. They name registers that stand once in the capability.
    pub rows: &'static [Row],
    /// Whether policies leave it alone: the service itself carries out what it controls.
    pub guarded: bool,
}

/// The rules for a capability; `None` for one whose registers are unknown.
pub(super) fn rules(id: AnyId) -> Option<&'static CapabilityRules> {
    legacy::RULES.iter().chain(extended::RULES).find(|rules| rules.id == id)
}

/// Whether a capability's registers keep their built-in treatment under every policy: the service itself carries out what
/// they control.
pub fn is_guarded(id: AnyId) -> bool {
    rules(id).is_some_and(|rules| rules.guarded)
}

pub(super) const fn row(offset: u16, mask: u32, treatment: Treatment, reason: &'static str) -> Row {
    Row { offset, mask, treatment, reason }
}

impl CapabilityRules {
    /// Its events are not of the function alone: they show and the guest leaves them as they are.
    const fn quiet(self, reason: &'static str) -> Self {
        Self { events: (Treatment::ReadOnly, reason), ..self }
    }
}

const fn shown(
    id: AnyId,
    treatment: Treatment,
    reason: &'static str,
    rows: &'static [Row],
) -> CapabilityRules {
    let events = (Treatment::Event, EVENT);
    CapabilityRules { id, hidden: None, controls: (treatment, reason), events, rows, guarded: false }
}

const fn hidden(id: AnyId, reason: &'static str) -> CapabilityRules {
    // A policy that shows it gets virtual controls, never hardware's.
    let controls = (Treatment::VIRTUAL, reason);
    let events = (Treatment::ReadOnly, reason);
    CapabilityRules { id, hidden: Some(reason), controls, events, rows: &[], guarded: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec;

    #[test]
    fn every_capability_with_registers_has_rules_and_the_other_way_round() {
        for capability in spec::capabilities() {
            assert!(rules(capability.id).is_some(), "{}", capability.id);
        }
        for rules in legacy::RULES.iter().chain(extended::RULES) {
            assert!(spec::capability(rules.id).is_some(), "{}", rules.id);
        }
    }

    #[test]
    fn each_row_treats_bits_of_one_register_that_have_a_field() {
        for rules in legacy::RULES.iter().chain(extended::RULES) {
            let spec = spec::capability(rules.id).unwrap();
            for row in rules.rows {
                let once = spec.groups.iter().filter(|group| group.first == Some(0));
                let mut registers =
                    spec.registers.iter().chain(once.flat_map(|group| group.registers.iter()));
                let register = registers.find(|register| register.offset == row.offset);
                let register = register.unwrap_or_else(|| panic!("{}: {row:?}", rules.id));
                let fields = register.fields.iter().fold(0, |bits, field| bits | field.mask);
                assert_eq!(row.mask & !fields, 0, "{}: {row:?}", rules.id);
                assert!(row.reason.len() > 10, "{}: {row:?}", rules.id);
            }
        }
    }
}
