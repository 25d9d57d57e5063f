//! The lab: a real Xen with a real dom0, SR-IOV devices and PV guests inside one QEMU process, and what system tests
//! need to drive it. A test boots a machine with [`Lab::builder`] and runs commands in it; see `tests/lab_smoke.rs`.

pub mod agent;
pub mod apt;
mod bare;
mod command;
mod cpio;
mod death;
pub mod debian;
mod elf;
mod fresh;
mod guest;
pub mod image;
mod lab;
mod link;
mod logs;
mod machine;

mod modules;
pub mod packages;
pub mod patched;
mod qemu;
mod qmp;
mod udev;
mod wire;

pub use bare::{BareGuest, Pending};
pub use command::{Command, DEFAULT_LIMIT, Output};
pub use guest::{Guest, GuestConfig};
pub use lab::{Builder, Lab, built};
pub use link::Process;
pub use logs::{scratch, workspace};
pub use machine::Devices;
pub use packages::XenVersion;
pub use wire::Exit;

#[path = "../host/mod.rs"]
pub mod host;
#[path = "../scenes/mod.rs"]
pub mod scenes;
