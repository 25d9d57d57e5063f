//! A function that is slow when the service starts delays no request for others.

use std::time::{Duration, Instant};

use pciback::platform::{VfSettings, sim};
use toolstack::protocol::Request;
use toolstack::settings::{Settings, WantedVfs};
use toolstack::target::Parent;

use crate::world::{DB, LIMIT, Service, World, bdf, wait_until};

/// Neither it nor what shares anything with it is slow.
const NIC: &str = "02:00.0";
const PF: &str = "01:00.0";
/// How long a read takes: longer than the service takes to start, and to answer, on a busy machine.
const SLOW: Duration = Duration::from_secs(15);

/// The service, started while the next read of a function's config space takes long; and when it was started.
fn started_with_slow(world: &World, address: &str, settings: Settings) -> (Service, Instant) {
    world.simulation.fail(sim::Failure {
        operation: "config_read".into(),
        address: Some(bdf(address)),
        delay: SLOW,
        times: 1,
        ..sim::Failure::default()
    });
    let begun = Instant::now();
    let service = world.start_at_once(settings, &[]);
    wait_until("the function is read", || world.simulation.pending_failures() == 0);
    (service, begun)
}

/// Another function is held and attached before the slow read has ended.
fn assert_others_are_attached(service: &Service, begun: Instant) {
    service.hold(bdf(NIC)).unwrap();
    service.attach(DB, bdf(NIC)).unwrap();
    let took = begun.elapsed();
    assert!(took < SLOW, "it was attached {took:?} after the start");
}

/// Entries of the settings, by a serial number that no PF has, so that the PF's config space is read, and by address.
fn wanted(count: u16) -> Vec<WantedVfs> {
    let by = |pf: Option<Parent>, serial: Option<&str>| WantedVfs {
        pf,
        id: None,
        serial: serial.map(str::to_owned),
        count,
        network: VfSettings::default(),
        vfs: Default::default(),
        unmanaged: false,
    };
    vec![by(None, Some("00-00-00-00-00-00-00-01")), by(Some(Parent::At(bdf(PF))), None)]
}

fn vfs(world: &World) -> u16 {
    world.host().function(bdf(PF)).unwrap().num_vfs
}

#[test]
fn a_slow_pf_delays_no_request_while_the_settings_are_asked_for_its_vfs() {
    let world = World::without_vfs();
    let settings = Settings { virtual_functions: wanted(2), ..world.settings() };
    let (service, begun) = started_with_slow(&world, PF, settings);
    assert_others_are_attached(&service, begun);
    wait_until("the VFs are enabled", || vfs(&world) == 2);
}

#[test]
fn vfs_that_a_client_creates_while_the_settings_are_asked_stay() {
    let world = World::without_vfs();
    let settings = Settings { virtual_functions: wanted(2), ..world.settings() };
    let (service, _) = started_with_slow(&world, PF, settings);
    service.call(Request::VfCreate { address: bdf(PF), count: 1, unmanaged: false }).unwrap();
    // Answered when all that the service does by itself has been begun, at least.
    service.call(Request::Sync { dry_run: true }).unwrap();
    assert_eq!(vfs(&world), 1);
    let no_pf = "virtual-functions: no PF matches serial number 00-00-00-00-00-00-00-01";
    assert_eq!(service.problems(), [no_pf]);
}

#[test]
fn a_slow_pf_delays_no_request_while_it_is_taken_back_from_the_stub() {
    let (world, pf) = (World::without_vfs(), bdf(PF));
    let driver = || world.host().function(pf).unwrap().driver;
    world.host().unbind(pf, LIMIT).unwrap();
    let service = world.start();
    service.call(Request::VfCreate { address: pf, count: 2, unmanaged: true }).unwrap();
    service.kill();
    world.host().set_num_vfs(pf, 0, LIMIT).unwrap();
    let mut wanted = wanted(2);
    wanted.truncate(1);
    let settings = Settings { virtual_functions: wanted, ..world.settings() };
    let (service, begun) = started_with_slow(&world, PF, settings);
    assert_others_are_attached(&service, begun);
    assert_eq!(driver().as_deref(), Some("pci-pf-stub"), "it is not known yet whether it is wanted");
    wait_until("the PF is taken back", || driver().is_none());
}
