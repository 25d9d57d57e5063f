//! Another toolstack beside the service: xl takes for its guests what xen-pciback holds, and the service neither fights that nor touches
//! what is another's guest's.

use nix::errno::Errno;
use pciback::platform::sim::{self, Owner};
use pciback::platform::{Hypervisor, StoreOps};
use pciback::policy::RdmPolicy;
use pciback::serve::pv::nodes;
use pciback::{DomId, FunctionState, Sbdf};
use toolstack::engine::Containment;
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Request, Success};

use crate::world::{DB, Service, WEB, World, bdf, wait_until};

const VF: &str = "01:10.0";
const COMMAND: u16 = 4;
const BUS_MASTER: u8 = 1 << 2;

/// xl with a connection of its own to Xen and xenstore.
struct Xl<'a>(&'a World);

impl Xl<'_> {
    fn hypervisor(&self) -> std::sync::Arc<dyn Hypervisor> {
        self.0.simulation.platform("xl").unwrap().hypervisor
    }

    fn nodes(domain: DomId) -> String {
        format!("/local/domain/0/backend/pci/{domain}/0")
    }

    /// Without a word in xenstore.
    fn assign(&self, domain: DomId, address: Sbdf) {
        self.hypervisor().assign(domain, address, RdmPolicy::Relaxed).unwrap();
    }

    fn attach(&self, domain: DomId, address: Sbdf) {
        self.assign(domain, address);
        let store = self.0.simulation.store(DomId::DOM0).unwrap();
        store.write(&format!("{}/dev-0", Self::nodes(domain)), address.to_string().as_bytes()).unwrap();
    }

    fn detach(&self, domain: DomId, address: Sbdf) {
        let store = self.0.simulation.store(DomId::DOM0).unwrap();
        store.remove(&Self::nodes(domain)).unwrap();
        self.hypervisor().deassign(domain, address).unwrap();
    }
}

/// What the service would do to the function in hardware fails from now on, and so that it was tried can be seen.
fn watch_hardware(world: &World, address: Sbdf) -> u32 {
    let operations = ["reset", "config_write", "unbind", "deassign"];
    for operation in operations {
        world.fail(operation, Some(address), Errno::EIO, 0);
    }
    operations.len() as u32
}

fn refused(answer: Result<Success, Failure>, words: &str) {
    refused_by_one_of(answer, &[words]);
}

fn refused_by_one_of(answer: Result<Success, Failure>, words: &[&str]) {
    let failure = answer.unwrap_err();
    assert!(matches!(failure.code, ErrorCode::Refused | ErrorCode::Quarantined), "{failure:?}");
    let said = format!("{failure} {:?}", failure.obstacles);
    assert!(words.iter().any(|words| said.contains(words)), "{failure:?}");
}

fn shown_obstacles(service: &Service, address: Sbdf) -> String {
    match service.call(Request::Show { address }) {
        Ok(Success::Shown(shown)) => format!("{:?}", shown.obstacles),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_status_shows_at_once_that_xl_took_a_held_function_and_its_guest_keeps_it() {
    let (world, vf) = (World::new(), bdf(VF));
    let service = world.start();
    service.hold(vf).unwrap();
    Xl(&world).attach(DB, vf);
    world.simulation.poke(vf, COMMAND, &[BUS_MASTER]);
    let untried = watch_hardware(&world, vf);
    let taken = "0000:01:10.0 belongs to 'db' (domain 2), through xen-pciback";
    wait_until("the status says so", || service.problems().iter().any(|problem| problem.contains(taken)));
    service.wait_for_state(vf, FunctionState::Quarantined);
    refused(service.attach(WEB, vf), "quarantined");
    refused(service.release(vf), "quarantined");
    refused(service.clear(vf), taken);
    assert_eq!(world.simulation.pending_failures(), untried, "something was done to the function");
    assert_eq!(world.simulation.peek(vf, COMMAND, 1)[0] & BUS_MASTER, BUS_MASTER);
    assert_eq!(world.simulation.owner(vf), Some(Owner::Guest(DB)));
    world.simulation.forget_failures();

    Xl(&world).detach(DB, vf);
    service.clear(vf).unwrap();
    world.assert_held(&service, vf, "xl has given it back");
    service.attach(WEB, vf).unwrap();
}

#[test]
fn the_owner_in_xen_is_checked_before_an_attachment() {
    let taken = "0000:01:10.0 belongs to a guest already";
    for give in [Service::release, |service: &Service, vf| service.attach(WEB, vf)] {
        let (world, vf) = (World::new(), bdf(VF));
        let service = world.start();
        service.hold(vf).unwrap();
        // What the service looks at by itself after that is done before this is answered.
        service.call(Request::Sync { dry_run: true }).unwrap();
        Xl(&world).assign(DB, vf);
        let untried = watch_hardware(&world, vf);
        assert!(shown_obstacles(&service, vf).contains(taken), "{}", shown_obstacles(&service, vf));
        // What was asked before has made the service look: it may know already.
        refused_by_one_of(give(&service, vf), &[taken, "is quarantined"]);
        // What was refused has made the service look.
        service.wait_for_state(vf, FunctionState::Quarantined);
        assert_eq!(world.simulation.pending_failures(), untried, "something was done to the function");
        assert_eq!(world.simulation.owner(vf), Some(Owner::Guest(DB)));
        assert_eq!(world.host().function(vf).unwrap().driver.as_deref(), Some("pci-stub"));
    }
}

#[test]
fn a_function_whose_owner_xen_cannot_report_is_quarantined_and_not_touched() {
    let (world, vf) = (World::new(), bdf(VF));
    let service = world.start();
    service.hold(vf).unwrap();
    world.simulation.poke(vf, COMMAND, &[BUS_MASTER]);
    world.simulation.fail(sim::Failure {
        operation: "device_known".into(),
        errno: Some(Errno::EIO),
        times: u32::MAX,
        ..sim::Failure::default()
    });
    service.contain(vf, Containment::Quarantine);
    service.wait_for_state(vf, FunctionState::Quarantined);
    assert_eq!(world.simulation.peek(vf, COMMAND, 1)[0] & BUS_MASTER, BUS_MASTER, "it may be a guest's");
    world.simulation.forget_failures();
    service.clear(vf).unwrap();
    world.assert_held(&service, vf, "cleared");
}

#[test]
fn a_function_can_be_cleared_after_its_guest_of_xl_is_destroyed() {
    let (world, vf) = (World::new(), bdf(VF));
    let service = world.start();
    service.hold(vf).unwrap();
    Xl(&world).attach(DB, vf);
    service.wait_for_state(vf, FunctionState::Quarantined);
    world.simulation.destroy(DB);
    world.simulation.store(DomId::DOM0).unwrap().remove(&Xl::nodes(DB)).unwrap();
    service.clear(vf).unwrap();
    world.assert_held(&service, vf, "its guest has ended");
}

#[test]
fn the_backend_that_a_guest_names_is_shown_short_and_printable() {
    let (world, vf) = (World::new(), bdf(VF));
    let service = world.start();
    service.hold(vf).unwrap();
    let store = world.simulation.store(DomId::DOM0).unwrap();
    let node = format!("{}/backend", nodes::frontend_directory(WEB));
    let refusal = |backend: &[u8]| {
        store.write(&node, backend).unwrap();
        service.attach(WEB, vf).unwrap_err().message
    };
    let of_pciback = Xl::nodes(WEB);
    assert!(refusal(of_pciback.as_bytes()).ends_with(&of_pciback), "it is not named");
    for hostile in [[b"\x1b[2J\n".as_slice(), &[b'a'; 4000]].concat(), vec![0xff; 4000], vec![b'\n'; 4000]] {
        let said = refusal(&hostile);
        assert!(said.len() < 200 && !said.contains(char::is_control), "{said:?}");
    }
}

/// Where libxl notes which domain has the function.
const ASSIGNED: &str = "/libxl/pci/0000-01-10-0/domid";

fn assigned(world: &World) -> Option<Vec<u8>> {
    world.simulation.store(DomId::DOM0).unwrap().read(ASSIGNED).unwrap()
}

fn wait_for_assigned(world: &World, expected: Option<&[u8]>) {
    wait_until(&format!("{ASSIGNED} is {expected:?}"), || assigned(world).as_deref() == expected);
}

#[test]
fn libxl_takes_a_function_for_assigned_from_its_hold_to_its_release() {
    let (world, vf) = (World::new(), bdf(VF));
    let store = world.simulation.store(DomId::DOM0).unwrap();
    let service = world.start_with_libxl();
    assert_eq!(assigned(&world), None, "dom0 has it");
    service.hold(vf).unwrap();
    wait_for_assigned(&world, Some(b"0"));
    // libxl removes the node when it has refused the function.
    store.remove(ASSIGNED).unwrap();
    wait_for_assigned(&world, Some(b"0"));
    service.attach(WEB, vf).unwrap();
    service.detach(WEB, vf).unwrap();
    assert_eq!(assigned(&world).as_deref(), Some(b"0".as_slice()));
    service.release(vf).unwrap();
    wait_for_assigned(&world, None);
    assert!(store.list("/libxl/pci").unwrap().is_empty());
}

#[test]
fn what_libxl_notes_of_a_function_itself_is_left_as_it_is() {
    let (world, vf) = (World::new(), bdf(VF));
    let store = world.simulation.store(DomId::DOM0).unwrap();
    let (driver, domain) = ("/libxl/pci/0000-01-10-0/driver_path", DB.to_string());
    store.write(ASSIGNED, domain.as_bytes()).unwrap();
    store.write(driver, b"/sys/bus/pci/drivers/igbvf").unwrap();
    let service = world.start_with_libxl();
    service.hold(vf).unwrap();
    store.remove(ASSIGNED).unwrap();
    wait_for_assigned(&world, Some(b"0"));
    store.write(ASSIGNED, domain.as_bytes()).unwrap();
    service.release(vf).unwrap();
    service.call(Request::Sync { dry_run: true }).unwrap();
    assert_eq!(assigned(&world).as_deref(), Some(domain.as_bytes()));
    assert!(store.read(driver).unwrap().is_some());
}

#[test]
fn a_node_that_could_not_be_written_is_written_later_and_a_restart_keeps_it() {
    let (world, vf) = (World::new(), bdf(VF));
    let service = world.start_with_libxl();
    service.hold(vf).unwrap();
    wait_for_assigned(&world, Some(b"0"));
    world.fail("transaction", None, Errno::EIO, 0);
    world.simulation.store(DomId::DOM0).unwrap().remove(ASSIGNED).unwrap();
    wait_for_assigned(&world, Some(b"0"));
    drop(service);
    let service = world.start_with_libxl();
    assert_eq!(assigned(&world).as_deref(), Some(b"0".as_slice()));
    service.release(vf).unwrap();
    wait_for_assigned(&world, None);
}

#[test]
fn who_wants_to_use_xl_for_held_functions_can() {
    let (world, vf) = (World::new(), bdf(VF));
    let service = world.start_with_libxl();
    service.hold(vf).unwrap();
    wait_for_assigned(&world, Some(b"0"));
    // Its thread would write the node once more, if it still ran.
    service.kill();
    let _service = world.start();
    wait_for_assigned(&world, None);
}

#[test]
fn what_a_killed_service_left_of_a_released_function_is_removed_by_the_next_one() {
    let world = World::new();
    world.simulation.store(DomId::DOM0).unwrap().write(ASSIGNED, b"0").unwrap();
    let _service = world.start_with_libxl();
    wait_for_assigned(&world, None);
}
