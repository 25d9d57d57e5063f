//! What the fuzz targets do with their input. They panic when something does not hold.
//!
//! One function a target, so that `targets/` holds nothing else.

mod byhand;
mod control;
mod dump;
mod files;
mod guest;
mod hvm;
mod hypervisor;
mod image;
mod ioreq;
mod mailbox;
mod netlink;
mod policy;
mod qmp;
mod rom;
mod settings;
mod space;
mod state;
mod store;
mod walk;
mod xenstore;

pub use control::control_line;
pub use dump::dump_parser;
pub use guest::ring_request;
pub use image::image;
pub use ioreq::ioreq;
pub use mailbox::mailbox;
pub use netlink::netlink;
pub use policy::policy_parser;
pub use qmp::qmp;
pub use rom::rom;
pub use settings::settings;
pub use state::state_file;
pub use walk::capability_walk;
pub use xenstore::xenstore;
