//! The contracts of the platform, asked of the simulated host.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on ends so")]

use pciback::platform::sim::{Owner, Simulation};
use pciback::policy::RdmPolicy;
use pciback::{DomId, Sbdf};
use xpci_contracts::{Fixture, LIMIT};

/// The shipped example with its VFs, one of them held.
fn fixture(pf: &str, vf: &str) -> (Simulation, Fixture) {
    let simulation = Simulation::from_yaml(include_str!("../../../configs/sim/two-guests.yaml")).unwrap();
    let platform = simulation.platform("the simulated host").unwrap();
    let (pf, vf): (Sbdf, Sbdf) = (pf.parse().unwrap(), vf.parse().unwrap());
    platform.host.set_vf_autoprobe(pf, false).unwrap();
    platform.host.set_num_vfs(pf, 3, LIMIT).unwrap();
    platform.host.set_vf_autoprobe(pf, true).unwrap();
    platform.host.set_driver_override(vf, Some("pci-stub")).unwrap();
    platform.host.probe(vf, LIMIT).unwrap();
    platform.hypervisor.assign(DomId::IO, vf, RdmPolicy::Strict).unwrap();
    let fixture = Fixture {
        other: simulation.platform("the simulated host").unwrap(),
        platform,
        pf,
        vf,
        holder: "pci-stub".to_owned(),
        guest: DomId(1),
        plain_guest: Some(DomId(3)),
        whole_pf: true,
    };
    (simulation, fixture)
}

fn keeps_all(pf: &str, vf: &str) {
    for (name, needs, contract) in xpci_contracts::all() {
        let (simulation, fixture) = fixture(pf, vf);
        assert!(fixture.has(needs), "{name}");
        let config = simulation.peek(fixture.vf, 0, 4096);
        contract(&fixture).unwrap_or_else(|why| panic!("{name}: {why}"));
        assert!(simulation.grants(DomId(1)).is_empty(), "{name} leaves something granted");
        assert!(!simulation.msix_prepared(fixture.vf), "{name} leaves MSI-X prepared");
        let owner = if name == "host/what-left-reads-all-ones" { Owner::Host } else { Owner::Quarantine };
        assert_eq!(simulation.owner(fixture.vf), Some(owner), "{name}");
        assert_eq!(simulation.peek(fixture.vf, 0, 4096), config, "{name} leaves config space changed");
        let vf = fixture.platform.host.function(fixture.vf).unwrap();
        assert_eq!(vf.driver.as_deref(), Some("pci-stub"), "{name}");
    }
}

#[test]
fn the_simulated_82576_keeps_all_contracts() {
    keeps_all("01:00.0", "01:10.0");
}

#[test]
fn the_simulated_nvme_keeps_all_contracts() {
    keeps_all("03:00.0", "03:00.2");
}
