//! What functions of different owners share is refused, or not given, unless a policy permits it by name.

use pciback::platform::sim::Owner;
use pciback::{FunctionState, Sbdf};
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Request, Success};

use crate::frontend::Frontend;
use crate::world::{DB, Service, WEB, World, attachment, bdf, dry_run, warnings};

/// Two with small BARs in one page, two functions of one device, and three on one interrupt line, of which the last has no messages.
const HOST: &str = r#"
drivers: [pci-stub, e1000e]
driver-kinds:
  e1000e: {ids: ["8086:10d3"]}
models:
  card:
    size: 256
    reset-methods: [flr]
    bars: {0: 400}
    config: |
      00: 86 80 d3 10 00 00 10 00 00 00 00 02 00 00 00 00
      30: 00 00 00 00 a0 00 00 00 00 00 00 00 00 01 00 00
      50: 05 00 80 00 00 00 00 00 00 00 00 00 00 00 00 00
      a0: 10 50 02 00 00 00 00 10 00 00 00 00 11 04 00 00
  old:
    size: 256
    reset-methods: [flr]
    bars: {0: 1000}
    config: |
      00: 86 80 d3 10 00 00 10 00 00 00 00 02 00 00 00 00
      30: 00 00 00 00 a0 00 00 00 00 00 00 00 00 01 00 00
      a0: 10 00 02 00 00 00 00 10 00 00 00 00 11 04 00 00
functions:
  - {address: "00:02.0", model: card, irq: 16, bars: {0: fe000000}}
  - {address: "00:03.0", model: card, irq: 17, bars: {0: fe000400}}
  - {address: "00:04.0", model: card, irq: 18}
  - {address: "00:04.1", model: card, irq: 19}
  - {address: "00:05.0", model: card, irq: 20}
  - {address: "00:06.0", model: card, irq: 20}
  - {address: "00:07.0", model: old, irq: 20}
domains:
  - {id: 1, name: web, type: pv, passthrough: true}
  - {id: 2, name: db, type: pv, passthrough: true}
"#;
const IN_PAGE: [&str; 2] = ["00:02.0", "00:03.0"];
const IN_DEVICE: [&str; 2] = ["00:04.0", "00:04.1"];
const ON_LINE: [&str; 2] = ["00:05.0", "00:06.0"];
const WITHOUT_MESSAGES: &str = "00:07.0";
const LINE: u32 = 20;
const INTERRUPT_PIN: u32 = 0x3d;

fn refusal(answer: Result<Success, Failure>) -> String {
    let failure = answer.unwrap_err();
    assert_eq!(failure.code, ErrorCode::Refused, "{failure}");
    format!("{failure} {:?}", failure.obstacles)
}

fn obstacles(service: &Service, address: Sbdf) -> String {
    match service.call(Request::Show { address }) {
        Ok(Success::Shown(shown)) => format!("{:?}", shown.obstacles),
        other => panic!("{other:?}"),
    }
}

/// The first of a pair is refused while dom0 has the second, in `xpci show` and in a dry run, too; with the second held the first is
/// given; then the second goes to no other guest and not to dom0, but to the same guest.
fn refused_between_owners(pair: [&str; 2], words: &str, permission: &str) {
    let (world, [one, two]) = (World::of(HOST), pair.map(bdf));
    let service = world.start();
    service.hold(one).unwrap();
    for refused in
        [refusal(service.attach(WEB, one)), refusal(dry_run(&service, WEB, one)), obstacles(&service, one)]
    {
        assert!(refused.contains(words) && refused.contains(&format!("{two} (dom0's")), "{refused}");
        assert!(refused.contains(&format!("permit: [{permission}]")), "{refused}");
    }
    world.assert_held(&service, one, "refused");
    service.hold(two).unwrap();
    assert_eq!(obstacles(&service, one), "[]", "a function that is held is nobody's");
    service.attach(WEB, one).unwrap();
    let refused = refusal(service.attach(DB, two));
    assert!(refused.contains(words) && refused.contains(&format!("{one} ('web', domain 1)")), "{refused}");
    assert_eq!(world.simulation.owner(two), Some(Owner::Quarantine));
    let refused = refusal(service.release(two));
    assert!(refused.contains(words) && refused.contains(&format!("{one} ('web', domain 1)")), "{refused}");
    assert_eq!(service.state(two), FunctionState::Held);
    service.attach(WEB, two).unwrap();
    assert_eq!(world.simulation.owner(two), Some(Owner::Guest(WEB)));
}

#[test]
fn a_page_with_another_owners_registers_is_not_granted() {
    refused_between_owners(IN_PAGE, "a page of memory", "shared-page");
}

#[test]
fn functions_that_the_iommu_cannot_isolate_go_to_one_owner() {
    refused_between_owners(IN_DEVICE, "the IOMMU cannot isolate", "shared-group");
}

#[test]
fn resources_that_a_policy_permits_by_name_are_shared() {
    let world = World::of(HOST);
    let service = world.start_with(&["match: {vendor: 8086}\npermit: [shared-page, shared-group]\n"]);
    for pair in [IN_PAGE, IN_DEVICE] {
        for (address, domain) in pair.map(bdf).into_iter().zip([WEB, DB]) {
            service.hold(address).unwrap();
            assert_eq!(obstacles(&service, address), "[]");
            service.attach(domain, address).unwrap();
            assert_eq!(world.simulation.owner(address), Some(Owner::Guest(domain)));
        }
    }
}

#[test]
fn two_simultaneous_attachments_do_not_both_get_a_shared_page() {
    for round in 0..8 {
        let (world, [one, two]) = (World::of(HOST), IN_PAGE.map(bdf));
        let service = world.start();
        service.hold(one).unwrap();
        service.hold(two).unwrap();
        let answers = std::thread::scope(|scope| {
            let attaching = [(WEB, one), (DB, two)].map(|(domain, address)| {
                scope.spawn({
                    let service = &service;
                    move || service.call(attachment(domain, address))
                })
            });
            attaching.map(|thread| thread.join().unwrap())
        });
        let given = answers.iter().filter(|answer| answer.is_ok()).count();
        assert!(given <= 1, "round {round}: {answers:?}");
        let shared = world
            .simulation
            .grants(WEB)
            .frames
            .iter()
            .any(|frames| world.simulation.grants(DB).frames.contains(frames));
        assert!(!shared, "round {round}");
    }
}

#[test]
fn a_line_that_dom0_uses_is_not_given_to_a_guest_whose_function_can_send_messages() {
    let (world, one) = (World::of(HOST), bdf(ON_LINE[0]));
    let frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(one).unwrap();
    assert_eq!(obstacles(&service, one), "[]");
    let warned = warnings(service.attach(WEB, one));
    assert!(
        warned.contains("without its interrupt line 20, which 0000:00:06.0 (dom0's, with e1000e)"),
        "{warned}"
    );
    assert!(warned.contains("permit: [shared-line]"), "{warned}");
    assert_eq!(frontend.read(0, INTERRUPT_PIN, 1), 0, "the guest sees a pin");
    assert!(world.simulation.grants(WEB).lines.is_empty());
    let command = world.simulation.peek(one, 5, 1)[0];
    assert_ne!(command & 1 << 2, 0, "INTx is on");
    // And so it stays when policies are reloaded and when the service is restarted.
    service.call(Request::PolicyReload).unwrap();
    assert_eq!(frontend.read(0, INTERRUPT_PIN, 1), 0, "after a reload");
    service.kill();
    let service = world.start();
    assert_eq!(frontend.read(0, INTERRUPT_PIN, 1), 0, "after a restart");
    service.detach(WEB, one).unwrap();
    world.assert_held(&service, one, "detached");
}

#[test]
fn a_function_without_messages_is_refused_where_its_line_is_shared() {
    let (world, old) = (World::of(HOST), bdf(WITHOUT_MESSAGES));
    let service = world.start();
    service.hold(old).unwrap();
    for refused in [refusal(service.attach(WEB, old)), obstacles(&service, old)] {
        assert!(refused.contains("uses interrupt line 20"), "{refused}");
        assert!(refused.contains("permit: [shared-line]"), "{refused}");
    }
    world.assert_held(&service, old, "refused");
    for user in ON_LINE.map(bdf) {
        service.hold(user).unwrap();
    }
    service.attach(WEB, old).unwrap();
    assert!(world.simulation.grants(WEB).lines.contains(&LINE), "nobody else uses it now");
    let warned = warnings(service.attach(DB, bdf(ON_LINE[0])));
    assert!(warned.contains("0000:00:07.0 ('web', domain 1)"), "{warned}");
    assert!(world.simulation.grants(DB).lines.is_empty());
    let refused = refusal(service.release(bdf(ON_LINE[1])));
    assert!(refused.contains("0000:00:07.0 ('web', domain 1)"), "{refused}");
}

#[test]
fn holding_a_function_warns_of_what_an_attachment_would_be_refused_for() {
    let world = World::of(HOST);
    let service = world.start();
    for (held, shares) in
        [(IN_PAGE[0], "a page of memory"), (IN_DEVICE[0], ""), (WITHOUT_MESSAGES, "line 20")]
    {
        let warned = warnings(service.hold(bdf(held)));
        let refused = refusal(service.attach(WEB, bdf(held)));
        assert!(warned.contains("it cannot be attached yet") && warned.contains(shares), "{held}: {warned}");
        assert!(refused.contains(shares), "{held}: {refused}");
    }
    // One is attached without its line; of the others, both are held now.
    for held in [ON_LINE[0], IN_PAGE[1], IN_DEVICE[1]] {
        let warned = warnings(service.hold(bdf(held)));
        assert!(!warned.contains("cannot be attached"), "{held}: {warned}");
    }
}

#[test]
fn a_shared_line_that_a_policy_permits_is_given() {
    let (world, one) = (World::of(HOST), bdf(ON_LINE[0]));
    let service = world.start_with(&["match: {vendor: 8086}\npermit: [shared-line]\n"]);
    service.hold(one).unwrap();
    let warned = warnings(service.attach(WEB, one));
    assert!(!warned.contains("interrupt line"), "{warned}");
    assert!(world.simulation.grants(WEB).lines.contains(&LINE));
}
