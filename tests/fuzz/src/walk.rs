//! Any bytes as a config space.

use std::borrow::Cow;
use std::sync::Arc;

use pciback::config::{
    Access, AnyId, CapabilityAction, CapabilityList, CapabilityOverride, Filter, Origin, Policy, Rule,
    Treatment,
};
use pciback::spec::{CapabilityId, ExtendedCapabilityId};

use crate::byhand;
use crate::space::{self, Hardware};

/// The first byte chooses a policy; the others are a config space.
pub fn capability_walk(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else { return };
    let bytes = &bytes[..bytes.len().min(4096)];
    let list = CapabilityList::walk(bytes);
    // Each dword is visited once.
    assert!(list.capabilities.len() <= bytes.len() / 4);
    for capability in &list.capabilities {
        let extent = list.extent(capability, bytes);
        assert!(extent.start == capability.offset && extent.end >= extent.start);
        assert!(usize::from(extent.end) <= bytes.len(), "{capability:x?} ends at {:#x}", extent.end);
    }
    if bytes.len() < 64 {
        return;
    }
    // A header of another type has no guest; most inputs should get further.
    let mut bytes = bytes[..bytes.len() & !3].to_vec();
    bytes[0x0e] &= 0x80;
    let list = CapabilityList::walk(&bytes);
    let expected = byhand::follow_far(&bytes);
    let found = |legacy: bool| -> Vec<usize> {
        let own = list.capabilities.iter().filter(|one| matches!(one.id, AnyId::Legacy(_)) == legacy);
        own.map(|one| usize::from(one.offset)).collect()
    };
    assert_eq!(found(true), expected.legacy.iter().map(|(at, _)| *at).collect::<Vec<_>>());
    assert_eq!(found(false), expected.extended.iter().map(|(at, _)| *at).collect::<Vec<_>>());
    let spec = space::function(&bytes);
    let Ok(filter) = Filter::compile(&spec, &policy(*choice)) else { return };
    check_filter(&filter, &bytes);
    let visible: Vec<(usize, AnyId)> = filter
        .capabilities()
        .iter()
        .filter(|(_, visible)| *visible)
        .map(|(capability, _)| (usize::from(capability.offset), capability.id))
        .collect();
    let hardware = Hardware::new(&bytes);
    let mut guest = space::create(&spec, Arc::new(filter));
    check_guest(&space::guest_bytes(&guest, &hardware), &visible);
    // A guest that writes ones, then zeros, all over it changes neither its lists nor what is guarded.
    let guarded = byhand::guarded(&bytes);
    for value in [u32::MAX, 0] {
        for offset in (0..bytes.len() as u32 & !3).step_by(4) {
            let access = Access::new(offset, 4).expect("a dword within it");
            guest.write(access, value, &hardware).expect("hardware that does not fail");
        }
        hardware.with(|state| {
            for (at, guarded) in guarded.iter().enumerate() {
                let changed = (state.bytes[at] ^ bytes[at]) & guarded;
                assert_eq!(changed, 0, "guarded bits {changed:#x} at {at:#x} were written, {value:#x}");
            }
        });
        let legacy = |bytes: Vec<u8>| byhand::follow(&bytes).map(|lists| lists.legacy);
        let own: Vec<_> = visible.iter().filter_map(|(at, id)| Some((*at, legacy_id(*id)?))).collect();
        assert_eq!(legacy(space::guest_bytes(&guest, &hardware)), Ok(own));
    }
}

fn legacy_id(id: AnyId) -> Option<u8> {
    match id {
        AnyId::Legacy(id) => Some(id.0),
        AnyId::Extended(_) => None,
    }
}

/// A filter partitions the bits, and each bit knows one rule.
fn check_filter(filter: &Filter, bytes: &[u8]) {
    let mut known = vec![0u32; 1024];
    for segment in filter.segments() {
        let known = &mut known[usize::from(segment.dword / 4)];
        assert_eq!(*known & segment.mask, 0, "two rules for a bit at {:#x}", segment.dword);
        *known |= segment.mask;
        assert!(usize::from(segment.rule) < filter.rules().len());
        assert!(segment.register.is_none_or(|register| usize::from(register) < filter.registers().len()));
    }
    for (index, known) in known.iter().enumerate().take(bytes.len() / 4) {
        let bits = filter.bits(4 * index as u16);
        assert_eq!(*known, u32::MAX, "a bit without a rule at {:#x}", 4 * index);
        assert_eq!(bits.hw_write & bits.shadow_write, 0, "a write to both at {:#x}", 4 * index);
        assert_eq!(bits.hw_read & bits.shadow_write, 0, "written here and read there at {:#x}", 4 * index);
        assert_eq!(bits.value & !bits.fixed, 0);
    }
}

/// The guest finds what it may see, in the same order, and nothing else.
fn check_guest(guest: &[u8], visible: &[(usize, AnyId)]) {
    let lists = byhand::follow(guest).unwrap_or_else(|error| panic!("{error}"));
    let mut found: Vec<(usize, AnyId)> =
        lists.legacy.iter().map(|(at, id)| (*at, AnyId::Legacy(CapabilityId(*id)))).collect();
    found.extend(lists.extended.iter().map(|(at, id)| (*at, AnyId::Extended(ExtendedCapabilityId(*id)))));
    // A null capability at the head may stand in for a hidden one, and alone it says that there is no list.
    let is_null = |one: &(usize, AnyId)| *one == (0x100, AnyId::Extended(ExtendedCapabilityId::NULL));
    found.retain(|one| !is_null(one));
    let visible: Vec<_> = visible.iter().copied().filter(|one| !is_null(one)).collect();
    assert_eq!(found, visible);
}

/// One of 256 policies: what is done with unknown registers, and with one capability.
fn policy(choice: u8) -> Policy {
    let rule = Rule {
        reason: Cow::Borrowed("fuzzing"),
        origin: Origin::Policy { file: "fuzz".to_owned(), line: 1 },
    };
    let mut policy = Policy::default();
    if choice & 1 != 0 {
        policy.unknown = (Treatment::ReadOnly, rule.clone());
    }
    let action = match choice >> 1 & 3 {
        0 => return policy,
        1 => CapabilityAction::Hide,
        2 => CapabilityAction::Show,
        _ => CapabilityAction::Treat(Treatment::Pass),
    };
    let id = match choice >> 3 {
        id @ 0..0x16 => AnyId::Legacy(CapabilityId(id)),
        id => AnyId::Extended(ExtendedCapabilityId(
            [0x01, 0x0b, 0x0d, 0x0f, 0x10, 0x15, 0x1b, 0x23, 0x2e, 0][usize::from(id) - 0x16],
        )),
    };
    policy.capabilities.push(CapabilityOverride { which: id.into(), action, rule });
    policy
}
