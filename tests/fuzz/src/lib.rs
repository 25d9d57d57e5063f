//! What the fuzz targets do with their input. They panic when something does not hold.
//!
//! One function a target, so that `targets/` holds nothing else.

mod byhand;
mod dump;
mod guest;
mod hypervisor;
mod mailbox;
mod policy;
mod rom;
mod space;
mod walk;

pub use dump::dump_parser;
pub use guest::ring_request;
pub use mailbox::mailbox;
pub use policy::policy_parser;
pub use rom::rom;
pub use walk::capability_walk;
