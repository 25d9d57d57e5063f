//! What the fuzz targets do with their input. They panic when something does not hold.
//!
//! One function a target, so that `targets/` holds nothing else. A target for the policy file goes here next to
//! [`dump_parser`]: parse any text, then compile what was accepted with [`space::function`].

mod byhand;
mod dump;
mod guest;
mod hypervisor;
mod space;
mod walk;

pub use dump::dump_parser;
pub use guest::ring_request;
pub use walk::capability_walk;
