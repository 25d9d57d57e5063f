//! Errors of attached functions are received, decided about and handled, whatever the guests do.

use std::sync::mpsc::channel;

use nix::errno::Errno;
use pciback::fault::{Action, Detection, Severity};
use pciback::platform::sim::Owner;
use pciback::{DomId, FunctionState, Sbdf};
use toolstack::protocol::Happening;

use crate::frontend::{Frontend, write_op};
use crate::world::{DB, Service, WEB, World, bdf, wait_until};

pub const PF: &str = "01:00.0";
pub const VF: &str = "01:10.0";
pub const SIBLING: &str = "01:10.2";
pub const PORT: &str = "00:01.0";

/// What Linux's drivers are asked and answer.
pub const DETECTED: u32 = 6;
pub const RESUME: u32 = 7;
const MMIO_ENABLED: u32 = 8;
pub const SLOT_RESET: u32 = 9;
pub const NORMAL: u32 = 1;
pub const FROZEN: u32 = 2;
pub const NONE: u32 = 1;
pub const CAN_RECOVER: u32 = 2;
pub const NEED_RESET: u32 = 3;
pub const DISCONNECT: u32 = 4;
pub const RECOVERED: u32 = 5;

pub const COMPLETION_TIMEOUT: u32 = 1 << 14;

/// The VF in the guest `web`, whose frontend receives errors, below a root port.
pub fn attached(world: &World, errors: &str) -> (Frontend, Service) {
    let frontend = Frontend::load(world, WEB);
    let service = world.start_with_errors(errors);
    attach(&service, &frontend, WEB, bdf(VF));
    (frontend, service)
}

pub fn attach(service: &Service, frontend: &Frontend, domain: DomId, address: Sbdf) {
    service.hold(address).unwrap();
    service.attach(domain, address).unwrap();
    frontend.receives_errors();
    // The engine answers when it has done all that came before.
    assert_eq!(service.state(address), FunctionState::Attached);
}

/// Waits for a decision about a function.
pub fn decided(service: &Service, address: Sbdf, severity: Severity) -> (Action, Detection, String) {
    service.wait_for_event(address, "a decision", |what| match what {
        Happening::Error { severity: found, action, detection, reason, .. } if *found == severity => {
            Some((*action, *detection, reason.clone()))
        }
        _ => None,
    })
}

/// Waits for what came of an action.
pub fn outcome(service: &Service, address: Sbdf) -> (bool, String) {
    service.wait_for_event(address, "an outcome", |what| match what {
        Happening::Outcome { ok, text } => Some((*ok, text.clone())),
        _ => None,
    })
}

pub fn quarantined(world: &World, service: &Service, address: Sbdf) {
    service.wait_for_state(address, FunctionState::Quarantined);
    wait_until("no guest has it", || service.view(address).is_some_and(|view| view.domain.is_none()));
    assert_eq!(world.simulation.owner(address), Some(Owner::Quarantine));
    assert!(service.attach(WEB, address).is_err());
    service.clear(address).unwrap();
    assert_eq!(service.state(address), FunctionState::Held);
}

#[test]
fn a_guest_that_needs_a_reset_gets_one_and_keeps_its_function() {
    let world = World::new();
    let (frontend, service) = attached(&world, "");
    let vf = bdf(VF);
    frontend.ask(&write_op(0, 4, 2, 4));
    world.simulation.report_error(vf, Severity::NonFatal, COMPLETION_TIMEOUT);
    frontend.is_notified(DETECTED, NORMAL, 0, NEED_RESET);
    frontend.is_notified(SLOT_RESET, NORMAL, 0, RECOVERED);
    assert_eq!(world.simulation.peek(vf, 4, 1)[0] & 4, 0, "it was reset");
    frontend.is_notified(RESUME, NORMAL, 0, NONE);
    let (ok, text) = outcome(&service, vf);
    assert!(ok && text.contains("has recovered"), "{text}");
    let (action, detection, reason) = decided(&service, vf, Severity::NonFatal);
    assert_eq!((action, detection), (Action::TellGuest, Detection::Event));
    assert_eq!(reason, "the policy for non-fatal errors");
    assert_eq!(service.state(vf), FunctionState::Attached);
    assert_eq!(frontend.read(0, 0, 4), 0x10ca_8086);
    let registers = service.wait_for_event(vf, "its registers", |what| match what {
        Happening::Registers { registers } => Some(registers.clone()),
        _ => None,
    });
    let severity = registers.iter().find(|register| register.name == "Uncorrectable Error Severity");
    assert!(severity.is_some() && registers.iter().any(|register| register.address == bdf(PORT)));
}

#[test]
fn mmio_enabled_is_sent_only_if_the_policy_asks_for_it() {
    for mmio_enabled in [false, true] {
        let world = World::new();
        let (frontend, service) = attached(&world, &format!("mmio-enabled: {mmio_enabled}"));
        world.simulation.report_error(bdf(VF), Severity::NonFatal, COMPLETION_TIMEOUT);
        frontend.is_notified(DETECTED, NORMAL, 0, CAN_RECOVER);
        if mmio_enabled {
            frontend.is_notified(MMIO_ENABLED, NORMAL, 0, RECOVERED);
        }
        frontend.is_notified(RESUME, NORMAL, 0, NONE);
        assert!(outcome(&service, bdf(VF)).0);
    }
}

/// And its config accesses are answered during that.
#[test]
fn a_guest_without_a_valid_answer_to_an_error_loses_its_function() {
    for (case, said) in [
        (None, "did not answer in time"),
        (Some(DISCONNECT), "gives up"),
        (Some(NONE), "has no error handlers"),
        (Some(0xdead_beef), "not a valid answer"),
    ] {
        let world = World::new();
        let (frontend, service) = attached(&world, "answer-seconds: 1");
        world.simulation.report_error(bdf(VF), Severity::NonFatal, COMPLETION_TIMEOUT);
        match case {
            Some(answer) => frontend.is_notified(DETECTED, NORMAL, 0, answer),
            None => {
                frontend.ignores();
                assert_eq!(frontend.read(0, 0, 4), 0x10ca_8086);
            }
        }
        let (ok, text) = outcome(&service, bdf(VF));
        assert!(!ok && text.contains(said) && text.ends_with("; quarantine"), "{text}");
        quarantined(&world, &service, bdf(VF));
    }
    let world = World::new();
    let _frontend = Frontend::load(&world, WEB);
    let service = world.start_with_errors("unanswered: unplug");
    service.hold(bdf(VF)).unwrap();
    service.attach(WEB, bdf(VF)).unwrap();
    assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
    world.simulation.report_error(bdf(VF), Severity::NonFatal, COMPLETION_TIMEOUT);
    assert!(outcome(&service, bdf(VF)).1.contains("its frontend cannot be notified of errors; unplug"));
    service.wait_for_state(bdf(VF), FunctionState::Held);
}

#[test]
fn a_fatal_error_quarantines_its_function_and_siblings_are_only_notified_of_the_link_reset() {
    let world = World::new();
    let (_frontend, service) = attached(&world, "");
    let beside = Frontend::load(&world, DB);
    attach(&service, &beside, DB, bdf(SIBLING));
    world.simulation.report_error(bdf(VF), Severity::Fatal, 1 << 18);
    beside.is_notified(DETECTED, FROZEN, 0, NEED_RESET);
    beside.is_notified(SLOT_RESET, FROZEN, 0, RECOVERED);
    beside.is_notified(RESUME, FROZEN, 0, NONE);
    assert_eq!(decided(&service, bdf(VF), Severity::Fatal).0, Action::Quarantine);
    let (action, _, reason) = decided(&service, bdf(SIBLING), Severity::Fatal);
    assert!(action == Action::TellGuest && reason.contains("of 0000:01:10.0 beside it"), "{reason}");
    assert!(outcome(&service, bdf(SIBLING)).0);
    quarantined(&world, &service, bdf(VF));
    // A guest that did nothing wrong keeps its function although it does not answer.
    world.simulation.report_error(bdf(PF), Severity::Fatal, 1 << 4);
    beside.is_notified(DETECTED, FROZEN, 0, DISCONNECT);
    service.wait_for_event(bdf(SIBLING), "that it gave up", |what| match what {
        Happening::Outcome { ok: false, text } => text.contains("gives up; log").then_some(()),
        _ => None,
    });
    assert_eq!(service.state(bdf(SIBLING)), FunctionState::Attached);
    // dom0's own function is only noted.
    assert_eq!(decided(&service, bdf(PF), Severity::Fatal).0, Action::Log);
    assert_eq!(world.host().function(bdf(PF)).unwrap().driver.as_deref(), Some("igb"));
}

#[test]
fn an_error_without_an_event_is_found_by_the_counters_with_the_same_decision() {
    let world = World::new();
    let (frontend, service) = attached(&world, "");
    world.simulation.report_error(bdf(VF), Severity::Correctable, 1);
    world.simulation.miss_error(bdf(VF), Severity::NonFatal);
    frontend.is_notified(DETECTED, NORMAL, 0, CAN_RECOVER);
    frontend.is_notified(RESUME, NORMAL, 0, NONE);
    let (action, detection, _) = decided(&service, bdf(VF), Severity::NonFatal);
    assert_eq!((action, detection), (Action::TellGuest, Detection::Counters));
    let of_event = decided(&service, bdf(VF), Severity::Correctable);
    assert_eq!((of_event.0, of_event.1), (Action::Log, Detection::Event));
}

/// Uncorrectable Error Status of the VF.
const AER_STATUS: u16 = 0x104;

fn read_by_the_host(service: &Service) -> Vec<(String, u32)> {
    let found = service.wait_for_event(bdf(VF), "its registers", |what| match what {
        Happening::Registers { registers } => Some(registers.clone()),
        _ => None,
    });
    let own = found.into_iter().filter(|register| register.address == bdf(VF));
    own.map(|register| (register.name, register.value)).collect()
}

#[test]
fn an_error_that_its_guest_clears_first_is_read_and_then_cleared_by_the_host() {
    let world = World::new();
    let (frontend, service) = attached(&world, "non-fatal: log");
    world.simulation.poke(bdf(VF), AER_STATUS, &COMPLETION_TIMEOUT.to_le_bytes());
    frontend.ask(&write_op(0, AER_STATUS.into(), 4, u32::MAX));
    assert_eq!(frontend.read(0, AER_STATUS.into(), 4), 0, "its own view");
    assert_eq!(world.simulation.peek(bdf(VF), AER_STATUS, 4), COMPLETION_TIMEOUT.to_le_bytes());
    world.simulation.report_error(bdf(VF), Severity::NonFatal, COMPLETION_TIMEOUT);
    let seen = read_by_the_host(&service);
    assert!(seen.contains(&("Uncorrectable Error Status".to_owned(), COMPLETION_TIMEOUT)), "{seen:?}");
    assert_eq!(world.simulation.peek(bdf(VF), AER_STATUS, 4), [0; 4]);
    // The next one is new to the guest.
    world.simulation.poke(bdf(VF), AER_STATUS, &COMPLETION_TIMEOUT.to_le_bytes());
    assert_eq!(frontend.read(0, AER_STATUS.into(), 4), COMPLETION_TIMEOUT);
}

#[test]
fn error_registers_under_firmware_control_are_not_cleared() {
    let world = World::new();
    world.simulation.withhold_aer(true);
    let (_frontend, service) = attached(&world, "non-fatal: log");
    world.simulation.poke(bdf(VF), AER_STATUS, &COMPLETION_TIMEOUT.to_le_bytes());
    world.simulation.report_error(bdf(VF), Severity::NonFatal, COMPLETION_TIMEOUT);
    let seen = read_by_the_host(&service);
    assert!(seen.contains(&("Uncorrectable Error Status".to_owned(), COMPLETION_TIMEOUT)), "{seen:?}");
    assert_eq!(world.simulation.peek(bdf(VF), AER_STATUS, 4), COMPLETION_TIMEOUT.to_le_bytes());
}

#[test]
fn without_tracing_errors_are_found_by_counters_and_the_status_shows_it() {
    let world = World::new();
    world.fail("error_events", None, Errno::ENOENT, 0);
    let (_frontend, service) = attached(&world, "");
    let problems = service.problems();
    assert!(problems.iter().any(|problem| problem.contains("counters only")), "{problems:?}");
    world.simulation.miss_error(bdf(VF), Severity::Fatal);
    assert_eq!(decided(&service, bdf(VF), Severity::Fatal).1, Detection::Counters);
    quarantined(&world, &service, bdf(VF));
}

/// Linux 6.1 traces no event for what a port contains by itself.
#[test]
fn a_port_that_contained_an_error_is_found_with_the_same_decisions() {
    let world = World::new();
    let (_frontend, service) = attached(&world, "");
    let beside = Frontend::load(&world, DB);
    attach(&service, &beside, DB, bdf(SIBLING));
    // DPC Error Source ID, then DPC Status: triggered by an ERR_FATAL message.
    world.simulation.poke(bdf(PORT), 0x15a, &[0x80, 0x01]);
    world.simulation.poke(bdf(PORT), 0x158, &[0x05, 0x00]);
    beside.is_notified(DETECTED, FROZEN, 0, NEED_RESET);
    beside.is_notified(SLOT_RESET, FROZEN, 0, RECOVERED);
    beside.is_notified(RESUME, FROZEN, 0, NONE);
    let (action, detection, _) = decided(&service, bdf(VF), Severity::Fatal);
    assert_eq!((action, detection), (Action::Quarantine, Detection::Containment));
    quarantined(&world, &service, bdf(VF));
    // The guest's last answer is noted by the engine after the guest has given it.
    service.wait_for_event(bdf(SIBLING), "its recovery", |what| match what {
        Happening::Outcome { ok: true, text } => text.contains("has recovered").then_some(()),
        _ => None,
    });
    let told = service.error_history(bdf(SIBLING)).len();
    world.simulation.miss_error(bdf(PF), Severity::Correctable);
    decided(&service, bdf(PF), Severity::Correctable);
    assert_eq!(service.error_history(bdf(SIBLING)).len(), told + 1, "the trigger itself is dealt with once");
}

#[test]
fn a_storm_of_correctable_errors_leaves_few_lines_and_is_masked_at_the_source_for_a_while() {
    let world = World::new();
    let (_frontend, service) = attached(&world, "mask-seconds: 2");
    let mask = || world.simulation.peek(bdf(PF), 0x114, 4);
    let before = mask();
    for _ in 0..10_000 {
        world.simulation.report_error(bdf(VF), Severity::Correctable, 1);
    }
    let masked = service.wait_for_event(bdf(VF), "masking", |what| match what {
        Happening::Outcome { ok, text } => text.contains("masked").then(|| (*ok, text.clone())),
        _ => None,
    });
    // A VF's own mask is read-only.
    assert!(masked.0 && masked.1.contains("masked at 0000:01:00.0"), "{masked:?}");
    assert_eq!(mask(), [0xc1, 0xf1, 0, 0]);
    let history = service.error_history(bdf(VF));
    assert!(history.len() < 12, "{history:#?}");
    let counted = history.iter().map(|event| match &event.what {
        Happening::Error { count, .. } => *count,
        _ => 0,
    });
    assert!(counted.sum::<u64>() > 60);
    wait_until("they are heard again", || mask() == before);
    assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
}

#[test]
fn masks_are_lifted_when_the_guest_loses_the_function_and_when_the_service_stops() {
    let world = World::new();
    let (_frontend, service) = attached(&world, "correctable-per-minute: 1");
    let mask = || world.simulation.peek(bdf(PF), 0x114, 4);
    let before = mask();
    let storm = |service: &Service| {
        for _ in 0..5 {
            world.simulation.report_error(bdf(VF), Severity::Correctable, 1);
        }
        wait_until("it is masked", || mask() != before);
        service.status();
    };
    storm(&service);
    service.detach(WEB, bdf(VF)).unwrap();
    wait_until("the mask is lifted", || mask() == before);
    service.attach(WEB, bdf(VF)).unwrap();
    storm(&service);
    service.stop();
    assert_eq!(mask(), before);
}

#[test]
fn uncorrectable_errors_beyond_the_limit_are_a_storm() {
    let world = World::new();
    let (frontend, service) = attached(&world, "uncorrectable-per-hour: 1");
    world.simulation.report_error(bdf(VF), Severity::NonFatal, COMPLETION_TIMEOUT);
    frontend.is_notified(DETECTED, NORMAL, 0, CAN_RECOVER);
    frontend.is_notified(RESUME, NORMAL, 0, NONE);
    assert!(outcome(&service, bdf(VF)).0);
    world.simulation.report_error(bdf(VF), Severity::NonFatal, COMPLETION_TIMEOUT);
    quarantined(&world, &service, bdf(VF));
    let (_, _, reason) = decided(&service, bdf(VF), Severity::NonFatal);
    assert!(reason.contains("more than 1 uncorrectable errors within an hour"), "{reason}");
}

#[test]
fn each_action_of_an_error_policy_is_carried_out() {
    let of = |action: &str| {
        let world = World::new();
        let (frontend, service) = attached(&world, &format!("fatal: {action}"));
        world.simulation.report_error(bdf(VF), Severity::Fatal, 0);
        (world, frontend, service)
    };
    let (_world, _frontend, service) = of("log");
    decided(&service, bdf(VF), Severity::Fatal);
    assert_eq!(service.state(bdf(VF)), FunctionState::Attached);

    let (_world, frontend, service) = of("reset");
    assert_eq!(outcome(&service, bdf(VF)), (true, "it was reset; its guest keeps it".to_owned()));
    assert_eq!((service.state(bdf(VF)), frontend.read(0, 0, 4)), (FunctionState::Attached, 0x10ca_8086));

    let (world, _frontend, service) = of("unplug");
    wait_until("it is held", || service.state(bdf(VF)) == FunctionState::Held);
    world.assert_held(&service, bdf(VF), "unplugged");

    let (world, _frontend, service) = of("pause-guest");
    assert_eq!(outcome(&service, bdf(VF)), (true, "'web' (domain 1) is paused".to_owned()));
    assert_eq!((world.simulation.is_paused(WEB), world.simulation.is_paused(DB)), (Some(true), Some(false)));
    assert_eq!(service.state(bdf(VF)), FunctionState::Attached);

    let (world, _frontend, service) = of("destroy-guest");
    wait_until("it is held", || service.state(bdf(VF)) == FunctionState::Held);
    assert_eq!(world.simulation.is_paused(WEB), None);
    assert_eq!(world.simulation.owner(bdf(VF)), Some(Owner::Quarantine));

    let (world, _frontend, service) = of("quarantine");
    quarantined(&world, &service, bdf(VF));
}

#[test]
fn a_failed_response_to_an_error_quarantines() {
    let world = World::new();
    let (_frontend, service) = attached(&world, "fatal: reset");
    world.fail("reset", Some(bdf(VF)), Errno::ENOTTY, 0);
    world.simulation.report_error(bdf(VF), Severity::Fatal, 0);
    assert!(outcome(&service, bdf(VF)).1.contains("its reset failed"));
    quarantined(&world, &service, bdf(VF));

    let world = World::new();
    let (_frontend, service) = attached(&world, "fatal: pause-guest");
    world.fail("pause", None, Errno::EPERM, 0);
    world.simulation.report_error(bdf(VF), Severity::Fatal, 0);
    assert!(!outcome(&service, bdf(VF)).0);
    quarantined(&world, &service, bdf(VF));
}

#[test]
fn followers_get_events_at_once_and_the_history_survives_a_restart() {
    let world = World::new();
    let (_frontend, service) = attached(&world, "");
    let (sender, heard) = channel();
    let follower = service.follow(move |event| {
        let ended = matches!(&event.what, Happening::State { to: FunctionState::Quarantined, .. });
        sender.send(event.clone()).unwrap();
        !ended
    });
    world.simulation.report_error(bdf(VF), Severity::Fatal, 1 << 18);
    follower.join().unwrap();
    let events: Vec<_> = heard.try_iter().collect();
    let position =
        |wanted: &dyn Fn(&Happening) -> bool| events.iter().position(|event| wanted(&event.what)).unwrap();
    let attached = position(&|what| matches!(what, Happening::State { to: FunctionState::Attached, .. }));
    let error = position(&|what| matches!(what, Happening::Error { action: Action::Quarantine, .. }));
    let detaching = position(&|what| matches!(what, Happening::State { to: FunctionState::Detaching, .. }));
    assert!(attached < error && error < detaching, "{events:#?}");
    assert_eq!((events[error].address, events[error].domain), (bdf(VF), Some(WEB)));
    service.stop();
    let service = world.start();
    assert_eq!(decided(&service, bdf(VF), Severity::Fatal).0, Action::Quarantine);
}

#[test]
fn errors_of_dom0s_functions_are_left_to_its_kernel() {
    let world = World::new();
    let (_frontend, service) = attached(&world, "");
    world.simulation.report_error(bdf("02:00.0"), Severity::Fatal, 0);
    world.simulation.report_error(bdf(VF), Severity::Correctable, 0);
    decided(&service, bdf(VF), Severity::Correctable);
    assert!(service.error_history(bdf("02:00.0")).is_empty());
    assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
}

/// Whenever the error comes: the guest may have the function before attach has ended.
#[test]
fn an_error_right_after_the_attachment_is_handled() {
    let world = World::new();
    let _frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(bdf(VF)).unwrap();
    service.attach(WEB, bdf(VF)).unwrap();
    world.simulation.report_error(bdf(VF), Severity::Fatal, 0);
    quarantined(&world, &service, bdf(VF));
    assert_eq!(decided(&service, bdf(VF), Severity::Fatal).0, Action::Quarantine);
}
