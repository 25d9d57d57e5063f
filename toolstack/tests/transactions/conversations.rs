//! The service ends while a guest is notified of an error: the next process goes on, so that the guest's driver ends working.

use std::time::Duration;

use pciback::fault::Severity;
use pciback::platform::sim::Failure;
use pciback::serve::pv::nodes::{self, XenbusState};
use pciback::{DomId, FunctionState};
use toolstack::protocol::Happening;

use crate::crashes::at_each_change;
use crate::errors::{
    CAN_RECOVER, COMPLETION_TIMEOUT, DETECTED, DISCONNECT, FROZEN, NEED_RESET, NONE, NORMAL, PF, RECOVERED,
    RESUME, SIBLING, SLOT_RESET, VF, attach, attached, decided, outcome, quarantined,
};
use crate::frontend::{Frontend, msix_op, write_op};
use crate::world::{Service, WEB, World, bdf, wait_until};

/// More changes than a conversation with a reset makes.
const CHANGES: u32 = 100;
const BAR: u32 = 0x10;
const DEVICE_CONTROL: u32 = 0xa8;
const INITIATE_FLR: u32 = 1 << 15;
/// Data Link Protocol Error.
const FATAL: u32 = 1 << 4;

/// What a driver answers that needs a reset.
fn answer_to(command: u32) -> u32 {
    match command {
        DETECTED => NEED_RESET,
        SLOT_RESET => RECOVERED,
        _ => NONE,
    }
}

/// What the guest's driver was told, in order.
#[derive(Default)]
struct Driver(Vec<u32>);

impl Driver {
    /// Answers what waits.
    fn answer(&mut self, frontend: &Frontend) {
        if let Some(command) = frontend.notification() {
            self.0.push(command);
            frontend.answers(answer_to(command));
        }
    }

    fn is_resumed(&self) -> bool {
        self.0.last() == Some(&RESUME)
    }
}

fn report(world: &World) {
    world.simulation.report_error(bdf(VF), Severity::NonFatal, COMPLETION_TIMEOUT);
}

/// Kills the service at each change of a conversation.
fn killed_anywhere(meanwhile: impl Fn(&mut Driver, &Frontend)) {
    at_each_change(5..CHANGES, |change, moment, why| {
        let world = World::new();
        let (frontend, service) = attached(&world, "");
        assert_eq!(frontend.ask(&msix_op(0, 2)).0, 0);
        let vectors = world.simulation.grants(WEB).vectors;
        let unset = frontend.read(0, BAR, 4);
        frontend.ask(&write_op(0, BAR, 4, 0xfd00_0000));
        let set = frontend.read(0, BAR, 4);
        assert_ne!(set, unset);
        let mut driver = Driver::default();
        service.fuse.arm(change, moment);
        report(&world);
        wait_until(&format!("{why}: it resumes or the service is killed"), || {
            driver.answer(&frontend);
            driver.is_resumed() || service.fuse.is_blown()
        });
        let killed = service.fuse.is_blown();
        service.kill();
        meanwhile(&mut driver, &frontend);
        let service = world.start();
        driver.answer(&frontend);
        if driver.0.is_empty() {
            // The service was killed before its guest was to be told.
            report(&world);
        }
        wait_until(&format!("{why}: the driver resumes"), || {
            driver.answer(&frontend);
            driver.is_resumed()
        });
        assert_eq!(driver.0, [DETECTED, SLOT_RESET, RESUME], "{why}");
        assert_eq!(service.state(bdf(VF)), FunctionState::Attached, "{why}");
        assert_eq!(frontend.read(0, 0, 4), 0x10ca_8086, "{why}");
        assert_eq!(frontend.read(0, BAR, 4), set, "{why}: the reset was the host's");
        assert_eq!(world.simulation.grants(WEB).vectors, vectors, "{why}");
        killed
    });
}

#[test]
fn a_driver_resumes_whose_service_is_killed_anywhere() {
    killed_anywhere(|_, _| ());
}

#[test]
fn a_driver_that_answers_while_no_service_runs_resumes_whose_service_is_killed_anywhere() {
    killed_anywhere(|driver, frontend| driver.answer(frontend));
}

fn recovered(what: &Happening) -> Option<()> {
    match what {
        Happening::Outcome { ok: true, text } => text.contains("has recovered").then_some(()),
        _ => None,
    }
}

fn end(service: Service, orderly: bool) {
    if orderly { service.stop() } else { service.kill() }
}

#[test]
fn each_request_that_is_not_answered_when_the_service_ends_is_awaited_by_the_next_one() {
    let requests = [DETECTED, SLOT_RESET, RESUME];
    for (place, open) in requests.into_iter().enumerate() {
        for (orderly, meanwhile) in [(false, false), (false, true), (true, false), (true, true)] {
            let world = World::new();
            let (frontend, service) = attached(&world, "");
            report(&world);
            for command in &requests[..place] {
                frontend.is_notified(*command, NORMAL, 0, answer_to(*command));
            }
            wait_until("it is notified", || frontend.notification() == Some(open));
            end(service, orderly);
            assert_eq!(frontend.notification(), Some(open), "it stays on the page");
            if meanwhile {
                frontend.answers(answer_to(open));
            }
            let service = world.start();
            for command in &requests[place + usize::from(meanwhile)..] {
                frontend.is_notified(*command, NORMAL, 0, answer_to(*command));
            }
            service.wait_for_event(bdf(VF), "its recovery", recovered);
            assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
            // It has ended for the next process, too.
            end(service, orderly);
            let _service = world.start();
            report(&world);
            frontend.is_notified(DETECTED, NORMAL, 0, NEED_RESET);
        }
    }
}

#[test]
fn a_guest_that_does_not_answer_the_next_process_either_loses_its_function() {
    let world = World::new();
    let (frontend, service) = attached(&world, "");
    report(&world);
    frontend.ignores();
    service.kill();
    let service = world.start_with_errors("answer-seconds: 1");
    let (ok, text) = outcome(&service, bdf(VF));
    assert!(!ok && text.contains("did not answer in time") && text.ends_with("; quarantine"), "{text}");
    quarantined(&world, &service, bdf(VF));
}

#[test]
fn what_a_guest_says_of_a_function_that_it_has_lost_is_not_taken_for_that_of_the_next_one_in_its_place() {
    let third = bdf("01:10.4");
    let world = World::new();
    let (frontend, service) = attached(&world, "");
    // Keeps the device of the guest.
    attach(&service, &frontend, WEB, bdf(SIBLING));
    report(&world);
    frontend.ignores();
    service.detach(WEB, bdf(VF)).unwrap();
    attach(&service, &frontend, WEB, third);
    world.simulation.report_error(third, Severity::NonFatal, COMPLETION_TIMEOUT);
    frontend.is_notified(DETECTED, NORMAL, 0, DISCONNECT);
    frontend.is_notified(DETECTED, NORMAL, 0, CAN_RECOVER);
    frontend.is_notified(RESUME, NORMAL, 0, NONE);
    let (ok, text) = outcome(&service, third);
    assert!(ok && text.contains("has recovered"), "{text}");
    assert_eq!(service.state(third), FunctionState::Attached);
}

/// Its xen-pcifront is unloaded while it is asked, and loaded again: its driver begins anew, and does not answer what the earlier one was asked.
#[test]
fn a_guest_that_comes_back_on_another_ring_is_notified_of_the_next_error() {
    for (asked, answer) in [(DETECTED, None), (SLOT_RESET, Some(NEED_RESET))] {
        let world = World::new();
        let (frontend, service) = attached(&world, "");
        report(&world);
        if let Some(answer) = answer {
            frontend.is_notified(DETECTED, NORMAL, 0, answer);
        }
        wait_until("it is notified", || frontend.notification() == Some(asked));
        frontend.unload();
        let store = world.simulation.store(DomId::DOM0).unwrap();
        wait_until("its ring is given up", || {
            nodes::read_backend_state(&store, WEB).unwrap() == Some(XenbusState::INITIALISED)
        });
        let frontend = Frontend::load_again(&world, WEB);
        wait_until("it is back", || frontend.is_connected());
        frontend.receives_errors();
        report(&world);
        frontend.is_notified(DETECTED, NORMAL, 0, CAN_RECOVER);
        frontend.is_notified(RESUME, NORMAL, 0, NONE);
        service.wait_for_event(bdf(VF), "its recovery", recovered);
        assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
    }
}

/// It resets its function by itself, as some drivers do when they are told of an error: before it answers, or in the middle of that reset.
#[test]
fn a_guest_that_resets_its_function_while_it_is_asked_is_told_of_a_reset_once() {
    for answers_during_reset in [false, true] {
        let world = World::new();
        let (frontend, service) = attached(&world, "");
        let delay = Duration::from_millis(if answers_during_reset { 300 } else { 0 });
        world.simulation.fail(Failure { operation: "reset".into(), delay, times: 1, ..Failure::default() });
        report(&world);
        frontend.ignores();
        frontend.ask(&write_op(0, DEVICE_CONTROL, 2, INITIATE_FLR));
        if !answers_during_reset {
            wait_until("it is reset", || frontend.read(0, 0, 2) == 0x8086);
            service.wait_for_state(bdf(VF), FunctionState::Attached);
        }
        frontend.is_notified(DETECTED, NORMAL, 0, NEED_RESET);
        frontend.is_notified(SLOT_RESET, NORMAL, 0, RECOVERED);
        frontend.is_notified(RESUME, NORMAL, 0, NONE);
        service.wait_for_event(bdf(VF), "its recovery", recovered);
        assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
    }
}

/// The driver can do without a reset after the error that it is told of, but the one that comes then takes the function's state.
#[test]
fn a_guest_whose_function_loses_its_state_while_it_is_asked_gets_a_reset() {
    for (errors, of) in [("", PF), ("fatal: reset", VF)] {
        let world = World::new();
        let (frontend, service) = attached(&world, errors);
        report(&world);
        frontend.ignores();
        world.simulation.report_error(bdf(of), Severity::Fatal, FATAL);
        decided(&service, bdf(VF), Severity::Fatal);
        frontend.is_notified(DETECTED, NORMAL, 0, CAN_RECOVER);
        frontend.is_notified(SLOT_RESET, FROZEN, 0, RECOVERED);
        frontend.is_notified(RESUME, FROZEN, 0, NONE);
        service.wait_for_event(bdf(VF), "its recovery", recovered);
        // It has ended for the next process, too.
        service.kill();
        let service = world.start_with_errors(errors);
        assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
        report(&world);
        frontend.is_notified(DETECTED, NORMAL, 0, NEED_RESET);
    }
}

#[test]
fn a_guest_whose_function_loses_its_state_while_its_driver_resumes_is_notified_of_that_afterwards() {
    let world = World::new();
    let (frontend, service) = attached(&world, "");
    report(&world);
    frontend.is_notified(DETECTED, NORMAL, 0, CAN_RECOVER);
    wait_until("it is to resume", || frontend.notification() == Some(RESUME));
    world.simulation.report_error(bdf(PF), Severity::Fatal, FATAL);
    decided(&service, bdf(VF), Severity::Fatal);
    frontend.is_notified(RESUME, NORMAL, 0, NONE);
    frontend.is_notified(DETECTED, FROZEN, 0, CAN_RECOVER);
    frontend.is_notified(SLOT_RESET, FROZEN, 0, RECOVERED);
    frontend.is_notified(RESUME, FROZEN, 0, NONE);
    service.wait_for_event(bdf(VF), "its recovery", recovered);
    assert_eq!(service.state(bdf(VF)), FunctionState::Attached);
}
