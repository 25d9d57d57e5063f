//! The PCI specification as data: offsets, ids and bits, with the section they come from. No behaviour.

pub mod express;
pub mod extended;
pub mod extended_link;
pub mod header;
pub mod id;
pub mod legacy;
pub mod register;
pub mod sriov;

pub use id::{AnyId, CapabilityId, ExtendedCapabilityId};
pub use register::{CapabilitySpec, Field, Kind, Length, Register};

/// What the specifications say of a capability; `None` for one whose registers they leave to its vendor, or an unknown one.
pub fn capability(id: AnyId) -> Option<&'static CapabilitySpec> {
    capabilities().find(|capability| capability.id == id)
}

/// All capabilities whose registers are known.
pub fn capabilities() -> impl Iterator<Item = &'static CapabilitySpec> {
    [legacy::CAPABILITIES, express::CAPABILITIES, extended::CAPABILITIES, extended_link::CAPABILITIES]
        .into_iter()
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_registers() -> impl Iterator<Item = (String, &'static Register)> {
        let header = header::REGISTERS.iter().map(|register| ("header".to_owned(), register));
        header.chain(capabilities().flat_map(|capability| {
            capability.registers.iter().map(|register| (capability.id.to_string(), register))
        }))
    }

    #[test]
    fn fields_are_disjoint_and_fit_their_register() {
        for (place, register) in all_registers() {
            let full = (1u64 << (8 * register.width)) - 1;
            let mut seen = 0;
            for field in register.fields {
                assert_ne!(field.mask, 0, "{place}: {}: {}", register.name, field.name);
                assert_eq!(seen & field.mask, 0, "{place}: {}: {}", register.name, field.name);
                assert_eq!(u64::from(field.mask) & !full, 0, "{place}: {}: {}", register.name, field.name);
                seen |= field.mask;
            }
        }
    }

    #[test]
    fn registers_are_aligned_ascending_and_disjoint() {
        let mut previous = (String::new(), 0);
        for (place, register) in all_registers() {
            assert!(matches!(register.width, 1 | 2 | 4), "{place}: {}", register.name);
            assert_eq!(register.offset % u16::from(register.width), 0, "{place}: {}", register.name);
            let end = if previous.0 == place { previous.1 } else { 0 };
            assert!(register.offset >= end, "{place}: {}", register.name);
            previous = (place, register.offset + u16::from(register.width));
        }
    }

    #[test]
    fn registers_lie_behind_the_header_and_within_a_known_length() {
        for capability in capabilities() {
            let header = if matches!(capability.id, AnyId::Legacy(_)) { 2 } else { 4 };
            for register in capability.registers {
                assert!(register.offset >= header, "{}: {}", capability.id, register.name);
                if let Length::Fixed(length) | Length::UpTo(length) = capability.length {
                    let end = register.offset + u16::from(register.width);
                    assert!(end <= length, "{}: {}", capability.id, register.name);
                }
            }
        }
    }

    #[test]
    fn each_capability_has_one_entry() {
        let mut ids: Vec<_> = capabilities().map(|capability| capability.id).collect();
        ids.sort();
        let count = ids.len();
        ids.dedup();
        assert_eq!(ids.len(), count);
    }
}
