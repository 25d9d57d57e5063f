//! Everything known of a function when its filter is built.

use super::access::ConfigSpace;
use super::bytes::Bytes;
use super::error::ConfigError;
use super::list::CapabilityList;
use crate::Sbdf;
use crate::host::{HostFunction, Resource};
use crate::spec::{ExtendedCapabilityId, header, sriov};

/// Who a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Base class, subclass, programming interface, from the high byte on.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
}

impl Identity {
    /// What the host says of a function.
    pub fn of(host: &HostFunction) -> Self {
        Self {
            vendor: host.vendor,
            device: host.device,
            subsystem_vendor: host.subsystem_vendor,
            subsystem: host.subsystem,
            class: host.class,
            revision: host.revision,
        }
    }
}

/// A function of its own, or a PF's virtual one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FunctionKind {
    /// A physical function, with or without SR-IOV.
    Physical,
    /// A virtual function.
    Virtual {
        /// Its PF.
        physical_function: Sbdf,
        /// The PF's config space.
        pf_bytes: Vec<u8>,
        /// Which of the PF's VFs it is, from 0.
        index: u16,
    },
}

/// The expansion ROM that a guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GuestRom {
    /// A copy, with its bytes: a power of two from 2 KiB to 16 MiB.
    Copy(u32),
    /// The function's own, at the address that the host gave it.
    OfHost,
}

/// Everything known of a function when its filter is built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionSpec {
    /// Where it is.
    pub address: Sbdf,
    /// Its config space as hardware shows it: 64, 256 or 4,096 bytes. Registers that cannot change are served from here.
    pub bytes: Vec<u8>,
    /// BAR 0-5, the expansion ROM, a PF's VF BAR 0-5: the only source of sizes.
    pub resources: [Resource; 13],
    /// Who it is.
    pub identity: Identity,
    /// PF or VF.
    pub kind: FunctionKind,
    /// The host's number of its interrupt line, the GSI; 0 where it has none.
    pub gsi: u32,
    /// The expansion ROM that its guest has; `None` where the guest has none.
    pub rom: Option<GuestRom>,
}

impl FunctionSpec {
    /// Reads what hardware and host say. `pf` and `pf_hw` are needed for a VF only.
    pub fn read(
        host: &HostFunction,
        pf: Option<&HostFunction>,
        hw: &dyn ConfigSpace,
        pf_hw: Option<&dyn ConfigSpace>,
    ) -> Result<Self, ConfigError> {
        let address = host.address;
        let bytes = snapshot(address, hw)?;
        let kind = match host.physical_function {
            None => FunctionKind::Physical,
            Some(physical_function) => {
                let no_pf = || ConfigError::NoPhysicalFunction { address, physical_function };
                let (pf, pf_hw) = pf.zip(pf_hw).ok_or_else(no_pf)?;
                let index = pf.virtual_functions.iter().position(|vf| *vf == address).unwrap_or(0) as u16;
                let pf_bytes = snapshot(physical_function, pf_hw)?;
                FunctionKind::Virtual { physical_function, pf_bytes, index }
            }
        };
        let mut identity = Identity::of(host);
        if let FunctionKind::Virtual { pf_bytes, physical_function, .. } = &kind {
            // Vendor and Device ID of a VF read FFFFh; software takes the PF's vendor and the capability's VF Device ID
            // (PCI Express 6.0, sections 9.3.4.1.1 and 9.3.3.11).
            let capability = CapabilityList::walk(pf_bytes)
                .extended(ExtendedCapabilityId::SR_IOV)
                .ok_or(ConfigError::NoPhysicalFunction { address, physical_function: *physical_function })?
                .offset;
            identity.vendor = pf_bytes.word(header::VENDOR_ID);
            identity.device = pf_bytes.word(capability + sriov::VF_DEVICE_ID);
        }
        Ok(Self { address, bytes, resources: host.resources, identity, kind, gsi: host.irq, rom: None })
    }

    /// Whether a guest is given its interrupt line: lines beyond 255 have no place in Interrupt Line, and VFs have none.
    pub fn has_line(&self) -> bool {
        !self.is_virtual() && (1..256).contains(&self.gsi)
    }

    /// Whether it is a VF.
    pub fn is_virtual(&self) -> bool {
        matches!(self.kind, FunctionKind::Virtual { .. })
    }
}

/// Reads a whole config space.
fn snapshot(address: Sbdf, hw: &dyn ConfigSpace) -> Result<Vec<u8>, ConfigError> {
    let bytes = hw.read_all().map_err(|source| ConfigError::Read { address, source })?;
    // The status register of a function that is there never reads all ones, a VF's neither: reserved bits are 0.
    if bytes.dword(header::COMMAND) == u32::MAX {
        return Err(ConfigError::NoAnswer { address });
    }
    Ok(bytes)
}
