//! Serving PCI functions to Xen guests: the platform they are on, their live registers, and the threads that answer guests.
//!
//! What needs no I/O is in `xpci-core`, and is found here under its own names. Hardware, hypervisor, xenstore and guests are
//! reached only through the small traits of [`platform`].

pub mod live;
pub mod platform;
pub mod serve;

pub use xpci_core::{
    Devfn, DeviceNumber, DomId, FunctionState, Sbdf, SbdfError, Uuid, abi, address, config, containment,
    dump, fault, function, hash, host, inventory, mailbox, memory, policy, spec, uuid,
};
