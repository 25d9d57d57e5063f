//! What guests do without end costs the service little, and keeps nobody else waiting.

use std::time::{Duration, Instant};

use pciback::platform::{StoreOps, sim};
use pciback::serve::ServerReport;
use pciback::serve::pv::nodes;
use pciback::{DomId, FunctionState};

use crate::errors::{VF, attached};
use crate::world::{LIMIT, WEB, World, bdf};

#[test]
fn a_guest_that_rewrites_a_node_without_end_keeps_nobody_waiting() {
    let world = World::new();
    let (_frontend, service) = attached(&world, "");
    // A look at the guest takes xenstored a while; thousands of them take minutes.
    world.simulation.fail(sim::Failure {
        operation: "read".into(),
        domain: Some(DomId::DOM0),
        path: Some(nodes::frontend_directory(WEB)),
        delay: Duration::from_millis(50),
        times: u32::MAX,
        ..sim::Failure::default()
    });
    let store = world.simulation.store(WEB).unwrap();
    let noise = format!("{}/noise", nodes::frontend_directory(WEB));
    for number in 0..5000u32 {
        store.write(&noise, number.to_string().as_bytes()).unwrap();
    }
    let begun = Instant::now();
    assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
    assert!(begun.elapsed() < LIMIT, "{:?} for an answer", begun.elapsed());
    world.simulation.forget_failures();
}

#[test]
fn a_guest_whose_ring_fails_again_and_again_fills_neither_memory_nor_the_status() {
    let world = World::new();
    let (_frontend, service) = attached(&world, "");
    for number in 0..10_000 {
        service.report(WEB, ServerReport::Failed(format!("its ring, connection {number}")));
    }
    let problems = service.status().problems;
    assert!((1..=8).contains(&problems.len()), "{} problems", problems.len());
    assert!(problems.iter().any(|problem| problem.contains("connection 9999")), "{problems:?}");
}
