//! HVM guests that take interrupts as events, as Linux does where Xen offers `XENFEAT_hvm_pirqs`: the message names the physical interrupt,
//! and the mask in the MSI-X table is left alone.

use nix::errno::Errno;
use pciback::Sbdf;
use pciback::platform::MsiMessage;
use pciback::platform::sim::{Delivery, Vector};
use pciback::serve::hvm::wire::xen::{config, memory};

use crate::crashes::at_each_change;
use crate::hvm::{
    BAR3, DEVICE_CONTROL, Guest, MSIX_CONTROL, SLOT, TABLE, VENDOR, WIN, assert_nothing_remains, attach_at,
    attached, bound, served, set_up,
};
use crate::world::{LIMIT, Service, World, bdf, wait_until};

const VF: &str = "01:10.0";
const PF: &str = "01:00.0";
/// Message Control, Message Address and Message Data of the PF's MSI, which has 64-bit addresses and a mask.
const MSI_CONTROL: u16 = 0x52;
const MSI_ADDRESS: u16 = 0x54;
const MSI_DATA: u16 = 0x5c;
const MSI_MASK: u16 = 0x60;
pub const ENABLE: u32 = 0x8000;
const ALL_MASKED: u32 = 0x4000;
/// Delivery mode ExtINT, vector 0.
const EVENT: u32 = 0x700;

/// The message that Linux composes for a physical interrupt.
fn event(pirq: u32) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000 | (pirq & 0xff) << 12, address_high: pirq & !0xff, data: EVENT }
}

fn write_table(guest: &Guest, entry: u64, words: &[(u64, u32)]) {
    for (at, value) in words {
        guest.ask(&memory(TABLE + 16 * entry + at, 4, Some((*value).into())));
    }
}

/// Writes a message in Linux's order.
fn write_message(guest: &Guest, entry: u64, message: MsiMessage) {
    let MsiMessage { address, address_high, data } = message;
    write_table(guest, entry, &[(0, address), (4, address_high), (8, data)]);
}

/// Sets up MSI-X as Linux does: enabled with all masked, messages, then unmasked as a whole.
fn enable(guest: &Guest, pirqs: &[(u64, u32)]) {
    guest.write(MSIX_CONTROL, 2, ENABLE | ALL_MASKED);
    for (entry, pirq) in pirqs {
        write_message(guest, *entry, event(*pirq));
    }
    guest.write(MSIX_CONTROL, 2, ENABLE);
}

/// The guest's physical interrupts with the entries that are mapped to them.
pub fn mapped(world: &World) -> Vec<(u32, u16)> {
    let vectors = world.simulation.grants(WIN).vectors;
    vectors.iter().map(|(pirq, vector)| (*pirq, vector.entry.unwrap_or(0))).collect()
}

fn delivered(pirq: u32, table: u64, masked: bool) -> (u32, Delivery) {
    (pirq, Delivery { message: event(pirq), table, masked })
}

pub fn with_table() -> (World, Guest, Service) {
    let (world, guest, service) = attached();
    guest.write(BAR3, 4, TABLE as u32);
    (world, guest, service)
}

/// Nothing of the host was lost on the way, and nothing of the function remains.
pub fn assert_ends_well(world: &World, guest: &Guest, service: &Service, address: Sbdf, why: &str) {
    service.detach(WIN, address).unwrap();
    world.assert_held(service, address, why);
    assert_nothing_remains(world, guest, why);
    assert_eq!(world.simulation.lost_interrupts(), 0, "{why}");
}

#[test]
fn masked_vectors_are_bound_to_the_interrupts_that_their_messages_name_when_the_function_is_unmasked() {
    let (world, guest, service) = with_table();
    guest.write(MSIX_CONTROL, 2, ENABLE | ALL_MASKED);
    write_message(&guest, 0, event(50));
    write_message(&guest, 2, event(40));
    assert_eq!((mapped(&world), guest.deliveries().len()), (vec![], 0), "while all of it is masked");
    guest.write(MSIX_CONTROL, 2, ENABLE);
    assert_eq!(mapped(&world), [(40, 2), (50, 0)]);
    // Binding the event channel unmasks them, not we: what comes before reaches no event channel.
    let expected = [delivered(40, TABLE, true), delivered(50, TABLE, true)];
    assert_eq!(guest.deliveries().into_iter().collect::<Vec<_>>(), expected);
    assert_eq!(guest.ask(&memory(TABLE + 0xc, 4, None)), 1, "the mask in the table is as it was");
    assert_ends_well(&world, &guest, &service, bdf(VF), "detached");
}

#[test]
fn disabling_and_a_reset_unmap_them_and_enabling_maps_the_same_again() {
    let (world, guest, service) = with_table();
    enable(&guest, &[(0, 50), (1, 51)]);
    guest.write(MSIX_CONTROL, 2, 0);
    assert_eq!((mapped(&world), guest.deliveries().len()), (vec![], 0));
    guest.write(MSIX_CONTROL, 2, ENABLE);
    assert_eq!(mapped(&world), [(50, 0), (51, 1)]);
    assert_eq!(
        guest.deliveries()[&50],
        delivered(50, TABLE, true).1,
        "its event channel is to be bound anew"
    );
    guest.write(DEVICE_CONTROL, 2, 0x8000);
    wait_until("the reset ends", || guest.read(SLOT, VENDOR, 4) == 0x10ca_8086);
    assert_eq!((mapped(&world), guest.deliveries().len()), (vec![], 0), "after a reset");
    guest.write(BAR3, 4, TABLE as u32);
    guest.write(MSIX_CONTROL, 2, ENABLE);
    assert_eq!(mapped(&world), [], "no message is left");
    enable(&guest, &[(0, 50), (1, 51)]);
    assert_eq!(mapped(&world), [(50, 0), (51, 1)]);
    assert_ends_well(&world, &guest, &service, bdf(VF), "detached");
}

#[test]
fn a_message_changes_to_another_interrupt_to_a_vector_and_back() {
    let (world, guest, service) = with_table();
    enable(&guest, &[(0, 50), (1, 51)]);
    enable(&guest, &[(0, 30)]);
    assert_eq!(mapped(&world), [(30, 0), (51, 1)]);
    // By a vector: it waits for the end of its mask, as hardware does.
    set_up(&guest, 0, 0x1_0000_0041);
    assert_eq!(mapped(&world), [(30, 0), (51, 1)]);
    write_table(&guest, 0, &[(0xc, 0)]);
    let [(first, 1), (second, 0)] = mapped(&world)[..] else { panic!("{:?}", mapped(&world)) };
    assert_eq!((first, guest.deliveries()[&second].message.data), (51, 0x41));
    assert_ne!(second, 30, "the guest did not choose it");
    enable(&guest, &[(0, 30)]);
    assert_eq!(mapped(&world), [(30, 0), (51, 1)]);
    assert_eq!(guest.deliveries().keys().collect::<Vec<_>>(), [&30, &51]);
    assert_ends_well(&world, &guest, &service, bdf(VF), "detached");
}

#[test]
fn half_of_a_number_is_no_interrupt() {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/sim/two-guests.yaml"));
    let world = World::of(&text.unwrap().replace("extra-guest-irqs: 32", "extra-guest-irqs: 300"));
    world.host().set_vf_autoprobe(bdf(PF), false).unwrap();
    world.host().set_num_vfs(bdf(PF), 1, LIMIT).unwrap();
    let guest = Guest::new(&world);
    let service = world.start();
    service.hold(bdf(VF)).unwrap();
    service.attach(WIN, bdf(VF)).unwrap();
    served(&guest, SLOT);
    guest.write(BAR3, 4, TABLE as u32);
    guest.write(MSIX_CONTROL, 2, ENABLE);
    let MsiMessage { address, address_high, data } = event(0x130);
    write_table(&guest, 0, &[(0, address), (4, address_high)]);
    assert_eq!(mapped(&world), []);
    write_table(&guest, 0, &[(8, data)]);
    assert_eq!(mapped(&world), [(0x130, 0)]);
    let MsiMessage { address, address_high, data } = event(0x28);
    write_table(&guest, 0, &[(0, address), (4, address_high)]);
    assert_eq!(mapped(&world), [(0x130, 0)]);
    write_table(&guest, 0, &[(8, data)]);
    assert_eq!(mapped(&world), [(0x28, 0)]);
    assert_ends_well(&world, &guest, &service, bdf(VF), "detached");
}

/// Xen would lose an interrupt of the host each time that a number is taken that is in use.
#[test]
fn pirqs_that_are_in_use_or_out_of_range_are_refused() {
    let (world, guest, service) = with_table();
    let other = bdf("01:10.2");
    service.hold(other).unwrap();
    attach_at(&service, other, 9).unwrap();
    served(&guest, 9);
    enable(&guest, &[(0, 50)]);
    let write_other = |offset: u16, value: u32| guest.ask(&config(9, offset, 4, Some(value)));
    let other_table = TABLE + 0x10_0000;
    write_other(BAR3, other_table as u32);
    write_other(MSIX_CONTROL - 2, ENABLE << 16);
    let name = |pirq: u32| {
        let MsiMessage { address, address_high, data } = event(pirq);
        for (at, value) in [(0, address), (4, address_high), (8, data)] {
            guest.ask(&memory(other_table + at, 4, Some(value.into())));
        }
    };
    // The other function's, a line's, and one behind the last, 55.
    for (failed, pirq) in (1..).zip([50, 21, 3, 56, 0x00ff_ff01, 0xffff_ff01]) {
        name(pirq);
        // Counted before the next request is answered.
        guest.read(SLOT, VENDOR, 2);
        assert_eq!((mapped(&world), service.status().guests[0].errors), (vec![(50, 0)], failed), "{pirq}");
    }
    // The function's own other entry.
    write_message(&guest, 1, event(50));
    guest.read(SLOT, VENDOR, 2);
    assert_eq!((mapped(&world), service.status().guests[0].errors), (vec![(50, 0)], 7));
    // The next process knows their owners, too, and a free number can be allocated.
    service.kill();
    let service = world.start();
    name(50);
    assert_eq!(mapped(&world), [(50, 0)]);
    name(49);
    assert_eq!(mapped(&world), [(49, 0), (50, 0)]);
    guest.write(MSIX_CONTROL, 2, 0);
    name(50);
    assert_eq!(mapped(&world), [(50, 0)], "it was given up");
    assert_eq!(world.simulation.grants(WIN).vectors[&50], Vector { address: other, entry: Some(0) });
    service.detach(WIN, other).unwrap();
    assert_ends_well(&world, &guest, &service, bdf(VF), "detached");
}

/// What is bound again is masked in Xen until it is bound as unmasked; no event channel is bound again.
#[test]
fn a_table_that_moves_and_a_service_that_is_restarted_leave_vectors_unmasked() {
    let (world, guest, service) = with_table();
    enable(&guest, &[(0, 50), (1, 51)]);
    service.kill();
    let service = world.start();
    wait_until("they are bound again", || {
        // Hardware shows no mask: the guest has bound its event channels.
        guest.deliveries().into_iter().eq([delivered(50, TABLE, false), delivered(51, TABLE, false)])
    });
    let moved = 0xf320_0000;
    guest.write(BAR3, 4, moved as u32);
    let expected = [delivered(50, moved, false), delivered(51, moved, false)];
    assert_eq!(guest.deliveries().into_iter().collect::<Vec<_>>(), expected);
    assert_ends_well(&world, &guest, &service, bdf(VF), "detached");
}

/// A run of the service that is killed at any of the changes which a write to config space makes leaves the next one to carry the write out;
/// `more_than` are so many changes, and `check` looks at what has become of it.
pub fn killed_at_each_change(
    begin: impl Fn() -> (World, Guest, Service),
    register: u16,
    value: u32,
    more_than: u32,
    check: impl Fn(&World, &Guest, &Service, &str),
) {
    at_each_change(more_than..100, |change, moment, why| {
        let (world, guest, service) = begin();
        service.fuse.arm(change, moment);
        let request = guest.begin(&config(SLOT, register, 2, Some(value)));
        wait_until("it is killed or has answered", || {
            service.fuse.is_blown() || request.answer(std::time::Duration::ZERO).is_ok()
        });
        if !service.fuse.is_blown() {
            return false;
        }
        service.kill();
        let service = world.start();
        request.answer(LIMIT).unwrap();
        check(&world, &guest, &service, why);
        true
    });
}

#[test]
fn a_service_that_is_killed_anywhere_loses_no_interrupt() {
    let begin = || {
        let (world, guest, service) = with_table();
        enable(&guest, &[(0, 50), (1, 51)]);
        guest.write(MSIX_CONTROL, 2, ENABLE | ALL_MASKED);
        write_message(&guest, 0, event(30));
        set_up(&guest, 1, 0x41);
        write_message(&guest, 2, event(51));
        (world, guest, service)
    };
    killed_at_each_change(begin, MSIX_CONTROL, ENABLE, 4, |world, guest, _, why| {
        let found = mapped(world);
        assert!(found.contains(&(30, 0)) && found.contains(&(51, 2)), "{why}: {found:?}");
        assert!(bound(guest).iter().any(|(data, _)| *data == 0x41), "{why}");
        guest.write(MSIX_CONTROL, 2, 0);
        assert_eq!(guest.deliveries().len(), 0, "{why}");
        assert_eq!(world.simulation.lost_interrupts(), 0, "{why}");
    });
}

fn pf() -> (World, Guest, Service) {
    let world = World::without_vfs();
    let guest = Guest::new(&world);
    let service = world.start();
    service.hold(bdf(PF)).unwrap();
    service.attach(WIN, bdf(PF)).unwrap();
    served(&guest, SLOT);
    (world, guest, service)
}

fn write_msi(guest: &Guest, message: MsiMessage) {
    guest.write(MSI_ADDRESS, 4, message.address);
    guest.write(MSI_ADDRESS + 4, 4, message.address_high);
    guest.write(MSI_DATA, 2, message.data);
}

#[test]
fn msi_is_bound_to_the_interrupt_that_its_message_names_and_changes_to_a_vector_and_back() {
    let (world, guest, service) = pf();
    write_msi(&guest, event(44));
    guest.write(MSI_MASK, 4, 1);
    guest.write(MSI_CONTROL, 2, 1);
    assert_eq!(mapped(&world), [(44, 0)]);
    assert_eq!(guest.deliveries()[&44], delivered(44, 0, true).1);
    // Another one; the number counts when it is complete.
    guest.write(MSI_ADDRESS, 4, event(45).address);
    assert_eq!(mapped(&world), [(44, 0)]);
    guest.write(MSI_DATA, 2, EVENT);
    assert_eq!(mapped(&world), [(45, 0)]);
    write_msi(&guest, MsiMessage { address: 0xfee0_0000, address_high: 0, data: 0x41 });
    let [(pirq, 0)] = mapped(&world)[..] else { panic!("{:?}", mapped(&world)) };
    assert_eq!((pirq == 45, guest.deliveries()[&pirq].message.data), (false, 0x41));
    write_msi(&guest, event(44));
    assert_eq!(mapped(&world), [(44, 0)]);
    assert_eq!(guest.read(SLOT, MSI_CONTROL, 2) & 1, 1);
    assert_eq!(msi_enable(&world), 1, "hardware");
    guest.write(MSI_CONTROL, 2, 0);
    assert_eq!(mapped(&world), []);
    assert_ends_well(&world, &guest, &service, bdf(PF), "detached");
}

/// MSI Enable as hardware has it.
fn msi_enable(world: &World) -> u32 {
    world.host().config(bdf(PF)).unwrap().read(access(MSI_CONTROL)).unwrap() & 1
}

#[test]
fn msi_enable_reaches_hardware_only_once_xen_has_written_a_message() {
    let (world, guest, service) = pf();
    write_msi(&guest, event(44));
    world.fail("map_msi_as", Some(bdf(PF)), Errno::EBUSY, 0);
    guest.write(MSI_CONTROL, 2, 1);
    assert_eq!((mapped(&world), msi_enable(&world)), (vec![], 0), "an interrupt would go to address 0");
    write_msi(&guest, event(45));
    assert_eq!((mapped(&world), msi_enable(&world)), (vec![(45, 0)], 1));
    guest.write(MSI_CONTROL, 2, 0);
    assert_eq!((mapped(&world), msi_enable(&world)), (vec![], 0));
    assert_ends_well(&world, &guest, &service, bdf(PF), "detached");
}

fn access(offset: u16) -> pciback::config::Access {
    pciback::config::Access::new(offset.into(), 2).unwrap()
}

#[test]
fn msi_is_enabled_by_the_next_run_when_the_service_is_killed_anywhere() {
    let begin = || {
        let (world, guest, service) = pf();
        write_msi(&guest, event(44));
        (world, guest, service)
    };
    killed_at_each_change(begin, MSI_CONTROL, 1, 2, |world, guest, service, why| {
        assert_eq!(mapped(world), [(44, 0)], "{why}");
        assert_eq!(guest.deliveries()[&44].message, event(44), "{why}");
        let control = world.host().config(bdf(PF)).unwrap().read(access(MSI_CONTROL)).unwrap();
        assert_eq!(control & 1, 1, "{why}");
        assert_ends_well(world, guest, service, bdf(PF), why);
    });
}
