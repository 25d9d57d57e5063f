//! The lab: a real Xen with a real dom0, SR-IOV devices and PV guests inside one QEMU process, and what system tests
//! need to drive it.

pub mod agent;
pub mod apt;
mod cpio;
mod elf;
pub mod image;
mod modules;
pub mod packages;
mod wire;
