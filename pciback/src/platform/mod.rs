//! The outside of xpci, as small traits: the host's PCI functions, their errors, the VFs' network settings, the
//! hypervisor, xenstore, guests' rings, HVM guests.
//!
//! Two sets implement them: `xen` with `linux` on a real dom0, and `sim`, a simulated host made of bytes. Only the
//! service's `main` chooses between them. Every call that may block has a limit of its own and is safe from several threads.

pub mod addresses;
pub mod device_models;
pub mod error;
pub mod errors;
pub mod events;
pub mod host;
pub mod hvm;
pub mod hypervisor;
pub mod linux;
pub mod machine;
pub mod memory;
pub mod network;
pub mod rings;
pub mod sim;
pub mod store;
pub mod xen;

use std::sync::Arc;

pub use crate::host::{HostFunction, Names, Resource};
pub use crate::memory::PAGE;
pub use addresses::{AddressMap, AddressRange, Foreign, foreign_bar};
pub use device_models::DeviceModels;
pub use error::{Cause, PlatformError, Result, Revoked};
pub use errors::{ErrorEvent, ErrorEvents, ErrorSource};
pub use events::{HostEvent, HostEvents};
pub use host::{BarMemory, Host, Use};
pub use hvm::{HvmDomains, IoreqServer, MsiMessage, ServerId};
pub use hypervisor::{DomainInfo, Edit, Hypervisor, MsiSource, Pirq, ResetReach};
pub use machine::{Machine, XlQuestion};
pub use memory::SharedMemory;
pub use network::{VfNetwork, VfPlace, VfSetting, VfSettings};
pub use rings::{GuestRings, Ring};
pub use store::{Permissions, Store, StoreOps, WatchEvent};

/// One host to work on, real or simulated.
#[derive(Clone)]
pub struct Platform {
    /// The host's PCI functions and their drivers.
    pub host: Arc<dyn Host>,
    /// Device assignment, permissions and interrupts.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// xenstore.
    pub store: Arc<dyn Store>,
    /// The shared pages and event channels of PV guests.
    pub rings: Arc<dyn GuestRings>,
    /// HVM guests.
    pub hvm: Arc<dyn HvmDomains>,
    /// Their device models.
    pub device_models: Arc<dyn DeviceModels>,
    /// The network settings of VFs.
    pub network: Arc<dyn VfNetwork>,
    /// Errors of functions as the kernel reports them.
    pub errors: Arc<dyn ErrorSource>,
    /// How dom0 is set up.
    pub machine: Arc<dyn Machine>,
    /// What this is, for people: `Xen 4.17.6` or `simulation of FILE`.
    pub description: String,
}
