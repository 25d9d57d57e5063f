//! S5: functions that Linux cannot reset, or only by their bus, and what policies make of them.

use nix::errno::Errno;
use pciback::FunctionState;
use pciback::platform::ResetReach;
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Request, Success};

use crate::world::{WEB, World, bdf, warnings};

/// A USB controller that Linux cannot reset, a card alone on its bus, and two on one bus.
const HOST: &str = r#"
drivers: [pci-stub]
models:
  xhci:
    size: 256
    reset-methods: []
    bars: {0: 10000}
    config: |
      00: 86 80 31 8c 02 00 90 02 05 30 03 0c 00 00 00 00
      10: 04 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
      30: 00 00 00 00 70 00 00 00 00 00 00 00 ff 01 00 00
      70: 01 00 c2 c1 08 00 00 00 00 00 00 00 00 00 00 00
  card:
    size: 256
    reset-methods: [bus]
    bars: {0: 1000}
    config: |
      00: 8c 16 2a 00 02 00 10 00 01 00 80 02 00 00 00 00
      30: 00 00 00 00 40 00 00 00 00 00 00 00 ff 01 00 00
      40: 01 00 c2 c1 08 00 00 00 00 00 00 00 00 00 00 00
functions:
  - {address: "00:14.0", model: xhci, irq: 16}
  - {address: "02:00.0", model: card, irq: 17}
  - {address: "03:00.0", model: card, irq: 18}
  - {address: "03:00.1", model: card, irq: 18}
domains:
  - {id: 1, name: web, type: pv, passthrough: true}
  - {id: 2, name: db, type: pv, passthrough: true}
"#;

fn refusal(answer: Result<Success, Failure>) -> String {
    let failure = answer.unwrap_err();
    assert_eq!(failure.code, ErrorCode::Refused, "{failure}");
    failure.to_string()
}

#[test]
fn holding_warns_of_a_missing_reset_and_the_hint_of_attach_helps() {
    let (world, usb) = (World::of(HOST), bdf("00:14.0"));
    let service = world.start();
    let held = warnings(service.hold(usb));
    assert!(held.contains("0000:00:14.0 cannot be attached as it is: reset 0000:00:14.0"), "{held}");
    let refused = refusal(service.attach(WEB, usb));
    for text in [&held, &refused] {
        assert!(text.contains("Linux has no way to reset it alone"), "{text}");
        assert!(text.contains("'reset: {none: permit}'"), "{text}");
    }
    world.assert_held(&service, usb, "refused");
    service.stop();

    let service = world.start_with(&["match: {class: '0c03'}\nreset: {none: permit}\n"]);
    for round in 0..2 {
        let attached = warnings(service.attach(WEB, usb));
        assert!(attached.contains("0000:00:14.0 gets a new owner without a reset"), "{round}: {attached}");
        assert_eq!(service.state(usb), FunctionState::Attached);
        let detached = warnings(service.detach(WEB, usb));
        assert!(detached.contains("0000:00:14.0 gets a new owner without a reset"), "{round}: {detached}");
        world.assert_held(&service, usb, "detached");
    }
    service.release(usb).unwrap();
    let held = warnings(service.hold(usb));
    assert!(!held.contains("cannot be attached"), "{held}");
}

#[test]
fn a_permit_without_a_reset_does_not_replace_an_available_reset() {
    let (world, card) = (World::of(HOST), bdf("02:00.0"));
    let service = world.start_with(&["match: {class: '0280'}\nreset: {none: permit}\n"]);
    let held = warnings(service.hold(card));
    let refused = refusal(service.attach(WEB, card));
    for text in [held, refused] {
        assert!(text.contains("Linux offers 'bus' first"), "{text}");
        assert!(text.contains("'reset: {methods: [bus]}'"), "{text}");
    }
}

#[test]
fn a_policy_accepts_a_reset_of_the_bus_of_a_function_that_is_alone_there() {
    let (world, alone, not_alone) = (World::of(HOST), bdf("02:00.0"), bdf("03:00.0"));
    let service = world.start_with(&["match: {class: '0280'}\nreset: {methods: [flr, bus]}\n"]);
    let held = warnings(service.hold(alone));
    assert!(!held.contains("cannot be attached"), "{held}");
    let attached = warnings(service.attach(WEB, alone));
    assert!(!attached.contains("without a reset"), "{attached}");
    service.detach(WEB, alone).unwrap();
    world.assert_held(&service, alone, "detached");

    service.hold(not_alone).unwrap();
    let refused = refusal(service.attach(WEB, not_alone));
    assert!(refused.contains("a reset of its bus would hit 0000:03:00.1"), "{refused}");
}

#[test]
fn a_reload_that_takes_the_reset_from_an_attached_function_says_so() {
    let (world, xhci) = (World::of(HOST), bdf("00:14.0"));
    let service = world.start_with(&["match: {class: '0c0330'}\nreset: {none: permit}\n"]);
    service.hold(xhci).unwrap();
    service.attach(WEB, xhci).unwrap();
    // There are no files, so that the built-in rules apply.
    let Ok(Success::Reloaded { functions, .. }) = service.call(Request::PolicyReload) else { panic!() };
    assert_eq!(functions.len(), 1);
    let said = functions[0].deferred.join("\n");
    assert!(said.contains("its guest's release quarantines it: reset 0000:00:14.0"), "{said}");
    assert_eq!(service.state(xhci), FunctionState::Attached);
}

#[test]
fn xen_is_told_of_each_reset_and_how_far_it_reached() {
    let function = bdf("02:00.0");
    for (method, reach) in [("flr", ResetReach::Function), ("bus", ResetReach::Bus)] {
        let host = HOST.replace("reset-methods: [bus]", &format!("reset-methods: [{method}]"));
        let world = World::of(&format!("xen: 4.20\n{host}"));
        let service = world.start_with_resets(&["flr", "bus"]);
        service.hold(function).unwrap();
        let before = world.simulation.noted_resets().len();
        service.attach(WEB, function).unwrap();
        let attached = world.simulation.noted_resets().len();
        assert!(attached > before, "attached");
        service.detach(WEB, function).unwrap();
        let noted = world.simulation.noted_resets();
        assert!(noted.len() > attached && noted.iter().all(|one| *one == (function, reach)), "{noted:?}");
    }
}

#[test]
fn a_reset_counts_although_xen_cannot_be_told_of_it() {
    let world = World::on_xen("4.20");
    let service = world.start();
    let address = bdf("02:00.0");
    service.hold(address).unwrap();
    world.fail("note_reset", Some(address), Errno::ENOMEM, 0);
    let warned = warnings(service.attach(WEB, address));
    assert!(warned.contains("0000:02:00.0 was reset, but Xen may still"), "{warned}");
    assert_eq!(service.state(address), FunctionState::Attached);
    assert_eq!(service.problems(), [""; 0]);
}
