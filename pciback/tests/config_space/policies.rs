//! Where a policy plugs in, and where it cannot.

use std::sync::Arc;

use pciback::config::{
    Access, AnyId, CapabilityAction, CapabilityList, CapabilityOverride, ConfigError, Filter, FunctionImage,
    Origin, Place, Policy, RegisterOverride, Rule, Treatment, VirtualConfigSpace,
};
use pciback::platform::SharedMemory;
use pciback::spec::{CapabilityId, ExtendedCapabilityId};

use proptest::prelude::*;

use crate::devices::{self, Device};
use crate::model::OWNER;

fn rule(line: u32) -> Rule {
    Rule { reason: "a test".into(), origin: Origin::Policy { file: "test.yaml".into(), line } }
}

fn space(device: &Device, policy: &Policy) -> VirtualConfigSpace {
    let filter = Arc::new(Filter::compile(&device.spec, policy).unwrap());
    let image = FunctionImage::new(SharedMemory::anonymous(FunctionImage::BYTES).unwrap(), OWNER);
    VirtualConfigSpace::create(&device.spec, filter, image).unwrap()
}

fn register(place: Place, width: u8, mask: u32, treatment: Treatment) -> Policy {
    let registers = vec![RegisterOverride { place, width, mask, treatment, rule: rule(1) }];
    Policy { registers, ..Policy::default() }
}

fn capability(id: AnyId, action: CapabilityAction) -> Policy {
    let capabilities = vec![CapabilityOverride { which: id.into(), action, rule: rule(2) }];
    Policy { capabilities, ..Policy::default() }
}

const EXPRESS: AnyId = AnyId::Legacy(CapabilityId::PCI_EXPRESS);

#[test]
fn a_register_that_a_policy_lets_through_reaches_hardware() {
    let device = devices::network_pf();
    let policy = register(Place::In(EXPRESS.into(), 8), 2, 0x7000, Treatment::Pass);
    let mut space = space(&device, &policy);
    space.write(Access::new(0xa8, 2).unwrap(), 0x5fff & !0x8000, &device.hardware).unwrap();
    assert_eq!(device.hardware.bytes.borrow()[0xa9] & 0x70, 0x50);
    let filter = space.filter();
    let segment = filter.segments().iter().find(|segment| segment.dword == 0xa8 && segment.mask == 0x7000);
    let segment = segment.expect("a segment of its own");
    assert_eq!(filter.rules()[usize::from(segment.rule)], rule(1));
    assert_eq!(filter.registers()[usize::from(segment.register.unwrap())].name, "Device Control");
}

#[test]
fn guarded_registers_stay_as_they_are_and_the_policy_hears_of_it() {
    let device = devices::network_pf();
    let plain = Filter::compile(&device.spec, &Policy::default()).unwrap();
    for place in [
        Place::Absolute(0x04),
        Place::Absolute(0x10),
        Place::Absolute(0x30),
        Place::Absolute(0x3c),
        Place::Absolute(0x52),
        Place::Absolute(0x5c),
        Place::In(AnyId::Legacy(CapabilityId::MSI_X).into(), 2),
        Place::Absolute(0x100),
    ] {
        let filter = Filter::compile(&device.spec, &register(place, 2, 0xffff, Treatment::Pass)).unwrap();
        assert_eq!(filter.behaviour_hash(), plain.behaviour_hash(), "{place:?}");
        assert_eq!(filter.refused().len(), 1, "{place:?}");
        assert_eq!(filter.refused()[0].mask, 0xffff, "{place:?}");
    }
}

#[test]
fn what_is_guarded_stays_so_behind_a_hidden_capability() {
    let device = devices::network_pf();
    for (id, offset, mask) in [
        (CapabilityId::MSI, 0x52, 0xffff),
        (CapabilityId::MSI, 0x5c, 0xffff),
        (CapabilityId::MSI_X, 0x72, 0xffff),
        // Initiate Function Level Reset.
        (CapabilityId::PCI_EXPRESS, 0xa8, 0x8000),
    ] {
        let hidden = capability(AnyId::Legacy(id), CapabilityAction::Hide);
        let opened = register(Place::Absolute(offset), 2, mask, Treatment::Pass);
        let both = Policy { registers: opened.registers, ..hidden.clone() };
        let (hidden, both) =
            (Filter::compile(&device.spec, &hidden).unwrap(), Filter::compile(&device.spec, &both).unwrap());
        assert_eq!(both.behaviour_hash(), hidden.behaviour_hash(), "{offset:#x}");
        assert_eq!(both.refused().iter().map(|refused| refused.mask).collect::<Vec<_>>(), [mask]);
    }
}

#[test]
fn registers_outside_config_space_or_unaligned_are_refused() {
    let device = devices::virtio();
    for (offset, width) in [(0x100, 4), (0xfe, 4), (0x41, 2), (0x40, 3), (0xfff, 1), (u16::MAX, 1)] {
        let policy = register(Place::Absolute(offset), width, u32::MAX, Treatment::Pass);
        assert_eq!(Filter::compile(&device.spec, &policy).unwrap().refused().len(), 1, "{offset:#x}/{width}");
    }
}

#[test]
fn a_policy_hides_shows_and_treats_capabilities() {
    let device = devices::network_pf();
    let walk = |policy: &Policy| {
        let space = space(&device, policy);
        let bytes: Vec<u8> = (0..0x1000)
            .map(|offset| space.read(Access::new(offset, 1).unwrap(), &device.hardware).unwrap() as u8)
            .collect();
        let list = CapabilityList::walk(&bytes);
        assert_eq!(list.problems, []);
        (list, space)
    };
    let (list, _) = walk(&capability(AnyId::Legacy(CapabilityId::POWER_MANAGEMENT), CapabilityAction::Hide));
    assert_eq!(list.capabilities[0].offset, 0x50, "the first of the list");
    let (list, space) = walk(&capability(AnyId::Legacy(CapabilityId::MSI_X), CapabilityAction::Hide));
    assert!(list.legacy(CapabilityId::MSI_X).is_none());
    assert_eq!(space.msix(), None);
    let sriov = AnyId::Extended(ExtendedCapabilityId::SR_IOV);
    let (list, _) = walk(&capability(sriov, CapabilityAction::Show));
    assert!(list.extended(ExtendedCapabilityId::SR_IOV).is_some());
    let aer = AnyId::Extended(ExtendedCapabilityId::AER);
    let (list, mut space) = walk(&capability(aer, CapabilityAction::Treat(Treatment::ReadOnly)));
    assert!(list.extended(ExtendedCapabilityId::AER).is_some());
    space.write(Access::new(0x108, 4).unwrap(), 0, &device.hardware).unwrap();
    assert_eq!(space.read(Access::new(0x108, 4).unwrap(), &device.hardware).unwrap(), 0x0040_0000);
    let (_, space) =
        walk(&capability(AnyId::Legacy(CapabilityId::MSI_X), CapabilityAction::Treat(Treatment::Pass)));
    assert_eq!(space.filter().bits(0x70).hw_write, 0, "guarded");
}

#[test]
fn events_stay_events_when_a_policy_treats_their_register() {
    let device = devices::network_pf();
    let policy = register(Place::Absolute(0x104), 4, u32::MAX, Treatment::Pass);
    let mut space = space(&device, &policy);
    // The merge of a partial mask must not clear what the guest did not write.
    space.write(Access::new(0x104, 1).unwrap(), 0, &device.hardware).unwrap();
    assert_eq!(device.hardware.bytes.borrow()[0x104], 0x20);
    space.write(Access::new(0x104, 4).unwrap(), 0x20, &device.hardware).unwrap();
    assert_eq!(device.hardware.bytes.borrow()[0x104..0x108], [0, 0x40, 0x10, 0]);
}

#[test]
fn vfs_of_one_pf_share_a_filter_and_other_layouts_do_not() {
    let first = devices::network_vf().spec;
    let mut second = first.clone();
    second.address = first.address.offset_by(2).unwrap();
    second.resources[0].start += 0x4000;
    second.identity.subsystem = 7;
    let hash = |spec: &pciback::config::FunctionSpec| {
        Filter::compile(spec, &Policy::default()).unwrap().behaviour_hash()
    };
    assert_eq!(hash(&first), hash(&second));
    second.resources[0].size *= 2;
    assert_ne!(hash(&first), hash(&second));
    assert_ne!(hash(&first), hash(&devices::network_pf().spec));
}

proptest! {
    /// Functions that agree in the inputs can share a filter: nothing else of them has a part in it.
    #[test]
    fn a_filter_depends_on_its_inputs_only(
        which in 0usize..devices::all().len(),
        changes in prop::collection::vec((0usize..4096, any::<u8>()), 1..200),
    ) {
        let spec = devices::all().swap_remove(which).spec;
        let mut other = spec.clone();
        other.identity.vendor ^= 1;
        for (at, value) in changes {
            let before = other.clone();
            if let Some(byte) = other.bytes.get_mut(at) {
                *byte = value;
            }
            if Filter::inputs(&other) != Filter::inputs(&spec) {
                other = before;
            }
        }
        if let Ok(filter) = Filter::compile(&other, &Policy::default()) {
            prop_assert!(filter == Filter::compile(&spec, &Policy::default()).unwrap());
        }
    }
}

#[test]
fn every_bit_of_config_space_has_exactly_one_rule() {
    for device in devices::all() {
        let filter = Filter::compile(&device.spec, &Policy::default()).unwrap();
        let mut seen = vec![0u32; device.spec.bytes.len() / 4];
        for segment in filter.segments() {
            let bits = &mut seen[usize::from(segment.dword / 4)];
            assert_eq!(*bits & segment.mask, 0, "{}: {segment:x?}", device.name);
            *bits |= segment.mask;
            assert!(!filter.rules()[usize::from(segment.rule)].reason.is_empty());
        }
        assert!(seen.iter().all(|bits| *bits == u32::MAX), "{}", device.name);
    }
}

#[test]
fn the_masks_of_a_filter_are_disjoint() {
    for device in devices::all() {
        let filter = Filter::compile(&device.spec, &Policy::default()).unwrap();
        for offset in (0..filter.size()).step_by(4) {
            let bits = filter.bits(offset);
            assert_eq!(bits.hw_write & bits.shadow_write, 0, "{}: {offset:#x}", device.name);
            assert_eq!(bits.hw_read & bits.shadow_write, 0, "{}: {offset:#x}", device.name);
            assert_eq!(bits.hw_write & !bits.hw_read, 0, "{}: {offset:#x}", device.name);
            assert_eq!(bits.value & !bits.fixed, 0, "{}: {offset:#x}", device.name);
            assert_eq!(bits.fixed & bits.hw_read, 0, "{}: {offset:#x}", device.name);
        }
    }
}

#[test]
fn bridges_stumps_and_functions_that_are_gone_are_refused() {
    let mut spec = devices::virtio().spec;
    spec.bytes[0x0e] = 0x81;
    let refused =
        |spec: &pciback::config::FunctionSpec| Filter::compile(spec, &Policy::default()).unwrap_err();
    assert!(matches!(refused(&spec), ConfigError::HeaderType { header_type: 1, .. }));
    spec.bytes.truncate(60);
    assert!(matches!(refused(&spec), ConfigError::TooShort { bytes: 60, .. }));
    spec.bytes = vec![0xff; 4096];
    assert!(matches!(refused(&spec), ConfigError::NoAnswer { .. }));
}
