//! The handshake against a model of xen-pcifront.

#![expect(clippy::unwrap_used, reason = "a test that fails says so by panicking")]

mod pcifront;

use pciback::serve::pv::nodes::End;
use pciback::serve::pv::{Action, FrontendView, Handshake, NodeChange, RingPlace, XenbusState};
use pciback::{Devfn, DomId};
use pcifront::World;
use proptest::prelude::*;

const FIRST: Devfn = Devfn(0);
const SECOND: Devfn = Devfn(8);
const THIRD: Devfn = Devfn(16);
const FOURTH: Devfn = Devfn(24);

fn connected(devfns: &[Devfn]) -> World {
    let mut world = World::new();
    devfns.iter().for_each(|devfn| world.add(*devfn));
    world.run();
    assert!(world.found().iter().eq(devfns), "{:?}", world.found());
    world
}

#[test]
fn a_guest_finds_what_was_attached_before_it_looked() {
    let world = connected(&[FIRST, SECOND]);
    assert_eq!(world.added.len(), 2);
    assert_eq!(world.backend("state"), Some("4"));
    assert_eq!(world.backend("vdev-1"), Some("0000:00:01.00"));
}

#[test]
fn functions_come_to_a_connected_guest_and_go_again() {
    let mut world = connected(&[FIRST]);
    world.add(SECOND);
    world.add(THIRD);
    world.run();
    assert_eq!(world.found().len(), 3);
    world.remove(SECOND);
    world.run();
    assert!(world.found().iter().eq(&[FIRST, THIRD]) && world.leaving.is_empty());
    assert_eq!((world.backend("dev-1"), world.backend("num_devs")), (None, Some("3")));
    world.add(FOURTH);
    world.run();
    assert_eq!(world.backend("vdev-1"), Some("0000:00:03.00"), "a free index is used again");
    assert_eq!(world.timeouts, 0);
}

#[test]
fn the_last_function_takes_the_device_along_and_it_can_come_back_ten_times() {
    let mut world = World::new();
    for _ in 0..10 {
        world.add(FIRST);
        world.run();
        assert!(world.found().contains(&FIRST) && world.added.contains(&FIRST));
        world.remove(FIRST);
        world.run();
        assert!(world.found().is_empty() && world.leaving.is_empty() && world.nothing_left());
        assert!(world.handshake.is_empty());
    }
    assert_eq!(world.timeouts, 0);
}

#[test]
fn a_guest_that_is_slow_to_see_its_directory_go_finds_the_next_one() {
    let mut world = connected(&[FIRST]);
    world.remove(FIRST);
    world.guest_sees_state();
    world.look();
    assert!(world.nothing_left());
    // Attached again before the guest has looked.
    world.add(SECOND);
    world.look();
    world.run();
    assert!(world.found().contains(&SECOND));
}

#[test]
fn accesses_of_a_guest_that_lost_its_last_function_are_answered_until_it_has_dropped_the_device() {
    let mut world = connected(&[FIRST]);
    world.remove_unasked(FIRST);
    assert!(world.leaving.is_empty() && world.is_connected(), "its driver reads registers when it goes");
    assert_eq!((world.backend("state"), world.backend("dev-0")), (Some("5"), None));
    world.run();
    assert!(world.found().is_empty() && world.stale().is_empty() && world.nothing_left());
    assert!(world.handshake.is_empty());
}

/// Its accesses take two seconds each, and its driver makes hundreds, where nothing answers.
#[test]
fn accesses_of_a_guest_that_loses_its_last_function_while_it_scans_are_answered_too() {
    for restarted in [false, true] {
        let mut world = World::new();
        world.add(FIRST);
        world.guest_sees_directory();
        world.look();
        assert_eq!(world.backend("state"), Some("4"), "the guest scans");
        world.remove_unasked(FIRST);
        assert!(world.leaving.is_empty() && world.is_connected(), "its accesses are answered");
        if restarted {
            world.restart();
        }
        // It has scanned, and says so before it looks at our state again.
        world.guest_has_scanned();
        world.look();
        assert!(world.is_connected(), "its driver reads registers when it goes");
        world.run();
        assert!(world.found().is_empty() && world.stale().is_empty() && world.nothing_left());
    }
}

#[test]
fn a_guest_that_does_not_drop_the_device_or_has_ended_loses_its_ring() {
    let mut world = connected(&[FIRST]);
    world.remove_unasked(FIRST);
    world.add(SECOND);
    world.closing_over();
    assert!(!world.is_connected());
    world.run();
    assert!(world.found().iter().eq(&[SECOND]) && world.stale().is_empty());
}

#[test]
fn a_ring_that_fails_after_the_device_was_removed_does_not_bring_back_a_part_of_it() {
    let ring = RingPlace { grant: 8, port: 9 };
    let frontend = FrontendView { state: Some(XenbusState::INITIALISED), ring: Some(Ok(ring)) };
    let mut handshake = Handshake::new(DomId(5));
    handshake.add(FIRST, pcifront::address(FIRST));
    assert_eq!(handshake.frontend_changed(frontend), [Action::Connect(ring)]);
    // Before that is done the guest loses the function, and gets another one.
    let actions = handshake.withdraw_unasked(FIRST);
    assert!(actions.contains(&Action::Nodes(vec![NodeChange::RemoveAll])), "{actions:?}");
    assert_eq!(handshake.add(SECOND, pcifront::address(SECOND)), []);
    assert_eq!(handshake.ring_connected(Err("no such grant".to_owned())), []);
    let published = handshake.pause_over();
    let backend =
        |change: &NodeChange| matches!(change, NodeChange::Write(End::Frontend, key, _) if key == "backend");
    let whole = |action: &Action| matches!(action, Action::Nodes(changes) if changes.iter().any(backend));
    assert!(published.iter().any(whole), "the guest does not find the device: {published:?}");
}

#[test]
fn a_guest_that_looks_only_after_the_pause_finds_the_next_function() {
    for forced in [false, true] {
        let mut world = connected(&[FIRST]);
        if forced {
            world.remove_unasked(FIRST);
        } else {
            world.remove(FIRST);
            world.guest_sees_state();
            world.look();
        }
        world.add(SECOND);
        // The guest was paused meanwhile: to it, the directories were always there.
        world.pause_over();
        world.run();
        assert!(world.found().contains(&SECOND) && world.stale().is_empty(), "forced: {forced}");
    }
}

#[test]
fn a_reloaded_module_finds_everything_again() {
    for looks_between in [false, true] {
        let mut world = connected(&[FIRST, SECOND]);
        world.unload();
        if looks_between {
            world.look();
        }
        world.load();
        world.run();
        assert_eq!(world.found().len(), 2);
    }
}

#[test]
fn what_happens_while_the_module_is_unloaded_counts_when_it_is_loaded() {
    let mut world = connected(&[FIRST, SECOND]);
    world.unload();
    world.run();
    world.remove(FIRST);
    world.add(THIRD);
    world.run();
    assert!(world.leaving.is_empty(), "nobody has to be asked");
    world.load();
    world.run();
    assert!(world.found().iter().eq(&[SECOND, THIRD]));
}

#[test]
fn a_module_unloaded_in_the_middle_of_an_exchange_does_not_hold_it_up() {
    for steps in 0..6 {
        let mut world = connected(&[FIRST, SECOND]);
        world.add(THIRD);
        world.remove(FIRST);
        for _ in 0..steps {
            world.guest_sees_state();
            world.look();
        }
        world.unload();
        world.run();
        assert!(world.leaving.is_empty(), "after {steps} steps");
        world.load();
        world.run();
        assert!(world.found().iter().eq(&[SECOND, THIRD]), "after {steps} steps: {:?}", world.found());
    }
}

#[test]
fn a_function_is_silent_before_the_guest_looks_again() {
    let mut world = connected(&[FIRST, SECOND]);
    world.remove(FIRST);
    // The model scans the moment that we write 8: a function that still answers then is found again.
    world.run();
    assert!(world.found().iter().eq(&[SECOND]));
}

#[test]
fn a_guest_whose_time_is_up_can_still_follow_later() {
    // At the limit it has not begun, or has dropped the function but we were not notified.
    for begun in [false, true] {
        let mut world = connected(&[FIRST, SECOND]);
        world.remove(FIRST);
        if begun {
            world.guest_sees_state();
        }
        world.withdraw_unasked(FIRST);
        assert!(world.leaving.is_empty());
        world.run();
        world.add(THIRD);
        world.run();
        assert!(world.found().contains(&THIRD), "begun {begun}: {:?}", world.found());
        world.remove(SECOND);
        world.run();
        assert!(world.leaving.is_empty() && !world.found().contains(&SECOND));
    }
}

#[test]
fn a_late_guest_has_a_function_attached_again_only_once_it_has_dropped_the_old_one() {
    // How many functions it has looked at when it is told of the next change.
    for looked_at in 0..4 {
        let mut world = connected(&[FIRST, SECOND, THIRD]);
        world.remove(SECOND);
        world.guest_begins();
        (0..looked_at).for_each(|_| world.guest_looks_at_one());
        world.withdraw_unasked(SECOND);
        world.look();
        // The same place, and a second function to be dropped while the guest is still at the first.
        world.add(SECOND);
        world.remove(FIRST);
        world.look();
        assert!(!world.added.contains(&SECOND) && world.leaving.contains(&FIRST), "after {looked_at}");
        world.run();
        assert!(world.found().iter().eq(&[SECOND, THIRD]) && world.stale().is_empty(), "after {looked_at}");
    }
}

#[test]
fn a_guest_drops_the_device_of_a_function_that_was_taken_without_asking() {
    let mut world = connected(&[FIRST, SECOND]);
    world.remove_unasked(FIRST);
    assert!(world.leaving.is_empty(), "nobody waits for the guest");
    world.run();
    assert!(world.stale().is_empty() && world.backend("vdev-0").is_none());
    world.add(FIRST);
    world.run();
    assert!(world.found().contains(&FIRST));
}

#[test]
fn a_service_killed_while_a_late_guest_drops_a_function_waits_for_it_too() {
    let mut world = connected(&[FIRST, SECOND]);
    world.remove(FIRST);
    world.guest_begins();
    world.withdraw_unasked(FIRST);
    world.restart();
    world.add(FIRST);
    world.run();
    assert!(world.found().contains(&FIRST) && world.stale().is_empty());
}

#[test]
fn overruling_ends_an_exchange_only_for_the_function_it_is_about() {
    let mut world = connected(&[FIRST, SECOND, THIRD]);
    world.remove(FIRST);
    world.add(FOURTH);
    world.guest_sees_state();
    world.look();
    world.remove(SECOND);
    world.withdraw_unasked(SECOND);
    world.run();
    assert!(world.leaving.is_empty());
    assert!(world.found().contains(&FOURTH) && world.found().contains(&THIRD));
}

#[test]
fn a_ring_that_could_not_be_used_is_tried_again_when_the_frontend_comes_back_with_it() {
    let mut world = World::new();
    world.add(FIRST);
    world.guest_sees_directory();
    world.scribble("pci-op-ref", "999");
    world.look();
    assert_eq!(world.reports.len(), 1);
    world.look();
    assert_eq!(world.reports.len(), 1, "once is enough");
    world.scribble("pci-op-ref", "8");
    world.run();
    assert!(world.found().contains(&FIRST));
}

#[test]
fn nonsense_is_reported_once_and_what_makes_sense_is_taken_afterwards() {
    let mut world = World::new();
    world.add(FIRST);
    world.guest_sees_directory();
    world.scribble("pci-op-ref", "0");
    world.look();
    world.look();
    assert_eq!(world.reports.len(), 1, "{:?}", world.reports);
    world.unload();
    world.load();
    world.run();
    assert!(world.found().contains(&FIRST));
}

#[test]
fn a_guest_notices_nothing_of_a_service_that_is_killed() {
    let mut world = connected(&[FIRST, SECOND]);
    world.restart();
    assert_eq!(world.backend("state"), Some("4"));
    world.run();
    assert_eq!((world.found().len(), world.timeouts), (2, 0));
}

#[test]
fn a_service_killed_at_any_point_of_an_exchange_ends_it() {
    for steps in 0..6 {
        let mut world = connected(&[FIRST, SECOND]);
        world.add(THIRD);
        world.remove(FIRST);
        for _ in 0..steps {
            world.guest_sees_state();
            world.look();
        }
        world.restart();
        world.run();
        assert!(world.leaving.is_empty(), "after {steps} steps");
        assert!(world.found().contains(&SECOND) && world.found().contains(&THIRD), "after {steps} steps");
        world.add(FOURTH);
        world.run();
        assert!(world.found().contains(&FOURTH), "after {steps} steps");
    }
}

#[test]
fn a_service_killed_while_the_device_goes_lets_it_go() {
    for steps in 0..3 {
        let mut world = connected(&[FIRST]);
        world.remove(FIRST);
        for _ in 0..steps {
            world.guest_sees_state();
        }
        world.restart();
        world.run();
        assert!(world.leaving.is_empty() && world.nothing_left(), "after {steps} steps");
        world.add(FIRST);
        world.run();
        assert!(world.found().contains(&FIRST), "after {steps} steps");
    }
}

#[derive(Debug, Clone)]
enum Happening {
    Add(Devfn),
    Remove(Devfn),
    WithdrawUnasked(Devfn),
    RemoveUnasked(Devfn),
    Look,
    Directory,
    State,
    Begin,
    LookAtOne,
    Unload,
    Load,
    Restart,
    Pause,
    NotifyAgain,
    Scribble(&'static str, &'static str),
}

fn happening(hostile: bool) -> impl Strategy<Value = Happening> {
    let devfn = (0u8..4).prop_map(|slot| Devfn(slot * 8));
    let key = prop::sample::select(vec!["state", "pci-op-ref", "event-channel"]);
    let value =
        prop::sample::select(vec!["", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "999", "4294967295"]);
    let orderly = prop_oneof![
        3 => devfn.clone().prop_map(Happening::Add),
        3 => devfn.clone().prop_map(Happening::Remove),
        1 => devfn.clone().prop_map(Happening::WithdrawUnasked),
        1 => devfn.prop_map(Happening::RemoveUnasked),
        6 => Just(Happening::Look),
        4 => Just(Happening::Directory),
        4 => Just(Happening::State),
        3 => Just(Happening::Begin),
        4 => Just(Happening::LookAtOne),
        1 => Just(Happening::Unload),
        2 => Just(Happening::Load),
        1 => Just(Happening::Restart),
        1 => Just(Happening::Pause),
        1 => Just(Happening::NotifyAgain),
    ];
    let scribble = (key, value).prop_map(|(key, value)| Happening::Scribble(key, value));
    if hostile { prop_oneof![4 => orderly, 1 => scribble].boxed() } else { orderly.boxed() }
}

impl World {
    fn happen(&mut self, happening: &Happening) {
        match *happening {
            Happening::Add(devfn) => self.add(devfn),
            Happening::Remove(devfn) => self.remove(devfn),
            Happening::WithdrawUnasked(devfn) => self.withdraw_unasked(devfn),
            Happening::RemoveUnasked(devfn) => self.remove_unasked(devfn),
            Happening::Look => self.look(),
            Happening::Directory => self.guest_sees_directory(),
            Happening::State => self.guest_sees_state(),
            Happening::Begin => self.guest_begins(),
            Happening::LookAtOne => self.guest_looks_at_one(),
            Happening::Unload => self.unload(),
            Happening::Load => self.load(),
            Happening::Restart => self.restart(),
            Happening::Pause => self.pause_over(),
            Happening::NotifyAgain => self.notify_again(),
            Happening::Scribble(key, value) => self.scribble(key, value),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// After any events in any order, the guest has the functions that are wanted and nothing else is left, in the guest too.
    #[test]
    fn everything_converges(happenings in prop::collection::vec(happening(false), 0..60)) {
        let mut world = World::new();
        for happening in &happenings {
            world.happen(happening);
        }
        world.load();
        world.run();
        prop_assert!(world.leaving.is_empty(), "still waiting for {:?}", world.leaving);
        prop_assert!(world.stale().is_empty(), "the guest keeps {:?}", world.stale());
        for devfn in &world.wanted {
            prop_assert!(world.found().contains(devfn), "{devfn} is not found: {}", world.handshake.describe());
            prop_assert!(world.added.contains(devfn));
        }
        if world.wanted.is_empty() {
            prop_assert!(world.nothing_left() && world.handshake.is_empty());
        }
    }

    /// A guest that writes anything into its nodes ends nothing but itself: its functions can be taken from it.
    #[test]
    fn a_hostile_guest_loses_its_function_in_time(happenings in prop::collection::vec(happening(true), 0..60)) {
        let mut world = World::new();
        for happening in &happenings {
            world.happen(happening);
        }
        for devfn in world.wanted.clone() {
            world.remove(devfn);
        }
        for devfn in world.leaving.clone() {
            world.withdraw_unasked(devfn);
        }
        world.closing_over();
        world.pause_over();
        prop_assert!(world.leaving.is_empty() && world.nothing_left() && world.handshake.is_empty());
    }
}
