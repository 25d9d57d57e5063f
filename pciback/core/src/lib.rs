//! What a Xen guest may see and do with a PCI function, decided without I/O: bytes and lists in, decisions out.
//!
//! Hardware, hypervisor, xenstore, files and guests are reached by the crates above, which pass in what they read. The order of
//! the modules is checked by `tests/layers.rs`.

#![forbid(unsafe_code)]

pub mod abi;
pub mod address;
pub mod config;
pub mod containment;
pub mod devfn;
pub mod dump;
pub mod fault;
pub mod function;
pub mod hash;
pub mod host;
pub mod inventory;
pub mod mailbox;
pub mod memory;
pub mod policy;
pub mod spec;
pub mod uuid;

pub use address::{Sbdf, SbdfError};
pub use devfn::{Devfn, DeviceNumber};
pub use function::{DomId, FunctionState};
pub use uuid::Uuid;
