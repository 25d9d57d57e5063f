//! VFs that the guest with their PF creates: the host carries out what it asks for, and other guests keep them.

use std::time::Duration;

use nix::errno::Errno;
use pciback::platform::sim::{self, Owner};
use pciback::serve::pv::wire::Op;
use pciback::{DomId, FunctionState, Sbdf};
use toolstack::outcome::ErrorCode;
use toolstack::protocol::{FunctionView, Happening, Request, Success, VfView};

use crate::errors::{CAN_RECOVER, DETECTED, FROZEN, NONE, RECOVERED, RESUME, SLOT_RESET};
use crate::frontend::{Frontend, read_op, write_op};
use crate::world::{DB, Service, WEB, World, bdf, wait_until};

pub const POLICY: &str =
    "match: {vendor: 8086}\npermit: [physical-function, untrusted-vf]\nvirtual-functions: {by-guest: 3}\n";
/// The PF's SR-IOV capability.
pub const CONTROL: u32 = 0x168;
pub const NUM_VFS: u32 = 0x170;
pub const VF_ENABLE: u32 = 9;
/// The guest's first VF: function 1 of the PF's device.
const FIRST: u32 = 1;
/// Function Mask, in the upper byte of MSI-X's Message Control of the PF: a reset clears it, and Linux does not put it back.
const MARK: (u16, u8) = (0x73, 0x40);

pub fn pf() -> Sbdf {
    bdf("01:00.0")
}

pub fn vfs() -> [Sbdf; 2] {
    [bdf("01:10.0"), bdf("01:10.2")]
}

pub fn present(world: &World) -> u16 {
    world.host().function(pf()).unwrap().num_vfs
}

/// A guest that has the PF.
fn guest_with_pf(world: &World) -> (Frontend, Service) {
    guest_with_pf_under(world, &[POLICY])
}

fn guest_with_pf_under(world: &World, policies: &[&str]) -> (Frontend, Service) {
    let frontend = Frontend::load(world, WEB);
    let service = world.start_with(policies);
    service.hold(pf()).unwrap();
    service.persist(WEB, pf()).unwrap();
    (frontend, service)
}

/// Marks the PF's hardware, to see whether it is reset.
pub fn mark(world: &World) {
    let control = world.simulation.peek(pf(), MARK.0, 1)[0];
    world.simulation.poke(pf(), MARK.0, &[control | MARK.1]);
}

pub fn was_reset(world: &World) -> bool {
    world.simulation.peek(pf(), MARK.0, 1)[0] & MARK.1 == 0
}

/// The domain that the guest with the PF is after its reboot.
pub const AGAIN: DomId = DomId(11);

/// What Linux writes to enable or disable VFs.
fn enable(frontend: &Frontend, count: u32) {
    frontend.ask(&write_op(0, NUM_VFS, 2, count));
    frontend.ask(&write_op(0, CONTROL, 2, VF_ENABLE));
}

fn disable(frontend: &Frontend) {
    frontend.ask(&write_op(0, CONTROL, 2, 0));
}

/// A read of the function with a Routing ID: error and value.
fn read_at(frontend: &Frontend, routing_id: u32, offset: u32, size: u32) -> (i32, u32) {
    let read = Op { bus: routing_id >> 8, ..read_op(routing_id & 0xff, offset, size) };
    let (error, value, _) = frontend.ask(&read);
    (error, value)
}

/// As `pci_iov_add_virtfn` reads it, the class before the header type: whether Linux adds the VF.
fn is_added(frontend: &Frontend, routing_id: u32) -> bool {
    assert_eq!(read_at(frontend, routing_id, 0, 4), (0, u32::MAX), "vendor and device");
    assert_eq!(read_at(frontend, routing_id, 8, 4).0, 0);
    let (error, header_type) = read_at(frontend, routing_id, 0x0e, 1);
    assert_eq!(error, 0);
    header_type & 0x7f != 0x7f
}

/// The guest has created two VFs, and another guest has the first.
fn with_a_vf_in_use(world: &World) -> (Frontend, Frontend, Service) {
    with_a_vf_in_use_under(world, &[POLICY])
}

fn with_a_vf_in_use_under(world: &World, policies: &[&str]) -> (Frontend, Frontend, Service) {
    let (frontend, service) = guest_with_pf_under(world, policies);
    enable(&frontend, 2);
    assert!(is_added(&frontend, FIRST));
    vfs().into_iter().for_each(|vf| service.wait_for_state(vf, FunctionState::Held));
    let user = Frontend::load(world, DB);
    service.attach(DB, vfs()[0]).unwrap();
    (frontend, user, service)
}

fn listed(service: &Service) -> Vec<VfView> {
    match service.call(Request::VfList { address: Some(pf()) }) {
        Ok(Success::Vfs { vfs }) => vfs,
        other => panic!("{other:?}"),
    }
}

#[test]
fn vfs_that_the_guest_enables_are_created_held_and_listed_as_untrusted() {
    let world = World::without_vfs();
    let (frontend, service) = guest_with_pf(&world);
    assert_eq!(world.host().function(pf()).unwrap().driver.as_deref(), Some("pci-pf-stub"));
    enable(&frontend, 2);
    assert!(is_added(&frontend, FIRST), "the first read waits for the host");
    assert_eq!(present(&world), 2);
    assert!(is_added(&frontend, FIRST + 1));
    assert_eq!(frontend.read(FIRST, 8, 4) >> 24, 0xff, "a class that no driver has");
    assert_eq!(read_at(&frontend, FIRST + 2, 0x0e, 1).0, -1, "no third one");
    for vf in vfs() {
        service.wait_for_state(vf, FunctionState::Held);
        assert_eq!(world.simulation.owner(vf), Some(Owner::Quarantine));
    }
    let vfs = listed(&service);
    assert_eq!(vfs.len(), 2);
    assert_eq!(vfs[0].untrusted.as_deref(), Some("which domain 1 has"));
    assert_eq!(service.problems(), [""; 0]);
}

/// PFs that can have more VFs than fit beside them.
pub const MANY: &str = r#"
drivers: [i40e, iavf, pci-stub, pci-pf-stub]
models:
  most-vfs:
    virtual-function: 82576-vf
    reset-methods: [flr, pm, bus]
    bars: {0: 20000, 3: 4000}
    config: |
      00: 86 80 72 15 00 00 10 00 01 00 00 02 00 00 00 00
      10: 00 00 00 00 00 00 00 00 00 00 00 00 04 00 00 00
      20: 00 00 00 00 00 00 00 00 00 00 00 00 f4 1a 00 11
      30: 00 00 00 00 70 00 00 00 00 00 00 00 00 01 00 00
      70: 11 a0 09 00 03 00 00 00 03 20 00 00 00 00 00 00
      a0: 10 00 02 00 20 80 00 10 00 00 00 00 11 04 00 00
      b0: 00 00 11 00 00 00 00 00 00 00 00 00 00 00 00 00
      100: 10 00 01 00 00 00 00 00 00 00 00 00 00 01 00 01
      110: 00 00 00 00 01 00 01 00 00 00 4c 15 53 05 00 00
      120: 01 00 00 00 0c 00 00 00 00 00 00 00 00 00 00 00
      130: 0c 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
functions:
  - {address: "01:00.0", model: many-vfs}
  - {address: "03:00.0", model: many-vfs}
domains:
  - {id: 1, name: web, type: pv, passthrough: true}
"#;

/// The largest number, and two PFs of one guest.
#[test]
fn more_vfs_than_fit_beside_their_pf_are_on_a_bus_for_each_pf() {
    for (model, count) in [("many-vfs", 64), ("most-vfs", 256)] {
        let world = World::of(&MANY.replace("model: many-vfs}", &format!("model: {model}}}")));
        let frontend = Frontend::load(&world, WEB);
        let service = world.start_with(&[&POLICY.replace("by-guest: 3", "by-guest: 256")]);
        let sriov = if count == 64 { 0x160 } else { 0x100 };
        for (own, pf) in [(0, bdf("01:00.0")), (8, bdf("03:00.0"))] {
            service.hold(pf).unwrap();
            service.attach(WEB, pf).unwrap();
            assert_eq!(frontend.read(own, sriov + 0x0e, 2), count, "TotalVFs");
            frontend.ask(&write_op(own, sriov + 0x10, 2, count));
            frontend.ask(&write_op(own, sriov + 0x08, 2, VF_ENABLE));
            let there = || world.host().function(pf).unwrap().num_vfs == count as u16;
            wait_until("the VFs are created", there);
            let offset = frontend.read(own, sriov + 0x14, 2);
            let routing_id = |index: u32| own + offset + index;
            assert_eq!((routing_id(0) >> 8, routing_id(count - 1) >> 8), (own / 8 + 1, own / 8 + 1));
            for index in [0, 1, count - 1] {
                assert!(is_added(&frontend, routing_id(index)), "{index}");
            }
            assert_eq!(read_at(&frontend, routing_id(count), 0x0e, 1).0, -1, "no other one");
        }
        let held = |view: &&FunctionView| view.state == FunctionState::Held;
        wait_until("all are held", || {
            service.status().functions.iter().filter(held).count() == 2 * count as usize
        });
        assert_eq!(service.problems(), [""; 0]);
    }
}

#[test]
fn a_host_that_takes_long_to_create_vfs_is_waited_for_by_two_reads() {
    for (seconds, added) in [(2, true), (6, false)] {
        let world = World::without_vfs();
        let (frontend, _service) = guest_with_pf(&world);
        world.simulation.fail(sim::Failure {
            operation: "set_num_vfs".to_owned(),
            delay: Duration::from_secs(seconds),
            times: 1,
            ..sim::Failure::default()
        });
        enable(&frontend, 2);
        assert_eq!(is_added(&frontend, FIRST), added, "after {seconds} s");
    }
}

#[test]
fn vfs_that_the_guest_disables_are_taken_from_their_guests_and_removed() {
    let world = World::without_vfs();
    let (frontend, _user, service) = with_a_vf_in_use(&world);
    disable(&frontend);
    wait_until("the VFs are removed", || present(&world) == 0);
    assert!(world.simulation.grants(DB).is_empty(), "the other guest has nothing of its VF");
    wait_until("their records end", || vfs().into_iter().all(|vf| service.state(vf) == FunctionState::Host));
    enable(&frontend, 1);
    assert!(is_added(&frontend, FIRST), "and others are created");
    assert_eq!(present(&world), 1);
}

#[test]
fn a_guest_learns_that_its_vfs_could_not_be_created_and_may_try_again() {
    let world = World::without_vfs();
    let (frontend, service) = guest_with_pf(&world);
    world.fail("set_num_vfs", Some(pf()), Errno::ENOMEM, 0);
    enable(&frontend, 2);
    assert!(!is_added(&frontend, FIRST));
    disable(&frontend);
    let problems = service.problems();
    enable(&frontend, 2);
    assert!(is_added(&frontend, FIRST));
    assert!(problems.iter().all(|problem| problem.contains("VFs that its guest asks for")), "{problems:?}");
    wait_until("the problem ends", || service.problems().is_empty());
}

#[test]
fn vfs_that_the_driver_does_not_remove_are_a_problem_until_the_guest_removes_them_again() {
    let world = World::without_vfs();
    let (frontend, service) = guest_with_pf(&world);
    enable(&frontend, 1);
    assert!(is_added(&frontend, FIRST));
    service.wait_for_state(vfs()[0], FunctionState::Held);
    world.fail("set_num_vfs", Some(pf()), Errno::EBUSY, 0);
    disable(&frontend);
    wait_until("the failure is a problem", || {
        service.problems().iter().any(|problem| problem.contains("VFs that its guest asks for"))
    });
    assert_eq!(present(&world), 1, "it is not tried again and again");
    enable(&frontend, 1);
    assert!(is_added(&frontend, FIRST));
    disable(&frontend);
    wait_until("it is removed", || present(&world) == 0);
    wait_until("the problem ends", || service.problems().is_empty());
}

#[test]
fn more_vfs_than_the_policy_gives_are_refused_though_hardware_has_them() {
    let world = World::without_vfs();
    let (frontend, service) = guest_with_pf(&world);
    enable(&frontend, 4);
    assert!(!is_added(&frontend, FIRST));
    assert_eq!(present(&world), 0);
    let problems = service.problems();
    assert!(
        problems.iter().any(|text| text.contains("asks for 4 VFs, and policies give it 3")),
        "{problems:?}"
    );
}

#[test]
fn a_guest_that_flips_vf_enable_ends_with_what_it_wanted_last() {
    let world = World::without_vfs();
    let (frontend, service) = guest_with_pf(&world);
    for round in 0..100 {
        enable(&frontend, 1 + round % 3);
        disable(&frontend);
    }
    enable(&frontend, 2);
    wait_until("two VFs are held", || {
        present(&world) == 2 && vfs().into_iter().all(|vf| service.state(vf) == FunctionState::Held)
    });
    disable(&frontend);
    wait_until("none is left", || present(&world) == 0);
}

#[test]
fn registers_of_the_capability_never_reach_hardware() {
    let world = World::without_vfs();
    let (frontend, _service) = guest_with_pf(&world);
    let before = world.simulation.peek(pf(), 0x160, 0x40);
    for offset in (0x160..0x1a0).step_by(4).filter(|offset| *offset != CONTROL) {
        frontend.ask(&write_op(0, offset, 4, u32::MAX));
    }
    assert_eq!(world.simulation.peek(pf(), 0x160, 0x40), before);
}

#[test]
fn a_reset_that_the_guest_asks_for_leaves_hardware_and_vfs_alone() {
    let world = World::without_vfs();
    let (frontend, _user, service) = with_a_vf_in_use(&world);
    mark(&world);
    frontend.ask(&write_op(0, 4, 2, 6));
    frontend.ask(&write_op(0, 0xa8, 2, 1 << 15));
    assert_eq!(frontend.read(0, 4, 2) & 6, 0, "Command is as after a reset");
    assert_eq!(frontend.read(0, CONTROL, 2), VF_ENABLE);
    assert!(!was_reset(&world));
    assert_eq!(world.simulation.peek(pf(), 4, 1)[0] & 6, 2, "it decodes, and sends nothing");
    assert_eq!((present(&world), service.state(vfs()[0])), (2, FunctionState::Attached));
}

/// A function level reset, as drivers do one when they start or end.
fn ask_for_reset(frontend: &Frontend) {
    frontend.ask(&write_op(0, 4, 2, 6));
    frontend.ask(&write_op(0, 0xa8, 2, 1 << 15));
}

fn is_reset(frontend: &Frontend) -> bool {
    frontend.read(0, 0, 2) == 0x8086 && frontend.read(0, 4, 2) & 6 == 0
}

#[test]
fn a_guest_that_resets_its_pf_after_a_reboot_leaves_the_vfs_that_stay_for_it() {
    let world = World::without_vfs();
    let (_frontend, _user, service) = with_a_vf_in_use(&world);
    mark(&world);
    let again = reboot(&world, &service);
    ask_for_reset(&again);
    wait_until("the PF answers again", || is_reset(&again));
    assert_eq!((present(&world), was_reset(&world)), (2, false));
    enable(&again, 2);
    assert!(is_added(&again, FIRST));
    assert_eq!((present(&world), service.state(vfs()[0])), (2, FunctionState::Attached));
}

#[test]
fn a_reset_of_a_pf_whose_vfs_cannot_be_removed_ends_all_the_same() {
    let world = World::without_vfs();
    let (frontend, service) = guest_with_pf(&world);
    enable(&frontend, 1);
    assert!(is_added(&frontend, FIRST));
    service.wait_for_state(vfs()[0], FunctionState::Held);
    // The reset tries once more.
    (0..2).for_each(|_| world.fail("set_num_vfs", Some(pf()), Errno::EBUSY, 0));
    disable(&frontend);
    ask_for_reset(&frontend);
    wait_until("the PF answers again", || is_reset(&frontend));
    assert_eq!(present(&world), 1);
}

#[test]
fn a_killed_service_goes_on_with_the_vfs_that_there_are() {
    let world = World::without_vfs();
    let (frontend, user, service) = with_a_vf_in_use(&world);
    mark(&world);
    service.kill();
    let service = world.start_with(&[POLICY]);
    assert_eq!(
        (service.state(pf()), service.state(vfs()[0])),
        (FunctionState::Attached, FunctionState::Attached)
    );
    assert!(is_added(&frontend, FIRST));
    assert_ne!(user.read(0, 0, 4), u32::MAX, "the other guest uses its VF");
    assert_eq!((present(&world), was_reset(&world)), (2, false));
    assert_eq!(service.problems(), [""; 0]);
    disable(&frontend);
    wait_until("the VFs are removed", || present(&world) == 0);
}

/// The guest with the PF reboots, and has it again.
fn reboot(world: &World, service: &Service) -> Frontend {
    world.simulation.destroy(WEB);
    let uuid = "00000000-0000-0000-0000-000000000001".parse().unwrap();
    world.simulation.create_guest(AGAIN, "web", "pv", uuid).unwrap();
    let again = Frontend::load(world, AGAIN);
    wait_until("the new domain has the PF", || {
        let view = service.view(pf());
        view.is_some_and(|view| view.state == FunctionState::Attached && view.domain == Some(AGAIN))
    });
    again
}

#[test]
fn vfs_stay_with_their_guests_while_the_guest_with_their_pf_reboots() {
    let world = World::without_vfs();
    let (_frontend, user, service) = with_a_vf_in_use(&world);
    mark(&world);
    let again = reboot(&world, &service);
    assert_eq!(again.read(0, CONTROL, 2), 0, "its driver finds no VFs enabled");
    service.kill();
    let service = world.start_with(&[POLICY]);
    assert_eq!((present(&world), service.state(vfs()[0])), (2, FunctionState::Attached));
    enable(&again, 2);
    assert!(is_added(&again, FIRST));
    assert_eq!((present(&world), service.state(vfs()[0])), (2, FunctionState::Attached));
    assert_ne!(user.read(0, 0, 4), u32::MAX);
    assert!(!was_reset(&world));
    assert_eq!(world.simulation.peek(pf(), 4, 1)[0] & 2, 2, "and decodes");
    disable(&again);
    wait_until("the VFs are removed", || present(&world) == 0);
}

/// What is said of a VF whose PF has started again.
const STARTED_AGAIN: &str = "the driver of its PF has started again; its guest is notified";

pub fn is_said(service: &Service, text: &str) -> bool {
    let outcomes =
        |what: &Happening| matches!(what, Happening::Outcome { text: found, .. } if found.contains(text));
    service.error_history(vfs()[0]).iter().any(|event| outcomes(&event.what))
}

#[test]
fn guests_with_vfs_are_notified_when_the_driver_of_the_pf_has_started_again() {
    let world = World::without_vfs();
    let (_frontend, user, service) = with_a_vf_in_use(&world);
    user.receives_errors();
    user.ask(&write_op(0, 4, 2, 4));
    let again = reboot(&world, &service);
    assert!(!is_said(&service, STARTED_AGAIN), "its driver has not asked for VFs yet");
    enable(&again, 2);
    assert!(is_added(&again, FIRST));
    user.is_notified(DETECTED, FROZEN, 0, CAN_RECOVER);
    user.is_notified(SLOT_RESET, FROZEN, 0, RECOVERED);
    assert_eq!(world.simulation.peek(vfs()[0], 4, 1)[0] & 4, 0, "it was reset all the same");
    user.is_notified(RESUME, FROZEN, 0, NONE);
    wait_until("it has recovered", || is_said(&service, "was notified and has recovered"));
    assert_eq!(service.state(vfs()[0]), FunctionState::Attached);
    assert_eq!((present(&world), service.problems()), (2, vec![]));
}

#[test]
fn a_service_that_is_killed_goes_on_notifying_them() {
    let world = World::without_vfs();
    let (_frontend, user, service) = with_a_vf_in_use(&world);
    user.receives_errors();
    let again = reboot(&world, &service);
    enable(&again, 2);
    assert!(is_added(&again, FIRST));
    user.ignores();
    service.kill();
    let service = world.start_with(&[POLICY]);
    user.is_notified(DETECTED, FROZEN, 0, CAN_RECOVER);
    user.is_notified(SLOT_RESET, FROZEN, 0, RECOVERED);
    user.is_notified(RESUME, FROZEN, 0, NONE);
    wait_until("it has recovered", || is_said(&service, "was notified and has recovered"));
    assert_eq!(service.state(vfs()[0]), FunctionState::Attached);
}

#[test]
fn a_guest_that_cannot_be_notified_of_that_keeps_its_vf() {
    let world = World::without_vfs();
    let (_frontend, user, service) = with_a_vf_in_use(&world);
    let again = reboot(&world, &service);
    enable(&again, 2);
    wait_until("it cannot be notified", || {
        is_said(&service, "its frontend cannot be notified of errors; log")
    });
    assert_eq!(service.state(vfs()[0]), FunctionState::Attached);
    assert_ne!(user.read(0, 0, 4), u32::MAX);
}

#[test]
fn a_guest_whose_policy_has_it_not_notified_of_lost_state_is_not() {
    let world = World::without_vfs();
    let policies = [POLICY, "errors: {link-reset: log}\n"];
    let (_frontend, user, service) = with_a_vf_in_use_under(&world, &policies);
    user.receives_errors();
    let again = reboot(&world, &service);
    enable(&again, 2);
    assert!(is_added(&again, FIRST));
    assert_eq!(service.state(vfs()[0]), FunctionState::Attached);
    assert!(!is_said(&service, STARTED_AGAIN));
}

#[test]
fn vfs_go_with_a_guest_that_does_not_have_their_pf_persistently() {
    let world = World::without_vfs();
    let frontend = Frontend::load(&world, WEB);
    let service = world.start_with(&[POLICY]);
    service.hold(pf()).unwrap();
    service.attach(WEB, pf()).unwrap();
    enable(&frontend, 1);
    assert!(is_added(&frontend, FIRST));
    service.wait_for_state(vfs()[0], FunctionState::Held);
    let _user = Frontend::load(&world, DB);
    service.attach(DB, vfs()[0]).unwrap();
    mark(&world);
    world.simulation.destroy(WEB);
    service.wait_for_state(pf(), FunctionState::Held);
    assert_eq!(present(&world), 0);
    assert!(world.simulation.grants(DB).is_empty());
    assert!(was_reset(&world));
}

#[test]
fn the_ports_above_are_never_a_guests() {
    let world = World::without_vfs();
    let (_frontend, service) = guest_with_pf(&world);
    let port = bdf("00:01.0");
    for failure in [service.hold(port).unwrap_err(), service.attach(DB, port).unwrap_err()] {
        assert_eq!(failure.code, ErrorCode::Refused);
        assert!(failure.message.contains("bridge"), "{failure}");
    }
}

/// The guest has asked for VFs that the host is creating, which its count of VFs does not show before it is done.
fn create_slowly(world: &World, frontend: &Frontend, count: u32) {
    let delay = Duration::from_millis(500);
    let operation = "set_num_vfs".to_owned();
    world.simulation.fail(sim::Failure { operation, delay, times: 1, ..sim::Failure::default() });
    enable(frontend, count);
    wait_until("the host has begun", || world.simulation.pending_failures() == 0);
}

#[test]
fn vfs_that_are_being_created_when_their_pf_is_detached_are_removed_before_it_goes() {
    let world = World::without_vfs();
    let (frontend, service) = guest_with_pf(&world);
    create_slowly(&world, &frontend, 2);
    // The next change takes no longer, and is counted.
    let operation = "set_num_vfs".to_owned();
    world.simulation.fail(sim::Failure { operation, times: 1, ..sim::Failure::default() });
    service.detach(WEB, pf()).unwrap();
    assert_eq!(world.simulation.pending_failures(), 0, "they were created and removed");
    assert_eq!((present(&world), service.state(pf())), (0, FunctionState::Held));
    assert_eq!(service.problems(), [""; 0]);
}

#[test]
fn a_pf_is_not_reset_under_vfs_that_are_being_created_when_its_guest_reboots() {
    let world = World::without_vfs();
    let (frontend, service) = guest_with_pf(&world);
    mark(&world);
    create_slowly(&world, &frontend, 2);
    let again = reboot(&world, &service);
    assert_eq!((present(&world), was_reset(&world)), (2, false));
    enable(&again, 2);
    assert!(is_added(&again, FIRST));
}

#[test]
fn a_pf_with_vfs_goes_to_nobody_before_they_are_gone() {
    let world = World::without_vfs();
    let (_frontend, _user, service) = with_a_vf_in_use(&world);
    service.detach(WEB, pf()).unwrap();
    assert_eq!(present(&world), 0);
    world.assert_nothing_granted_but_nodes(pf());
    assert_eq!(service.state(pf()), FunctionState::Held);
    service.release(pf()).unwrap();
    world.assert_host(&service, pf(), Some("igb"), "after all");
    world.host().set_num_vfs(pf(), 1, crate::world::LIMIT).unwrap();
    assert_eq!(
        world.host().function(vfs()[0]).unwrap().driver.as_deref(),
        Some("igbvf"),
        "dom0 probes VFs again"
    );
}

#[test]
fn without_the_driver_that_creates_vfs_a_pf_is_not_held_for_that() {
    let world = World::of(
        &std::fs::read_to_string(
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/sim/two-guests.yaml"),
        )
        .unwrap()
        .replace(", pci-pf-stub]", "]"),
    );
    let service = world.start_with(&[POLICY]);
    let failure = service.hold(pf()).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Refused);
    assert!(failure.message.contains("pci-pf-stub"), "{failure}");
}
