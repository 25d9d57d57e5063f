//! Taking a function from a thread that does not answer, and from one that is in the middle of long work on it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::errno::Errno;

use crate::config::{Access, ConfigSpace};

/// Whether a function was taken from the thread that serves it. Clones share the state.
///
/// A thread that hangs in a config access keeps the function's open config space, and continues with it when that access ends: by then
/// the function may have another owner. So this is looked at before each access to hardware and before anything is mapped.
///
/// Mapping a large BAR is work of seconds. It is done in parts, and pauses where there are orders for the thread.
#[derive(Debug, Clone, Default)]
pub(super) struct Revocation(Arc<State>);

#[derive(Debug, Default)]
struct State {
    revoked: AtomicBool,
    interrupted: AtomicBool,
    parts: AtomicU64,
}

impl Revocation {
    pub fn revoke(&self) {
        self.0.revoked.store(true, Ordering::SeqCst);
    }

    /// An error: the function was taken, and is not there for this thread.
    pub fn check(&self) -> Result<(), Errno> {
        if self.0.revoked.load(Ordering::SeqCst) { Err(Errno::ENODEV) } else { Ok(()) }
    }

    /// There is an order for the thread: called after it was sent.
    pub fn interrupt(&self) {
        self.0.interrupted.store(true, Ordering::SeqCst);
    }

    /// Whether there may be an order that was not looked at.
    pub fn is_interrupted(&self) -> bool {
        self.0.interrupted.load(Ordering::SeqCst)
    }

    /// All orders that were sent before are about to be looked at.
    pub fn resume(&self) {
        self.0.interrupted.store(false, Ordering::SeqCst);
    }

    /// A part of long work is done: the thread does not hang.
    pub fn advance(&self) {
        self.0.parts.fetch_add(1, Ordering::SeqCst);
    }

    /// How many parts of long work were done.
    pub fn parts(&self) -> u64 {
        self.0.parts.load(Ordering::SeqCst)
    }
}

/// A function's config space until it is revoked.
pub(super) struct Revocable {
    hardware: Box<dyn ConfigSpace>,
    revocation: Revocation,
}

impl Revocable {
    pub fn new(hardware: Box<dyn ConfigSpace>, revocation: &Revocation) -> Self {
        Self { hardware, revocation: revocation.clone() }
    }
}

impl ConfigSpace for Revocable {
    fn size(&self) -> u16 {
        self.hardware.size()
    }

    fn read(&self, access: Access) -> io::Result<u32> {
        self.revocation.check()?;
        self.hardware.read(access)
    }

    fn write(&self, access: Access, value: u32) -> io::Result<()> {
        self.revocation.check()?;
        self.hardware.write(access, value)
    }

    fn read_vpd(&self, address: u16) -> io::Result<Option<u32>> {
        self.revocation.check()?;
        self.hardware.read_vpd(address)
    }

    fn read_all(&self) -> io::Result<Vec<u8>> {
        self.revocation.check()?;
        self.hardware.read_all()
    }
}
