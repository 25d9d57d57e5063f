//! Capabilities of extended config space, by topic.

mod channels;
mod errors;
mod flit;
mod function;
mod link;
mod root;
mod security;
mod speed;
mod translation;
mod virtualization;

pub use errors::{CORRECTABLE as CORRECTABLE_ERRORS, UNCORRECTABLE as UNCORRECTABLE_ERRORS, aer, dpc};

use super::register::{Kind, Length, Register};
use super::{AnyId, CapabilitySpec, ExtendedCapabilityId};

/// All of them.
pub const CAPABILITIES: [&[CapabilitySpec]; 10] = [
    errors::CAPABILITIES,
    function::CAPABILITIES,
    translation::CAPABILITIES,
    virtualization::CAPABILITIES,
    security::CAPABILITIES,
    channels::CAPABILITIES,
    link::CAPABILITIES,
    speed::CAPABILITIES,
    flit::CAPABILITIES,
    root::CAPABILITIES,
];

const fn extended(
    id: ExtendedCapabilityId,
    section: &'static str,
    length: Length,
    rest: Kind,
    registers: &'static [Register],
) -> CapabilitySpec {
    CapabilitySpec { id: AnyId::Extended(id), section, length, registers, groups: &[], rest: Some(rest) }
}
