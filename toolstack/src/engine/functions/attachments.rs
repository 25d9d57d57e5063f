//! The current attachments.
//!
//! A report of a serving thread, or the end of a reset, belongs to the attachment for which it was started. The function may have another
//! owner when it arrives; it is then ignored.

use std::collections::BTreeMap;

use pciback::Sbdf;
use pciback::serve::Attachment;

/// The current attachment of each function, from just before the guest is served until the function is withdrawn from it.
#[derive(Debug, Default)]
pub(super) struct Attachments(BTreeMap<Sbdf, Attachment>);

impl Attachments {
    pub fn begin(&mut self, attachment: Attachment) {
        self.0.insert(attachment.address(), attachment);
    }

    pub fn end(&mut self, address: Sbdf) {
        self.0.remove(&address);
    }

    /// The current attachment of a function.
    pub fn of(&self, address: Sbdf) -> Option<Attachment> {
        self.0.get(&address).copied()
    }

    pub fn is_current(&self, attachment: Attachment) -> bool {
        self.of(attachment.address()) == Some(attachment)
    }
}
