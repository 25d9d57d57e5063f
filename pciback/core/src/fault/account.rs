//! The account of a function's errors, through which both views of them pass: events, and the kernel's counters.
//!
//! One error usually shows twice: the kernel counts it and traces it. Either may be missing. An event gets lost when a buffer
//! overflows; Linux 6.1 traces a fatal error of an endpoint without counting it, because it cannot read the endpoint's registers; and
//! an error that a port contained may show as neither. The account matches the views, so that one error leads to one decision.
//!
//! # Time
//!
//! Time is counted in looks. A look is one reading of the counters; looks are numbered from 1, one begins at least an interval after
//! the one before has ended, and when it begins the events that came before have been taken. An event carries the number of looks that
//! had begun when it came. The account assumes that the two views of one error are at most an interval apart, in either order. Then
//!
//! - the count of an event that came after the begin of look *n* shows in look *n + 2* at the latest. Look *n* itself may have read the
//!   counter before the error and end after the event: it says nothing about that event;
//! - the event of a count that look *n* found comes before look *n + 1* begins.
//!
//! # Bursts
//!
//! Evidence that follows other evidence within two looks is one burst. The first event of a burst is decided about at once. What follows
//! waits for a look, because only the counter tells another error from another view of the same one. So a burst causes at most one
//! decision a look, however long it is, and a single error is never delayed.
//!
//! # What cannot be distinguished
//!
//! Two errors of one kind in one burst, one that was not counted and one without an event, look like one error with both views. They
//! are taken as one: a function is never reset twice for one error, and what the guest had in the function is gone after the first reset
//! anyway. For the same reason, where the counter moved in a burst it says how many errors there were, and events beyond its count are
//! repetitions. Where the counter did not move each event is an error. No kernel known mixes the two: for one function and severity
//! Linux counts all errors or none.
//!
//! Errors that were counted before the account began and whose events come afterwards are errors without a count. In the burst
//! with such events those beyond the counter's count are errors, not repetitions.
//!
//! An error without an event is decided about at the second look that shows it. An event that comes more than two looks after that
//! is another error.

use super::{Detection, ErrorCounters, Fault, Severity};
use crate::Sbdf;

/// Evidence of a burst is at most so many looks apart.
const REACH: u64 = 2;

/// The errors of one function.
#[derive(Debug, Clone)]
pub struct Account {
    address: Sbdf,
    tallies: [Tally; 3],
}

impl Account {
    /// Begins with what the counters show now, after so many looks have begun; `None` where they cannot be read. Then it begins with the
    /// first look that reads them.
    pub fn begin(address: Sbdf, counters: Option<&ErrorCounters>, looks: u64) -> Self {
        let tally = |severity| Tally {
            counter: counters.map(|counters| counters.of(severity)),
            since: looks,
            burst: None,
        };
        Self { address, tallies: Severity::ALL.map(tally) }
    }

    /// An event came, or a port contained an error, after so many looks had begun. Returns the error that needs a decision at once.
    pub fn heard(&mut self, fault: &Fault, looks: u64) -> Option<Fault> {
        self.tallies[fault.severity as usize].heard(fault, looks)
    }

    /// The look with this number has ended and read the counters; `None` where they could not be read. Returns what needs a decision
    /// about, at most one fault of each severity.
    pub fn looked(&mut self, look: u64, counters: Option<&ErrorCounters>) -> Vec<Fault> {
        let address = self.address;
        let tallies = Severity::ALL.into_iter().zip(&mut self.tallies);
        let due = tallies.filter_map(|(severity, tally)| {
            let due = tally.looked(look, counters.map(|counters| counters.of(severity)))?;
            let Due { count, status, detection } = due;
            Some(Fault { address, severity, status, detection, count })
        });
        due.collect()
    }

    /// Whether a burst has not ended: then looks must follow.
    pub fn is_open(&self) -> bool {
        self.tallies.iter().any(|tally| tally.burst.is_some())
    }
}

/// The errors of one function and severity.
#[derive(Debug, Clone)]
struct Tally {
    /// What the counter showed last.
    counter: Option<u64>,
    /// How many looks had begun when it was read first.
    since: u64,
    burst: Option<Burst>,
}

/// An error that needs a decision.
struct Due {
    count: u64,
    status: u32,
    detection: Detection,
}

impl Tally {
    fn heard(&mut self, fault: &Fault, looks: u64) -> Option<Fault> {
        let burst = self.burst.get_or_insert_default();
        burst.from_begin |= looks <= self.since + 1;
        burst.heard(fault, looks)
    }

    fn looked(&mut self, look: u64, counter: Option<u64>) -> Option<Due> {
        let more = match (self.counter, counter) {
            (Some(before), Some(now)) => increase(before, now),
            (None, Some(_)) => {
                self.since = look;
                self.burst.iter_mut().for_each(|burst| burst.from_begin = true);
                0
            }
            (_, None) => 0,
        };
        self.counter = counter;
        if more > 0 {
            self.burst.get_or_insert_default();
        }
        let burst = self.burst.as_mut()?;
        let due = burst.looked(look, more, counter.is_some());
        if look >= burst.last + REACH {
            self.burst = None;
        }
        due
    }
}

/// What was counted between two readings. A counter that shows less than before has wrapped, or begun again at 0 with its device.
fn increase(before: u64, now: u64) -> u64 {
    let more = now.wrapping_sub(before);
    if now >= before || more <= u64::from(u32::MAX) { more } else { now }
}

/// Evidence of which each part came soon after another.
#[derive(Debug, Clone, Default)]
struct Burst {
    /// How many errors the counter showed.
    counted: u64,
    /// Events that came after the begin of one of the last looks, by its number: their counts may still come.
    young: Vec<(u64, u64)>,
    /// All other events.
    old: u64,
    /// How many errors were decided about.
    decided: u64,
    /// The errors of events that had no decision yet.
    status: u32,
    /// The look before or at which the last evidence came.
    last: u64,
    /// A containment stands for an event that has not come.
    contained: bool,
    /// There may be events of errors that were counted before the account began.
    from_begin: bool,
}

impl Burst {
    fn events(&self) -> u64 {
        self.young.iter().fold(self.old, |sum, (_, number)| sum.saturating_add(*number))
    }

    fn heard(&mut self, fault: &Fault, looks: u64) -> Option<Fault> {
        self.last = self.last.max(looks);
        let containment = fault.detection == Detection::Containment;
        if containment && self.decided > 0 {
            // Nothing can arrive from below the port after the error that made it cut off the link.
            return None;
        }
        if !containment && std::mem::take(&mut self.contained) {
            return None;
        }
        self.contained = containment;
        match self.young.last_mut() {
            Some((look, number)) if *look == looks => *number = number.saturating_add(fault.count),
            _ => self.young.push((looks, fault.count)),
        }
        if self.decided > 0 {
            self.status |= fault.status;
            return None;
        }
        self.decided = fault.count;
        Some(*fault)
    }

    fn looked(&mut self, look: u64, more: u64, has_counter: bool) -> Option<Due> {
        if more > 0 {
            self.last = self.last.max(look);
        }
        let events = self.events();
        // Their events would have come.
        let sure = self.counted;
        self.counted = self.counted.saturating_add(more);
        let counts_may_come = |(begun, _): &(u64, u64)| has_counter && look < begun + REACH;
        let old = self.young.extract_if(.., |event| !counts_may_come(event));
        self.old = old.fold(self.old, |sum, (_, number)| sum.saturating_add(number));
        let uncounted = if self.counted == 0 || self.from_begin { self.old } else { 0 };
        let errors = sure.max(self.counted.min(events)).max(uncounted);
        let count = errors.saturating_sub(self.decided);
        if count == 0 {
            return None;
        }
        let heard = events > self.decided;
        self.decided = errors;
        if !heard {
            // The event may still come.
            self.last = self.last.max(look);
        }
        let detection = if heard { Detection::Event } else { Detection::Counters };
        Some(Due { count, status: std::mem::take(&mut self.status), detection })
    }
}

#[cfg(test)]
mod tests;
