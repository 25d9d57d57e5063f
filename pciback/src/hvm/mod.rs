//! Serving HVM guests: an ioreq server beside the guest's device model answers for the functions that the guest was given.

mod acpi;
mod addresses;
mod bars;
mod device;
mod interrupts;
mod ports;
mod server;
pub use crate::abi::ioreq as wire;

pub use acpi::mcfg;
pub use addresses::Addresses;
pub use device::{Device, ECAM_BASE, ECAM_BYTES};
pub use ports::{CONFIG_ADDRESS, CONFIG_PORTS, ConfigPorts};
