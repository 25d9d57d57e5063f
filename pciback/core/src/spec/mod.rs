//! The PCI specification as data: offsets, ids and bits, with the section they come from. No behaviour.

pub mod bus;
pub mod doe;
pub mod express;
pub mod extended;
pub mod header;
pub mod hyper_transport;
pub mod id;
pub mod legacy;
pub mod register;
pub mod sriov;
pub mod vendor;

pub use extended::{CORRECTABLE_ERRORS, UNCORRECTABLE_ERRORS, aer, dpc};
pub use id::{AnyId, CapabilityId, ExtendedCapabilityId};
pub use register::{CapabilitySpec, Count, Field, Group, Kind, Length, Register, Stride};

/// What the specifications say of a capability; `None` for one that they do not know.
pub fn capability(id: AnyId) -> Option<&'static CapabilitySpec> {
    capabilities().find(|capability| capability.id == id)
}

/// All capabilities that the specifications know.
pub fn capabilities() -> impl Iterator<Item = &'static CapabilitySpec> {
    let legacy = [
        legacy::CAPABILITIES,
        express::CAPABILITIES,
        bus::CAPABILITIES,
        hyper_transport::CAPABILITIES,
        vendor::CAPABILITIES,
    ];
    legacy.into_iter().chain(extended::CAPABILITIES).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The registers of each capability, those of its groups included, with the name of the place.
    fn all_registers() -> Vec<(String, &'static Register)> {
        fn add(place: &str, groups: &'static [Group], all: &mut Vec<(String, &'static Register)>) {
            for (index, group) in groups.iter().enumerate() {
                let place = format!("{place}, group {index}");
                all.extend(group.registers.iter().map(|register| (place.clone(), register)));
                add(&place, group.groups, all);
            }
        }
        let mut all: Vec<_> =
            header::REGISTERS.iter().map(|register| ("header".to_owned(), register)).collect();
        for capability in capabilities() {
            let place = capability.id.to_string();
            all.extend(capability.registers.iter().map(|register| (place.clone(), register)));
            add(&place, capability.groups, &mut all);
        }
        all
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
    fn fields_are_runs_of_bits_in_ascending_order() {
        for (place, register) in all_registers() {
            let mut end = 0;
            for field in register.fields.iter().filter(|field| field.kind != Kind::RsvdZ) {
                let run = field.mask >> field.mask.trailing_zeros();
                assert_eq!(run & run.wrapping_add(1), 0, "{place}: {}: {}", register.name, field.name);
                assert!(field.mask.trailing_zeros() >= end, "{place}: {}: {}", register.name, field.name);
                end = 32 - field.mask.leading_zeros();
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

    #[test]
    fn every_id_with_a_name_has_an_entry() {
        let legacy = CapabilityId::NAMED.iter().map(|id| AnyId::Legacy(*id));
        let extended = ExtendedCapabilityId::NAMED.iter().map(|id| AnyId::Extended(*id));
        for id in legacy.chain(extended) {
            let null =
                matches!(id, AnyId::Legacy(CapabilityId::NULL) | AnyId::Extended(ExtendedCapabilityId::NULL));
            assert_eq!(capability(id).is_none(), null, "{id}");
        }
    }

    #[test]
    fn registers_cover_a_fixed_length() {
        for capability in capabilities().filter(|capability| capability.groups.is_empty()) {
            if let Length::Fixed(length) = capability.length {
                let header = if matches!(capability.id, AnyId::Legacy(_)) { 2 } else { 4 };
                let end = capability.registers.iter().fold(header, |end, register| {
                    assert_eq!(register.offset, end, "{}: a gap before {}", capability.id, register.name);
                    end + u16::from(register.width)
                });
                assert_eq!(end, length, "{}: a gap at the end", capability.id);
            }
        }
    }

    #[test]
    fn fields_have_the_names_that_specifications_give() {
        for (place, register) in all_registers() {
            let reserved = register.name == "reserved" || EMPTY.contains(&register.name);
            assert_eq!(register.fields.is_empty(), reserved, "{place}: {}", register.name);
            for field in register.fields.iter().filter(|field| field.kind != Kind::RsvdZ) {
                let named = field.name.contains(|letter: char| letter.is_ascii_uppercase());
                assert!(named || field.name == register::WHOLE, "{place}: {}: {}", register.name, field.name);
            }
        }
    }

    /// Registers that have a name and only reserved bits.
    const EMPTY: [&str; 6] = [
        "Slot Control 2",
        "16.0 GT/s Capabilities",
        "16.0 GT/s Control",
        "64.0 GT/s Capabilities",
        "64.0 GT/s Control",
        "Flit Error Injection Capability",
    ];

    #[test]
    fn only_these_capabilities_have_registers_that_are_not_described_by_field() {
        let undescribed = capabilities().filter(|capability| {
            let mut registers = capability
                .registers
                .iter()
                .chain(capability.groups.iter().flat_map(|group| group.registers))
                .peekable();
            registers.peek().is_none()
                || registers.any(|register| register.fields.iter().any(|field| field.name == register::WHOLE))
        });
        let ids: Vec<_> = undescribed.map(|capability| capability.id).collect();
        assert_eq!(
            ids,
            [
                AnyId::Legacy(CapabilityId::COMPACT_PCI_RESOURCE),
                AnyId::Extended(ExtendedCapabilityId::MR_IOV),
                AnyId::Extended(ExtendedCapabilityId::SHADOW_FUNCTIONS),
                AnyId::Extended(ExtendedCapabilityId::STREAMLINED_VIRTUAL_CHANNEL),
                AnyId::Extended(ExtendedCapabilityId::PMUX),
                AnyId::Extended(ExtendedCapabilityId::MPCIE),
                AnyId::Extended(ExtendedCapabilityId::FLIT_PERFORMANCE),
                AnyId::Extended(ExtendedCapabilityId::NOP_FLIT),
            ]
        );
    }
}
