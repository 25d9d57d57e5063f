//! The virtual config space of a function. Pure: bytes in, bytes out.

pub mod access;
mod bar;
mod bytes;
mod error;
mod function;
mod image;
mod interrupts;
mod list;
mod planes;
mod policy;
mod space;

pub use access::{Access, AccessError, ConfigSpace, Width};
pub use bar::{Bar, BarKind};
pub use error::ConfigError;
pub use function::{FunctionKind, FunctionSpec, Identity};
pub use image::{FunctionImage, ImageError, InterruptMode, Life, RequestRecord, RequestStage, VectorState};
pub use interrupts::{MsiCapability, MsixCapability};
pub use list::{AnyId, Capability, CapabilityList, ListProblem};
pub use planes::Planes;
pub use policy::{
    CapabilityAction, CapabilityOverride, Initial, Origin, Place, Policy, RegisterOverride, Rule, Treatment,
};
pub use space::{SideEffect, VirtualConfigSpace};
