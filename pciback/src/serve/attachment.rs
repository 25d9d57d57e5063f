//! Which attachment of a function something is about.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::Sbdf;

static NEXT: AtomicU64 = AtomicU64::new(1);

/// One attachment of a function to a guest: a function that is attached again, to the same guest or another one, has another. What is
/// reported of an attachment that has ended is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attachment {
    address: Sbdf,
    token: u64,
}

impl Attachment {
    /// Another one than all before in this process.
    pub fn new(address: Sbdf) -> Self {
        Self { address, token: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// The function.
    pub const fn address(self) -> Sbdf {
        self.address
    }
}
