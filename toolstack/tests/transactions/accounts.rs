//! An error is handled once, no matter which sources report it and when.

use std::time::Duration;

use pciback::Sbdf;
use pciback::fault::{Action, Severity};
use pciback::platform::sim;
use toolstack::protocol::Happening;

use crate::errors::{COMPLETION_TIMEOUT, PORT, SIBLING, VF, attach, attached};
use crate::frontend::Frontend;
use crate::world::{DB, Service, World, bdf, wait_until};

/// The VF of `web`, and one of `db` whose errors show that looks have passed.
struct Watched {
    world: World,
    service: Service,
    _frontends: [Frontend; 2],
}

fn watched() -> Watched {
    let world = World::new();
    let (frontend, service) = attached(&world, "non-fatal: reset, fatal: reset, uncorrectable-per-hour: 1");
    let beside = Frontend::load(&world, DB);
    attach(&service, &beside, DB, bdf(SIBLING));
    Watched { world, service, _frontends: [frontend, beside] }
}

impl Watched {
    /// The errors of a function that were decided about, and of which more than noting was done.
    fn decided(&self, address: Sbdf, severity: Severity) -> (u64, usize) {
        let history = self.service.error_history(address);
        let decisions = history.iter().filter_map(|event| match &event.what {
            Happening::Error { severity: found, action, count, .. } if *found == severity => {
                Some((*count, usize::from(*action > Action::Log)))
            }
            _ => None,
        });
        decisions.fold((0, 0), |(errors, deeds), (count, deed)| (errors + count, deeds + deed))
    }

    fn wait_for_decision(&self, severity: Severity) {
        wait_until("a decision", || self.decided(bdf(VF), severity).0 > 0);
    }

    /// Waits until at least three looks at all counters have ended that began from now on.
    fn looks_pass(&self) {
        let sibling = bdf(SIBLING);
        for _ in 0..2 {
            let before = self.decided(sibling, Severity::Correctable).0;
            self.world.simulation.miss_error(sibling, Severity::Correctable);
            wait_until("the sibling's error is found", || {
                self.decided(sibling, Severity::Correctable).0 > before
            });
        }
    }

    /// The VF's error was decided about once, and one reset followed.
    fn assert_once(&self, severity: Severity) {
        self.looks_pass();
        let history = self.service.error_history(bdf(VF));
        assert_eq!(self.decided(bdf(VF), severity), (1, 1), "{history:#?}");
        let resets = history.iter().filter(
            |event| matches!(&event.what, Happening::Outcome { text, .. } if text.contains("it was reset")),
        );
        assert_eq!(resets.count(), 1, "{history:#?}");
    }
}

#[test]
fn a_poll_that_overlaps_an_error_event_causes_no_second_reset() {
    let watched = watched();
    let simulation = &watched.world.simulation;
    // Counters are read by address, the sibling's last.
    let slow = sim::Failure {
        operation: "error_counters".into(),
        address: Some(bdf(SIBLING)),
        delay: Duration::from_secs(1),
        times: 1,
        ..sim::Failure::default()
    };
    simulation.fail(slow);
    wait_until("the look has read the VF's counters", || simulation.pending_failures() == 0);
    simulation.report_error(bdf(VF), Severity::NonFatal, COMPLETION_TIMEOUT);
    watched.wait_for_decision(Severity::NonFatal);
    watched.assert_once(Severity::NonFatal);
}

#[test]
fn an_event_that_comes_twice_is_one_error() {
    let watched = watched();
    // Before, it might be the event of an error that was counted before the guest had the function.
    watched.looks_pass();
    let simulation = &watched.world.simulation;
    simulation.report_error(bdf(VF), Severity::NonFatal, COMPLETION_TIMEOUT);
    simulation.trace_error(bdf(VF), Severity::NonFatal, COMPLETION_TIMEOUT);
    watched.assert_once(Severity::NonFatal);
}

#[test]
fn an_event_after_a_change_of_the_counters_is_the_same_error() {
    let watched = watched();
    let simulation = &watched.world.simulation;
    simulation.miss_error(bdf(VF), Severity::NonFatal);
    watched.wait_for_decision(Severity::NonFatal);
    simulation.trace_error(bdf(VF), Severity::NonFatal, COMPLETION_TIMEOUT);
    watched.assert_once(Severity::NonFatal);
}

/// As Linux 6.1 does with fatal errors of endpoints.
#[test]
fn an_error_that_is_not_counted_and_that_a_port_contained_is_one_error() {
    let watched = watched();
    let simulation = &watched.world.simulation;
    simulation.trace_error(bdf(VF), Severity::Fatal, 0);
    watched.wait_for_decision(Severity::Fatal);
    // DPC Error Source ID, then DPC Status: triggered by an ERR_FATAL message.
    simulation.poke(bdf(PORT), 0x15a, &[0x80, 0x01]);
    simulation.poke(bdf(PORT), 0x158, &[0x05, 0x00]);
    watched.assert_once(Severity::Fatal);
}

#[test]
fn successive_errors_are_all_handled() {
    let watched = watched();
    let simulation = &watched.world.simulation;
    for status in 0..3 {
        simulation.report_error(bdf(VF), Severity::Correctable, 1 << status);
        simulation.miss_error(bdf(VF), Severity::Correctable);
    }
    wait_until("six errors", || watched.decided(bdf(VF), Severity::Correctable).0 >= 6);
    watched.looks_pass();
    assert_eq!(watched.decided(bdf(VF), Severity::Correctable).0, 6);
}
