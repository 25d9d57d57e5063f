//! Serving functions to guests: one function as its guest uses it, and one thread for each guest, with the engine's orders and what it
//! reports. How a guest's requests come ([`pv`], [`hvm`]) is behind a trait, and so is what the service places in the guest for a function.

mod attachment;
mod counters;
mod device;
mod function;
mod guest_vfs;
pub mod hvm;
mod interrupts;
mod mailbox;
mod orders;
mod pace;
pub mod pv;
mod revocation;
mod roster;
mod server;
#[cfg(test)]
mod test_machine;
mod upkeep;
mod worker;

pub use attachment::Attachment;
pub use counters::{Counters, TIME_BOUNDS};
pub use function::{Demand, GuestFunction};
pub use guest_vfs::VfRequests;
pub use interrupts::InterruptError;
pub use mailbox::{FunctionMailbox, Mailboxes};
pub use orders::{NotNotified, Notification, ServerReport, ServerStuck, Taken};
use roster::Roster;
pub use server::Server;
