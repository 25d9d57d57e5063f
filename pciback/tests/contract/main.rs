//! The contracts of the platform, asked of the simulation.

mod suite;

use std::path::Path;
use std::time::Duration;

use pciback::DomId;
use pciback::platform::sim;
use suite::{CONTRACTS, Subject};

#[test]
fn the_simulation_answers_as_xen_linux_and_xenstore_do() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/sim/two-guests.yaml");
    let platform = sim::open(&path).unwrap();
    let pf = "01:00.0".parse().unwrap();
    platform.host.set_vf_autoprobe(pf, false).unwrap();
    platform.host.set_num_vfs(pf, 1, Duration::from_secs(30)).unwrap();
    let subject = Subject { function: "01:10.0".parse().unwrap(), guest: DomId(1), closed: DomId(3) };
    let broken: Vec<String> = CONTRACTS
        .iter()
        .filter_map(|(name, contract)| Some(format!("{name}: {}", contract(&platform, &subject).err()?)))
        .collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}
