//! The shared page and event channel that a PV guest's frontend offers.

use std::os::fd::BorrowedFd;

use super::{Result, SharedMemory};
use crate::DomId;

/// Connects to what frontends publish.
pub trait GuestRings: Send + Sync {
    /// Maps the guest's page `grant` and binds its event channel `port`. Both numbers come from the guest: a wrong one is an
    /// error and leaves nothing mapped or bound.
    fn connect(&self, domain: DomId, grant: u32, port: u32) -> Result<Box<dyn Ring>>;
}

/// One connected guest; unmapped and unbound when dropped.
pub trait Ring: Send {
    /// The page, 4,096 bytes, which the guest may change at any time.
    fn page(&self) -> &SharedMemory;
    /// Readable when the guest has sent an event.
    fn event_fd(&self) -> BorrowedFd<'_>;
    /// Takes one event, without waiting, and lets the next one come. `false`: there was none.
    fn take_event(&self) -> Result<bool>;
    /// Sends the guest an event.
    fn notify(&self) -> Result<()>;
}
