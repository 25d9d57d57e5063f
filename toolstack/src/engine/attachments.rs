//! Which attachments are in force, and the resets under way under guests.
//!
//! What a serving thread reports, and the end of a reset, concern the attachment that they were begun for. The function may have another
//! owner by the time that they arrive: then they concern nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pciback::Sbdf;
use pciback::serve::Attachment;

/// The attachments in force, by function: from the moment before the guest is served until it has lost the function.
#[derive(Debug, Default)]
pub(super) struct Attachments(BTreeMap<Sbdf, Attachment>);

impl Attachments {
    pub fn begin(&mut self, attachment: Attachment) {
        self.0.insert(attachment.address(), attachment);
    }

    pub fn end(&mut self, address: Sbdf) {
        self.0.remove(&address);
    }

    /// The one in force.
    pub fn of(&self, address: Sbdf) -> Option<Attachment> {
        self.0.get(&address).copied()
    }

    pub fn is_current(&self, attachment: Attachment) -> bool {
        self.of(attachment.address()) == Some(attachment)
    }
}

/// Functions that are being reset under their guests. A transaction that takes a function from its guest waits here for the end of that:
/// until then nobody else may have it.
#[derive(Debug, Clone, Default)]
pub(super) struct Resets(Arc<(Mutex<BTreeSet<Sbdf>>, Condvar)>);

impl Resets {
    /// One begins; `false`: one is under way.
    pub fn begin(&self, address: Sbdf) -> bool {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).insert(address)
    }

    /// Whether none is under way.
    pub fn none(&self) -> bool {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    pub fn end(&self, address: Sbdf) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
        self.0.1.notify_all();
    }

    /// Waits until none is under way; `false`: that took longer than the limit.
    pub fn wait(&self, address: Sbdf, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let running = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.0.1.wait_timeout_while(running, left, |running| running.contains(&address));
        !waited.unwrap_or_else(PoisonError::into_inner).0.contains(&address)
    }
}
