//! VFs' network settings: what guests do to them, and what is left of them when the service dies.

use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use pciback::platform::network::VfSetting;
use pciback::platform::{VfSettings, sim};
use pciback::{FunctionState, Sbdf};
use toolstack::outcome::Failure;
use toolstack::protocol::{Request, Success, VfNetworkView};
use toolstack::settings::WantedVfs;
use toolstack::target::Parent;

use crate::crashes::{killed_anywhere, settled};
use crate::frontend::{Frontend, write_op};
use crate::world::{LIMIT, Service, WEB, World, bdf, wait_until};

const VF: &str = "01:10.0";
/// Device Control of the VFs, whose PCI Express capability lies at 0xa0.
const DEVICE_CONTROL: u32 = 0xa8;
const INITIATE_FLR: u32 = 1 << 15;
const COMMAND: u32 = 4;
const BUS_MASTER: u32 = 1 << 2;

fn wishes() -> VfSettings {
    VfSettings {
        mac: Some("52:54:00:aa:bb:01".parse().unwrap()),
        vlan: Some("100:3".parse().unwrap()),
        trust: Some(true),
        max_rate: Some(500),
        ..VfSettings::default()
    }
}

fn set(service: &Service, address: Sbdf, settings: VfSettings) -> Result<Success, Failure> {
    service.call(Request::VfSet { address, settings, persist: false })
}

fn show(service: &Service, address: Sbdf) -> VfNetworkView {
    match service.call(Request::VfShow { address }) {
        Ok(Success::VfNetwork(view)) => view,
        other => panic!("vf show: {other:?}"),
    }
}

fn warnings(outcome: Result<Success, Failure>) -> Vec<String> {
    match outcome {
        Ok(Success::Changed { warnings, .. }) => warnings,
        other => panic!("{other:?}"),
    }
}

#[test]
fn changes_by_a_guest_are_shown_reported_at_detach_and_undone_at_the_next_attach() {
    let (world, vf) = (World::new(), bdf(VF));
    let _frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(vf).unwrap();
    set(&service, vf, wishes()).unwrap();
    service.attach(WEB, vf).unwrap();
    assert_eq!(show(&service, vf).differing, [""; 0]);

    let other = "52:54:00:00:00:99".parse().unwrap();
    world.simulation.guest_sets(vf, VfSetting::Mac(other));
    let view = show(&service, vf);
    assert_eq!((view.in_force.unwrap().mac, view.wished.mac), (Some(other), wishes().mac));
    assert_eq!(view.differing, ["mac"]);

    let warnings = warnings(service.detach(WEB, vf));
    let said = warnings.iter().find(|warning| warning.contains("the guest had changed"));
    assert!(said.unwrap().contains("mac 52:54:00:00:00:99 instead of mac 52:54:00:aa:bb:01"), "{warnings:?}");
    service.attach(WEB, vf).unwrap();
    assert_eq!(show(&service, vf).differing, [""; 0]);
}

/// The settings file's wishes for the PF: all VFs in a VLAN, the first with an address of its own.
fn configured() -> Vec<WantedVfs> {
    let all = VfSettings { vlan: Some("100".parse().unwrap()), trust: Some(true), ..VfSettings::default() };
    let first = VfSettings { mac: wishes().mac, vlan: wishes().vlan, ..VfSettings::default() };
    vec![WantedVfs {
        pf: Some(Parent::At(bdf("01:00.0"))),
        id: None,
        serial: None,
        count: 2,
        unmanaged: false,
        network: all,
        vfs: [(0, first)].into(),
    }]
}

fn in_force(world: &World, address: &str) -> VfSettings {
    world.simulation.vf_network(bdf(address)).unwrap()
}

#[test]
fn configured_settings_are_applied_when_vfs_are_created_and_attached() {
    let (world, vf) = (World::without_vfs(), bdf(VF));
    let _frontend = Frontend::load(&world, WEB);
    let service = world.start_with_vfs(configured());
    wait_until("the VFs are there and set", || {
        let set = |address: &str| {
            world.simulation.vf_network(bdf(address)).is_some_and(|found| found.trust == Some(true))
        };
        set(VF) && set("01:10.2")
    });
    let created = in_force(&world, VF);
    assert_eq!((created.mac, created.vlan, created.trust), (wishes().mac, wishes().vlan, Some(true)));
    let other = in_force(&world, "01:10.2");
    assert_eq!(
        (other.mac.unwrap().to_string().as_str(), other.vlan),
        ("00:00:00:00:00:00", "100".parse().ok())
    );

    // Even if it was changed in between, the guest gets what the settings say, and 'vf set' goes before them.
    world.simulation.guest_sets(vf, VfSetting::Vlan("7".parse().unwrap()));
    service.hold(vf).unwrap();
    set(&service, vf, VfSettings { max_rate: Some(500), ..VfSettings::default() }).unwrap();
    service.attach(WEB, vf).unwrap();
    let attached = in_force(&world, VF);
    assert_eq!((attached.mac, attached.vlan, attached.max_rate), (wishes().mac, wishes().vlan, Some(500)));
    assert_eq!(show(&service, vf).differing, [""; 0]);
    service.detach(WEB, vf).unwrap();
    service.release(vf).unwrap();
    let released = in_force(&world, VF);
    assert_eq!(
        (released.vlan, released.max_rate),
        ("7".parse().ok(), Some(0)),
        "as it was when it was taken"
    );
}

#[test]
fn vfs_whose_settings_cannot_be_set_are_not_created() {
    let world = World::without_vfs();
    world.fail("set_vf_setting", Some(bdf("01:10.2")), Errno::EIO, 1);
    let service = world.start_with_vfs(configured());
    wait_until("it is said", || service.problems().iter().any(|problem| problem.contains("01:10.2")));
    assert_eq!(world.host().function(bdf("01:00.0")).unwrap().num_vfs, 0, "all or none");
    // The next try works.
    service.call(Request::VfCreate { address: bdf("01:00.0"), count: 2, unmanaged: false }).unwrap();
    assert_eq!(in_force(&world, "01:10.2").vlan, "100".parse().ok());
}

#[test]
fn changes_by_a_guests_driver_at_its_start_are_detected() {
    let (world, vf) = (World::new(), bdf(VF));
    let frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(vf).unwrap();
    set(&service, vf, wishes()).unwrap();
    service.attach(WEB, vf).unwrap();
    frontend.ask(&write_op(0, COMMAND, 2, BUS_MASTER));
    world.simulation.guest_sets(vf, VfSetting::Mac("52:54:00:00:00:99".parse().unwrap()));
    let said = "0000:01:10.0 has other network settings than requested: mac 52:54:00:00:00:99 instead of mac 52:54:00:aa:bb:01";
    wait_until("it is said", || service.problems().iter().any(|problem| problem == said));
    let warnings = warnings(service.detach(WEB, vf));
    assert!(warnings.iter().any(|warning| warning.contains("the guest had changed")), "{warnings:?}");
    assert_eq!(world.simulation.vf_network(vf).unwrap().mac, wishes().mac, "put back at once");
    assert_eq!(service.problems(), [""; 0]);
}

#[test]
fn settings_lost_by_a_guests_reset_are_set_again() {
    let (world, vf) = (World::new(), bdf(VF));
    let frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(vf).unwrap();
    set(&service, vf, wishes()).unwrap();
    service.attach(WEB, vf).unwrap();
    // A driver that forgets a VF's VLAN when the VF is reset would let the guest out of it.
    world.simulation.guest_sets(vf, VfSetting::Vlan("0".parse().unwrap()));
    frontend.ask(&write_op(0, DEVICE_CONTROL, 2, INITIATE_FLR));
    wait_until("its VLAN is in force again", || {
        world.simulation.vf_network(vf).unwrap().vlan == wishes().vlan
    });
    service.wait_for_state(vf, FunctionState::Attached);
}

#[test]
fn settings_that_cannot_be_read_back_are_set_with_a_warning() {
    let (world, vf) = (World::new(), bdf(VF));
    let service = world.start();
    service.hold(vf).unwrap();
    world.fail("vf_settings", Some(bdf("01:00.0")), Errno::EIO, 1);
    let warnings = warnings(set(&service, vf, wishes()));
    assert!(warnings[0].contains("cannot be verified"), "{warnings:?}");
    assert_eq!(show(&service, vf).differing, [""; 0]);
}

#[test]
fn a_guest_that_ends_while_its_vf_is_being_set_loses_it_and_the_settings_are_kept() {
    let (world, vf) = (World::new(), bdf(VF));
    let service = world.start();
    service.hold(vf).unwrap();
    service.attach(WEB, vf).unwrap();
    world.simulation.fail(sim::Failure {
        operation: "set_vf_setting".into(),
        delay: Duration::from_millis(300),
        times: 1,
        ..sim::Failure::default()
    });
    thread::scope(|scope| {
        let setting = scope.spawn(|| set(&service, vf, wishes()));
        wait_until("it is being set", || world.simulation.pending_failures() == 0);
        world.simulation.destroy(WEB);
        setting.join().unwrap().unwrap();
    });
    service.wait_for_state(vf, FunctionState::Held);
    world.assert_held(&service, vf, "its guest has ended");
    assert_eq!(show(&service, vf).wished, wishes());
}

#[test]
fn the_earlier_settings_survive_a_restart() {
    let (world, vf) = (World::new(), bdf(VF));
    let fresh = world.simulation.vf_network(vf);
    let service = world.start();
    service.hold(vf).unwrap();
    set(&service, vf, wishes()).unwrap();
    service.kill();
    let service = world.start();
    assert_eq!(show(&service, vf).wished, wishes());
    service.release(vf).unwrap();
    assert_eq!(world.simulation.vf_network(vf), fresh);
    world.assert_host(&service, vf, None, "released");
}

#[test]
fn a_vf_that_is_destroyed_takes_its_settings_with_it() {
    let (world, vf, pf) = (World::new(), bdf(VF), bdf("01:00.0"));
    let service = world.start();
    service.hold(vf).unwrap();
    set(&service, vf, wishes()).unwrap();
    world.host().set_num_vfs(pf, 0, LIMIT).unwrap();
    wait_until("it is forgotten", || world.record(vf).is_none());
    world.host().set_num_vfs(pf, 2, LIMIT).unwrap();
    service.hold(vf).unwrap();
    assert!(show(&service, vf).wished.is_empty());
    assert_eq!(service.problems(), [""; 0]);
}

/// Whatever was under way when the service was killed, dom0 gets the VF back as it was.
fn is_released_unchanged(world: &World, service: &Service, _: &Frontend, why: &str) {
    let vf = bdf(VF);
    settled(service, why);
    wait_until(&format!("{why}: it has ended"), || {
        world.record(vf).is_none_or(|record| record.transaction.is_none())
    });
    if service.state(vf) == FunctionState::Held {
        let released = service.release(vf);
        assert!(released.is_ok(), "{why}: {released:?}");
    }
    world.assert_host(service, vf, Some("igbvf"), why);
    let untouched = bdf("01:10.2");
    assert_eq!(world.simulation.vf_network(vf), world.simulation.vf_network(untouched), "{why}");
}

fn held(world: &World, service: &Service) {
    world.host().set_num_vfs(bdf("01:00.0"), 2, LIMIT).unwrap();
    service.hold(bdf(VF)).unwrap();
}

#[test]
fn a_set_that_is_killed_anywhere_is_undone_when_the_vf_goes_back() {
    killed_anywhere(held, |service| set(service, bdf(VF), wishes()).is_ok(), is_released_unchanged);
}

#[test]
fn a_release_with_settings_that_is_killed_anywhere_restores_them() {
    let prepare = |world: &World, service: &Service| {
        held(world, service);
        set(service, bdf(VF), wishes()).unwrap();
    };
    killed_anywhere(prepare, |service| service.release(bdf(VF)).is_ok(), is_released_unchanged);
}
