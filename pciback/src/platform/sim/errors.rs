//! Errors that the simulated host's kernel reports, on a test's command.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::failures::{Failures, Subject};
use super::locked;
use crate::Sbdf;
use crate::fault::{ErrorCounters, Severity};
use crate::platform::{ErrorEvent, ErrorEvents, ErrorSource, PlatformError, Result};

/// The kernel's tracing and counters; clones are the same.
#[derive(Clone, Default)]
pub(super) struct Kernel {
    queues: Arc<Mutex<Vec<Weak<Queue>>>>,
    counters: Arc<Mutex<BTreeMap<Sbdf, ErrorCounters>>>,
    /// Whether the platform keeps AER from the kernel.
    withheld: Arc<AtomicBool>,
}

struct Queue {
    events: Mutex<VecDeque<ErrorEvent>>,
    ready: EventFd,
}

impl Kernel {
    /// Sends an event to all subscribers.
    pub fn tell(&self, event: ErrorEvent) {
        for queue in locked(&self.queues).iter().filter_map(Weak::upgrade) {
            locked(&queue.events).push_back(event);
            // A counter of 64 bits does not overflow.
            let _ = queue.ready.write(1);
        }
    }

    /// The platform keeps AER from the kernel, or grants it.
    pub fn withhold(&self, withheld: bool) {
        self.withheld.store(withheld, Ordering::SeqCst);
    }

    /// Counts errors of a function.
    pub fn count(&self, address: Sbdf, severity: Severity, number: u64) {
        let mut counters = locked(&self.counters);
        let counters = counters.entry(address).or_default();
        match severity {
            Severity::Correctable => counters.correctable += number,
            Severity::NonFatal => counters.non_fatal += number,
            Severity::Fatal => counters.fatal += number,
        }
    }
}

pub(super) struct SimErrors {
    kernel: Kernel,
    failures: Failures,
}

impl SimErrors {
    pub fn new(kernel: &Kernel, failures: &Failures) -> Self {
        Self { kernel: kernel.clone(), failures: failures.clone() }
    }
}

struct SimErrorEvents(Arc<Queue>);

impl ErrorSource for SimErrors {
    fn events(&self) -> Result<Box<dyn ErrorEvents>> {
        let error = |cause| PlatformError::new("trace errors through", "the simulated kernel", cause);
        self.failures.check("error_events", Subject::default()).map_err(error)?;
        // Counts down: as many reads as there are events.
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE;
        let ready = EventFd::from_value_and_flags(0, flags).map_err(|errno| error(errno.into()))?;
        let queue = Arc::new(Queue { events: Mutex::default(), ready });
        let mut queues = locked(&self.kernel.queues);
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(Arc::downgrade(&queue));
        Ok(Box::new(SimErrorEvents(queue)))
    }

    fn counters(&self, address: Sbdf) -> Result<Option<ErrorCounters>> {
        let failed = self.failures.check("error_counters", Subject::from(address));
        failed.map_err(|cause| PlatformError::new("read the error counters of", address, cause))?;
        Ok(Some(locked(&self.kernel.counters).get(&address).copied().unwrap_or_default()))
    }

    fn handled(&self, root_port: Sbdf) -> Result<bool> {
        let failed = self.failures.check("error_handled", Subject::from(root_port));
        failed.map_err(|cause| PlatformError::new("ask who handles the errors of", root_port, cause))?;
        Ok(!self.kernel.withheld.load(Ordering::SeqCst))
    }
}

impl ErrorEvents for SimErrorEvents {
    fn event_fd(&self) -> BorrowedFd<'_> {
        self.0.ready.as_fd()
    }

    fn next_event(&self) -> Option<ErrorEvent> {
        let event = locked(&self.0.events).pop_front();
        if event.is_some() {
            let _ = self.0.ready.read();
        }
        event
    }
}
