//! VFs that the HVM guest with their PF creates: what it finds at their numbers, and that all else is as for a PV guest.

use std::time::Duration;

use nix::errno::Errno;
use pciback::platform::sim;
use pciback::serve::hvm::ECAM_BASE;
use pciback::serve::hvm::wire::xen::{config_of, memory};
use pciback::{Devfn, FunctionState};

use crate::errors::{CAN_RECOVER, DETECTED, FROZEN, NONE, RECOVERED, RESUME, SLOT_RESET};
use crate::frontend::{Frontend, write_op};
use crate::guest_vfs::{
    AGAIN, CONTROL, MANY, NUM_VFS, POLICY, VF_ENABLE, is_said, mark, pf, present, vfs, was_reset,
};
use crate::hvm::{DEVICE_CONTROL, Guest, SLOT, WIN, assert_nothing_remains, attach_at, served};
use crate::world::{DB, LIMIT, Service, World, bdf, wait_until};

const HEADER_TYPE: u16 = 0x0e;
const BAR0: u16 = 0x10;
const COMMAND: u16 = 4;

/// A function beside the PF.
fn beside(number: u8) -> Devfn {
    Devfn(SLOT << 3 | number)
}

/// The PF's registers in the window to extended config space, with its SR-IOV capability.
fn window(function: Devfn, offset: u32) -> u64 {
    ECAM_BASE + (u64::from(function.0) << 12) + u64::from(offset)
}

fn set(guest: &Guest, register: u32, value: u32) {
    guest.ask(&memory(window(beside(0), register), 2, Some(value.into())));
}

fn get(guest: &Guest, register: u32) -> u32 {
    guest.ask(&memory(window(beside(0), register), 2, None)) as u32
}

/// What Linux writes to enable or disable VFs.
fn enable(guest: &Guest, count: u32) {
    set(guest, NUM_VFS, count);
    set(guest, CONTROL, VF_ENABLE);
}

fn disable(guest: &Guest) {
    set(guest, CONTROL, 0);
}

fn read(guest: &Guest, function: Devfn, offset: u16, size: u32) -> u32 {
    guest.ask(&config_of(function, offset, size, None)) as u32
}

/// As `pci_iov_add_virtfn` reads it through ports CF8 and CFC: whether Linux adds the VF.
fn is_added(guest: &Guest, number: u8) -> bool {
    assert_eq!(read(guest, beside(number), 0, 4), u32::MAX, "vendor and device");
    read(guest, beside(number), 8, 4);
    read(guest, beside(number), HEADER_TYPE, 1) & 0x7f != 0x7f
}

fn guest_with_pf(world: &World) -> (Guest, Service) {
    let guest = Guest::new(world);
    let service = world.start_with(&[POLICY]);
    service.hold(pf()).unwrap();
    service.attach(WIN, pf()).unwrap();
    served(&guest, SLOT);
    (guest, service)
}

/// The guest, which has the PF persistently, has created two VFs, and a PV guest has the first.
fn with_a_vf_in_use(world: &World) -> (Guest, Frontend, Service) {
    let uuid = "00000000-0000-0000-0000-000000000007".parse().unwrap();
    world.simulation.create_guest(WIN, "win", "hvm", uuid).unwrap();
    world.simulation.start_device_model(WIN);
    let guest = Guest::of(world, WIN);
    let service = world.start_with(&[POLICY]);
    service.hold(pf()).unwrap();
    service.persist(WIN, pf()).unwrap();
    served(&guest, SLOT);
    enable(&guest, 2);
    assert!(is_added(&guest, 1));
    vfs().into_iter().for_each(|vf| service.wait_for_state(vf, FunctionState::Held));
    let user = Frontend::load(world, DB);
    service.attach(DB, vfs()[0]).unwrap();
    (guest, user, service)
}

#[test]
fn vfs_that_the_guest_enables_are_functions_of_the_pfs_device() {
    let world = World::without_vfs();
    let (guest, service) = guest_with_pf(&world);
    for number in 1..4 {
        assert_eq!(read(&guest, beside(number), HEADER_TYPE, 1), 0xff, "before it enables any");
    }
    enable(&guest, 2);
    for number in [1, 2] {
        assert!(is_added(&guest, number));
        assert_eq!(read(&guest, beside(number), 8, 4) >> 24, 0xff, "a class that no driver has");
        for offset in [0x10, 0x34, 0x3c] {
            assert_eq!(read(&guest, beside(number), offset, 4), 0, "BARs, capabilities, INTx at {offset:x}");
        }
        guest.ask(&config_of(beside(number), BAR0, 4, Some(u32::MAX)));
        assert_eq!(read(&guest, beside(number), BAR0, 4), 0, "writes change nothing");
        // The same in the window, and what lies behind 256 bytes; eight bytes that begin with the class.
        assert_eq!(guest.ask(&memory(window(beside(number), 8), 8, None)), 0xff00_0000);
        assert_eq!(guest.ask(&memory(window(beside(number), 0x100), 4, None)), 0);
    }
    assert_eq!(read(&guest, beside(3), HEADER_TYPE, 1), 0xff, "no third one");
    vfs().into_iter().for_each(|vf| service.wait_for_state(vf, FunctionState::Held));
    assert_eq!((present(&world), service.problems()), (2, vec![]));
    assert_eq!(service.status().guests[0].errors, 0);
}

#[test]
fn with_the_pf_the_numbers_of_its_vfs_are_given_up() {
    let world = World::without_vfs();
    let (guest, service) = guest_with_pf(&world);
    service.hold(bdf("02:00.0")).unwrap();
    attach_at(&service, bdf("02:00.0"), 9).unwrap();
    let served = || (0..8).filter(|number| guest.is_function_served(beside(*number))).collect::<Vec<_>>();
    assert_eq!(served(), [0, 1, 2, 3], "those that the policy gives it");
    assert!(!guest.is_function_served(Devfn(9 << 3 | 1)), "of a function without VFs");
    enable(&guest, 2);
    assert!(is_added(&guest, 1));
    service.detach(WIN, pf()).unwrap();
    assert_eq!((served(), present(&world)), (vec![], 0));
    assert!(guest.is_served(9));
    service.detach(WIN, bdf("02:00.0")).unwrap();
    assert_eq!(service.state(pf()), FunctionState::Held);
    assert_nothing_remains(&world, &guest, "detached");
}

#[test]
fn a_guest_with_one_bus_has_no_more_vfs_than_fit_beside_their_pf() {
    let world = World::of(MANY);
    let guest = Guest::new(&world);
    let service = world.start_with(&[&POLICY.replace("by-guest: 3", "by-guest: 256")]);
    service.hold(pf()).unwrap();
    service.attach(WIN, pf()).unwrap();
    served(&guest, SLOT);
    let registers = [0x0c, 0x0e, 0x14].map(|register| get(&guest, 0x160 + register));
    assert_eq!(registers, [7, 7, 1], "InitialVFs, TotalVFs, First VF Offset");
    enable(&guest, 8);
    assert!(!is_added(&guest, 1));
    let problems = service.problems();
    assert!(
        problems.iter().any(|text| text.contains("asks for 8 VFs, and an HVM guest can have 7")),
        "{problems:?}"
    );
    disable(&guest);
    enable(&guest, 7);
    assert!((1..8).all(|number| is_added(&guest, number)));
    assert_eq!((present(&world), service.problems()), (7, vec![]));
}

#[test]
fn a_host_that_takes_longer_than_a_pv_guest_waits_is_waited_for() {
    let world = World::without_vfs();
    let (guest, _service) = guest_with_pf(&world);
    world.simulation.fail(sim::Failure {
        operation: "set_num_vfs".to_owned(),
        delay: Duration::from_millis(4500),
        times: 1,
        ..sim::Failure::default()
    });
    enable(&guest, 2);
    assert!(is_added(&guest, 1));
}

#[test]
fn functions_are_taken_from_a_guest_that_waits_for_a_vf() {
    let world = World::without_vfs();
    let (guest, service) = guest_with_pf(&world);
    service.hold(bdf("02:00.0")).unwrap();
    attach_at(&service, bdf("02:00.0"), 9).unwrap();
    world.simulation.fail(sim::Failure {
        operation: "set_num_vfs".to_owned(),
        delay: Duration::from_secs(4),
        times: 1,
        ..sim::Failure::default()
    });
    enable(&guest, 2);
    let waiting = guest.begin(&config_of(beside(1), HEADER_TYPE, 1, None));
    // A thread that does not obey for two seconds counts as stuck.
    service.detach(WIN, bdf("02:00.0")).unwrap();
    assert_eq!(service.state(bdf("02:00.0")), FunctionState::Held);
    waiting.answer(LIMIT).unwrap();
    assert!(is_added(&guest, 1));
}

#[test]
fn vfs_that_the_guest_disables_are_taken_from_their_guests_and_removed() {
    let world = World::without_vfs();
    let (guest, _user, _service) = with_a_vf_in_use(&world);
    disable(&guest);
    wait_until("the VFs are removed", || present(&world) == 0);
    assert!(world.simulation.grants(DB).is_empty(), "the other guest has nothing of its VF");
    assert_eq!(read(&guest, beside(1), HEADER_TYPE, 1), 0xff);
}

#[test]
fn a_guest_learns_that_its_vfs_could_not_be_created_and_may_try_again() {
    let world = World::without_vfs();
    let (guest, service) = guest_with_pf(&world);
    world.fail("set_num_vfs", Some(pf()), Errno::ENOMEM, 0);
    enable(&guest, 2);
    assert!(!is_added(&guest, 1));
    disable(&guest);
    enable(&guest, 2);
    assert!(is_added(&guest, 1));
    wait_until("the problem ends", || service.problems().is_empty());
}

/// Its driver restores the BARs after that, as after any reset.
#[test]
fn a_reset_that_the_guest_asks_for_leaves_hardware_and_vfs_alone() {
    let world = World::without_vfs();
    let (guest, _user, service) = with_a_vf_in_use(&world);
    guest.write(BAR0, 4, 0xf300_0000);
    guest.write(COMMAND, 2, 6);
    let mapped = guest.frames();
    assert!(!mapped.is_empty());
    mark(&world);
    guest.write(DEVICE_CONTROL, 2, 0x8000);
    assert_eq!((read(&guest, beside(0), COMMAND, 2) & 6, get(&guest, CONTROL)), (0, VF_ENABLE));
    assert_eq!((read(&guest, beside(0), BAR0, 4) >> 12, guest.frames()), (0, vec![]));
    assert!(!was_reset(&world));
    assert_eq!((present(&world), service.state(vfs()[0])), (2, FunctionState::Attached));
    guest.write(BAR0, 4, 0xf300_0000);
    guest.write(COMMAND, 2, 6);
    assert_eq!(guest.frames(), mapped);
}

#[test]
fn a_killed_service_goes_on_with_the_vfs_that_there_are() {
    let world = World::without_vfs();
    let (guest, user, service) = with_a_vf_in_use(&world);
    mark(&world);
    service.kill();
    let waiting = guest.begin(&config_of(beside(1), HEADER_TYPE, 1, None));
    let service = world.start_with(&[POLICY]);
    assert_eq!(waiting.answer(LIMIT).unwrap(), 0);
    assert!(is_added(&guest, 2));
    assert_ne!(user.read(0, 0, 4), u32::MAX, "the other guest uses its VF");
    assert_eq!((present(&world), was_reset(&world), service.problems()), (2, false, vec![]));
    disable(&guest);
    wait_until("the VFs are removed", || present(&world) == 0);
}

#[test]
fn a_read_that_waits_for_a_vf_when_the_service_is_killed_is_answered_by_the_next_one() {
    let world = World::without_vfs();
    let (guest, service) = guest_with_pf(&world);
    world.simulation.fail(sim::Failure {
        operation: "set_num_vfs".to_owned(),
        delay: Duration::from_secs(1),
        times: 1,
        ..sim::Failure::default()
    });
    enable(&guest, 2);
    let waiting = guest.begin(&config_of(beside(1), HEADER_TYPE, 1, None));
    service.kill();
    let service = world.start_with(&[POLICY]);
    assert_eq!(waiting.answer(LIMIT).unwrap(), 0);
    assert_eq!((present(&world), service.problems()), (2, vec![]));
}

/// The guest with the PF reboots, has it again, and its driver asks for the same VFs.
#[test]
fn vfs_stay_with_their_guests_over_a_reboot_and_these_are_notified() {
    let world = World::without_vfs();
    let (_guest, user, service) = with_a_vf_in_use(&world);
    user.receives_errors();
    user.ask(&write_op(0, 4, 2, 4));
    mark(&world);
    world.simulation.destroy(WIN);
    let uuid = "00000000-0000-0000-0000-000000000007".parse().unwrap();
    world.simulation.create_guest(AGAIN, "win", "hvm", uuid).unwrap();
    world.simulation.start_device_model(AGAIN);
    wait_until("the new domain has the PF", || {
        let view = service.view(pf());
        view.is_some_and(|view| view.state == FunctionState::Attached && view.domain == Some(AGAIN))
    });
    let again = Guest::of(&world, AGAIN);
    served(&again, SLOT);
    assert_eq!(get(&again, CONTROL), 0, "its driver finds no VFs enabled");
    assert_eq!((present(&world), service.state(vfs()[0])), (2, FunctionState::Attached));
    enable(&again, 2);
    assert!(is_added(&again, 1));
    user.is_notified(DETECTED, FROZEN, 0, CAN_RECOVER);
    user.is_notified(SLOT_RESET, FROZEN, 0, RECOVERED);
    user.is_notified(RESUME, FROZEN, 0, NONE);
    wait_until("it has recovered", || is_said(&service, "was notified and has recovered"));
    assert_eq!((present(&world), was_reset(&world)), (2, false));
}

#[test]
fn vfs_go_with_a_guest_that_does_not_have_their_pf_persistently() {
    let world = World::without_vfs();
    let (guest, service) = guest_with_pf(&world);
    enable(&guest, 1);
    assert!(is_added(&guest, 1));
    service.wait_for_state(vfs()[0], FunctionState::Held);
    mark(&world);
    world.simulation.destroy(WIN);
    service.wait_for_state(pf(), FunctionState::Held);
    assert_eq!((present(&world), was_reset(&world)), (0, true));
}
