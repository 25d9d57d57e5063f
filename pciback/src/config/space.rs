//! The virtual config space of one function.

use std::io;
use std::sync::Arc;

use super::access::{Access, ConfigSpace};
use super::bar::Bar;
use super::error::ConfigError;
use super::function::FunctionSpec;
use super::image::FunctionImage;
use super::interrupts::{MsiCapability, MsixCapability};
use super::planes::Planes;

/// What a write asks for beyond the bits it stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SideEffect {
    /// The guest asked for a function level reset. The host carries it out, then calls [`VirtualConfigSpace::reset`].
    FunctionLevelReset,
    /// Bits of Command changed, as the guest sees them.
    Command {
        /// Which.
        changed: u16,
        /// The bits of the register that the access covered, after it.
        value: u16,
    },
    /// The guest wrote MSI's Message Control. PV guests enable by protocol requests: nothing to do for them.
    MsiControl {
        /// The virtual register.
        value: u16,
    },
    /// The guest wrote MSI-X's Message Control. PV guests enable by protocol requests: nothing to do for them.
    MsixControl {
        /// The virtual register.
        value: u16,
    },
    /// The guest changed the power state it sees; hardware stays in D0.
    PowerState {
        /// 0-3: D0 to D3hot.
        state: u8,
    },
}

/// The virtual config space of one function, for one guest.
#[derive(Debug)]
pub struct VirtualConfigSpace {
    planes: Arc<Planes>,
    image: FunctionImage,
    bars: Vec<Bar>,
}

impl VirtualConfigSpace {
    /// Begins a life with a guest: overwrites the image.
    pub fn create(
        spec: &FunctionSpec,
        planes: Arc<Planes>,
        mut image: FunctionImage,
    ) -> Result<Self, ConfigError> {
        image.begin(spec.address, planes.layout_hash())?;
        image.complete();
        Ok(Self { bars: Bar::of(spec), planes, image })
    }

    /// Takes over the image of an earlier life of the service. An image of another version, boot, domain, function or layout,
    /// and one that holds impossible values, is an error.
    pub fn resume(
        spec: &FunctionSpec,
        planes: Arc<Planes>,
        image: FunctionImage,
    ) -> Result<Self, ConfigError> {
        image.check(spec.address, planes.layout_hash())?;
        Ok(Self { bars: Bar::of(spec), planes, image })
    }

    /// What the guest reads.
    pub fn read(&self, access: Access, hw: &dyn ConfigSpace) -> io::Result<u32> {
        hw.read(access)
    }

    /// Carries out a guest's write.
    pub fn write(
        &mut self,
        access: Access,
        value: u32,
        hw: &dyn ConfigSpace,
    ) -> io::Result<Option<SideEffect>> {
        hw.write(access, value)?;
        Ok(None)
    }

    /// The function's MSI capability, where it has one that the guest sees.
    pub fn msi(&self) -> Option<MsiCapability> {
        None
    }

    /// The function's MSI-X capability, where it has one that the guest sees.
    pub fn msix(&self) -> Option<MsixCapability> {
        None
    }

    /// The function's BARs, on the host.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// Sets what the guest reads as MSI Enable, after its protocol request was carried out.
    pub fn set_msi_enabled(&mut self, _enabled: bool) {}

    /// Sets what the guest reads as MSI-X Enable, after its protocol request was carried out.
    pub fn set_msix_enabled(&mut self, _enabled: bool) {}

    /// What a function level reset does to what the guest sees.
    pub fn reset(&mut self) {}

    /// The image: vectors, requests, the reset flag.
    pub fn image(&self) -> &FunctionImage {
        &self.image
    }

    /// The image, to note vectors and requests in.
    pub fn image_mut(&mut self) -> &mut FunctionImage {
        &mut self.image
    }

    /// The filter.
    pub fn planes(&self) -> &Arc<Planes> {
        &self.planes
    }
}
