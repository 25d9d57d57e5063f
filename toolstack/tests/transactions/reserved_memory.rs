//! S5: functions with reserved memory (RMRR) that Xen would refuse to give away.

use nix::errno::Errno;
use pciback::FunctionState;
use pciback::platform::sim::Owner;
use pciback::policy::RdmPolicy;
use toolstack::outcome::ErrorCode;
use toolstack::protocol::Success;

use crate::world::{DB, WEB, World, bdf};

/// A USB controller whose reserved memory is as `what` says.
fn host(what: &str) -> String {
    format!(
        r#"
drivers: [pci-stub]
models:
  ehci:
    size: 256
    reset-methods: [af_flr]
    bars: {{0: 400}}
    config: |
      00: 86 80 2d 8c 02 00 90 02 05 20 03 0c 00 00 00 00
      30: 00 00 00 00 50 00 00 00 00 00 00 00 ff 03 00 00
      50: 01 98 c2 c9 00 00 00 00 00 00 00 00 00 00 00 00
      90: 00 00 00 00 00 00 00 00 13 00 06 03 00 00 00 00
functions:
  - {{address: "00:1a.0", model: ehci, irq: 16, reserved-memory: {what}}}
domains:
  - {{id: 1, name: web, type: pv, passthrough: true}}
  - {{id: 2, name: db, type: pv, passthrough: true}}
"#
    )
}

const CASES: [(&str, &str); 2] = [
    ("shared", "other functions have the same reserved memory"),
    ("in-guest-memory", "the guest has memory where"),
];

#[test]
fn it_is_held_and_a_guest_gets_it_with_a_warning_that_names_the_cause() {
    for (what, cause) in CASES {
        let (world, usb) = (World::of(&host(what)), bdf("00:1a.0"));
        let service = world.start();
        service.hold(usb).unwrap();
        world.assert_held(&service, usb, what);
        for _ in 0..2 {
            let Success::Changed { warnings, .. } = service.attach(WEB, usb).unwrap() else {
                panic!("{what}")
            };
            let said = warnings.join("; ");
            assert!(said.contains(cause) && said.contains("'rdm-policy' is relaxed"), "{what}: {said}");
            assert_eq!(world.simulation.owner(usb), Some(Owner::Guest(WEB)));
            service.detach(WEB, usb).unwrap();
            world.assert_held(&service, usb, what);
        }
    }
}

#[test]
fn holding_what_xen_forbids_names_reserved_memory_and_leaves_the_function_to_the_host() {
    let (world, usb) = (World::of(&host("shared")), bdf("00:1a.0"));
    let service = world.start();
    world.fail("assign", Some(usb), Errno::EPERM, 0);
    let text = service.hold(usb).unwrap_err().to_string();
    assert!(text.contains("reserved memory (RMRR)") && text.contains("xl dmesg"), "{text}");
    assert_eq!(world.simulation.owner(usb), Some(Owner::Host));
    service.hold(usb).unwrap();
}

#[test]
fn a_strict_policy_refuses_it_and_names_the_cause() {
    for (what, cause) in CASES {
        let (world, usb) = (World::of(&host(what)), bdf("00:1a.0"));
        let service = world.start_with(&["match: {class: '0c0320'}\nrdm-policy: strict\n"]);
        service.hold(usb).unwrap();
        let failure = service.attach(WEB, usb).unwrap_err();
        assert_eq!(failure.code, ErrorCode::Refused, "{what}: {failure}");
        let text = failure.to_string();
        assert!(text.contains(cause) && text.contains("'rdm-policy: strict'"), "{what}: {text}");
        assert!(!text.contains("another domain owns it"), "{what}: {text}");
        world.assert_held(&service, usb, what);
    }
}

#[test]
fn one_that_another_domain_has_taken_is_not_mistaken_for_one_with_reserved_memory() {
    let (world, usb) = (World::of(&host("shared")), bdf("00:1a.0"));
    let service = world.start();
    service.hold(usb).unwrap();
    let xl = world.simulation.platform("xl").unwrap();
    xl.hypervisor.assign(DB, usb, RdmPolicy::Relaxed).unwrap();
    let text = service.attach(WEB, usb).unwrap_err().to_string();
    // Or the service has already found that by itself.
    assert!(text.contains("belongs to a guest already") || text.contains("is quarantined"), "{text}");
    assert!(!text.contains("RMRR"), "{text}");
    assert_ne!(service.state(usb), FunctionState::Attached);
    assert_eq!(world.simulation.owner(usb), Some(Owner::Guest(DB)));
}
