//! Serving PV guests: the pciif protocol, its xenstore handshake and the thread that serves one guest.
//!
//! [`wire`] knows the shared page, [`nodes`] the names in xenstore, [`handshake`] decides what is written there and when,
//! [`function`] carries out a guest's requests on one function, [`guest`] answers a ring from its functions, and [`server`]
//! gives that a thread.

pub mod counters;
pub mod function;
pub mod guest;
pub mod handshake;
mod interrupts;
pub mod log_limit;
pub mod nodes;
pub mod server;
pub mod wire;

pub use counters::{CounterValues, Counters};
pub use function::{FunctionError, Outcome, ServedFunction};
pub use guest::{Guest, GuestReport, ResetError, Stage};
pub use handshake::{Action, Handshake, HandshakeReport, Input, Limits};
pub use nodes::{BackendSnapshot, Change, FrontendSnapshot, Nodes, Offer, OfferError, Owner, XenbusState};
pub use server::{GuestServer, HostReset, Reports, ResetDone, ResetRunner, ServerControl, ServerOptions};
pub use wire::{Answer, Command, ErrorCode, Page, Request};
