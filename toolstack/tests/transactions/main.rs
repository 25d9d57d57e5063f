//! Transactions on a simulated host: whatever fails, and whenever the service dies, no function stays half attached.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that fails says so by panicking")]

mod accounts;
mod addresses;
mod advisories;
mod crashes;
mod errors;
mod failures;
mod former_owners;
mod frontend;
mod guest_vfs;
mod guests;
mod handing_over;
mod holding;
mod hvm;
mod hvm_events;
mod hvm_hotplug;
mod hvm_lines;
mod hvm_vectors;
mod hvm_window;
mod mailbox;
mod managed;
mod network;
mod operators;
mod other_toolstacks;
mod ownership;
mod path;
mod persistent;
mod power;
mod pv_roms;
mod quarantine;
mod reconcile;
mod records;
mod reserved_memory;
mod resets;
mod roms;
mod saving;
mod scale;
mod sharing;
mod starting;
mod surprises;
mod suspended;
mod together;
mod unproved;
mod vpd;
mod world;
