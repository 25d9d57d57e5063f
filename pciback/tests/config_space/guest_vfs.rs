//! The SR-IOV capability of a PF whose guest creates VFs.

use std::sync::Arc;

use pciback::Devfn;
use pciback::config::{
    Access, AnyId, ByGuest, CapabilityAction, CapabilityList, CapabilityOverride, Filter, GuestVfs, Origin,
    Policy, Rule, SideEffect, VirtualConfigSpace,
};
use pciback::spec::ExtendedCapabilityId;
use proptest::prelude::*;
use xpci_test_support::meaning;

use crate::devices::{self, Device};
use crate::model::{check, space_under};

const SRIOV: u32 = 0x160;
const CONTROL: u32 = SRIOV + 0x08;
const NUM_VFS: u32 = SRIOV + 0x10;

fn rule() -> Rule {
    Rule { reason: "a test".into(), origin: Origin::Policy { file: "test.yaml".into(), line: 1 } }
}

fn by_guest(count: u16) -> Policy {
    Policy { virtual_functions: Some(ByGuest { count, rule: rule() }), ..Policy::default() }
}

/// Where the first VF is, for a guest that has the PF as device 0: beside it, or on the next bus where more than seven are possible.
fn pf(count: u16) -> (Device, VirtualConfigSpace) {
    let mut device = devices::network_pf();
    let space = space_under(&device.spec, &by_guest(count));
    device.oracle.constant(0x150, &[0x0e, 0, 1, 0x16]);
    meaning::guest_vfs(&mut device.oracle, SRIOV as usize, count, if count > 7 { 0x100 } else { 1 });
    (device, space)
}

fn write(space: &mut VirtualConfigSpace, device: &Device, offset: u32, value: u32) -> Option<SideEffect> {
    space.write(Access::new(offset, 2).unwrap(), value, &device.hardware).unwrap()
}

fn read(space: &VirtualConfigSpace, device: &Device, offset: u32) -> u32 {
    space.read(Access::new(offset, 2).unwrap(), &device.hardware).unwrap()
}

#[test]
fn every_write_of_the_capability_does_what_the_model_says_and_never_reaches_hardware() {
    for count in [3, 256] {
        let (mut device, mut space) = pf(count);
        for size in [1u32, 2, 4] {
            for offset in (0x150..0x1a0).step_by(size as usize) {
                for value in [0, u32::MAX, 0x5555_5555, 0xaaaa_aaaa, 1, 8, 9, 0] {
                    check(&mut device, &mut space, offset, size, value);
                }
            }
        }
    }
}

/// By what the guest reads and Linux computes: `pci_iov_virtfn_bus`, `pci_iov_virtfn_devfn`.
#[test]
fn vfs_are_where_the_capability_says_and_at_no_place_of_another_device_or_pf() {
    for (own, total, enabled) in [
        (0x00, 7, 7),
        (0x18, 7, 3),
        (0xf8, 7, 7),
        (0x00, 8, 8),
        (0x18, 31, 31),
        (0x18, 256, 9),
        (0x00, 256, 256),
        (0xf8, 256, 256),
    ] {
        let (device, mut space) = pf(total);
        space.show_own_number(Devfn(own));
        write(&mut space, &device, NUM_VFS, enabled);
        assert!((0..=u16::MAX).all(|id| !space.has_guest_vf(Devfn(own), id)), "before VF Enable");
        write(&mut space, &device, CONTROL, 9);
        let (first, stride) = (read(&space, &device, SRIOV + 0x14), read(&space, &device, SRIOV + 0x16));
        let computed: Vec<u32> = (0..enabled).map(|index| u32::from(own) + first + stride * index).collect();
        let found: Vec<u32> =
            (0..=u16::MAX).filter(|id| space.has_guest_vf(Devfn(own), *id)).map(u32::from).collect();
        assert_eq!(found, computed, "{own:#x}, {total}");
        let place = |id: &u32| {
            if total > 7 { id >> 8 == u32::from(own >> 3) + 1 } else { id >> 3 == u32::from(own >> 3) }
        };
        assert!(found.iter().all(place), "{own:#x}, {total}: {found:x?}");
    }
}

#[test]
fn vfs_beyond_total_vfs_are_nowhere() {
    for total in [7, 64] {
        let (device, mut space) = pf(total);
        write(&mut space, &device, NUM_VFS, 0xffff);
        write(&mut space, &device, CONTROL, 9);
        let found = (0..=u16::MAX).filter(|id| space.has_guest_vf(Devfn(0), *id)).count();
        assert_eq!(found, usize::from(total));
    }
}

#[test]
fn a_guest_finds_no_more_vfs_than_the_pf_has() {
    let mut device = devices::network_pf();
    device.spec.bytes[SRIOV as usize + 0x0e..][..2].copy_from_slice(&[8, 0]);
    let space = space_under(&device.spec, &by_guest(31));
    assert_eq!((read(&space, &device, SRIOV + 0x0c), read(&space, &device, SRIOV + 0x0e)), (8, 8));
    let said = |rule: &Rule| rule.reason.starts_with("the PF has no more VFs");
    assert!(space.filter().rules().iter().any(said));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_sequence_of_writes_does_what_the_model_says(
        writes in prop::collection::vec((0u32..0x40, 0u32..3, any::<u32>()), 1..100),
        count in prop::sample::select(vec![7, 31]),
    ) {
        let (mut device, mut space) = pf(count);
        for (place, width, value) in writes {
            let size = 1 << width;
            check(&mut device, &mut space, SRIOV + (place & !(size - 1)), size, value);
        }
    }
}

#[test]
fn a_change_of_vf_enable_is_reported_with_the_number_of_vfs_and_nothing_else_is() {
    let (device, mut space) = pf(3);
    assert_eq!(space.guest_vfs(), Some(GuestVfs { enabled: false, count: 0 }));
    assert_eq!(write(&mut space, &device, NUM_VFS, 2), None);
    assert_eq!(write(&mut space, &device, CONTROL, 0x08), None, "VF MSE alone");
    assert_eq!(write(&mut space, &device, CONTROL, 0x09), Some(SideEffect::VfEnable));
    assert_eq!(space.guest_vfs(), Some(GuestVfs { enabled: true, count: 2 }));
    assert_eq!(write(&mut space, &device, CONTROL, 0x09), None, "once more");
    assert_eq!(write(&mut space, &device, NUM_VFS, 3), None);
    assert_eq!(space.guest_vfs(), Some(GuestVfs { enabled: true, count: 2 }), "NumVFs while VFs are enabled");
    assert_eq!(write(&mut space, &device, CONTROL, 0), Some(SideEffect::VfEnable));
    assert_eq!(space.guest_vfs(), Some(GuestVfs { enabled: false, count: 2 }));
}

#[test]
fn a_reset_of_the_pf_leaves_the_vfs_that_exist() {
    let (device, mut space) = pf(3);
    write(&mut space, &device, NUM_VFS, 2);
    space.reset();
    assert_eq!(space.guest_vfs(), Some(GuestVfs { enabled: false, count: 0 }));
    write(&mut space, &device, NUM_VFS, 2);
    write(&mut space, &device, CONTROL, 9);
    write(&mut space, &device, 0xa8, 0x5f00);
    space.reset();
    assert_eq!(space.guest_vfs(), Some(GuestVfs { enabled: true, count: 2 }));
    let control = space.read(Access::new(0xa8, 2).unwrap(), &device.hardware).unwrap();
    assert_ne!(control & 0x5f00, 0x5f00, "all else is as at first");
}

#[test]
fn the_pf_depends_on_the_function_that_its_guest_knows_it_by() {
    let (device, mut space) = pf(3);
    let link = |space: &VirtualConfigSpace| {
        space.read(Access::new(SRIOV + 0x12, 1).unwrap(), &device.hardware).unwrap()
    };
    space.show_own_number(Devfn(0x18));
    assert_eq!(link(&space), 0x18);
    space.reset();
    assert_eq!(link(&space), 0x18);
}

#[test]
fn a_guest_that_has_the_capability_keeps_its_numbers_under_another_policy() {
    let (device, mut space) = pf(3);
    write(&mut space, &device, NUM_VFS, 2);
    write(&mut space, &device, CONTROL, 9);
    let visible = space.image().visible_capabilities(device.spec.bytes.len());
    for policy in [by_guest(1), by_guest(64), Policy::default()] {
        let filter = Filter::compile_keeping(&device.spec, &policy, Some(&visible)).unwrap();
        space.replace_filter(Arc::new(filter), &device.hardware).unwrap();
        space.show_own_number(Devfn(0x18));
        assert_eq!(read(&space, &device, SRIOV + 0x14), 1, "its VFs stay where they are");
        let total = read(&space, &device, SRIOV + 0x0e);
        assert_eq!((total, space.guest_vfs()), (3, Some(GuestVfs { enabled: true, count: 2 })));
        assert_eq!(write(&mut space, &device, CONTROL, 0), Some(SideEffect::VfEnable));
        write(&mut space, &device, CONTROL, 9);
    }
}

#[test]
fn it_is_hidden_from_vfs_without_the_policy_and_where_a_policy_hides_it() {
    let sriov = AnyId::Extended(ExtendedCapabilityId::SR_IOV);
    let hide = CapabilityOverride { which: sriov.into(), action: CapabilityAction::Hide, rule: rule() };
    let hidden = Policy { capabilities: vec![hide], ..by_guest(3) };
    for (policy, seen) in [(by_guest(3), true), (Policy::default(), false), (hidden, false)] {
        let device = devices::network_pf();
        let space = space_under(&device.spec, &policy);
        let listed = space.filter().capabilities().iter().any(|(found, seen)| found.id == sriov && *seen);
        assert_eq!((listed, space.guest_vfs().is_some()), (seen, seen));
    }
    let vf = devices::network_vf();
    assert_eq!(space_under(&vf.spec, &by_guest(3)).guest_vfs(), None);
}

#[test]
fn no_policy_opens_a_register_of_it() {
    let device = devices::network_pf();
    let sriov = AnyId::Extended(ExtendedCapabilityId::SR_IOV);
    let pass = CapabilityAction::Treat(pciback::config::Treatment::Pass);
    let open = CapabilityOverride { which: sriov.into(), action: pass, rule: rule() };
    let space = space_under(&device.spec, &Policy { capabilities: vec![open], ..by_guest(3) });
    for offset in (SRIOV as u16..SRIOV as u16 + 0x40).step_by(4) {
        let bits = space.filter().bits(offset);
        assert_eq!((bits.hw_write, bits.hw_read), (0, 0), "{offset:#x}");
        assert_eq!(space.filter().guarded(offset), u32::MAX, "{offset:#x}");
    }
    assert!(CapabilityList::walk(&device.spec.bytes).extended(ExtendedCapabilityId::SR_IOV).is_some());
}
