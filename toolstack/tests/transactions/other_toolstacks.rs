//! Another toolstack beside the service: xl takes for its guests what xen-pciback holds, and the service neither fights that nor touches
//! what is another's guest's.

use nix::errno::Errno;
use pciback::platform::sim::{self, Owner};
use pciback::platform::{Hypervisor, StoreOps};
use pciback::policy::RdmPolicy;
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
