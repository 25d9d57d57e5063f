//! What a Xen guest may see and do with a PCI function, and how that is served.
//!
//! Direction of dependencies: `spec` <- `config` <- `policy`; `config` <- `pv` -> `platform`; `spec` <- `fault`; `config`, `containment`, `platform` <- `live` <- `pv`. What is not `pv`, `live` or `platform` is pure:
//! hardware, hypervisor, xenstore and guests are reached only through the small traits of [`platform`].

pub mod address;
pub mod config;
pub mod containment;
pub mod dump;
pub mod fault;
pub mod function;
pub mod hash;
pub mod hvm;
pub mod inventory;
pub mod live;
pub mod platform;
pub mod policy;
pub mod pv;
pub mod spec;
pub mod uuid;

pub use address::{Sbdf, SbdfError};
pub use function::{DomId, FunctionState};
pub use uuid::Uuid;
