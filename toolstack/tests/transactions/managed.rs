//! Managed functions are held for one guest, and go back to dom0 when it has released them.

use std::fs;

use nix::errno::Errno;
use pciback::{DomId, FunctionState, Sbdf};
use toolstack::outcome::Failure;
use toolstack::protocol::{Placed, Request, Scope, Success};

use crate::crashes::{killed_anywhere, settled};
use crate::frontend::Frontend;
use crate::world::{DB, Service, WEB, World, bdf, name, wait_until};

const DRIVER: Option<&str> = Some("virtio-pci");

fn nic() -> Sbdf {
    bdf("02:00.0")
}

fn attach(service: &Service, domain: DomId, dry_run: bool) -> Result<Success, Failure> {
    service.call(Request::PciAttachAll {
        domain: name(domain),
        functions: vec![Placed { address: nic(), slot: None }],
        persist: false,
        managed: true,
        trust_former_owner: false,
        dry_run,
    })
}

fn goes_back(world: &World, service: &Service, why: &str) {
    wait_until(&format!("{why}: dom0 has it again"), || service.view(nic()).is_none());
    world.assert_host(service, nic(), DRIVER, why);
}

#[test]
fn a_function_of_dom0_is_held_for_a_guest_and_goes_back_with_its_detach() {
    let world = World::without_vfs();
    let service = world.start();
    assert!(matches!(attach(&service, WEB, true), Ok(Success::Possible { .. })));
    world.assert_host(&service, nic(), DRIVER, "a dry run");
    attach(&service, WEB, false).unwrap();
    assert!(matches!(attach(&service, WEB, false), Ok(Success::Already { .. })));
    let Ok(Success::Changed { message, .. }) = service.detach(WEB, nic()) else { panic!("not detached") };
    assert!(message.ends_with("goes back to dom0 as soon as no guest can reach it"), "{message}");
    goes_back(&world, &service, "it was detached");
}

#[test]
fn it_goes_back_when_its_guest_has_ended_also_while_the_service_did_not_run() {
    let world = World::without_vfs();
    let service = world.start();
    attach(&service, WEB, false).unwrap();
    world.simulation.destroy(WEB);
    goes_back(&world, &service, "its guest has ended");
    attach(&service, DB, false).unwrap();
    service.kill();
    world.simulation.destroy(DB);
    goes_back(&world, &world.start(), "its guest ended meanwhile");
}

#[test]
fn while_a_former_pv_guest_may_reach_it_it_stays_held() {
    let world = World::without_vfs();
    let service = world.start_with(&["match: {class: '02'}\nreuse: after-shutdown\n"]);
    attach(&service, WEB, false).unwrap();
    service.detach(WEB, nic()).unwrap();
    assert_eq!(service.state(nic()), FunctionState::Held);
    let note = service.view(nic()).and_then(|view| view.note).unwrap_or_default();
    assert_eq!(note, "goes back to dom0 as soon as no guest can reach it");
    assert_eq!(service.problems(), [""; 0]);
    world.simulation.destroy(WEB);
    goes_back(&world, &service, "the former guest has ended");
}

#[test]
fn what_was_assignable_before_stays_so() {
    let world = World::without_vfs();
    let service = world.start();
    service.hold(nic()).unwrap();
    attach(&service, WEB, false).unwrap();
    service.detach(WEB, nic()).unwrap();
    world.assert_held(&service, nic(), "it was held before");
}

#[test]
fn what_is_made_assignable_while_it_waits_stays_so() {
    let world = World::without_vfs();
    let service = world.start_with(&["match: {class: '02'}\nreuse: after-shutdown\n"]);
    attach(&service, WEB, false).unwrap();
    service.detach(WEB, nic()).unwrap();
    service.hold(nic()).unwrap();
    world.simulation.destroy(WEB);
    service.call(Request::Sync { dry_run: true }).unwrap();
    world.assert_held(&service, nic(), "it was made assignable");
}

#[test]
fn when_it_cannot_be_attached_dom0_has_it_again() {
    let world = World::without_vfs();
    let service = world.start();
    // The first assignment is the one to Xen's quarantine domain.
    world.fail("assign", Some(nic()), Errno::EIO, 1);
    let failure = attach(&service, WEB, false).unwrap_err();
    assert!(failure.message.contains("assign 0000:02:00.0"), "{failure}");
    goes_back(&world, &service, "its attach failed");
    let refused = attach(&service, DomId(99), false).unwrap_err();
    assert!(refused.message.contains("there is no domain"), "{refused}");
    world.assert_host(&service, nic(), DRIVER, "there is no such guest");
}

#[test]
fn what_cannot_be_attached_is_not_taken_from_its_driver() {
    let world = World::without_vfs();
    let service = world.start_with(&["match: {class: '02'}\nreset: {methods: [bus]}\n"]);
    for dry_run in [true, false] {
        let refused = attach(&service, WEB, dry_run).unwrap_err();
        assert!(refused.code.is_refusal() && refused.message.contains("reset 0000:02:00.0"), "{refused}");
        assert!(!refused.to_string().contains("not assignable"), "{refused}");
    }
    let Ok(Success::Events { events }) = service.call(Request::Events { follow: false }) else { panic!() };
    assert!(events.iter().all(|event| event.address != nic()), "{events:?}");
}

#[test]
fn what_is_made_persistent_does_not_go_back() {
    let world = World::without_vfs();
    let service = world.start();
    attach(&service, WEB, false).unwrap();
    service.persist(WEB, nic()).unwrap();
    service.detach_only(WEB, nic(), Scope::Live).unwrap();
    assert_eq!(service.view(nic()).map(|view| (view.state, view.note)), Some((FunctionState::Held, None)));
}

#[test]
fn a_refused_command_does_not_keep_it() {
    let world = World::without_vfs();
    let service = world.start();
    attach(&service, WEB, false).unwrap();
    service.hold(nic()).unwrap_err();
    service.detach(WEB, nic()).unwrap();
    goes_back(&world, &service, "holding it was refused while its guest had it");
}

#[test]
fn it_goes_back_after_its_quarantine_is_cleared() {
    let world = World::without_vfs();
    let service = world.start();
    attach(&service, WEB, false).unwrap();
    world.fail("deassign", Some(nic()), Errno::EIO, 0);
    service.detach(WEB, nic()).unwrap_err();
    service.clear(nic()).unwrap();
    goes_back(&world, &service, "its quarantine was cleared");
}

#[test]
fn new_policies_let_it_go_back() {
    let world = World::without_vfs();
    let service = world.start_with(&["match: {class: '02'}\nreuse: after-shutdown\n"]);
    attach(&service, WEB, false).unwrap();
    service.detach(WEB, nic()).unwrap();
    let policies = world.settings().policy_directories[0].clone();
    fs::create_dir_all(&policies).unwrap();
    fs::write(policies.join("trusted.yaml"), "match: {class: '02'}\nreuse: trusted\n").unwrap();
    service.call(Request::PolicyReload).unwrap();
    goes_back(&world, &service, "former owners are trusted");
}

#[test]
fn a_failed_attach_says_nothing_of_a_function_that_goes_back() {
    let world = World::without_vfs();
    let service = world.start();
    world.fail("assign", Some(nic()), Errno::EIO, 1);
    let failure = attach(&service, WEB, false).unwrap_err();
    assert!(!failure.message.contains("not returned"), "{failure}");
    // The command ends when dom0 has it again.
    world.assert_host(&service, nic(), DRIVER, "its attach failed");
}

#[test]
fn a_managed_attach_that_is_killed_anywhere_ends_attached_or_with_its_driver() {
    killed_anywhere(
        |_, _| (),
        |service| attach(service, WEB, false).is_ok(),
        |world: &World, service: &Service, _: &Frontend, why: &str| {
            settled(service, why);
            wait_until(&format!("{why}: it is not left held"), || {
                service.view(nic()).is_none_or(|view| view.state == FunctionState::Attached)
            });
            if service.state(nic()) == FunctionState::Attached {
                service.detach(WEB, nic()).unwrap();
            }
            goes_back(world, service, why);
        },
    );
}
