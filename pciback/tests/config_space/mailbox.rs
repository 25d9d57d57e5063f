//! The mailbox's Data Object Exchange, which hardware does not have.

use std::sync::Arc;

use pciback::config::{
    Access, AnyId, CapabilityList, Filter, FunctionSpec, MailboxPeers, MailboxPlace, MailboxWish, Origin,
    Policy, Rule, SideEffect, VirtualConfigSpace,
};
use pciback::policy::explain;
use pciback::spec::{CapabilityId, ExtendedCapabilityId, doe};

use crate::devices::{self, Device};
use crate::model::space_under;

const PEERS: MailboxPeers = MailboxPeers { guest: true, dom0: false };
const DOE: AnyId = AnyId::Extended(ExtendedCapabilityId::DOE);

fn policy(peers: MailboxPeers) -> Policy {
    let rule = Rule { reason: "a test".into(), origin: Origin::Policy { file: "test.yaml".into(), line: 1 } };
    Policy { mailbox: Some(MailboxWish { peers, rule }), ..Policy::default() }
}

fn filter(spec: &FunctionSpec) -> Filter {
    Filter::compile(spec, &policy(PEERS)).unwrap()
}

/// The whole config space as the guest reads it.
fn seen(space: &VirtualConfigSpace, device: &Device) -> Vec<u8> {
    let dwords = (0..space.filter().size()).step_by(4);
    let read = |offset: u16| space.read(Access::new(offset.into(), 4).unwrap(), &device.hardware).unwrap();
    dwords.flat_map(|offset| read(offset).to_le_bytes()).collect()
}

fn write(
    space: &mut VirtualConfigSpace,
    device: &Device,
    at: u16,
    size: u32,
    value: u32,
) -> Option<SideEffect> {
    space.write(Access::new(at.into(), size).unwrap(), value, &device.hardware).unwrap()
}

#[test]
fn the_capability_is_last_in_the_guests_list_and_in_bytes_of_no_other() {
    for device in [devices::network_pf(), devices::network_vf()] {
        let plain = space_under(&device.spec, &Policy::default());
        let space = space_under(&device.spec, &policy(PEERS));
        let MailboxPlace { offset, peers } = space.filter().mailbox().unwrap();
        assert_eq!(peers, PEERS);
        let (before, after) = (CapabilityList::walk(&seen(&plain, &device)), seen(&space, &device));
        let list = CapabilityList::walk(&after);
        assert_eq!(list.problems, [], "{}", device.name);
        let last = list.capabilities.last().unwrap();
        assert_eq!((last.id, last.offset, last.version), (DOE, offset, 1), "{}", device.name);
        let ids = |list: &CapabilityList| list.capabilities.iter().map(|one| one.id).collect::<Vec<_>>();
        assert_eq!(ids(&list), [ids(&before), vec![DOE]].concat(), "{}", device.name);
        let hardware = CapabilityList::walk(&device.spec.bytes);
        for capability in &hardware.capabilities {
            let extent = hardware.extent(capability, &device.spec.bytes);
            assert!(extent.end <= offset || offset + doe::LENGTH <= extent.start, "{}", device.name);
        }
        assert!(
            device.spec.bytes[usize::from(offset)..][..usize::from(doe::LENGTH)]
                .iter()
                .all(|byte| *byte == 0)
        );
    }
}

#[test]
fn a_function_without_room_for_it_goes_without_and_the_explanation_says_why() {
    let vf = devices::network_vf().spec;
    let mut full = vf.clone();
    full.bytes[0x100..].iter_mut().filter(|byte| **byte == 0).for_each(|byte| *byte = 0xaa);
    let conventional = FunctionSpec { bytes: vf.bytes[..256].to_vec(), ..vf.clone() };
    let mut not_express = vf.clone();
    let express = CapabilityList::walk(&vf.bytes).legacy(CapabilityId::PCI_EXPRESS).unwrap().offset;
    not_express.bytes[usize::from(express)] = CapabilityId::VENDOR_SPECIFIC.0;
    for (spec, why) in [
        (full, "its extended config space has no gap for the capability"),
        (conventional, "it has no extended config space"),
        (not_express, "it has no extended config space"),
        (devices::disk().spec, "it is neither a VF nor a PF"),
    ] {
        let filter = filter(&spec);
        assert_eq!((filter.mailbox(), filter.mailbox_refused()), (None, Some(why)));
        let refused = explain(&spec, &policy(PEERS), None).refused;
        assert_eq!(refused, [format!("test.yaml:1: it cannot have a mailbox: {why}")]);
    }
}

#[test]
fn an_empty_extended_list_begins_with_it() {
    let mut spec = devices::network_vf().spec;
    spec.bytes[0x100..].fill(0);
    assert_eq!(filter(&spec).mailbox().unwrap().offset, 0x100);
}

#[test]
fn vendors_registers_in_a_gap_are_left_alone() {
    let mut spec = devices::network_vf().spec;
    let highest = filter(&spec).mailbox().unwrap().offset;
    spec.bytes[usize::from(highest) + 5] = 1;
    let other = filter(&spec).mailbox().unwrap().offset;
    assert!(other + doe::LENGTH <= highest + 4, "{other:#x} {highest:#x}");
    assert_ne!(
        Filter::inputs(&spec),
        Filter::inputs(&devices::network_vf().spec),
        "they cannot share a filter"
    );
}

#[test]
fn writes_of_its_registers_are_reported_and_change_neither_hardware_nor_what_is_read() {
    let device = devices::network_vf();
    let mut space = space_under(&device.spec, &policy(PEERS));
    let at = space.filter().mailbox().unwrap().offset;
    let hardware = device.hardware.bytes.borrow().clone();
    let before = seen(&space, &device);
    for register in (0..doe::LENGTH).step_by(4) {
        for (size, mask) in [(4, u32::MAX), (2, 0xffff), (1, 0xff)] {
            let effect = write(&mut space, &device, at + register, size, u32::MAX);
            let reported = matches!(register, doe::CONTROL | doe::WRITE_DATA | doe::READ_DATA)
                .then_some(SideEffect::DataObject { offset: at + register, value: mask, mask });
            assert_eq!(effect, reported, "{register:#x}/{size}");
        }
    }
    let part = write(&mut space, &device, at + doe::CONTROL + 3, 1, 0x80);
    let go = SideEffect::DataObject { offset: at + doe::CONTROL, value: doe::GO, mask: 0xff00_0000 };
    assert_eq!(part, Some(go));
    assert_eq!(seen(&space, &device), before);
    assert_eq!(*device.hardware.bytes.borrow(), hardware);
    assert_eq!(space.masked_writes().iter().count(), 0, "nothing of the guest's is lost");
}

#[test]
fn what_is_shown_lasts_until_a_reset_or_another_filter() {
    let device = devices::network_vf();
    let mut space = space_under(&device.spec, &policy(PEERS));
    let at = space.filter().mailbox().unwrap().offset;
    space.show_data_object(doe::READY, 0x1234_5678);
    let read = |space: &VirtualConfigSpace, register: u16| {
        space.read(Access::new((at + register).into(), 4).unwrap(), &device.hardware).unwrap()
    };
    assert_eq!((read(&space, doe::STATUS), read(&space, doe::READ_DATA)), (doe::READY, 0x1234_5678));
    space.reset();
    assert_eq!((read(&space, doe::STATUS), read(&space, doe::READ_DATA)), (0, 0));
}

#[test]
fn a_guest_that_has_seen_it_keeps_it_and_one_that_has_not_gets_it_with_the_next_attach() {
    let device = devices::network_vf();
    let mut space = space_under(&device.spec, &policy(PEERS));
    let place = space.filter().mailbox().unwrap();
    let visible = space.image().visible_capabilities(device.spec.bytes.len());
    assert!(visible.contains(&place.offset));
    let without = Filter::compile_keeping(&device.spec, &Policy::default(), Some(&visible)).unwrap();
    assert_eq!(
        without.mailbox(),
        Some(MailboxPlace { peers: MailboxPeers::default(), ..place }),
        "with nobody"
    );
    assert_eq!(without.deferred().len(), 1);
    let before = seen(&space, &device);
    space.replace_filter(Arc::new(without), &device.hardware).unwrap();
    assert_eq!(seen(&space, &device), before);

    let plain = space_under(&device.spec, &Policy::default());
    let visible = plain.image().visible_capabilities(device.spec.bytes.len());
    let with = Filter::compile_keeping(&device.spec, &policy(PEERS), Some(&visible)).unwrap();
    assert_eq!(with.mailbox(), None);
    assert!(with.deferred().iter().any(|one| one.show && one.capability.id == DOE), "{:?}", with.deferred());
}
