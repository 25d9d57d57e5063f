//! Who may take a function from whom, what belongs to guests from the start, and PFs that no driver manages.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use pciback::config::Access;
use pciback::platform::sim::{self, Moment, Owner};
use pciback::platform::{StoreOps, Use};
use pciback::policy::RdmPolicy;
use pciback::{DomId, FunctionState, Sbdf};
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Request, Success, VfView};

use crate::world::{DB, Service, WEB, World, bdf, wait_until};

/// A network function, a PF, and its first VF.
const NIC: &str = "02:00.0";
const PF: &str = "01:00.0";
const VF: &str = "01:10.0";
const LIMIT: Duration = Duration::from_secs(5);

fn interface(up: bool, master: Option<&str>) -> Vec<Use> {
    vec![Use::Interface { name: "eth1".into(), up, master: master.map(str::to_owned) }]
}

fn seize(service: &Service, address: Sbdf) -> Result<Success, Failure> {
    service.call(Request::PciAssignableAdd {
        address,
        force: true,
        persist: false,
        managed: false,
        dry_run: false,
    })
}

fn create(service: &Service, pf: &str, count: u16, unmanaged: bool) -> Result<Success, Failure> {
    service.call(Request::VfCreate { address: bdf(pf), count, unmanaged })
}

fn destroy(service: &Service, pf: &str) -> Success {
    service.call(Request::VfDestroy { address: bdf(pf) }).unwrap()
}

fn vfs(service: &Service, pf: &str) -> Vec<VfView> {
    match service.call(Request::VfList { address: Some(bdf(pf)) }) {
        Ok(Success::Vfs { vfs }) => vfs,
        other => panic!("{other:?}"),
    }
}

fn warnings(answer: Success) -> Vec<String> {
    match answer {
        Success::Changed { warnings, .. } => warnings,
        other => panic!("{other:?}"),
    }
}

fn refused(answer: Result<Success, Failure>, words: &[&str]) {
    let failure = answer.unwrap_err();
    assert_eq!(failure.code, ErrorCode::Refused, "{failure}");
    let said = failure.to_string();
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
}

fn driver(world: &World, address: &str) -> (Option<String>, Option<String>) {
    let function = world.host().function(bdf(address)).unwrap();
    (function.driver, function.driver_override)
}

fn named(name: &str) -> Option<String> {
    Some(name.to_owned())
}

#[test]
fn a_function_in_use_is_left_alone_and_its_users_are_named_unless_it_is_forced() {
    let (world, nic) = (World::new(), bdf(NIC));
    let service = world.start();
    let mount = Use::Mount { device: "/dev/vda1".into(), at: "/srv".into() };
    world.simulation.set_uses(nic, [interface(true, Some("br0")), vec![mount]].concat());
    refused(
        service.hold(nic),
        &["interface eth1 is up and part of br0; /dev/vda1 is mounted at /srv", "--force"],
    );
    world.assert_host(&service, nic, Some("virtio-pci"), "after the refusal");

    world.simulation.set_uses(nic, interface(true, None));
    let said = warnings(seize(&service, nic).unwrap()).join("; ");
    assert!(said.contains("0000:02:00.0 is in use: interface eth1 is up"), "{said}");
    world.assert_held(&service, nic, "forced");
    service.release(nic).unwrap();
    world.assert_host(&service, nic, Some("virtio-pci"), "given back");

    world.simulation.set_uses(nic, Vec::new());
    let said = warnings(service.hold(nic).unwrap()).join("; ");
    assert!(!said.contains("in use"), "{said}");
}

#[test]
fn driver_and_override_are_restored_even_after_a_killed_service() {
    let (world, nic) = (World::new(), bdf(NIC));
    world.host().set_driver_override(nic, Some("virtio-pci")).unwrap();
    let service = world.start();
    service.hold(nic).unwrap();
    assert_eq!(driver(&world, NIC), (named("pci-stub"), named("pci-stub")));
    service.kill();
    let service = world.start();
    service.release(nic).unwrap();
    assert_eq!(driver(&world, NIC), (named("virtio-pci"), named("virtio-pci")));

    // A refusal leaves both as they are, too.
    world.simulation.set_uses(nic, interface(false, Some("bond0")));
    refused(service.hold(nic), &["interface eth1 is part of bond0"]);
    assert_eq!(driver(&world, NIC), (named("virtio-pci"), named("virtio-pci")));
}

#[test]
fn a_function_attached_by_xl_is_not_held_even_with_force() {
    let (world, vf) = (World::new(), bdf(VF));
    let xl = world.simulation.platform("xl").unwrap();
    xl.host.set_driver_override(vf, Some("pciback")).unwrap();
    xl.host.probe(vf, LIMIT).unwrap();
    xl.hypervisor.assign(DB, vf, RdmPolicy::Strict).unwrap();
    xl.store.write("/local/domain/0/backend/pci/2/0/dev-0", b"0000:01:10.0").unwrap();
    let service = world.start_with(&["match: {device: 10ca}\nhold: at-once\n"]);
    service.wait_for_state(bdf("01:10.2"), FunctionState::Held);
    refused(
        seize(&service, vf),
        &["belongs to 'db' (domain 2), through xen-pciback", "xl pci-detach db 0000:01:10.0"],
    );
    assert_eq!(driver(&world, VF).0, named("pciback"));
    assert_eq!(world.simulation.owner(vf), Some(Owner::Guest(DB)));
}

#[test]
fn a_pf_without_a_driver_gets_untrusted_vfs_by_the_stub_until_they_are_destroyed() {
    let (world, pf, vf) = (World::without_vfs(), bdf(PF), bdf(VF));
    world.host().unbind(pf, LIMIT).unwrap();
    let service = world.start();
    refused(create(&service, PF, 2, false), &["has no driver", "--unmanaged", "permit: [untrusted-vf]"]);
    refused(create(&service, "03:00.0", 1, true), &["0000:03:00.0 is managed by nvme"]);
    create(&service, PF, 2, true).unwrap();
    assert_eq!(driver(&world, PF).0, named("pci-pf-stub"));
    let listed = vfs(&service, PF);
    assert_eq!(listed.len(), 2);
    assert!(
        listed
            .iter()
            .all(|vf| vf.untrusted.as_deref() == Some("which no driver manages (it has pci-pf-stub)"))
    );
    service.hold(vf).unwrap();
    refused(
        service.attach(WEB, vf),
        &["which no driver manages (it has pci-pf-stub)", "permit: [untrusted-vf]"],
    );
    service.kill();

    let service = world.start_with(&["match: {device: 10ca}\npermit: untrusted-vf\n"]);
    service.attach(WEB, vf).unwrap();
    service.detach(WEB, vf).unwrap();
    service.release(vf).unwrap();
    service.call(Request::VfSetCount { address: pf, count: 1 }).unwrap();
    assert_eq!((vfs(&service, PF).len(), driver(&world, PF).0), (1, named("pci-pf-stub")));
    destroy(&service, PF);
    assert_eq!(driver(&world, PF), (None, None), "as it was before");

    // One that another program bound to the stub stays there.
    world.host().set_driver_override(pf, Some("pci-pf-stub")).unwrap();
    world.host().probe(pf, LIMIT).unwrap();
    create(&service, PF, 1, false).unwrap();
    destroy(&service, PF);
    assert_eq!(driver(&world, PF), (named("pci-pf-stub"), named("pci-pf-stub")));
}

#[test]
fn a_pf_is_unbound_from_the_stub_after_a_failure_or_a_killed_service() {
    let (world, pf) = (World::without_vfs(), bdf(PF));
    world.host().unbind(pf, LIMIT).unwrap();
    let service = world.start();
    world.fail("set_num_vfs", Some(pf), Errno::ENOMEM, 0);
    assert!(create(&service, PF, 2, true).unwrap_err().message.contains("ENOMEM"));
    assert_eq!(driver(&world, PF), (None, None));

    create(&service, PF, 2, true).unwrap();
    service.kill();
    world.host().set_num_vfs(pf, 0, LIMIT).unwrap();
    let service = world.start();
    wait_until("the PF is taken back", || driver(&world, PF) == (None, None));
    assert_eq!(service.problems(), [""; 0]);
}

#[test]
fn the_vfs_of_a_managed_pf_are_trusted() {
    let world = World::new();
    let service = world.start();
    assert!(vfs(&service, PF).iter().all(|vf| vf.untrusted.is_none()));
}

#[test]
fn a_function_held_by_policy_is_held_when_it_appears_and_released_to_its_driver() {
    let (world, nic) = (World::without_vfs(), bdf(NIC));
    world.simulation.unplug(nic);
    let policy = "match: {vendor: 1af4}\nhold: at-once\n";
    let service = world.start_with(&[policy]);
    world.simulation.plug(r#"{address: "02:00.0", model: virtio-net, irq: 11}"#).unwrap();
    service.wait_for_state(nic, FunctionState::Held);
    wait_until("it is the quarantine domain's", || world.simulation.owner(nic) == Some(Owner::Quarantine));

    service.release(nic).unwrap();
    world.assert_host(&service, nic, Some("virtio-pci"), "given back to the driver that had it first");
    // It stays dom0's, whatever happens to it, until the service restarts.
    let host = world.host();
    host.unbind(nic, LIMIT).unwrap();
    host.probe(nic, LIMIT).unwrap();
    service.hold(bdf("03:00.0")).unwrap();
    world.assert_host(&service, nic, Some("virtio-pci"), "somebody wanted it so");
    service.stop();
    let service = world.start_with(&[policy]);
    service.wait_for_state(nic, FunctionState::Held);
}

#[test]
fn a_function_held_by_policy_is_held_after_a_restart_of_a_killed_service() {
    let policy = "match: {vendor: 1af4}\nhold: at-once\n";
    for changes in 0..4 {
        let (world, nic) = (World::without_vfs(), bdf(NIC));
        world.simulation.unplug(nic);
        let service = world.start_with(&[policy]);
        service.fuse.arm(changes, Moment::After);
        world.simulation.plug(r#"{address: "02:00.0", model: virtio-net, irq: 11}"#).unwrap();
        wait_until("it is killed", || service.fuse.is_blown());
        service.kill();
        let service = world.start_with(&[policy]);
        service.wait_for_state(nic, FunctionState::Held);
        world.assert_held(&service, nic, &format!("killed after {changes} changes"));
        service.release(nic).unwrap();
        world.assert_host(&service, nic, Some("virtio-pci"), "given back");
    }
}

#[test]
fn a_function_held_by_policy_is_reported_and_not_held_while_it_is_in_use() {
    let (world, nic) = (World::without_vfs(), bdf(NIC));
    world.simulation.set_uses(nic, interface(true, None));
    let service = world.start_with(&["match: {vendor: 1af4}\nhold: at-once\n"]);
    wait_until("the refusal is shown", || !service.problems().is_empty());
    let (problems, since) = (service.problems(), service.status().problems.remove(0).since);
    let expected = "0000:02:00.0 is to be held at once: 0000:02:00.0 is in use: interface eth1 is up";
    assert_eq!(problems, [expected]);
    assert!(since.is_some());
    assert_eq!(service.status().problems[0].since, since, "since it was found, not since it was asked for");
    world.assert_host(&service, nic, Some("virtio-pci"), "in use");
    world.simulation.set_uses(nic, Vec::new());
    service.hold(nic).unwrap();
    assert_eq!(service.problems(), [""; 0]);
}

#[test]
fn vfs_enabled_from_outside_are_taken_from_their_native_driver() {
    let world = World::without_vfs();
    let service = world.start_with(&["match: {device: 10ca, function: virtual}\nhold: at-once\n"]);
    world.host().set_num_vfs(bdf(PF), 3, LIMIT).unwrap();
    for vf in ["01:10.0", "01:10.2", "01:10.4"].map(bdf) {
        service.wait_for_state(vf, FunctionState::Held);
        world.assert_held(&service, vf, "by policy");
    }
    service.release(bdf(VF)).unwrap();
    world.assert_host(&service, bdf(VF), Some("igbvf"), "its native driver had it");
}

#[test]
fn no_native_driver_is_probed_for_vfs_that_the_service_enables() {
    let world = World::without_vfs();
    let service = world.start_with(&["match: {device: 10ca, function: virtual}\nhold: at-once\n"]);
    create(&service, PF, 1, false).unwrap();
    service.wait_for_state(bdf(VF), FunctionState::Held);
    service.release(bdf(VF)).unwrap();
    world.assert_host(&service, bdf(VF), None, "as it came");
}

#[test]
fn an_attachment_to_a_privileged_domain_has_a_warning() {
    let (world, vf) = (World::new(), bdf(VF));
    let service = world.start();
    service.hold(vf).unwrap();
    let store = world.simulation.store(DomId::DOM0).unwrap();
    let attach = |expected: Option<&str>| {
        let said = warnings(service.attach(WEB, vf).unwrap()).join("; ");
        assert_eq!(said.contains("privileged"), expected.is_some(), "{said}");
        assert!(said.contains(expected.unwrap_or_default()), "{said}");
        service.detach(WEB, vf).unwrap();
    };
    attach(None);
    store.write("/local/domain/1/target", b"2").unwrap();
    attach(Some("'web' (domain 1) is privileged: it is the device model of 'db' (domain 2)"));
    store.remove("/local/domain/1/target").unwrap();
    store.write("/local/domain/1/backend/vif/2/0/state", b"4").unwrap();
    attach(Some("it is a driver domain, its vif devices are other guests'"));
    store.write("/tool/xenstored/domid", b"1").unwrap();
    attach(Some("it runs xenstored"));
}

/// A root port with one bus behind it, ARI Forwarding supported and off, and two PFs there.
const BEHIND_A_PORT: &str = r#"
drivers: [igb, i40e, nvme, pci-stub]
models:
  port:
    config: |
      00: 86 80 0c 00 07 00 10 00 01 00 04 06 00 00 01 00
      10: 00 00 00 00 00 00 00 00 00 01 01 00 00 00 00 00
      30: 00 00 00 00 40 00 00 00 00 00 00 00 00 01 00 00
      40: 10 00 42 00 00 00 00 00 00 00 00 00 00 00 00 00
      60: 00 00 00 00 20 00 00 00 00 00 00 00 00 00 00 00
functions:
  - {address: "00:02.0", model: port}
  - {address: "01:00.0", model: "82576"}
  - {address: "01:1e.0", model: many-vfs}
"#;

#[test]
fn vfs_with_unreachable_routing_ids_are_refused_and_none_is_enabled() {
    let world = World::of(BEHIND_A_PORT);
    let service = world.start();
    refused(
        create(&service, PF, 3, false),
        &["the VF at 0000:01:10.0", "ARI Forwarding", "0000:00:02.0, which has it off"],
    );
    assert_eq!(vfs(&service, PF).len(), 0);
    // Device Control 2 of the port: ARI Forwarding Enable.
    world.simulation.poke(bdf("00:02.0"), 0x68, &[0x20]);
    create(&service, PF, 3, false).unwrap();

    let far = "01:1e.0";
    refused(
        create(&service, far, 64, false),
        &[
            "64 VFs of 0000:01:1e.0 need the buses 01 to 02 (First VF Offset 1, VF Stride 1)",
            "0000:00:02.0, leads to 01 to 01 only; 15 VFs fit",
            "pci=assign-busses",
        ],
    );
    refused(service.call(Request::VfSetCount { address: bdf(far), count: 16 }), &["15 VFs fit"]);
    assert_eq!(vfs(&service, far).len(), 0);
    create(&service, far, 15, false).unwrap();
    assert_eq!(vfs(&service, far).last().unwrap().function.address, bdf("01:1f.7"));
}

/// Device Control of the NVMe controller's PCI Express capability, with Initiate Function Level Reset; nothing is restored.
fn forget(world: &World, address: Sbdf) {
    let config = world.host().config(address).unwrap();
    let control = Access::new(0x88, 2).unwrap();
    config.write(control, 1 << 15).unwrap();
}

#[test]
fn bars_cleared_by_a_link_reset_are_restored_before_an_attachment() {
    let (world, nvme) = (World::new(), bdf("03:00.0"));
    let bars = || {
        let config = world.host().config(nvme).unwrap();
        [0x10, 0x14].map(|offset| config.read(Access::new(offset, 4).unwrap()).unwrap())
    };
    let placed = bars();
    assert_ne!(placed[0] & !0xf, 0);
    forget(&world, nvme);
    assert_eq!(bars()[0] & !0xf, 0);
    let service = world.start();
    service.hold(nvme).unwrap();
    service.attach(WEB, nvme).unwrap();
    assert_eq!(bars(), placed, "its guest has it");
    forget(&world, nvme);
    service.detach(WEB, nvme).unwrap();
    assert_eq!(bars(), placed, "dom0 gets it back");
}

/// A scan that began before the function was held ends afterwards, and shows the state before.
#[test]
fn an_outdated_examination_does_not_release_a_held_function() {
    let (world, address) = (World::new(), bdf("02:00.0"));
    let service = world.start();
    let delay = Duration::from_secs(3);
    world.simulation.fail(sim::Failure {
        operation: "assignable".into(),
        address: Some(address),
        delay,
        times: 1,
        ..sim::Failure::default()
    });
    world.host().unbind(address, LIMIT).unwrap();
    wait_until("the service looks at it", || world.simulation.pending_failures() == 0);
    let begun = Instant::now();
    service.hold(address).unwrap();
    assert!(begun.elapsed() < delay, "the look ended before");
    // Answered when the look has ended.
    service.call(Request::Sync { dry_run: true }).unwrap();
    service.attach(WEB, address).unwrap();
    assert_eq!(service.state(address), FunctionState::Attached);
}
