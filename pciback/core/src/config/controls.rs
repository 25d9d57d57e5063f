//! The registers of known capabilities that hold what software writes: what a guest may leave behind for the next owner.

use super::access::Access;
use super::filter::{Filter, Model};
use crate::spec::{self, AnyId, CapabilityId, ExtendedCapabilityId, express};

/// A register with bits that hold what is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlRegister {
    /// Where it is.
    pub access: Access,
    /// What the specification calls it.
    pub name: &'static str,
    /// Its bits that hold what is written, from the register's bit 0 on.
    pub mask: u32,
    /// Its bits of which a written 1 clears or starts something, and which a write must carry as 0.
    pub zero: u32,
}

/// Capabilities whose registers are not a state that can be put back: power states, windows into other registers, vendors' bytes.
const NO_STATE: [AnyId; 6] = [
    AnyId::Legacy(CapabilityId::POWER_MANAGEMENT),
    AnyId::Legacy(CapabilityId::VPD),
    AnyId::Legacy(CapabilityId::SATA),
    AnyId::Legacy(CapabilityId::VENDOR_SPECIFIC),
    AnyId::Extended(ExtendedCapabilityId::VENDOR_SPECIFIC),
    AnyId::Extended(ExtendedCapabilityId::DVSEC),
];

fn holds_state(id: AnyId) -> bool {
    !NO_STATE.contains(&id) && spec::capability(id).is_some_and(|spec| spec.rest.is_some())
}

impl Filter {
    /// The control registers of the visible known capabilities, by offset, but for those that Xen and the host program themselves
    /// (header, MSI, MSI-X).
    pub fn controls(&self) -> Vec<ControlRegister> {
        let mut controls: Vec<ControlRegister> = Vec::new();
        for segment in self.segments() {
            let Some(index) = segment.register else { continue };
            let register = &self.registers()[usize::from(index)];
            if !register.capability.is_some_and(holds_state) {
                continue;
            }
            let (bits, guarded) = (self.bits(segment.dword), self.guarded(segment.dword));
            let stored = (bits.hw_write | bits.masked) & !bits.zero_merge & !guarded & segment.mask;
            let Ok(access) = Access::new(register.offset.into(), register.width.into()) else { continue };
            if stored == 0 || access.dword() != segment.dword {
                continue;
            }
            let mask = stored >> access.shift() & access.width().mask();
            match controls.iter_mut().find(|known| known.access == access) {
                Some(known) => known.mask |= mask,
                None => controls.push(ControlRegister {
                    access,
                    name: register.name,
                    mask,
                    zero: bits.zero_merge >> access.shift() & access.width().mask(),
                }),
            }
        }
        controls.sort_by_key(|control| control.access);
        controls
    }

    /// The bits of a register that a guest's write takes to hardware.
    pub fn reaches(&self, access: Access) -> u32 {
        let by_value = match self.models().contains(&(access.offset(), Model::ReadRequestSize)) {
            true => u32::from(express::READ_REQUEST_SIZE),
            false => 0,
        };
        (self.bits(access.offset()).hw_write >> access.shift() | by_value) & access.width().mask()
    }
}
