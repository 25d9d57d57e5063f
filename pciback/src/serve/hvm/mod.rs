//! Serving HVM guests: an ioreq server beside the guest's device model answers for the functions that the guest was given.

mod acpi;
mod addresses;
mod bars;
mod device;
mod emulated;
mod frames;
mod interrupts;
mod numbers;
mod ports;
mod recovery;
mod requests;
mod rom;
mod table;

pub use crate::abi::ioreq as wire;
pub use acpi::mcfg;
pub use device::{Device, trapped_bars};
pub use ports::{CONFIG_ADDRESS, CONFIG_PORTS, ConfigPorts};
#[cfg(fuzzing)]
pub use requests::Unthreaded;
pub use requests::{Connection, start};
pub use rom::RomCopy;

/// What the functions of one guest have of it.
#[derive(Debug, Default)]
pub struct Taken {
    /// Addresses of its BARs.
    addresses: addresses::Addresses,
    /// Physical interrupts.
    numbers: numbers::Numbers,
}

/// Where the window to extended config space is in every guest: hvmloader reports 0xfc000000 to 4 GiB as reserved, uses none of
/// it from 0xfe000000 up to the I/O APIC, and the specification wants it aligned to its size (PCI Express 6.0, section 7.2.2).
pub const ECAM_BASE: u64 = 0xfe00_0000;
/// Its size: one bus.
pub const ECAM_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests;
