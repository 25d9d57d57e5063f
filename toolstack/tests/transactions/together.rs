//! P9, T4: functions that cannot be reset alone are reset with all others on their bus.

use nix::errno::Errno;
use pciback::platform::ResetReach;
use pciback::platform::sim::Moment;
use pciback::{DeviceNumber, DomId, FunctionState, Sbdf};
use toolstack::outcome::{ErrorCode, Failure};
use toolstack::protocol::{Placed, Request, Success};

use crate::world::{DB, Service, WEB, World, bdf, name, wait_until, warnings};

/// A graphics card with its audio function, neither of which can be reset alone.
const HOST: &str = r#"
drivers: [pci-stub, snd]
driver-kinds:
  snd: {ids: ["1002:ab28"]}
models:
  gpu:
    size: 256
    reset-methods: []
    bars: {0: 1000}
    config: |
      00: 02 10 ff 73 02 00 10 00 00 00 00 03 08 00 80 00
      30: 00 00 00 00 50 00 00 00 00 00 00 00 ff 01 00 00
      50: 01 70 03 00 08 00 00 00 00 00 00 00 00 00 00 00
      70: 05 00 82 00 00 00 00 00 00 00 00 00 00 00 00 00
  audio:
    size: 256
    reset-methods: []
    bars: {0: 1000}
    config: |
      00: 02 10 28 ab 02 00 10 00 00 00 03 04 08 00 80 00
      30: 00 00 00 00 50 00 00 00 00 00 00 00 ff 02 00 00
      50: 01 70 03 00 08 00 00 00 00 00 00 00 00 00 00 00
      70: 05 00 82 00 00 00 00 00 00 00 00 00 00 00 00 00
functions:
  - {address: "00:01.0", model: root-port, buses: [1, 1]}
  - {address: "01:00.0", model: gpu, irq: 17}
  - {address: "01:00.1", model: audio, irq: 18}
domains:
  - {id: 1, name: web, type: pv, passthrough: true}
  - {id: 2, name: db, type: pv, passthrough: true}
"#;

const TOGETHER: &str = "match: {vendor: 1002}\nreset: {together: true}\n";
/// Where no capability is, and what a guest leaves there.
const OWN_REGISTER: u16 = 0xc0;
const TRACE: u8 = 0x5a;
/// Slot Control of the root port.
const SLOT_CONTROL: u16 = 0x6c;

fn both() -> [Sbdf; 2] {
    [bdf("01:00.0"), bdf("01:00.1")]
}

fn leave_traces(world: &World) {
    for address in both() {
        world.simulation.poke(address, OWN_REGISTER, &[TRACE]);
    }
}

fn has_trace(world: &World, address: Sbdf) -> bool {
    world.simulation.peek(address, OWN_REGISTER, 1)[0] == TRACE
}

/// The service with both functions held.
fn held(world: &World) -> Service {
    let service = world.start_with(&[TOGETHER]);
    for address in both() {
        service.hold(address).unwrap();
    }
    service
}

fn refusal(answer: Result<Success, Failure>) -> String {
    let failure = answer.unwrap_err();
    assert_eq!(failure.code, ErrorCode::Refused, "{failure}");
    format!("{failure} ({})", failure.hint.clone().unwrap_or_default())
}

#[test]
fn the_first_attachment_resets_all_functions_on_the_bus_and_keeps_their_registers() {
    let (world, [gpu, audio]) = (World::of(HOST), both());
    let service = held(&world);
    let port = bdf("00:01.0");
    let placed: Vec<_> = both().iter().map(|address| world.simulation.peek(*address, 0x10, 4)).collect();
    leave_traces(&world);
    world.simulation.poke(port, 0xc0, &[TRACE]);
    service.attach(WEB, gpu).unwrap();
    assert!(!has_trace(&world, gpu) && !has_trace(&world, audio));
    let now: Vec<_> = both().iter().map(|address| world.simulation.peek(*address, 0x10, 4)).collect();
    assert!(placed == now && placed.iter().all(|bar| *bar != [0; 4]), "{placed:x?} {now:x?}");
    // The bridge is not reset, and its bus does not stay in reset.
    assert_eq!(world.simulation.peek(port, 0xc0, 1), [TRACE]);
    assert_eq!(world.simulation.peek(port, 0x3e, 1)[0] & 0x40, 0);
    leave_traces(&world);
    service.attach(WEB, audio).unwrap();
    assert!(has_trace(&world, gpu), "the guest's function is left alone");
    assert_eq!(service.state(audio), FunctionState::Attached);
}

#[test]
fn xen_is_told_of_the_reset_of_each_function_on_the_bus() {
    let (world, [gpu, audio]) = (World::of(&format!("xen: 4.20\n{HOST}")), both());
    let service = held(&world);
    service.attach(WEB, gpu).unwrap();
    let noted = world.simulation.noted_resets();
    assert_eq!(noted, [(gpu, ResetReach::Bus), (audio, ResetReach::Bus)]);
}

#[test]
fn detaching_the_last_function_resets_all_on_the_bus() {
    let (world, [gpu, audio]) = (World::of(HOST), both());
    let service = held(&world);
    service.attach(WEB, gpu).unwrap();
    service.attach(WEB, audio).unwrap();
    leave_traces(&world);
    let said = warnings(service.detach(WEB, gpu));
    assert!(said.contains("0000:01:00.0 is not reset yet") && said.contains("0000:01:00.1"), "{said}");
    assert!(has_trace(&world, gpu));
    let refused = refusal(service.attach(WEB, gpu));
    assert!(refused.contains("would hit 0000:01:00.1 ('web', domain 1) (detach those first"), "{refused}");
    let refused = refusal(service.release(gpu));
    assert!(refused.contains("would hit 0000:01:00.1 ('web', domain 1)"), "{refused}");

    let said = warnings(service.detach(WEB, audio));
    assert!(!said.contains("not reset"), "{said}");
    assert!(!has_trace(&world, gpu) && !has_trace(&world, audio));
    for address in both() {
        world.assert_held(&service, address, "detached");
    }
    service.attach(DB, gpu).unwrap();
    service.detach(DB, gpu).unwrap();
    for address in both() {
        service.release(address).unwrap();
    }
}

#[test]
fn a_function_that_waits_for_its_reset_is_reset_after_a_restart_before_dom0_gets_it() {
    let (world, [gpu, audio]) = (World::of(HOST), both());
    let service = held(&world);
    service.attach(WEB, gpu).unwrap();
    service.attach(WEB, audio).unwrap();
    service.detach(WEB, gpu).unwrap();
    service.detach(WEB, audio).unwrap();
    service.attach(WEB, audio).unwrap();
    service.attach(WEB, gpu).unwrap();
    service.detach(WEB, gpu).unwrap();
    leave_traces(&world);
    service.stop();
    let service = world.start_with(&[TOGETHER]);
    let refused = refusal(service.release(gpu));
    assert!(refused.contains("would hit 0000:01:00.1"), "{refused}");
    assert!(has_trace(&world, gpu));
    service.detach(WEB, audio).unwrap();
    service.release(gpu).unwrap();
    assert!(!has_trace(&world, gpu));
    world.assert_host(&service, gpu, None, "released");
}

#[test]
fn a_guest_that_ends_leaves_all_its_functions_on_the_bus_reset() {
    // Both are taken from it at the same time.
    for round in 0..8 {
        let world = World::of(HOST);
        let service = held(&world);
        for address in both() {
            service.attach(WEB, address).unwrap();
        }
        leave_traces(&world);
        world.simulation.destroy(WEB);
        for address in both() {
            service.wait_for_state(address, FunctionState::Held);
        }
        wait_until(&format!("round {round}: both transactions end"), || {
            let records = both().map(|address| world.record(address));
            records.iter().flatten().all(|record| record.transaction.is_none())
        });
        for address in both() {
            assert!(!has_trace(&world, address), "round {round}: {address} is not reset");
        }
    }
}

#[test]
fn a_bus_that_dom0_uses_too_is_not_reset_and_holding_warns() {
    let (world, [gpu, audio]) = (World::of(HOST), both());
    let service = world.start_with(&[TOGETHER]);
    let said = warnings(service.hold(gpu));
    leave_traces(&world);
    let refused = refusal(service.attach(WEB, gpu));
    for text in [&said, &refused] {
        assert!(text.contains("would hit 0000:01:00.1 (dom0's, with snd)"), "{text}");
    }
    assert!(said.contains("hold all functions on this bus with 'xpci pci-assignable-add'"), "{said}");
    assert!(has_trace(&world, audio));
    let said = warnings(service.hold(audio));
    assert!(!said.contains("cannot be attached"), "{said}");
    service.attach(WEB, gpu).unwrap();
    // The guest's function could not be reset any more.
    let refused = refusal(service.release(audio));
    assert!(refused.contains("would hit 0000:01:00.0 ('web', domain 1)"), "{refused}");
    assert_eq!(service.state(audio), FunctionState::Held);
}

#[test]
fn functions_of_one_bus_do_not_go_to_different_guests() {
    let (world, [gpu, audio]) = (World::of(HOST), both());
    let permit = "match: {vendor: 1002}\npermit: [shared-group]\nreset: {together: true}\n";
    let service = world.start_with(&[permit]);
    for address in both() {
        service.hold(address).unwrap();
    }
    service.attach(WEB, gpu).unwrap();
    let refused = refusal(service.attach(DB, audio));
    assert!(refused.contains("would hit 0000:01:00.0 ('web', domain 1)"), "{refused}");
}

#[test]
fn a_reset_of_the_bus_without_effect_on_one_function_quarantines() {
    let (world, [gpu, audio]) = (World::of(HOST), both());
    let service = held(&world);
    service.attach(WEB, gpu).unwrap();
    world.simulation.ignore_resets(audio, true);
    let failure = service.detach(WEB, gpu).unwrap_err();
    assert_eq!(failure.code, ErrorCode::Quarantined);
    let text = failure.to_string();
    assert!(text.contains("reset 0000:01:00.1: a register still has its earlier value"), "{text}");
    assert_eq!(service.state(gpu), FunctionState::Quarantined);
    world.simulation.ignore_resets(audio, false);
    service.clear(gpu).unwrap();
    world.assert_held(&service, gpu, "cleared");
}

/// A register of each function is marked before the reset, which shows by it that it reached the function.
#[test]
fn a_function_that_does_not_answer_before_the_reset_leaves_no_mark_in_the_other_one() {
    let (world, [gpu, audio]) = (World::of(HOST), both());
    let service = held(&world);
    let command_and_status_excepted =
        || [world.simulation.peek(gpu, 0, 4), world.simulation.peek(gpu, 8, 248)];
    let before = command_and_status_excepted();
    world.simulation.silence(audio, true);
    let text = service.attach(WEB, gpu).unwrap_err().to_string();
    assert!(text.contains("01:00.1"), "{text}");
    assert_eq!(command_and_status_excepted(), before);
}

#[test]
fn a_hot_plug_slot_is_not_reset_because_the_kernel_would_take_that_for_a_removal() {
    let (world, [gpu, _]) = (World::of(HOST), both());
    world.simulation.poke(bdf("00:01.0"), SLOT_CONTROL, &[0, 0x10]);
    let service = held(&world);
    leave_traces(&world);
    let refused = refusal(service.attach(WEB, gpu));
    assert!(refused.contains("0000:00:01.0 is a hot-plug slot"), "{refused}");
    assert!(has_trace(&world, gpu));
}

fn attach_both(service: &Service, domain: DomId, dry_run: bool) -> Result<Success, Failure> {
    service.call(request_for_both(domain, false, dry_run))
}

fn request_for_both(domain: DomId, persist: bool, dry_run: bool) -> Request {
    Request::PciAttachAll {
        domain: name(domain),
        functions: both().map(|address| Placed { address, slot: None }).to_vec(),
        persist,
        managed: false,
        trust_former_owner: false,
        dry_run,
    }
}

fn states(service: &Service) -> [FunctionState; 2] {
    both().map(|address| service.state(address))
}

#[test]
fn several_functions_are_attached_by_one_request() {
    let world = World::of(HOST);
    let service = held(&world);
    attach_both(&service, WEB, true).unwrap();
    assert_eq!(states(&service), [FunctionState::Held; 2], "a dry run changes nothing");
    let Success::Changed { message, functions, .. } = attach_both(&service, WEB, false).unwrap() else {
        panic!()
    };
    assert!(both().iter().all(|address| message.contains(&address.to_string())), "{message}");
    assert_eq!((functions.len(), states(&service)), (2, [FunctionState::Attached; 2]));
    assert!(matches!(attach_both(&service, WEB, false), Ok(Success::Already { .. })));
}

#[test]
fn when_one_of_several_functions_cannot_be_attached_the_others_are_detached_and_named() {
    let (world, [gpu, audio]) = (World::of(HOST), both());
    let service = held(&world);
    world.fail("assign", Some(audio), Errno::EIO, 0);
    let failure = attach_both(&service, WEB, false).unwrap_err();
    let text = failure.to_string();
    assert!(failure.code == ErrorCode::Failed && text.contains("assign 0000:01:00.1"), "{failure:?}");
    assert!(text.contains("taken back: 0000:01:00.0"), "{text}");
    for address in [gpu, audio] {
        world.assert_held(&service, address, "one failed");
    }
    attach_both(&service, WEB, false).unwrap();
}

#[test]
fn several_functions_are_checked_before_the_first_is_attached() {
    let (world, [gpu, audio]) = (World::of(HOST), both());
    let service =
        world.start_with(&["match: {vendor: 1002}\nreset: {none: permit}\npermit: [shared-group]\n"]);
    service.hold(gpu).unwrap();
    leave_traces(&world);
    let refused = refusal(attach_both(&service, WEB, false));
    assert!(
        refused.contains(&format!("{audio} is not assignable")) && !refused.contains("taken back"),
        "{refused}"
    );
    assert!(service.error_history(gpu).is_empty() && service.state(gpu) == FunctionState::Held);
    let twice = |slot: Option<u8>| {
        let placed = |address| Placed { address, slot: slot.and_then(DeviceNumber::new) };
        service.call(Request::PciAttachAll {
            domain: name(WEB),
            functions: vec![placed(gpu), placed(if slot.is_some() { audio } else { gpu })],
            persist: false,
            managed: false,
            trust_former_owner: false,
            dry_run: false,
        })
    };
    for (slot, why) in [(None, "0000:01:00.0 is named twice"), (Some(3), "two functions are to be device 3")]
    {
        let failure = twice(slot).unwrap_err();
        assert_eq!(failure.code, ErrorCode::Usage);
        assert!(failure.message.contains(why), "{failure}");
    }
}

#[test]
fn a_service_killed_between_several_persistent_functions_leaves_all_or_none_reserved() {
    let [gpu, _] = both();
    for attached_before in [false, true] {
        for changes in (1..).step_by(7) {
            let world = World::of(HOST);
            let service = held(&world);
            if attached_before {
                service.attach(WEB, gpu).unwrap();
            }
            service.fuse.arm(changes, Moment::After);
            let answer = service.call(request_for_both(WEB, true, false));
            let done = answer.is_ok() && !service.fuse.is_blown();
            service.kill();
            // What is reserved is known before anything is asked; what is reserved comes back to its guest.
            let service = world.start_with(&[TOGETHER]);
            let reserved =
                both().map(|address| service.view(address).is_some_and(|view| view.persistent.is_some()));
            // It may have been killed when all was done.
            let all = reserved[0];
            assert!(reserved == [all; 2] && (all || !done), "killed at change {changes}: {reserved:?}");
            let settled = match (all, attached_before) {
                (true, _) => [FunctionState::Attached; 2],
                (false, true) => [FunctionState::Attached, FunctionState::Held],
                (false, false) => [FunctionState::Held; 2],
            };
            wait_until(&format!("killed at change {changes}: all or none"), || states(&service) == settled);
            if done {
                assert!(changes > 7, "hardly anything was done");
                break;
            }
        }
    }
}

#[test]
fn a_service_killed_between_several_functions_leaves_all_or_none_with_the_guest() {
    let mut between = 0;
    // Every change would take minutes; what a killed attachment of one function leaves, other tests show at each.
    for changes in (1..).step_by(9) {
        let world = World::of(HOST);
        let service = held(&world);
        service.fuse.arm(changes, if changes % 2 == 0 { Moment::After } else { Moment::Before });
        let done = attach_both(&service, WEB, false).is_ok() && !service.fuse.is_blown();
        service.kill();
        if world.record(both()[0]).is_some_and(|record| record.state == FunctionState::Attached) {
            between += 1;
        }
        let service = world.start_with(&[TOGETHER]);
        let settled = [[FunctionState::Held; 2], [FunctionState::Attached; 2]];
        wait_until(&format!("killed at change {changes}: all or none"), || {
            settled.contains(&states(&service))
        });
        if done {
            assert_eq!(states(&service), settled[1]);
            break;
        }
        // Killed at the last change, the guest has both: what is granted for the one is there until the other is detached too.
        for address in both() {
            let _ = service.detach(WEB, address);
        }
        for address in both() {
            world.assert_held(&service, address, "undone");
        }
        attach_both(&service, WEB, false).unwrap();
    }
    assert!(between > 1, "never killed while the guest had one of them");
}
