//! A report about a function affects only the guest it was started for, and no other guest waits for slow hardware.

use std::thread;
use std::time::{Duration, Instant};

use pciback::platform::sim;
use pciback::serve::{Attachment, ServerReport};
use pciback::{FunctionState, Sbdf};
use toolstack::engine::{Event, GuestEvent};
use toolstack::outcome::{ErrorCode, Failure};

use crate::frontend::{Frontend, write_op};
use crate::world::{Service, WEB, World, bdf, wait_until};

const COMMAND: u32 = 4;
const BUS_MASTER: u32 = 1 << 2;
/// Device Control of the VFs, whose PCI Express capability lies at 0xa0.
const DEVICE_CONTROL: u32 = 0xa8;
const INITIATE_FLR: u32 = 1 << 15;
/// How long a slow call takes.
const SLOW: Duration = Duration::from_secs(4);

/// Makes the next such call take long.
fn slow(world: &World, operation: &str, address: Sbdf) {
    world.simulation.fail(sim::Failure {
        operation: operation.into(),
        address: Some(address),
        delay: SLOW,
        times: 1,
        ..sim::Failure::default()
    });
}

/// Waits until the slow call is under way, and checks that others are answered during it.
fn assert_answers_during_a_slow_call(world: &World, service: &Service) {
    wait_until("the slow call is made", || world.simulation.pending_failures() == 0);
    let asked = Instant::now();
    service.status();
    let took = asked.elapsed();
    assert!(took < SLOW / 2, "'xpci status' was answered after {took:?}");
}

#[test]
fn a_guest_loses_a_function_only_when_the_reset_that_it_asked_for_has_ended() {
    let (world, address) = (World::new(), bdf("01:10.0"));
    let frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(address).unwrap();
    service.attach(WEB, address).unwrap();
    slow(&world, "reset", address);
    let begun = Instant::now();
    frontend.ask(&write_op(0, DEVICE_CONTROL, 2, INITIATE_FLR));
    service.wait_for_state(address, FunctionState::Resetting);
    service.detach(WEB, address).unwrap();
    assert!(begun.elapsed() >= SLOW, "it could be somebody else's while it was reset: {:?}", begun.elapsed());
    world.assert_held(&service, address, "after its reset");
}

#[test]
fn reports_about_an_ended_attachment_are_ignored() {
    let (world, address) = (World::new(), bdf("01:10.0"));
    let _frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(address).unwrap();
    service.attach(WEB, address).unwrap();
    let ended = Attachment::new(address);
    let failure = Failure::new(ErrorCode::Failed, "a reset of the test's failed");
    for event in [
        GuestEvent::Reported(WEB, ServerReport::RestoreFailed(ended, "the test says so".into())),
        GuestEvent::Reported(WEB, ServerReport::Vanished(ended)),
        GuestEvent::Reported(WEB, ServerReport::ResetWanted(ended)),
        GuestEvent::ResetEnded(ended, Err(failure)),
    ] {
        service.send(Event::Guests(event));
        assert_eq!(service.state(address), FunctionState::Attached);
    }
}

#[test]
fn a_function_that_is_slow_to_be_switched_off_delays_no_other_request() {
    let (world, address) = (World::new(), bdf("01:10.0"));
    let service = world.start();
    service.hold(address).unwrap();
    // The guest does not use it: no thread serves it.
    service.attach(WEB, address).unwrap();
    slow(&world, "config_read", address);
    thread::scope(|scope| {
        let detached = scope.spawn(|| service.detach(WEB, address));
        assert_answers_during_a_slow_call(&world, &service);
        detached.join().unwrap().unwrap();
    });
    world.assert_held(&service, address, "after the slow call");
}

#[test]
fn a_frontend_that_leaves_a_slow_function_delays_no_request() {
    let (world, address) = (World::new(), bdf("01:10.0"));
    let frontend = Frontend::load(&world, WEB);
    let service = world.start();
    service.hold(address).unwrap();
    service.attach(WEB, address).unwrap();
    frontend.ask(&write_op(0, COMMAND, 2, BUS_MASTER));
    slow(&world, "config_write", address);
    frontend.unload();
    assert_answers_during_a_slow_call(&world, &service);
    service.detach(WEB, address).unwrap();
    world.assert_held(&service, address, "after the slow call");
}

#[test]
fn a_slow_pf_delays_no_request_while_the_settings_are_asked_for_the_guest_of_its_vf() {
    let (world, pf, address) = (World::new(), bdf("01:00.0"), bdf("01:10.0"));
    let service = world.start_with_guest("absent", &["eth0:0"]);
    service.hold(address).unwrap();
    slow(&world, "function", pf);
    thread::scope(|scope| {
        let released = scope.spawn(|| service.release(address));
        assert_answers_during_a_slow_call(&world, &service);
        let failure = released.join().unwrap().unwrap_err();
        assert!(failure.message.contains("reserved for guest 'absent' by the settings"), "{failure}");
    });
}

#[test]
fn a_slow_pf_delays_no_request_while_its_vf_becomes_persistent() {
    let (world, pf, address) = (World::new(), bdf("01:00.0"), bdf("01:10.0"));
    let service = world.start();
    service.hold(address).unwrap();
    slow(&world, "config_read", pf);
    thread::scope(|scope| {
        let attached = scope.spawn(|| service.persist(WEB, address));
        assert_answers_during_a_slow_call(&world, &service);
        attached.join().unwrap().unwrap();
    });
    assert_eq!(service.state(address), FunctionState::Attached);
}
