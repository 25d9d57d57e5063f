//! The host's PCI functions through sysfs, and the kernel's events about them.

pub mod attributes;
pub mod blocking;
mod config;
pub mod events;
mod host;

pub use host::LinuxHost;
