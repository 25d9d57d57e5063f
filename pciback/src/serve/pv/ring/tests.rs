//! Serving, with a service that is killed between any two steps, and with guests that ask for anything.

mod notification;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use proptest::prelude::*;

use super::super::wire::frontend;
use super::*;
use crate::Sbdf;
use crate::config::InterruptMode;
use crate::fault::{AerRequest, ChannelState, Conversation, Heard, Recovery};
use crate::serve::orders::Order;
use crate::serve::test_machine::{DEVICE_CONTROL, DOMAIN, Killed, MSI, MSIX, Machine, TABLE_SIZE, msix, op};
use crate::serve::worker::Worker;
use crate::serve::{ServerStuck, Taken};

const FIRST: Sbdf = Sbdf::from_devfn(0, 1, 0x10);
const SECOND: Sbdf = Sbdf::from_devfn(0, 1, 0x18);
/// An unknown register, which passes.
const PLAIN: u16 = 0xc0;

/// One run of the service over the machine, as far as its thread goes.
fn one_run(machine: &Machine) -> Serving {
    let functions = BTreeMap::from([(Devfn(0), machine.open(FIRST)), (Devfn(8), machine.open(SECOND))]);
    serving(machine, functions, Box::new(|_| {}))
}

type Serving = Worker<RingRequests>;

fn serving(
    machine: &Machine,
    functions: BTreeMap<Devfn, Box<GuestFunction>>,
    report: Box<dyn Fn(ServerReport) + Send>,
) -> Serving {
    let roster = Roster::new(DOMAIN, functions, &Arc::default(), report, mpsc::channel().1);
    Worker::new(roster, RingRequests::new(DOMAIN, machine.ring()))
}

impl Serving {
    /// Answers what waits.
    fn serve_waiting(&mut self) {
        self.serve_while_busy();
    }

    fn begin(&mut self) {
        self.source.recover(&mut self.roster);
        self.serve_waiting();
    }

    fn ask(&mut self, machine: &Machine, op: &Op) -> (i32, u32, Vec<u16>) {
        machine.ask(op);
        self.serve_waiting();
        answered(machine, op)
    }
}

/// Gives a thread orders.
fn orders(serving: &mut Serving) -> mpsc::Sender<Order> {
    let (sender, orders) = mpsc::channel();
    serving.roster.orders = orders;
    sender
}

fn answered(machine: &Machine, op: &Op) -> (i32, u32, Vec<u16>) {
    let (error, value, entries) = machine.answer(op.value as usize).expect("an answer");
    let vectors = if op.command == Command::ENABLE_MSIX { entries } else { Vec::new() };
    (error, value, vectors.iter().map(|entry| entry.vector).collect())
}

/// Everything that Xen has mapped is noted, and everything noted is mapped.
fn assert_notes_are_true(serving: &Serving, machine: &Machine) {
    let noted: BTreeMap<u32, Sbdf> = serving
        .roster
        .functions
        .values()
        .flat_map(|function| {
            let address = function.address();
            function.space.image().vectors().entries.into_iter().map(move |(_, pirq)| (pirq, address))
        })
        .collect();
    let mapped: BTreeMap<u32, Sbdf> =
        machine.pirqs().into_iter().map(|(pirq, (address, _))| (pirq, address)).collect();
    assert_eq!(noted, mapped);
}

/// Has a request served by a service that is killed after any number of steps, and its successor likewise, and checks the end.
fn killed_anywhere(before: &[Op], op: &Op, check: impl Fn(&Machine, (i32, u32, Vec<u16>))) {
    let mut kills = 0;
    for second in [None, Some(0), Some(1), Some(2), Some(3), Some(5), Some(8), Some(13), Some(21)] {
        let mut idle = 0;
        for first in 0.. {
            let machine = Machine::new();
            let mut serving = one_run(&machine);
            // Another function has vectors already, which must stay as they are.
            let mut other = msix(&[0, 3]);
            other.devfn = 8;
            serving.ask(&machine, &other);
            before.iter().for_each(|op| drop(serving.ask(&machine, op)));
            machine.ask(op);
            for (run_number, steps) in [Some(first), second, None].into_iter().enumerate() {
                machine.kill_after(steps);
                // The killed service runs no more code: what unwinding drops has no effects of its own.
                let outcome = catch_unwind(AssertUnwindSafe(|| serving.begin()));
                if let Err(cause) = outcome {
                    assert!(cause.is::<Killed>(), "it panicked by itself after {first} and {second:?} steps");
                    kills += 1;
                }
                // The page is looked at, that is a step, as long as nothing waits on it.
                idle += u32::from(run_number == 0 && machine.answer(0).is_some());
                machine.kill_after(None);
                serving = one_run(&machine);
            }
            serving.begin();
            assert_notes_are_true(&serving, &machine);
            let others = machine.pirqs().values().filter(|(address, _)| *address == SECOND).count();
            assert_eq!(others, 2, "after {first} and {second:?} steps");
            check(&machine, answered(&machine, op));
            if idle > 3 {
                break;
            }
        }
    }
    assert!(kills > 30, "{kills} kills prove little");
}

#[test]
fn msix_is_enabled_once_by_a_service_that_is_killed_anywhere() {
    killed_anywhere(&[], &msix(&[4, 0, 2]), |machine, (error, value, vectors)| {
        assert_eq!((error, value), (0, 0));
        let pirqs = machine.pirqs();
        let entries: Vec<_> = vectors.iter().map(|vector| pirqs[&u32::from(*vector)]).collect();
        assert_eq!(entries, [(FIRST, Some(4)), (FIRST, Some(0)), (FIRST, Some(2))]);
        assert_eq!(pirqs.len(), 5, "none is lost");
        assert_eq!(machine.word(FIRST, MSIX + 2) >> 15, 1);
    });
}

#[test]
fn msi_is_enabled_once_by_a_service_that_is_killed_anywhere() {
    let enable = op(Command::ENABLE_MSI.0, 0, 0, 0);
    killed_anywhere(&[], &enable, |machine, (error, value, _)| {
        assert_eq!(error, 0);
        assert_eq!(machine.pirqs()[&value], (FIRST, None));
        assert_eq!(machine.pirqs().len(), 3);
        assert_eq!(machine.word(FIRST, MSI + 2) & 1, 1);
    });
}

#[test]
fn interrupts_are_disabled_by_a_service_that_is_killed_anywhere() {
    let disable = op(Command::DISABLE_MSIX.0, 0, 0, 0);
    killed_anywhere(&[msix(&[1, 2, 3])], &disable, |machine, (error, ..)| {
        assert_eq!((error, machine.pirqs().len()), (0, 2));
        assert_eq!(machine.word(FIRST, MSIX + 2) >> 15, 0);
    });
}

#[test]
fn enabling_again_replaces_what_was_there_whenever_the_service_is_killed() {
    killed_anywhere(&[msix(&[1, 2, 3])], &msix(&[5, 6]), |machine, (error, _, vectors)| {
        assert_eq!((error, vectors.len(), machine.pirqs().len()), (0, 2, 4));
    });
}

#[test]
fn a_write_reaches_hardware_although_the_service_is_killed_anywhere() {
    killed_anywhere(&[], &op(Command::CONF_WRITE.0, PLAIN, 2, 0x1234), |machine, (error, ..)| {
        assert_eq!((error, machine.word(FIRST, PLAIN)), (0, 0x1234));
    });
}

/// The one thing that content cannot show: whether the same write is the old one or comes again.
#[test]
fn the_same_write_again_is_carried_out_again_whenever_the_service_is_killed() {
    let write = op(Command::CONF_WRITE.0, PLAIN, 2, 0x1234);
    let mut idle = 0;
    for steps in 0..40 {
        let machine = Machine::new();
        let mut serving = one_run(&machine);
        machine.ask(&write);
        machine.kill_after(Some(steps));
        let _ = catch_unwind(AssertUnwindSafe(|| serving.begin()));
        idle += u32::from(machine.answer(0).is_some());
        machine.kill_after(None);
        serving = one_run(&machine);
        serving.begin();
        assert_eq!(answered(&machine, &write).0, 0);
        // The device changes it, the guest writes it again.
        machine.set_word(FIRST, PLAIN, 0);
        assert_eq!(serving.ask(&machine, &write).0, 0);
        assert_eq!(machine.word(FIRST, PLAIN), 0x1234, "killed after {steps} steps");
    }
    assert!((1..38).contains(&idle), "{idle} of 40 were killed when all was done");
}

#[test]
fn a_killed_service_that_nobody_waits_for_leaves_nothing_to_the_next_request() {
    let write = op(Command::CONF_WRITE.0, PLAIN, 2, 0x1234);
    for steps in 0..20 {
        let machine = Machine::new();
        let mut serving = one_run(&machine);
        machine.ask(&write);
        machine.kill_after(Some(steps));
        let _ = catch_unwind(AssertUnwindSafe(|| serving.begin()));
        machine.kill_after(None);
        // The frontend gives up, and later asks for the same.
        machine.page()[0].store(0, Ordering::Relaxed);
        serving = one_run(&machine);
        serving.begin();
        machine.set_word(FIRST, PLAIN, 0);
        assert_eq!(serving.ask(&machine, &write).0, 0);
        assert_eq!(machine.word(FIRST, PLAIN), 0x1234, "killed after {steps} steps");
    }
}

#[test]
fn an_answer_that_comes_too_late_does_not_reach_the_next_request() {
    let machine = Machine::new();
    let mut serving = one_run(&machine);
    let write = op(Command::CONF_WRITE.0, PLAIN, 2, 1);
    machine.ask(&write);
    let taken = wire::take_request(machine.page()).unwrap();
    // While that is being carried out the frontend gives up and asks for something else.
    let next = op(Command::CONF_READ.0, 0, 4, 0);
    machine.ask(&next);
    serving.source.answer(&mut serving.roster, Op { info: 77, ..taken });
    assert_eq!(machine.answer(0), None, "the next request still waits");
    serving.serve_waiting();
    assert_eq!(answered(&machine, &next), (0, 0x10ca_8086, vec![]));
}

#[test]
fn requests_for_others_and_beyond_are_refused_with_the_protocols_errors() {
    let machine = Machine::new();
    let mut serving = one_run(&machine);
    let read = |devfn, bus, domain| Op { devfn, bus, domain, ..op(0, 0, 4, 0) };
    assert_eq!(serving.ask(&machine, &read(0, 0, 0)), (0, 0x10ca_8086, vec![]));
    for other in [read(16, 0, 0), read(0, 1, 0), read(0, 0, 1), read(0x100, 0, 0), read(u32::MAX, 0, 0)] {
        assert_eq!(serving.ask(&machine, &other), (-1, u32::MAX, vec![]));
    }
    assert_eq!(serving.roster.counters.errors(), 0, "a scan of the bus is no error");
    for (offset, size) in [(1u16, 2), (2, 4), (0, 3), (0, 0), (0xfffe, 4)] {
        assert_eq!(serving.ask(&machine, &op(0, offset, size, 0)).0, -2);
        assert_eq!(serving.ask(&machine, &op(1, offset, size, 0)).0, -2);
    }
    for command in [6, 7, 10, 11, u32::MAX] {
        assert_eq!(serving.ask(&machine, &op(command, 0, 4, 0)).0, -4);
    }
    assert_eq!(serving.roster.counters.errors(), 15);
}

#[test]
fn impossible_msix_requests_are_refused_and_change_nothing() {
    let machine = Machine::new();
    let mut serving = one_run(&machine);
    let two = serving.ask(&machine, &msix(&[0, 1]));
    let before = (machine.pirqs(), machine.writes());
    let mut many = msix(&[]);
    many.value = 129;
    let mut huge = msix(&[]);
    huge.value = u32::MAX;
    for bad in [msix(&[]), msix(&[TABLE_SIZE]), msix(&[3, 4, 3]), many, huge] {
        machine.ask(&bad);
        serving.serve_waiting();
        assert_eq!(machine.answer(0).unwrap().0, -5);
        assert_eq!((machine.pirqs(), machine.writes()), before, "{two:?}");
    }
    assert_eq!(serving.ask(&machine, &op(Command::ENABLE_MSI.0, 0, 0, 0)).0, -5, "MSI beside MSI-X");
    assert_eq!(machine.pirqs(), before.0);
}

#[test]
fn a_mapping_that_fails_half_way_is_undone() {
    let machine = Machine::new();
    machine.occupy_pirqs(2);
    let mut serving = one_run(&machine);
    let occupied = machine.pirqs();
    assert_eq!(serving.ask(&machine, &msix(&[0, 1, 2])).0, -5);
    assert_eq!(machine.pirqs(), occupied);
    assert_eq!(machine.word(FIRST, MSIX + 2) >> 15, 0);
    assert_eq!(serving.ask(&machine, &msix(&[0, 1])).0, 0);
}

#[test]
fn a_function_that_vanishes_reads_all_ones_and_is_reported_once() {
    let machine = Machine::new();
    let reports = Arc::new(Mutex::new(0));
    let mut serving = one_run(&machine);
    let count = Arc::clone(&reports);
    serving.roster.report = Box::new(move |_| *count.lock().unwrap() += 1);
    machine.break_config(Some(Errno::ENODEV));
    for _ in 0..3 {
        assert_eq!(serving.ask(&machine, &op(0, PLAIN, 2, 0)), (0, 0xffff, vec![]));
        assert_eq!(serving.ask(&machine, &op(1, PLAIN, 2, 0)).0, 0);
    }
    assert_eq!(*reports.lock().unwrap(), 1);
    // The other function is none the worse for it.
    machine.break_config(None);
    assert_eq!(serving.ask(&machine, &Op { devfn: 8, ..op(0, 0, 2, 0) }).1, 0x8086);
}

#[test]
fn a_function_that_is_reset_is_silent_until_that_is_over_and_has_its_interrupts_then() {
    let machine = Machine::new();
    let mut serving = one_run(&machine);
    let wanted = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&wanted);
    serving.roster.report = Box::new(move |report| {
        if let ServerReport::ResetWanted(attachment) = report {
            heard.lock().unwrap().push(attachment.address());
        }
    });
    assert_eq!(serving.ask(&machine, &op(1, 4, 2, 6)).0, 0);
    let pirq = serving.ask(&machine, &op(Command::ENABLE_MSI.0, 0, 0, 0)).1;
    assert_eq!(serving.ask(&machine, &op(1, DEVICE_CONTROL, 2, 1 << 15)).0, 0);
    assert_eq!(*wanted.lock().unwrap(), [FIRST]);
    let writes = machine.writes();
    assert_eq!(serving.ask(&machine, &op(0, 0, 4, 0)).1, u32::MAX);
    assert_eq!(serving.ask(&machine, &op(1, PLAIN, 2, 5)).0, 0);
    assert_eq!(serving.ask(&machine, &Op { devfn: 8, ..op(0, 0, 2, 0) }).1, 0x8086, "others go on");
    assert_eq!(machine.writes(), writes, "nothing reaches hardware");
    // The host has reset it: MSI is off and without a message, Command is restored.
    machine.set_word(FIRST, MSI + 2, 0x80);
    machine.set_word(FIRST, MSI + 4, 0);
    machine.set_word(FIRST, 4, 6);
    serving.roster.reset_ended(Devfn(0), true);
    assert_eq!(serving.ask(&machine, &op(0, 0, 4, 0)).1, 0x10ca_8086);
    assert_eq!(machine.word(FIRST, MSI + 2) & 1, 1);
    assert_eq!(machine.word(FIRST, 4) & 4, 0, "after a reset bus mastering is off");
    assert!(machine.pirqs().contains_key(&pirq));
}

#[test]
fn a_guest_that_toggles_bus_mastering_without_end_reports_little() {
    let machine = Machine::new();
    let reports = Arc::new(Mutex::new(0));
    let mut serving = one_run(&machine);
    let count = Arc::clone(&reports);
    serving.roster.report = Box::new(move |report| {
        assert!(matches!(report, ServerReport::DriverStarted(_)));
        *count.lock().unwrap() += 1;
    });
    let begun = Instant::now();
    for _ in 0..1000 {
        assert_eq!(serving.ask(&machine, &op(1, 4, 2, 6)).0, 0);
        assert_eq!(serving.ask(&machine, &op(1, 4, 2, 2)).0, 0);
    }
    let most = 1 + begun.elapsed().as_secs();
    let reported = *reports.lock().unwrap();
    assert!((1..=most).contains(&reported), "{reported} reports within {most} s");
}

#[test]
fn a_function_that_was_added_before_the_guest_asks_for_it_answers() {
    let machine = Machine::new();
    let mut serving = one_run(&machine);
    let sender = orders(&mut serving);
    let function = serving.roster.functions.remove(&Devfn(8)).unwrap();
    sender.send(Order::Add(Devfn(8), function)).unwrap();
    let read = Op { devfn: 8, ..op(0, 0, 4, 0) };
    machine.ask(&read);
    serving.serve_while_busy();
    assert_eq!(answered(&machine, &read), (0, 0x10ca_8086, vec![]));
}

#[test]
fn a_function_that_is_ordered_away_is_not_touched_by_a_request_that_waits() {
    let machine = Machine::new();
    let mut serving = one_run(&machine);
    let sender = orders(&mut serving);
    let (taken, _keeps_it) = mpsc::channel();
    sender.send(Order::Take(Devfn(0), taken)).unwrap();
    let before = machine.word(FIRST, PLAIN);
    let write = op(Command::CONF_WRITE.0, PLAIN, 2, u32::from(!before));
    machine.ask(&write);
    serving.serve_while_busy();
    assert_eq!(answered(&machine, &write).0, WireError::NoDevice.number());
    assert_eq!(machine.word(FIRST, PLAIN), before);
}

#[test]
fn a_request_that_a_stopping_thread_finds_is_left_to_the_next_one() {
    let machine = Machine::new();
    let mut serving = one_run(&machine);
    let sender = orders(&mut serving);
    let (stopped, functions) = mpsc::channel();
    sender.send(Order::Stop(stopped)).unwrap();
    machine.ask(&op(0, 0, 4, 0));
    assert_eq!(serving.serve_while_busy(), Turn::Stopped);
    assert_eq!(machine.answer(0), None);
    serving.roster.functions = functions.recv().unwrap();
    serving.serve_waiting();
    assert_eq!(answered(&machine, &op(0, 0, 4, 0)), (0, 0x10ca_8086, vec![]));
}

#[test]
fn quiescing_leaves_nothing_mapped_and_nothing_enabled() {
    let machine = Machine::new();
    let mut serving = one_run(&machine);
    serving.ask(&machine, &op(1, 4, 2, 6));
    serving.ask(&machine, &msix(&[0, 1, 2]));
    assert_eq!(machine.word(FIRST, 4) & 4, 4);
    let mut function = serving.roster.functions.remove(&Devfn(0)).unwrap();
    function.quiesce().unwrap();
    assert!(machine.pirqs().is_empty());
    assert_eq!((machine.word(FIRST, 4) & 4, machine.word(FIRST, MSIX + 2) >> 15), (0, 0));
    assert_eq!(function.space.image().vectors().mode, InterruptMode::Off);
}

/// A guest that unloads xen-pcifront and loads it again: its functions are quiesced in between, and served by another thread then.
#[test]
fn intx_is_delivered_again_to_a_guest_that_has_left_its_ring_and_come_back() {
    const INTX_OFF: u16 = 0x400;
    let machine = Machine::new();
    let functions = BTreeMap::from([(Devfn(0), machine.open_with_line(FIRST, 17))]);
    let mut first = serving(&machine, functions, Box::new(|_| {}));
    first.ask(&machine, &op(1, 4, 2, 6));
    assert_eq!(machine.word(FIRST, 4) & INTX_OFF, 0);
    let mut functions = std::mem::take(&mut first.roster.functions);
    functions.get_mut(&Devfn(0)).unwrap().quiesce().unwrap();
    assert_eq!(machine.word(FIRST, 4) & INTX_OFF, INTX_OFF);
    let mut second = serving(&machine, functions, Box::new(|_| {}));
    second.ask(&machine, &op(0, 4, 2, 0));
    assert_eq!(machine.word(FIRST, 4) & INTX_OFF, INTX_OFF, "not before its driver starts");
    second.ask(&machine, &op(1, 4, 2, 6));
    assert_eq!(machine.word(FIRST, 4) & INTX_OFF, 0);
}

#[test]
fn a_guest_that_never_pauses_does_not_keep_its_function() {
    let machine = Machine::new();
    let functions = BTreeMap::from([(Devfn(0), machine.open(FIRST))]);
    let server = start(DOMAIN, machine.ring(), functions, Arc::default(), Box::new(|_| {})).unwrap();
    let stop = Arc::new(AtomicU64::new(0));
    let flood = thread::spawn({
        let (machine, stop) = (machine.clone(), Arc::clone(&stop));
        move || {
            // Asks again the moment that it is answered, and while the answer is being written.
            while stop.load(Ordering::Relaxed) == 0 {
                machine.page()[0].fetch_or(1, Ordering::Release);
                machine.send_event();
            }
        }
    });
    machine.ask(&op(0, 0, 4, 0));
    while server.counters().requests() < 1000 {
        thread::yield_now();
    }
    let taken = server.take(Devfn(0));
    stop.store(1, Ordering::Relaxed);
    flood.join().unwrap();
    assert!(matches!(taken, Ok(Some(Taken { quiesced: Ok(()), .. }))));
    assert!(server.stop().unwrap().is_empty());
}

#[test]
fn a_guest_that_sends_events_without_end_does_not_keep_its_function() {
    let machine = Machine::new();
    let functions = BTreeMap::from([(Devfn(0), machine.open(FIRST))]);
    let server = start(DOMAIN, machine.ring(), functions, Arc::default(), Box::new(|_| {})).unwrap();
    machine.send_events_without_end();
    machine.ask(&op(0, 0, 4, 0));
    while server.counters().requests() == 0 {
        thread::yield_now();
    }
    assert!(matches!(server.take(Devfn(0)), Ok(Some(Taken { quiesced: Ok(()), .. }))));
    assert!(server.stop().unwrap().is_empty());
}

#[test]
fn a_function_that_is_taken_from_a_hanging_thread_is_not_touched_when_that_goes_on() {
    let machine = Machine::new();
    let functions = BTreeMap::from([(Devfn(0), machine.open(FIRST)), (Devfn(8), machine.open(SECOND))]);
    let server = start(DOMAIN, machine.ring(), functions, Arc::default(), Box::new(|_| {})).unwrap();
    let (hang, before) = (machine.hang(), machine.accesses().len());
    machine.ask(&op(Command::CONF_WRITE.0, PLAIN, 2, 0x1234));
    while machine.accesses().len() == before {
        thread::yield_now();
    }
    assert!(matches!(server.take(Devfn(0)), Err(ServerStuck)));
    let before = machine.accesses().len();
    drop(hang);
    assert!(
        matches!(server.take(Devfn(8)), Ok(Some(Taken { quiesced: Ok(()), .. }))),
        "the other one is served on"
    );
    assert!(server.stop().unwrap().is_empty());
    let touched = machine.accesses().split_off(before);
    assert!(!touched.is_empty() && touched.iter().all(|address| *address == SECOND), "{touched:?}");
}

fn word() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0u32..16, 2 => 0u32..0x1100, 1 => any::<u32>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// With any content of the page: no panic, an answer, and what is mapped is recorded.
    #[test]
    fn any_page_is_answered(pages in prop::collection::vec(prop::collection::vec(word(), 142), 1..8)) {
        let machine = Machine::new();
        let mut serving = one_run(&machine);
        for words in &pages {
            for (place, value) in machine.page()[1..].iter().zip(words) {
                place.store(*value, Ordering::Relaxed);
            }
            machine.page()[0].store(1, Ordering::Release);
            serving.serve_waiting();
            prop_assert!(machine.answer(0).is_some());
            assert_notes_are_true(&serving, &machine);
        }
    }

    /// The same for requests that are nearly sensible, in sequence.
    #[test]
    fn any_requests_are_answered(
        requests in prop::collection::vec((0u32..12, word(), 0u32..6, word(), prop::collection::vec(0u16..12, 0..12)), 1..12),
        resets in any::<bool>(),
    ) {
        let machine = Machine::new();
        let mut serving = one_run(&machine);
        for (command, offset, size, value, entries) in &requests {
            let mut op = msix(entries);
            if *command != Command::ENABLE_MSIX.0 {
                op.value = *value;
            }
            (op.command, op.offset, op.size) = (Command(*command), *offset, *size);
            op.devfn = value & 8;
            frontend::put_request(machine.page(), &op);
            serving.serve_waiting();
            prop_assert!(machine.answer(0).is_some());
            assert_notes_are_true(&serving, &machine);
            if resets {
                serving.roster.reset_ended(Devfn(0), true);
            }
        }
        for function in serving.roster.functions.values_mut() {
            let _ = function.quiesce();
        }
        prop_assert!(machine.pirqs().is_empty());
    }
}
