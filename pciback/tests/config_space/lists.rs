//! Lists of capabilities, well formed and not.

use pciback::config::{AnyId, CapabilityList, ListProblem, MsixFault, VirtualConfigSpace};
use pciback::spec::{CapabilityId, ExtendedCapabilityId};

use crate::devices;

fn conventional(pointer: u8) -> Vec<u8> {
    let mut bytes = vec![0; 256];
    bytes[0x06] = 0x10;
    bytes[0x34] = pointer;
    bytes
}

fn offsets(bytes: &[u8]) -> (Vec<u16>, Vec<ListProblem>) {
    let list = CapabilityList::walk(bytes);
    (list.capabilities.iter().map(|capability| capability.offset).collect(), list.problems)
}

#[test]
fn both_lists_are_walked_in_their_order() {
    let pf = devices::network_pf();
    let list = CapabilityList::walk(&pf.spec.bytes);
    assert_eq!(list.problems, []);
    let offsets: Vec<_> = list.capabilities.iter().map(|capability| capability.offset).collect();
    assert_eq!(offsets, [0x40, 0x50, 0x70, 0xa0, 0xe0, 0x100, 0x140, 0x150, 0x160]);
    assert_eq!(list.extended(ExtendedCapabilityId::SR_IOV).unwrap().offset, 0x160);
    assert_eq!(list.legacy(CapabilityId::MSI_X).unwrap().offset, 0x70);
    assert_eq!(list.capabilities[5].id, AnyId::Extended(ExtendedCapabilityId::AER));
}

#[test]
fn no_list_without_the_status_bit() {
    let mut bytes = conventional(0x40);
    bytes[0x06] = 0;
    assert_eq!(offsets(&bytes), (vec![], vec![]));
}

#[test]
fn a_card_bus_bridge_has_its_pointer_elsewhere() {
    let mut bytes = conventional(0xfc);
    bytes[0x0e] = 0x82;
    bytes[0x14] = 0xa0;
    bytes[0xa0] = 1;
    assert_eq!(offsets(&bytes), (vec![0xa0], vec![]));
}

#[test]
fn a_loop_ends_the_list() {
    let mut bytes = conventional(0x40);
    bytes[0x40..0x42].copy_from_slice(&[1, 0x50]);
    bytes[0x50..0x52].copy_from_slice(&[5, 0x40]);
    assert_eq!(offsets(&bytes), (vec![0x40, 0x50], vec![ListProblem::Loop { at: 0x51, target: 0x40 }]));
}

#[test]
fn low_bits_of_a_pointer_are_ignored_and_reported() {
    let mut bytes = conventional(0x43);
    bytes[0x40] = 1;
    assert_eq!(offsets(&bytes), (vec![0x40], vec![ListProblem::Misaligned { at: 0x34, target: 0x43 }]));
}

#[test]
fn a_pointer_into_the_header_ends_the_list() {
    assert_eq!(
        offsets(&conventional(0x10)),
        (vec![], vec![ListProblem::InsideHeader { at: 0x34, target: 0x10 }])
    );
}

#[test]
fn a_pointer_behind_the_bytes_ends_the_list() {
    let bytes = conventional(0x40);
    assert_eq!(offsets(&bytes[..64]), (vec![], vec![ListProblem::OutOfRange { at: 0x34, target: 0x40 }]));
}

#[test]
fn a_header_of_all_ones_ends_the_list() {
    let mut bytes = conventional(0x40);
    bytes[0x40..0x44].fill(0xff);
    assert_eq!(offsets(&bytes), (vec![], vec![ListProblem::NoAnswer { at: 0x40 }]));
}

#[test]
fn extended_lists_end_at_loops_and_pointers_below_0x100() {
    let mut bytes = conventional(0);
    bytes.resize(4096, 0);
    bytes[0x100..0x104].copy_from_slice(&[1, 0, 1, 0x20]);
    bytes[0x200..0x204].copy_from_slice(&[3, 0, 1, 0x10]);
    assert_eq!(offsets(&bytes), (vec![0x100, 0x200], vec![ListProblem::Loop { at: 0x200, target: 0x100 }]));
    bytes[0x200..0x204].copy_from_slice(&[3, 0, 1, 0x04]);
    assert_eq!(
        offsets(&bytes),
        (vec![0x100, 0x200], vec![ListProblem::InsideHeader { at: 0x200, target: 0x40 }])
    );
}

#[test]
fn a_guest_walks_only_what_it_may_see() {
    for (device, expected) in [
        (devices::network_pf(), vec![0x40, 0x50, 0x70, 0xa0, 0xe0, 0x100, 0x140, 0x150]),
        // A null capability leads on from 0x100; DOE at the end is gone.
        (devices::disk(), vec![0x40, 0x60, 0x80, 0x100, 0x120, 0x140]),
        (devices::header_only(), vec![]),
    ] {
        let space = crate::model::space(&device.spec);
        let size = device.spec.bytes.len() as u32;
        let guest: Vec<u8> = (0..size)
            .map(|offset| {
                let access = pciback::config::Access::new(offset, 1).unwrap();
                space.read(access, &device.hardware).unwrap() as u8
            })
            .collect();
        assert_eq!(offsets(&guest), (expected, vec![]), "{}", device.name);
    }
}

#[test]
fn an_unknown_capability_inside_msix_does_not_open_it() {
    let mut device = devices::virtio();
    // The list begins with a vendor's capability that stands in the middle of MSI-X.
    device.hardware.put(0x34, &[0x9c]);
    device.hardware.put(0x9c, &[0x09, 0x98, 8, 0]);
    device.spec.bytes = device.hardware.bytes.borrow().clone();
    device.hardware.writable32(0x98, u32::MAX);
    device.hardware.writable32(0x9c, u32::MAX);
    device.hardware.writable32(0xa0, u32::MAX);
    let mut space = crate::model::space(&device.spec);
    for offset in (0x98..0xa4).step_by(4) {
        let access = pciback::config::Access::new(offset, 4).unwrap();
        space.write(access, u32::MAX, &device.hardware).unwrap();
    }
    assert_eq!(device.hardware.take_seen(), []);
    assert!(space.filter().problems().contains(&ListProblem::Overlap { at: 0x98, with: 0x9c }));
}

#[test]
fn a_capability_within_another_is_not_shown() {
    let mut device = devices::virtio();
    // Power management at 0x40, then one inside it, then MSI-X, where the list of the composed device begins.
    device.hardware.put(0x34, &[0x40]);
    device.hardware.put(0x40, &[0x01, 0x44, 3, 0, 0, 0, 0, 0]);
    device.hardware.put(0x44, &[0x03, 0x98]);
    device.spec.bytes = device.hardware.bytes.borrow().clone();
    let space = crate::model::space(&device.spec);
    let guest: Vec<u8> = (0..256)
        .map(|offset| {
            space.read(pciback::config::Access::new(offset, 1).unwrap(), &device.hardware).unwrap() as u8
        })
        .collect();
    let (found, problems) = offsets(&guest);
    assert_eq!((&found[..2], problems), (&[0x40, 0x98][..], vec![]));
}

#[test]
fn msi_within_another_capability_stays_guarded() {
    let mut device = devices::virtio();
    // MSI's Enable stands where Device Status has an event that a guest clears by writing 1.
    device.hardware.put(0x34, &[0x40]);
    device.hardware.put(0x40, &[0x10, 0x48, 1, 0, 0, 0, 0, 0]);
    device.hardware.put(0x48, &[0x05, 0, 0, 0, 0, 0, 0, 0]);
    device.spec.bytes = device.hardware.bytes.borrow().clone();
    device.hardware.writable32(0x48, u32::MAX);
    let mut space = crate::model::space(&device.spec);
    let control = pciback::config::Access::new(0x4a, 2).unwrap();
    space.write(control, 1, &device.hardware).unwrap();
    assert_eq!(device.hardware.take_seen(), []);
}

#[test]
fn msix_whose_structures_have_no_place_of_their_own_is_named_and_hidden() {
    // BAR 0 has ports, BAR 1 has 0x1000 bytes; there are four vectors: 0x40 bytes of table, 8 bytes of PBA.
    for (table, pba, fault) in [
        (1, 1, MsixFault::Overlap { bar: 1 }),
        (0x801, 0x839, MsixFault::Overlap { bar: 1 }),
        (0xfc9, 1, MsixFault::BehindTheEnd { bar: 1 }),
        (1, 0x1001, MsixFault::BehindTheEnd { bar: 1 }),
        (0, 1, MsixFault::IoSpace { bar: 0 }),
        (1, 6, MsixFault::ReservedBar),
    ] {
        let space = virtio_with_msix_at(table, pba);
        assert_eq!(space.filter().problems(), [ListProblem::Msix { at: 0x98, fault }], "{table:#x} {pba:#x}");
        assert!(space.msix().is_none(), "{table:#x} {pba:#x}");
    }
}

#[test]
fn msix_whose_structures_touch_without_overlap_is_shown() {
    for (table, pba) in [(0x801, 0x7f9), (0x801, 0x841), (0xfc1, 1), (1, 0xff9)] {
        let space = virtio_with_msix_at(table, pba);
        assert_eq!(space.filter().problems(), [], "{table:#x} {pba:#x}");
        assert!(space.msix().is_some(), "{table:#x} {pba:#x}");
    }
}

fn virtio_with_msix_at(table: u32, pba: u32) -> VirtualConfigSpace {
    let mut device = devices::virtio();
    device.hardware.put32(0x9c, table);
    device.hardware.put32(0xa0, pba);
    device.spec.bytes = device.hardware.bytes.borrow().clone();
    crate::model::space(&device.spec)
}
