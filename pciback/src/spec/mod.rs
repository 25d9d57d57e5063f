//! The PCI specification as data: offsets, ids and bits, with the section they come from. No behaviour.

pub mod header;
pub mod id;
pub mod sriov;

pub use id::{CapabilityId, ExtendedCapabilityId};
