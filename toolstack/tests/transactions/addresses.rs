//! What a guest is given of the host's addresses: the function's own and nothing else.

use pciback::FunctionState;
use toolstack::outcome::ErrorCode;

use crate::frontend::Frontend;
use crate::world::{WEB, World, bdf, dry_run};

/// A host with a network card of which Linux placed no I/O BAR, or as `bars` says.
fn host(bars: &str) -> World {
    World::of(&description(bars))
}

fn description(bars: &str) -> String {
    format!(
        r#"
xen: 4.17
extra-guest-irqs: 32
drivers: [pciback, pci-stub]
models:
  card:
    size: 256
    reset-methods: [flr]
    bars: {{0: 100, 2: 1000, 4: 4000}}
    config: |
      00: ec 10 68 81 07 04 10 00 15 00 00 02 00 00 00 00
      10: 01 d0 00 00 00 00 00 00 04 40 d0 fb 00 00 00 00
      20: 04 00 d0 fb 00 00 00 00 00 00 00 00 ec 10 23 01
      30: 00 00 00 00 40 00 00 00 00 00 00 00 00 01 00 00
      40: 11 00 03 00 04 00 00 00 04 08 00 00 00 00 00 00
functions:
  - {{address: 04:00.0, model: card, irq: 16, bars: {{{bars}}}}}
domains:
  - {{id: 1, name: web, type: pv, passthrough: true}}
failures: []
"#
    )
}

fn register(world: &World, offset: u32) -> u32 {
    let frontend = Frontend::load(world, WEB);
    let service = world.start();
    service.hold(bdf("04:00.0")).unwrap();
    service.attach(WEB, bdf("04:00.0")).unwrap();
    let value = frontend.read(0, offset, 4);
    service.detach(WEB, bdf("04:00.0")).unwrap();
    world.assert_held(&service, bdf("04:00.0"), "detached");
    value
}

#[test]
fn a_bar_without_an_address_is_not_granted_and_reads_0() {
    for (bars, offset) in [("0: \"0\"", 0x10), ("2: \"0\"", 0x18), ("4: \"0\"", 0x20)] {
        let world = host(bars);
        let frontend = Frontend::load(&world, WEB);
        let service = world.start();
        service.hold(bdf("04:00.0")).unwrap();
        service.attach(WEB, bdf("04:00.0")).unwrap();
        let grants = world.simulation.grants(WEB);
        let from_0 = |ranges: &[(u64, u64)]| ranges.iter().any(|(first, _)| *first == 0);
        assert!(!from_0(&grants.frames) && !from_0(&grants.ports), "{bars}: {grants:x?}");
        assert_eq!(frontend.read(0, offset, 4), 0, "{bars}");
        assert_eq!(world.simulation.msix_prepared(bdf("04:00.0")), !bars.starts_with('4'), "{bars}");
        service.detach(WEB, bdf("04:00.0")).unwrap();
        world.assert_held(&service, bdf("04:00.0"), bars);
    }
    assert_ne!(register(&host(""), 0x20), 0);
}

#[test]
fn a_bar_that_overlaps_ram_is_not_granted() {
    let world = host("4: \"10000000\"");
    let service = world.start();
    service.hold(bdf("04:00.0")).unwrap();
    let failure = service.attach(WEB, bdf("04:00.0")).unwrap_err();
    assert!(failure.message.contains("System RAM"), "{failure}");
    world.assert_held(&service, bdf("04:00.0"), "refused");
}

#[test]
fn a_bar_that_overlaps_another_resource_is_not_granted() {
    for (more, named) in [
        ("memory: \"fbd04400-fbd0440f : HPET 0\"\n", "HPET 0"),
        ("memory: \"fbd00000-fbd03fff : efifb\"\n", "efifb"),
        ("ports: \"d000-d00f : ata_piix\"\n", "ata_piix"),
    ] {
        // A BAR of 1 KiB at fbd04000, one of 16 KiB at fbd00000, ports from d000.
        let description = description("0: d000, 2: fbd04000, 4: fbd00000").replace("2: 1000", "2: 400");
        let world = World::of(&format!("{description}{more}"));
        let service = world.start();
        service.hold(bdf("04:00.0")).unwrap();
        let refusals = [service.attach(WEB, bdf("04:00.0")), dry_run(&service, WEB, bdf("04:00.0"))];
        for failure in refusals.map(Result::unwrap_err) {
            assert_eq!(failure.code, ErrorCode::Refused, "{failure}");
            assert!(failure.message.contains(named), "{failure}");
        }
        let grants = world.simulation.grants(WEB);
        assert!(grants.frames.is_empty() && grants.ports.is_empty(), "{more}: {grants:x?}");
        world.assert_held(&service, bdf("04:00.0"), "refused");
    }
}

#[test]
fn a_grant_that_xen_refuses_is_not_taken_back_and_quarantines_nothing() {
    // Xen's serial port, which dom0 itself may not touch.
    let world = host("0: \"300\"");
    let service = world.start();
    service.hold(bdf("04:00.0")).unwrap();
    let failure = service.attach(WEB, bdf("04:00.0")).unwrap_err();
    assert!(failure.message.contains("EPERM"), "{failure}");
    assert_eq!(service.state(bdf("04:00.0")), FunctionState::Held);
    world.assert_held(&service, bdf("04:00.0"), "refused");
}
