//! A PV guest may keep a BAR mapped that it has lost: no other guest gets the function while that guest exists.

use std::fs;

use pciback::{DomId, FunctionState, Uuid};
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Request, Success};

use crate::world::{DB, Service, WEB, World, attachment, bdf};

/// The rule for functions whose former owners are not trusted, which is the default; the other tests' is the opposite.
const NOT_TRUSTED: &str = "match: {class: '02'}\nreuse: after-shutdown\n";
const VF: &str = "01:10.0";

fn start(world: &World) -> Service {
    world.start_with(&[NOT_TRUSTED])
}

/// A service whose VF a PV guest had and lost.
fn after_detach(world: &World) -> Service {
    let service = start(world);
    service.hold(bdf(VF)).unwrap();
    service.attach(WEB, bdf(VF)).unwrap();
    service.detach(WEB, bdf(VF)).unwrap();
    service
}

fn assert_refused(outcome: Result<Success, Failure>, domain: DomId) {
    let failure = outcome.unwrap_err();
    assert_eq!((failure.code, failure.domain), (ErrorCode::Refused, Some(domain)), "{failure}");
    let hint = failure.hint.unwrap();
    assert!(hint.contains("shut it down") && hint.contains("--trust-former-owner"), "{hint}");
}

#[test]
fn another_guest_does_not_get_it_while_the_former_owner_runs() {
    let world = World::new();
    let service = after_detach(&world);
    assert_refused(service.attach(DB, bdf(VF)), WEB);
    assert_eq!(service.state(bdf(VF)), FunctionState::Held);
    world.simulation.destroy(WEB);
    service.attach(DB, bdf(VF)).unwrap();
}

#[test]
fn the_former_owner_itself_gets_it_again() {
    let world = World::new();
    let service = after_detach(&world);
    service.attach(WEB, bdf(VF)).unwrap();
}

#[test]
fn dom0_does_not_get_it_back_while_the_former_owner_runs() {
    let world = World::new();
    let service = after_detach(&world);
    assert_refused(service.release(bdf(VF)), WEB);
    world.simulation.destroy(WEB);
    service.release(bdf(VF)).unwrap();
}

#[test]
fn its_quarantine_is_not_cleared_while_the_former_owner_runs() {
    let world = World::new();
    let service = after_detach(&world);
    service.contain(bdf(VF), toolstack::engine::Containment::Quarantine);
    service.wait_for_state(bdf(VF), FunctionState::Quarantined);
    assert_refused(service.clear(bdf(VF)), WEB);
    let trusting = Request::QuarantineClear { address: bdf(VF), trust_former_owner: true };
    service.call(trusting).unwrap();
    assert_eq!(service.state(bdf(VF)), FunctionState::Held);
}

#[test]
fn an_option_trusts_the_former_owner() {
    let world = World::new();
    let service = after_detach(&world);
    let mut request = attachment(DB, bdf(VF));
    if let Request::PciAttach { trust_former_owner, .. } = &mut request {
        *trust_former_owner = true;
    }
    service.call(request).unwrap();
    service.detach(DB, bdf(VF)).unwrap();
    // Now there are two.
    let failure = service.release(bdf(VF)).unwrap_err();
    assert!(failure.message.contains("'web'") && failure.message.contains("'db'"), "{failure}");
    let request = Request::PciAssignableRemove { address: bdf(VF), force: false, trust_former_owner: true };
    service.call(request).unwrap();
}

#[test]
fn a_policy_can_trust_former_owners_of_some_functions() {
    let world = World::new();
    let trusted = "match: {vendor: 8086, device: 10ca}\nreuse: trusted\n";
    let service = world.start_with(&[NOT_TRUSTED, trusted]);
    service.hold(bdf(VF)).unwrap();
    service.attach(WEB, bdf(VF)).unwrap();
    service.detach(WEB, bdf(VF)).unwrap();
    service.attach(DB, bdf(VF)).unwrap();
}

#[test]
fn a_restarted_service_knows_the_former_owner() {
    let world = World::new();
    after_detach(&world).stop();
    let service = start(&world);
    assert_refused(service.attach(DB, bdf(VF)), WEB);
}

#[test]
fn a_service_that_replaces_an_older_version_notes_what_that_one_granted() {
    let world = World::new();
    let service = start(&world);
    service.hold(bdf(VF)).unwrap();
    service.attach(WEB, bdf(VF)).unwrap();
    service.stop();
    fs::remove_dir_all(world.settings().state_directory.join("former-owners")).unwrap();
    let service = start(&world);
    service.detach(WEB, bdf(VF)).unwrap();
    assert_refused(service.attach(DB, bdf(VF)), WEB);
}

#[test]
fn a_domain_that_reuses_the_number_of_the_former_owner_is_another_one() {
    let world = World::new();
    let service = after_detach(&world);
    world.simulation.destroy(WEB);
    world.simulation.create_guest(WEB, "other", "pv", Uuid([5; 16])).unwrap();
    service.attach(DB, bdf(VF)).unwrap();
}

#[test]
fn a_vf_created_again_at_the_same_memory_is_still_reachable_by_the_former_owner() {
    let world = World::new();
    let service = after_detach(&world);
    let pf = bdf("01:00.0");
    service
        .call(Request::PciAssignableRemove { address: bdf(VF), force: false, trust_former_owner: true })
        .unwrap();
    service.call(Request::VfDestroy { address: pf }).unwrap();
    service.call(Request::VfCreate { address: pf, count: 1, unmanaged: false }).unwrap();
    service.hold(bdf(VF)).unwrap();
    assert_refused(service.attach(DB, bdf(VF)), WEB);
}

#[test]
fn a_damaged_note_prevents_every_attachment() {
    let world = World::new();
    after_detach(&world).stop();
    let file = world.settings().state_directory.join("former-owners/0000:01:10.0.json");
    fs::write(&file, "{").unwrap();
    let service = start(&world);
    let failure = service.attach(DB, bdf(VF)).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Refused, "{failure}");
    assert!(failure.message.contains("former-owners/0000:01:10.0.json is damaged"), "{failure}");
    assert!(service.problems().iter().any(|problem| problem.contains("former-owners")));
}

#[test]
fn a_note_that_cannot_be_written_stops_the_attachment_before_anything_is_granted() {
    let world = World::new();
    let service = start(&world);
    service.hold(bdf(VF)).unwrap();
    let directory = world.settings().state_directory.join("former-owners");
    fs::remove_dir_all(&directory).unwrap();
    let failure = service.attach(WEB, bdf(VF)).unwrap_err();
    assert!(failure.message.contains("former-owners"), "{failure}");
    assert!(world.simulation.grants(WEB).is_empty());
    assert_eq!(service.state(bdf(VF)), FunctionState::Held);
}
