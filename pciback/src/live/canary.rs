//! A sign that a reset has reached the registers.
//!
//! Most of what a reset clears Linux writes back from what it saved before (`pci_save_state`, of 6.1): the header, the controls of PCI
//! Express, PCI-X, AER, LTR, VC and PTM. It writes back MSI and MSI-X only where Linux itself has enabled them, which it has not in a
//! function that it holds for a guest. So the sign is a bit of their Message Control, whose value after a reset is 0: Enable where it is
//! set, else one that does nothing while Enable is 0.

use std::io;

use super::{Changed, change, message_control, rewrite};
use crate::config::{Access, CapabilityList, ConfigSpace};
use crate::spec::{CapabilityId, legacy};

/// A bit that is set and that a reset clears (PCI Express 6.0, sections 6.6.2, 7.7.1.2 and 7.7.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Canary {
    access: Access,
    bit: u32,
    /// Whether it was set before.
    ours: bool,
}

/// Multiple Message Enable for two messages.
const TWO_MESSAGES: u16 = 1 << legacy::MSI_MULTIPLE_ENABLE.trailing_zeros();

impl Canary {
    /// Sets the sign; `None`: the function has no such bit, or does not keep it.
    pub fn set(config: &dyn ConfigSpace) -> io::Result<Option<Self>> {
        let list = CapabilityList::walk(&config.read_all()?);
        for (id, enable, idle) in [
            (CapabilityId::MSI_X, legacy::MSIX_ENABLE, legacy::MSIX_FUNCTION_MASK),
            (CapabilityId::MSI, legacy::MSI_ENABLE, TWO_MESSAGES),
        ] {
            let Some(capability) = list.legacy(id) else { continue };
            let access = message_control(capability.offset).map_err(io::Error::other)?;
            let control = config.read(access)?;
            if control == access.width().mask() {
                return Ok(None);
            }
            let set = control & u32::from(enable | idle);
            if set != 0 {
                return Ok(Some(Self { access, bit: set, ours: false }));
            }
            if change(config, access, 0, idle.into())? == Changed::Kept {
                return Ok(Some(Self { access, bit: idle.into(), ours: true }));
            }
        }
        Ok(None)
    }

    /// Whether a reset has cleared it.
    pub fn is_cleared(&self, config: &dyn ConfigSpace) -> io::Result<bool> {
        let control = config.read(self.access)?;
        Ok(control != self.access.width().mask() && control & self.bit == 0)
    }

    /// Takes the sign back, also after a reset that has cleared it: Xen has seen Function Mask being set and nothing of the reset, sets it
    /// again when it prepares MSI-X, and then refuses to assign the function (EBUSY).
    pub fn remove(&self, config: &dyn ConfigSpace) -> io::Result<()> {
        if self.ours || self.is_cleared(config)? {
            rewrite(config, self.access, self.bit, 0)?.kept_or_silent("Message Control")?;
        }
        Ok(())
    }
}
