//! The virtual config space of a function. Pure: bytes in, bytes out.

pub mod access;
mod bar;
pub(crate) mod bytes;
mod compile;
mod compile_list;
mod controls;
mod error;
mod filter;
mod function;
mod image;
mod interrupts;
mod list;
mod mailbox;
mod masked;
mod policy;
mod records;
mod rom;
mod rules;
pub(crate) mod shape;
mod space;
mod vf_routing;
mod virtual_functions;

pub use crate::spec::AnyId;
pub use access::{Access, AccessError, CONVENTIONAL_SIZE, ConfigSpace, EXTENDED_SIZE, Width};
pub use bar::{Bar, BarKind};
pub use controls::ControlRegister;
pub use error::ConfigError;
pub use filter::{Bits, Deferred, Filter, Model, NamedRegister, RefusedOverride, Segment};
pub use function::{FunctionKind, FunctionSpec, GuestRom, Identity};
pub use image::{FunctionImage, GUEST_END};
pub use interrupts::{BarPart, MsiCapability, MsixCapability};
pub use list::{Capability, CapabilityList, ListProblem, MsixFault};
pub use mailbox::MailboxPlace;
pub use masked::{MaskedWrite, MaskedWrites};
pub use policy::{
    ByGuest, CapabilityAction, CapabilityOverride, Initial, MailboxPeers, MailboxWish, Origin, Place, Policy,
    RegisterOverride, Rule, Selector, Treatment, VendorPart,
};
pub use records::{ImageError, ImageOwner, InterruptMode, RequestRecord, RequestStage, VectorState};
pub use rom::{ROM_LIMIT, RomError, rom_contents};
pub use rules::is_guarded;
pub use space::{SideEffect, VirtualConfigSpace};
pub use vf_routing::{PortAbove, Unroutable, VfRouting};
pub use virtual_functions::{GuestVfs, MOST_BESIDE_PF, MOST_BY_GUEST, NO_DRIVERS_ID};
