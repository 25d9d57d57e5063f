//! A function that is slow when the service starts delays no request for others.

use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use pciback::FunctionState;
use pciback::platform::{VfSettings, sim};
use toolstack::outcome::Failure;
use toolstack::protocol::{Request, Success};
use toolstack::settings::{Settings, WantedVfs};
use toolstack::target::Parent;

use crate::world::{DB, LIMIT, Service, WEB, World, bdf, wait_until};

/// Neither it nor what shares anything with it is slow.
const NIC: &str = "02:00.0";
const PF: &str = "01:00.0";
const VF: &str = "01:10.0";
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

/// A VF that 'web' has persistently and that is held, because 'web' does not run; the service is stopped.
fn with_reserved_vf() -> World {
    let world = World::new();
    let service = world.start();
    service.hold(bdf(VF)).unwrap();
    service.persist(WEB, bdf(VF)).unwrap();
    world.simulation.destroy(WEB);
    service.wait_for_state(bdf(VF), FunctionState::Held);
    service.stop();
    world
}

fn assert_refused_as_reserved(attached: ScopedJoinHandle<'_, Result<Success, Failure>>) {
    let failure = attached.join().unwrap().unwrap_err();
    assert!(failure.message.contains("is reserved for guest 'web'"), "{failure}");
}

#[test]
fn a_function_that_is_slow_to_be_recognised_delays_only_what_a_guest_may_have_persistently() {
    let world = with_reserved_vf();
    let (service, begun) = started_with_slow(&world, "03:00.0", world.settings());
    thread::scope(|scope| {
        let attached = scope.spawn(|| service.attach(DB, bdf(VF)));
        assert_others_are_attached(&service, begun);
        assert!(!attached.is_finished(), "it was decided before it was known which device it is");
        assert_refused_as_reserved(attached);
    });
}

#[test]
fn a_guest_that_starts_while_devices_are_recognised_gets_what_it_has_persistently_after_that() {
    let world = with_reserved_vf();
    let (service, begun) = started_with_slow(&world, "03:00.0", world.settings());
    let uuid = "00000000-0000-0000-0000-000000000001".parse().unwrap();
    world.simulation.create_guest(pciback::DomId(11), "web", "pv", uuid).unwrap();
    assert_others_are_attached(&service, begun);
    assert_eq!(service.state(bdf(VF)), FunctionState::Held, "it is not known yet which device it is");
    service.wait_for_state(bdf(VF), FunctionState::Attached);
    assert!(begun.elapsed() >= SLOW);
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

#[test]
fn a_reserved_function_that_does_not_answer_is_read_again_beside_the_engine() {
    let world = with_reserved_vf();
    world.simulation.silence(bdf(PF), true);
    let service = world.start();
    world.simulation.fail(sim::Failure {
        operation: "config_read".into(),
        address: Some(bdf(PF)),
        delay: SLOW,
        times: 1,
        ..sim::Failure::default()
    });
    thread::scope(|scope| {
        let begun = Instant::now();
        let attached = scope.spawn(|| service.attach(DB, bdf(VF)));
        wait_until("the PF is read", || world.simulation.pending_failures() == 0);
        assert_others_are_attached(&service, begun);
        assert_refused_as_reserved(attached);
    });
}
