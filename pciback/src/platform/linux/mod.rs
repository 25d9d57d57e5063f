//! The host's PCI functions through sysfs and netlink, and the kernel's events about them.

pub mod attributes;
pub mod blocking;
mod config;
mod errors;
pub mod events;
mod host;
mod machine;
mod names;
mod network;
pub mod programs;
mod users;
mod vf_messages;

pub use errors::LinuxErrors;
pub use host::LinuxHost;
pub use machine::LinuxMachine;
pub use network::LinuxVfNetwork;
#[cfg(fuzzing)]
pub use vf_messages::{acknowledged, set_request, vfs};
