//! The host's PCI functions through sysfs and netlink, and the kernel's events about them.

pub mod attributes;
pub mod blocking;
mod config;
pub mod events;
mod host;
mod network;
mod users;
mod vf_messages;

pub use host::LinuxHost;
pub use network::LinuxVfNetwork;
