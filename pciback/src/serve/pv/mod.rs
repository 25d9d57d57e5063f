//! Serving PV guests: the pciif protocol on a shared page, and its xenstore handshake.

pub mod handshake;
mod interrupts;
pub mod nodes;
mod requests;
mod ring;

pub use crate::abi::pciif as wire;
pub use handshake::{Action, Handshake, PAUSE};
pub use nodes::{FrontendView, NodeChange, RingPlace, XenbusState};
pub use ring::start;
