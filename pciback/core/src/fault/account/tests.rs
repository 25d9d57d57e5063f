use Severity::{Correctable, Fatal, NonFatal};
use proptest::prelude::*;

use super::*;

const STATUS: u32 = 1 << 14;

/// What happens to an account, in order.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// A look begins.
    Begin,
    /// A look that shows this count ends.
    End(u64),
    /// A look ends that could not read the counters.
    Blind,
    /// An event comes.
    Event,
    /// A port is seen to have contained an error.
    Containment,
}
use Step::{Begin, Blind, Containment, End, Event};

fn address() -> Sbdf {
    Sbdf::from_devfn(0, 1, 0x80)
}

fn counters(severity: Severity, count: u64) -> ErrorCounters {
    let mut counters = ErrorCounters::default();
    match severity {
        Correctable => counters.correctable = count,
        NonFatal => counters.non_fatal = count,
        Fatal => counters.fatal = count,
    }
    counters
}

fn fault(severity: Severity, detection: Detection) -> Fault {
    Fault { address: address(), severity, status: STATUS, detection, count: 1 }
}

/// An account and the looks that were begun.
struct Watched {
    account: Account,
    severity: Severity,
    looks: u64,
}

impl Watched {
    fn new(severity: Severity, count: Option<u64>) -> Self {
        let counters = count.map(|count| counters(severity, count));
        // Looks have begun for other functions before.
        Self { account: Account::begin(address(), counters.as_ref(), 7), severity, looks: 7 }
    }

    fn step(&mut self, step: Step) -> Option<(u64, Detection)> {
        let due = match step {
            Begin => {
                self.looks += 1;
                None
            }
            End(count) => {
                self.account.looked(self.looks, Some(&counters(self.severity, count))).first().copied()
            }
            Blind => self.account.looked(self.looks, None).first().copied(),
            Event => self.account.heard(&fault(self.severity, Detection::Event), self.looks),
            Containment => self.account.heard(&fault(self.severity, Detection::Containment), self.looks),
        };
        due.map(|fault| {
            assert_eq!((fault.address, fault.severity), (address(), self.severity));
            (fault.count, fault.detection)
        })
    }

    /// Lets what is open end, with a counter that stays where it is.
    fn settle(&mut self, count: Option<u64>) -> u64 {
        let mut decided = 0;
        for _ in 0..8 {
            self.step(Begin);
            decided += self.step(count.map_or(Blind, End)).map_or(0, |(count, _)| count);
        }
        assert!(!self.account.is_open(), "{:?}", self.account);
        decided
    }
}

/// What is decided at each step, and afterwards while nothing more happens.
fn check(case: &str, begin: Option<u64>, steps: &[(Step, Option<(u64, Detection)>)], later: u64) {
    for severity in Severity::ALL {
        let mut watched = Watched::new(severity, begin);
        let mut count = begin;
        // A function is watched for a while before it reports anything.
        assert_eq!(watched.settle(begin), 0, "{case}");
        for (index, (step, expected)) in steps.iter().enumerate() {
            if let End(shown) = step {
                count = Some(*shown);
            }
            assert_eq!(watched.step(*step), *expected, "{case}: step {index}, {step:?}");
        }
        assert_eq!(watched.settle(count), later, "{case}: later");
    }
}

const EVENT: Option<(u64, Detection)> = Some((1, Detection::Event));
const COUNTED: Option<(u64, Detection)> = Some((1, Detection::Counters));

#[test]
fn an_error_is_decided_about_once_whenever_its_event_and_its_count_come() {
    for (case, steps) in [
        ("the event, then the count", &[(Event, EVENT), (Begin, None), (End(6), None)][..]),
        ("the count, then the event", &[(Begin, None), (End(6), None), (Event, EVENT)]),
        ("a look around both", &[(Begin, None), (Event, EVENT), (End(6), None)]),
        (
            "a look that read the counter before the error and ends after its event",
            &[(Begin, None), (Event, EVENT), (End(5), None), (Begin, None), (End(6), None)],
        ),
        (
            "a count that comes late",
            &[
                (Begin, None),
                (Event, EVENT),
                (End(5), None),
                (Begin, None),
                (End(5), None),
                (Begin, None),
                (End(6), None),
            ],
        ),
        (
            "an event that comes after its count was decided about",
            &[(Begin, None), (End(6), None), (Begin, None), (End(6), COUNTED), (Event, None)],
        ),
        (
            "an event that comes while another look runs",
            &[
                (Begin, None),
                (End(6), None),
                (Begin, None),
                (End(6), COUNTED),
                (Begin, None),
                (Event, None),
                (End(6), None),
            ],
        ),
        ("no event", &[(Begin, None), (End(6), None), (Begin, None), (End(6), COUNTED)]),
        ("no count", &[(Event, EVENT), (Begin, None), (End(5), None)]),
        ("the event twice", &[(Event, EVENT), (Event, None), (Begin, None), (End(6), None)]),
        (
            "the event again after a look",
            &[(Event, EVENT), (Begin, None), (End(6), None), (Event, None), (Begin, None), (End(6), None)],
        ),
        (
            "the event twice, and the count late",
            &[(Event, EVENT), (Event, None), (Begin, None), (End(5), None), (Begin, None), (End(6), None)],
        ),
        (
            "containment, then the event and the count",
            &[(Containment, Some((1, Detection::Containment))), (Event, None), (Begin, None), (End(6), None)],
        ),
        (
            "containment of what is not counted",
            &[(Containment, Some((1, Detection::Containment))), (Event, None), (Begin, None), (End(5), None)],
        ),
        (
            "the event, then containment",
            &[(Event, EVENT), (Containment, None), (Begin, None), (End(6), None)],
        ),
        (
            "the count, then containment, then the event",
            &[
                (Begin, None),
                (End(6), None),
                (Containment, Some((1, Detection::Containment))),
                (Event, None),
                (Begin, None),
                (End(6), None),
            ],
        ),
    ] {
        check(case, Some(5), steps, 0);
    }
}

#[test]
fn several_errors_at_once_lead_to_as_many_decisions() {
    for (case, steps, later) in [
        (
            "each with event and count",
            &[
                (Event, EVENT),
                (Event, None),
                (Event, None),
                (Begin, None),
                (End(8), Some((2, Detection::Event))),
            ][..],
            0,
        ),
        (
            "one after the other",
            &[
                (Event, EVENT),
                (Begin, None),
                (End(6), None),
                (Event, None),
                (Begin, None),
                (End(7), EVENT),
                (Event, None),
                (Begin, None),
                (End(8), EVENT),
            ],
            0,
        ),
        (
            "only one of three has an event",
            &[
                (Event, EVENT),
                (Begin, None),
                (End(8), None),
                (Begin, None),
                (End(8), Some((2, Detection::Counters))),
            ],
            0,
        ),
        (
            "none has an event, and one comes later",
            &[
                (Begin, None),
                (End(7), None),
                (Begin, None),
                (End(8), Some((2, Detection::Counters))),
                (Begin, None),
                (End(8), COUNTED),
            ],
            0,
        ),
        (
            "none is counted",
            &[(Event, EVENT), (Event, None), (Begin, None), (Event, None), (End(5), None)],
            2,
        ),
        (
            "an event is lost and the other one comes twice",
            &[(Event, EVENT), (Event, None), (Begin, None), (End(7), EVENT)],
            0,
        ),
    ] {
        check(case, Some(5), steps, later);
    }
}

#[test]
fn an_error_long_after_another_is_another_one() {
    let quiet = [(Begin, None), (End(5), None), (Begin, None), (End(5), None), (Begin, None), (End(5), None)];
    let steps = [&[(Event, EVENT)][..], &quiet, &[(Event, EVENT)], &quiet].concat();
    check("neither is counted", Some(5), &steps, 0);
    let lost = [(Begin, None), (End(6), None), (Begin, None), (End(6), COUNTED)];
    check("not counted, then no event", Some(5), &[&[(Event, EVENT)][..], &quiet, &lost].concat(), 0);
}

/// The direction in which it is resolved: never two resets for one error.
#[test]
fn an_error_without_a_count_close_to_one_without_an_event_is_taken_as_one() {
    let steps = [(Event, EVENT), (Begin, None), (End(6), None), (Begin, None), (End(6), None)];
    check("one decision", Some(5), &steps, 0);
    let steps = [(Event, EVENT), (Event, None), (Begin, None), (End(6), None)];
    check("one of two events has a count", Some(5), &steps, 0);
}

#[test]
fn counters_wrap_and_begin_again() {
    let found = [(Begin, None), (End(1), None), (Begin, None), (End(1), Some((3, Detection::Counters)))];
    check("it wraps", Some(u64::MAX - 1), &found, 0);
    let found = [(Begin, None), (End(1), None), (Begin, None), (End(1), COUNTED)];
    check("it began again", Some(5), &found, 0);
    check("it began again at 0", Some(5), &[(Begin, None), (End(0), None)], 0);
    let steps = [(Event, EVENT), (Begin, None), (End(0), None), (Begin, None), (End(1), None)];
    check("it began again with the error's count", Some(5), &steps, 0);
    let steps = [(Event, EVENT), (Begin, None), (Blind, None), (Begin, None), (End(6), None)];
    check("it could not be read", Some(5), &steps, 0);
}

#[test]
fn where_nothing_is_counted_each_event_is_an_error() {
    let steps =
        [(Event, EVENT), (Event, None), (Begin, None), (Event, None), (Blind, Some((2, Detection::Event)))];
    check("no counters", None, &steps, 0);
}

#[test]
fn errors_that_were_counted_before_the_account_began_are_decided_about_by_their_events() {
    for severity in Severity::ALL {
        // Two have been counted, and a third is after the account has begun.
        let mut watched = Watched::new(severity, Some(2));
        let steps = [Event, Event, Event, Begin, End(3)];
        let decided: u64 = steps.iter().filter_map(|step| watched.step(*step)).map(|(count, _)| count).sum();
        assert_eq!(decided + watched.settle(Some(3)), 3);
        // An event that came before the account's first look.
        let mut watched = Watched::new(severity, None);
        assert_eq!(watched.step(Event), EVENT);
        assert_eq!(watched.settle(Some(3)), 0);
    }
}

#[test]
fn severities_have_accounts_of_their_own() {
    let mut account = Account::begin(address(), Some(&ErrorCounters::default()), 0);
    assert!(account.heard(&fault(Correctable, Detection::Event), 0).is_some());
    assert!(account.heard(&fault(Fatal, Detection::Event), 0).is_some());
    let shown = ErrorCounters { correctable: 1, non_fatal: 1, fatal: 0 };
    assert_eq!(account.looked(1, Some(&shown)), []);
    let found = account.looked(2, Some(&shown));
    assert_eq!(found.iter().map(|fault| (fault.severity, fault.count)).collect::<Vec<_>>(), [(NonFatal, 1)]);
}

#[test]
fn a_decision_names_what_the_events_since_the_last_one_named() {
    let mut account = Account::begin(address(), Some(&ErrorCounters::default()), 0);
    for status in [1, 2, 4] {
        account.heard(&Fault { status, ..fault(Correctable, Detection::Event) }, 0);
    }
    let due = account.looked(1, Some(&counters(Correctable, 3)));
    assert_eq!(due.iter().map(|fault| (fault.status, fault.count)).collect::<Vec<_>>(), [(6, 2)]);
}

/// A storm is decided about once a look.
#[test]
fn a_storm_takes_no_room_and_one_decision_a_look() {
    let mut watched = Watched::new(Correctable, Some(0));
    let (mut decisions, mut decided) = (0, 0);
    for count in 1..=10_000u64 {
        let steps = [Event, Begin, End(count)];
        for step in &steps[..if count % 100 == 0 { 3 } else { 1 }] {
            if let Some((count, _)) = watched.step(*step) {
                (decisions, decided) = (decisions + 1, decided + count);
            }
        }
        assert!(watched.account.tallies[0].burst.as_ref().is_none_or(|burst| burst.young.len() <= 3));
    }
    assert!(decisions <= 101, "{decisions}");
    assert_eq!(decided + watched.settle(Some(10_000)), 10_000);
}

/// An interval between looks, in ticks.
const INTERVAL: u64 = 4;

/// An error; its views are at most an interval apart.
#[derive(Debug, Clone)]
struct Real {
    /// When the first view of it shows.
    at: u64,
    event_first: bool,
    /// How long after it the other one.
    apart: u64,
    counted: bool,
    told: bool,
    /// How long after its event that comes again.
    again: Option<u64>,
}

impl Real {
    fn event(&self) -> u64 {
        if self.event_first { self.at } else { self.at + self.apart }
    }

    fn count(&self) -> u64 {
        if self.event_first { self.at + self.apart } else { self.at }
    }
}

fn real() -> impl Strategy<Value = Real> {
    let again = prop::option::weighted(0.3, 0..=INTERVAL);
    // An account of which the first look has ended, where it begins at 0.
    (20..80u64, any::<bool>(), 0..=INTERVAL, any::<bool>(), any::<bool>(), again).prop_map(
        |(at, event_first, apart, counted, told, again)| Real {
            at,
            event_first,
            apart,
            // At least one of both; otherwise nothing shows the error.
            counted: counted || !told,
            told,
            again,
        },
    )
}

/// What happens within a tick comes in any order.
#[derive(Debug, Clone, Copy)]
enum Happens {
    Event,
    Count,
    Look,
}

/// How long each look takes until it reads the counter and until it ends, and how the things of a tick are ordered.
type Course = Vec<(u64, u64, u32)>;

fn course() -> impl Strategy<Value = Course> {
    prop::collection::vec((0..3u64, 0..4u64, any::<u32>()), 1..16)
}

/// How many decisions all this leads to.
fn decisions(errors: &[Real], course: &Course, begin: u64) -> u64 {
    let mut account = None;
    let (mut count, mut decided, mut looks) = (3, 0, 0);
    let mut next = 0;
    let mut reading: Option<(u64, Option<u64>, u64)> = None;
    for tick in 0..180 {
        let mut things = vec![Happens::Look; 3];
        for error in errors {
            let events = [Some(error.event()), error.again.map(|again| error.event() + again)];
            let events = events.into_iter().flatten().filter(|at| error.told && *at == tick).count();
            things.extend(vec![Happens::Event; events]);
            things.extend((error.counted && error.count() == tick).then_some(Happens::Count));
        }
        let mut shuffle = course[tick as usize % course.len()].2;
        let (takes, more, _) = course[looks as usize % course.len()];
        if tick == begin {
            account = Some(Account::begin(address(), Some(&counters(NonFatal, count)), looks));
        }
        while !things.is_empty() {
            shuffle = shuffle.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let thing = things.swap_remove((shuffle >> 16) as usize % things.len());
            match (thing, account.as_mut()) {
                (Happens::Count, _) => count += 1,
                (Happens::Event, Some(account)) => {
                    let due = account.heard(&fault(NonFatal, Detection::Event), looks);
                    decided += due.map_or(0, |due| due.count);
                }
                (Happens::Look, Some(account)) => match &mut reading {
                    None if tick >= next => {
                        looks += 1;
                        reading = Some((tick + takes, None, tick + takes + more));
                    }
                    Some((at, shown @ None, _)) if tick >= *at => *shown = Some(count),
                    Some((_, Some(shown), ends)) if tick >= *ends => {
                        let due = account.looked(looks, Some(&counters(NonFatal, *shown)));
                        decided += due.iter().map(|due| due.count).sum::<u64>();
                        reading = None;
                        // What ends late in a tick is a whole interval before what begins early only in the tick after that.
                        next = tick + INTERVAL + 1;
                    }
                    _ => {}
                },
                (_, None) => {}
            }
        }
    }
    assert!(!account.unwrap().is_open());
    decided
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn as_many_decisions_as_errors_where_the_kernel_counts(
        errors in prop::collection::vec(real(), 0..8),
        course in course(),
    ) {
        let counted: Vec<Real> = errors.into_iter().map(|error| Real { counted: true, ..error }).collect();
        prop_assert_eq!(decisions(&counted, &course, 0), counted.len() as u64);
    }

    #[test]
    fn as_many_decisions_as_errors_where_the_kernel_does_not_count(
        errors in prop::collection::vec(real(), 0..8),
        course in course(),
    ) {
        let uncounted: Vec<Real> = errors
            .into_iter()
            .map(|error| Real { counted: false, told: true, again: None, ..error })
            .collect();
        prop_assert_eq!(decisions(&uncounted, &course, 0), uncounted.len() as u64);
    }

    /// A kernel that counts an error before it reports the event, as Linux does.
    #[test]
    fn as_many_decisions_as_errors_that_show_after_the_account_has_begun(
        errors in prop::collection::vec(real(), 0..8),
        course in course(),
        begin in 0..80u64,
    ) {
        let errors: Vec<Real> = errors
            .into_iter()
            .map(|error| Real { counted: true, told: true, again: None, event_first: false, ..error })
            .collect();
        let heard = errors.iter().filter(|error| error.event() >= begin).count();
        prop_assert_eq!(decisions(&errors, &course, begin), heard as u64);
    }

    /// With any kernel, an error causes at most one decision and a burst at least one.
    #[test]
    fn never_more_decisions_than_errors_and_never_none(
        errors in prop::collection::vec(real(), 0..8),
        course in course(),
    ) {
        let errors: Vec<Real> = errors.into_iter().map(|error| Real { again: None, ..error }).collect();
        let decided = decisions(&errors, &course, 0);
        prop_assert!(decided <= errors.len() as u64);
        prop_assert_eq!(decided == 0, errors.is_empty());
    }

    /// Errors of both kinds are all found where those of one kind come long after those of the other.
    #[test]
    fn errors_far_apart_are_all_found(first in any::<bool>(), course in course(), at in 20..40u64) {
        let of = |at, counted| Real { at, event_first: true, apart: 0, counted, told: !counted, again: None };
        let errors = [of(at, first), of(at + 60, !first)];
        prop_assert_eq!(decisions(&errors, &course, 0), 2);
    }
}
