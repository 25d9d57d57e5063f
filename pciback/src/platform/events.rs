//! Events of the host's PCI functions, as they happen.

use std::os::fd::BorrowedFd;

use crate::Sbdf;

/// One event. It says when to look, not what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostEvent {
    /// A function appeared.
    Added(Sbdf),
    /// A function left.
    Removed(Sbdf),
    /// Something else about a function changed, for example its driver.
    Changed(Sbdf),
    /// Events were lost: anything may have happened to any function.
    Lost,
}

/// A subscription to events from now on. It is used by one thread.
pub trait HostEvents {
    /// Readable when [`Self::next_event`] has something.
    fn event_fd(&self) -> BorrowedFd<'_>;
    /// The next event, without waiting.
    fn next_event(&self) -> Option<HostEvent>;
}
