//! What a function is like when it changes hands, and what the next guest finds.

use pciback::FunctionState;

use crate::world::{WEB, World, bdf};

const VF: &str = "01:10.0";

#[test]
fn msix_that_a_policy_hides_is_not_prepared_in_xen() {
    let world = World::new();
    let hide =
        "match: {vendor: 8086, device: 10ca}\ncapabilities:\n  msi-x: {action: hide, reason: a test}\n";
    let service = world.start_with(&[hide]);
    service.hold(bdf(VF)).unwrap();
    service.attach(WEB, bdf(VF)).unwrap();
    assert!(!world.simulation.msix_prepared(bdf(VF)));
    assert!(!world.record(bdf(VF)).unwrap().msix_prepared);
    service.detach(WEB, bdf(VF)).unwrap();
    assert_eq!(service.state(bdf(VF)), FunctionState::Held);
}
