//! The service `xpcid` and the command `xpci`: everything around the library `pciback`.

pub mod audit;
pub mod cli;
pub mod client;
pub mod control;
pub mod descriptors;
pub mod device;
pub mod doctor;
pub mod domains;
mod drop_ins;
mod durable;
pub mod engine;
pub mod former_owners;
pub mod guest_names;
pub mod journal;
pub mod ledger;
pub mod moves;
pub mod names;
pub mod outcome;
pub mod pci_path;
pub mod persistent_settings;
pub mod policies;
pub mod protocol;
pub mod reply;
pub mod reservations;
pub mod reset_plan;
pub mod saved;
pub mod settings;
pub mod spec;
pub mod steps;
pub mod successor;
pub mod supervisor;
pub mod suspensions;
pub mod target;
pub mod transaction;

/// The version of both programs, with the commit where a release was built from a git checkout.
pub const VERSION: &str = env!("XPCI_VERSION");
