//! Errors of functions as the kernel reports them.

use std::os::fd::BorrowedFd;

use super::Result;
use crate::Sbdf;
use crate::fault::{ErrorCounters, Fault};

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorEvent {
    /// A function reported an error.
    Error(Fault),
    /// Events were lost: the counters show how many.
    Lost,
}

/// A subscription to events. It is used by one thread.
pub trait ErrorEvents {
    /// Readable when [`Self::next_event`] may have something.
    fn event_fd(&self) -> BorrowedFd<'_>;
    /// The next event, without waiting.
    fn next_event(&self) -> Option<ErrorEvent>;
}

/// Where errors become known.
pub trait ErrorSource: Send + Sync {
    /// Subscribes. Events since a previous process of the service was killed are included.
    fn events(&self) -> Result<Box<dyn ErrorEvents>>;
    /// How many errors of a function, or a port, the kernel has counted; `None` where it counts none: the function has no AER
    /// capability, or the platform keeps it from the kernel. Does not touch the function.
    fn counters(&self, address: Sbdf) -> Result<Option<ErrorCounters>>;
    /// Whether the kernel handles the errors that arrive at a root port. Where it does not, the platform has kept AER to itself (ACPI `_OSC`,
    /// PCI Firmware 3.3, section 4.5.1), or the kernel's command line says not to use it.
    fn handled(&self, root_port: Sbdf) -> Result<bool>;
}
