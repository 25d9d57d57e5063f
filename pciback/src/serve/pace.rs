//! How long a serving thread looks for its guest's next request before it sleeps.
//!
//! A guest that has read one register usually reads the next, and to be woken by an event costs more than the access itself. So the thread
//! continues to look for as long as this guest's requests have been apart lately; a guest whose requests come one at a time is waited for
//! asleep.

use std::num::NonZero;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Longest time of looking. A request that comes later than that after the last one does not pay for the processor.
const LONGEST: Duration = Duration::from_millis(2);
/// Below this, being woken takes longer than looking.
const SHORTEST: Duration = Duration::from_micros(20);

/// Threads that look just now, of all guests.
static LOOKING: AtomicUsize = AtomicUsize::new(0);

/// What a thread knows of the pace of its guest's requests.
///
/// The clock is read only while a request is waited for: under Xen that can be a system call, which costs as much as an access.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// How long to look after an answer.
    look: Duration,
    /// Since when the next request has been waited for, if it did not come at once.
    since: Option<Instant>,
    /// A request was answered since the thread last began to look.
    fresh: bool,
}

impl Pace {
    /// A request has been answered.
    pub fn answered(&mut self) {
        if let Some(since) = self.since.take() {
            self.look = next(self.look, since.elapsed());
        }
        self.fresh = true;
    }

    /// Begins to look for another request; `None`: there is none to be expected, or too many threads look already.
    pub fn begin(&mut self) -> Option<Look> {
        std::mem::take(&mut self.fresh).then_some(())?;
        Look::begin(processors())
    }

    /// Whether the thread has looked for long enough; asked after a moment in which no request came.
    pub fn is_over(&mut self) -> bool {
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        now.saturating_duration_since(since) >= self.look
    }
}

/// How long to look next, after a request that was waited for during `gap`.
fn next(look: Duration, gap: Duration) -> Duration {
    let wanted = gap * 2;
    let next = if gap > LONGEST {
        look / 2
    } else if wanted > look {
        wanted.min(LONGEST)
    } else {
        look - (look - wanted) / 8
    };
    if next < SHORTEST && gap > LONGEST { Duration::ZERO } else { next.max(SHORTEST) }
}

/// One processor stays free for what the guests wait for besides.
fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))
}

/// A thread looks for requests, until dropped.
#[derive(Debug)]
pub(super) struct Look(());

impl Look {
    fn begin(processors: usize) -> Option<Self> {
        let others = LOOKING.fetch_add(1, Ordering::Relaxed);
        // Made before it is judged: dropping it counts down.
        let look = Self(());
        (others + 1 < processors).then_some(look)
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        LOOKING.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    fn after(gaps: impl IntoIterator<Item = Duration>) -> Duration {
        gaps.into_iter().fold(Duration::ZERO, next)
    }

    #[test]
    fn it_looks_longer_than_the_requests_of_a_series_are_apart_and_never_longer_than_the_limit() {
        for gap in [1, 10, 100, 900, 1_999] {
            let look = after([micros(gap); 3]);
            assert!(look >= micros(gap).min(LONGEST) && look <= LONGEST, "{gap} µs: {look:?}");
        }
    }

    #[test]
    fn after_requests_that_come_one_at_a_time_it_does_not_look() {
        assert_eq!(after([Duration::from_secs(1); 3]), Duration::ZERO);
        let series = std::iter::repeat_n(micros(900), 20);
        assert_eq!(after(series.chain([Duration::from_millis(50); 8])), Duration::ZERO);
    }

    #[test]
    fn after_a_faster_series_it_looks_less_long() {
        let slow = after([micros(900); 3]);
        let fast = after([micros(900); 3].into_iter().chain([micros(20); 30]));
        assert!(fast < slow / 8, "{fast:?} after {slow:?}");
    }

    #[test]
    fn it_looks_once_after_an_answer() {
        let mut pace = Pace { look: micros(100), since: None, fresh: true };
        pace.begin();
        assert!(pace.begin().is_none());
    }

    #[test]
    fn it_looks_no_longer_than_its_guest_needs() {
        let mut pace = Pace { look: Duration::ZERO, since: None, fresh: true };
        assert!(pace.is_over());
        pace.answered();
        pace.look = Duration::MAX;
        assert!(!pace.is_over());
    }

    #[test]
    fn one_processor_is_left_alone() {
        assert!(Look::begin(1).is_none());
    }
}
