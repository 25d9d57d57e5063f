//! Serving PV guests: the pciif protocol, its xenstore handshake and the thread that serves one guest.

mod attachment;
pub(crate) mod function;
pub mod handshake;
pub(crate) mod interrupts;
#[cfg(test)]
mod machine;
pub mod nodes;
pub(crate) mod revocation;
pub(crate) mod roster;
pub(crate) mod server;
mod upkeep;

pub use crate::abi::pciif as wire;
pub use attachment::Attachment;
pub use function::{Demand, GuestFunction};
pub use handshake::{Action, Handshake, PAUSE};
pub use interrupts::InterruptError;
pub use nodes::{FrontendView, NodeChange, RingPlace, XenbusState};
pub use server::{Counters, NotTold, Server, ServerReport, ServerStuck, Taken, Telling};
