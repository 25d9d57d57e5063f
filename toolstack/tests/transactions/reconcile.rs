//! What sysfs, Xen and xenstore disagree on is repaired by the service itself, and reported; what cannot be repaired is tried a few
//! times, and reported too.

use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use pciback::platform::sim::{self, Owner};
use pciback::policy::RdmPolicy;
use pciback::{FunctionState, Sbdf};
use toolstack::protocol::Request;

use crate::frontend::Frontend;
use crate::world::{DB, Service, WEB, World, bdf, wait_until};

const PF: &str = "01:00.0";
const VF: &str = "01:10.0";
const OTHER: &str = "01:10.2";
const LIMIT: Duration = Duration::from_secs(5);

/// Makes Xen forget a function, which no event reports.
fn forget(world: &World, address: Sbdf) {
    world.simulation.platform("somebody").unwrap().hypervisor.device_remove(address).unwrap();
}

/// Whether the status says that the service made a repair with these words.
fn was_repaired(service: &Service, words: &[&str]) -> bool {
    service.status().repaired.iter().any(|text| words.iter().all(|word| text.contains(word)))
}

#[test]
fn differences_at_the_start_of_the_service_are_repaired_and_reported() {
    let world = World::new();
    let (used, held, lost) = (bdf(VF), bdf(OTHER), bdf("01:10.4"));
    let frontend = Frontend::load(&world, WEB);
    let service = world.start();
    for address in [used, held] {
        service.hold(address).unwrap();
    }
    service.attach(WEB, used).unwrap();
    service.kill();
    forget(&world, lost);
    forget(&world, held);
    let service = world.start();
    wait_until("Xen knows it again", || world.simulation.owner(lost) == Some(Owner::Host));
    wait_until("the held one is held again", || world.simulation.owner(held) == Some(Owner::Quarantine));
    wait_until("it is said", || was_repaired(&service, &["report 0000:01:10.4 to Xen"]));
    wait_until("it is said of both", || was_repaired(&service, &["hold 0000:01:10.2"]));
    service.release(held).unwrap();
    world.assert_host(&service, held, None, "it was held before");
    assert_eq!(frontend.read(0, 0, 4), 0x10ca_8086, "the guest never noticed");
    assert_eq!(service.problems(), [""; 0]);
}

#[test]
fn the_service_reports_functions_to_xen_that_the_kernel_did_not_report() {
    let world = World::without_vfs();
    let service = world.start();
    let vfs = [bdf(VF), bdf(OTHER)];
    world.simulation.report_to_xen(false);
    world.host().set_num_vfs(bdf(PF), 2, LIMIT).unwrap();
    wait_until("Xen knows the VFs", || vfs.iter().all(|vf| world.simulation.owner(*vf) == Some(Owner::Host)));
    world.host().set_num_vfs(bdf(PF), 0, LIMIT).unwrap();
    wait_until("Xen forgot the VFs", || vfs.iter().all(|vf| world.simulation.owner(*vf).is_none()));
    wait_until("it is said", || {
        was_repaired(&service, &["0000:01:10.2", "Xen knows it, sysfs does not show it"])
    });
    assert_eq!(service.problems(), [""; 0]);
}

#[test]
fn a_removed_pf_and_its_vfs_are_removed_from_xen_in_the_required_order() {
    // From 4.20 on Xen refuses a PF before its VFs, and distrusts all of them from then on.
    let world = World::on_xen("4.20");
    world.host().set_num_vfs(bdf(PF), 2, LIMIT).unwrap();
    let service = world.start();
    service.hold(bdf(VF)).unwrap();
    world.simulation.report_to_xen(false);
    world.simulation.unplug(bdf(PF));
    wait_until("Xen forgot them all", || {
        [PF, VF, OTHER].iter().all(|address| world.simulation.owner(bdf(address)).is_none())
    });
    service.wait_for_state(bdf(VF), FunctionState::Host);
    assert_eq!(service.problems(), [""; 0]);
}

#[test]
fn differences_are_found_after_events_were_lost() {
    let world = World::new();
    let (taken, lost) = (bdf(VF), bdf(OTHER));
    let service = world.start();
    service.hold(taken).unwrap();
    let somebody = world.simulation.platform("somebody").unwrap().hypervisor;
    world.simulation.while_events_are_lost(|| {
        forget(&world, lost);
        somebody.assign(DB, taken, RdmPolicy::Strict).unwrap();
    });
    wait_until("Xen knows it again", || world.simulation.owner(lost) == Some(Owner::Host));
    // A function that a guest owns without a known attach cannot be trusted.
    service.wait_for_state(taken, FunctionState::Quarantined);
    assert_eq!(world.simulation.owner(taken), Some(Owner::Guest(DB)), "nobody takes it from there unasked");
    wait_until("it is said", || was_repaired(&service, &["quarantine 0000:01:10.0"]));
}

#[test]
fn a_guest_that_lost_its_function_in_xen_loses_it_in_xenstore_too() {
    let world = World::new();
    let vf = bdf(VF);
    let _frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(vf).unwrap();
    service.attach(WEB, vf).unwrap();
    let somebody = world.simulation.platform("somebody").unwrap().hypervisor;
    world.simulation.while_events_are_lost(|| somebody.deassign(WEB, vf).unwrap());
    wait_until("it is said", || was_repaired(&service, &["withdraw 0000:01:10.0"]));
    world.assert_held(&service, vf, "withdrawn from its guest");
}

#[test]
fn a_repair_that_fails_is_tried_three_times_and_reported() {
    let world = World::new();
    let vf = bdf(VF);
    let service = world.start();
    world.simulation.fail(sim::Failure {
        operation: "device_add".into(),
        address: Some(vf),
        errno: Some(Errno::EIO),
        times: 100,
        ..sim::Failure::default()
    });
    world.simulation.while_events_are_lost(|| forget(&world, vf));
    wait_until("the service gives up", || {
        service.problems().iter().any(|problem| problem.contains("given up"))
    });
    let status = service.status();
    let [problem] = status.problems.as_slice() else { panic!("{status:?}") };
    let problem = &problem.message;
    assert!(problem.contains("report 0000:01:10.0 to Xen") && problem.contains("EIO"), "{problem}");
    assert_eq!(world.simulation.pending_failures(), 97, "three tries");
    // Neither further events nor a full look make it try again.
    world.simulation.while_events_are_lost(|| ());
    let failure = service.call(Request::Sync { dry_run: false }).unwrap_err();
    assert!(failure.message.contains("0 of 1 repairs were made"), "{failure}");
    assert_eq!(world.simulation.pending_failures(), 96, "one more, by command");
    world.simulation.forget_failures();
    service.call(Request::Sync { dry_run: false }).unwrap();
    assert_eq!(world.simulation.owner(vf), Some(Owner::Host));
    assert_eq!(service.problems(), [""; 0]);
}

#[test]
fn a_request_waits_for_a_repair_of_its_function() {
    let world = World::new();
    let service = world.start();
    let address = bdf(VF);
    world.simulation.fail(sim::Failure {
        operation: "device_add".into(),
        address: Some(address),
        domain: None,
        errno: None,
        delay: Duration::from_millis(300),
        times: 1,
        ..sim::Failure::default()
    });
    forget(&world, address);
    thread::scope(|scope| {
        scope.spawn(|| service.call(Request::Sync { dry_run: false }).unwrap());
        wait_until("Xen is asked to take it again", || world.simulation.pending_failures() == 0);
        let held = service.hold(address);
        assert!(held.is_ok(), "{held:?}");
    });
    world.assert_held(&service, address, "after the repair");
}
