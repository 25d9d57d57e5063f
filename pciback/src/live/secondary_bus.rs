//! A reset of the secondary bus of a bridge: all functions below it are reset, the bridge itself is not (PCI Express 6.0, sections 6.6.1
//! and 7.5.1.3.13).

use std::io;
use std::time::{Duration, Instant};

use super::{change, register};
use crate::config::{Access, CapabilityList, ConfigSpace};
use crate::spec::{CapabilityId, express, header};

const BRIDGE_CONTROL: Access = Access::fixed::<{ header::BRIDGE_CONTROL }, 2>();
const SECONDARY_BUS_RESET: u32 = 1 << 6;
/// Device/Port Types (section 7.5.3.2).
const UPSTREAM_PORT: u32 = 5;
const PCI_TO_EXPRESS: u32 = 8;
/// Link Status, in the PCI Express capability, and its bit Data Link Layer Link Active (section 7.5.3.8).
const LINK_STATUS: u16 = 0x12;
const LINK_ACTIVE: u32 = 1 << 13;
/// Slot Control (section 7.5.3.10), and what makes software hear of a link that goes down: Presence Detect Changed Enable, Data Link
/// Layer State Changed Enable.
const SLOT_CONTROL: u16 = 0x18;
const NOTIFIES: u32 = 1 << 3 | 1 << 12;
/// Slot Implemented, in the capability's flags.
const HAS_SLOT: u32 = 1 << 8;

/// How long the reset is asserted: at least Trst, 1 ms (PCI Local Bus 3.0, section 4.3.2).
const ASSERTED: Duration = Duration::from_millis(2);
/// How long the link may take to train, 1 s in Linux, too.
const TRAINING: Duration = Duration::from_secs(1);
/// From the end of the reset, or of the link's training, to the first access (section 6.6.1).
const SETTLING: Duration = Duration::from_millis(100);
/// The same on a conventional bus: Trhfa, 2^25 clocks of 33 MHz (PCI Local Bus 3.0, section 4.3.2).
const CONVENTIONAL_SETTLING: Duration = Duration::from_millis(1017);

/// Where the PCI Express capability is in a bridge, what its flags say, and whether PCI Express is below.
struct Express {
    at: u16,
    flags: u32,
    is_below: bool,
}

impl Express {
    fn of(bridge: &dyn ConfigSpace) -> io::Result<Option<Self>> {
        let list = CapabilityList::walk(&bridge.read_all()?);
        let Some(at) = list.legacy(CapabilityId::PCI_EXPRESS).map(|found| found.offset) else {
            return Ok(None);
        };
        let flags = bridge.read(register(at, 2, 2).map_err(io::Error::other)?)?;
        let is_below = [express::ROOT_PORT, express::DOWNSTREAM_PORT, UPSTREAM_PORT, PCI_TO_EXPRESS]
            .contains(&(flags >> 4 & 0xf));
        Ok(Some(Self { at, flags, is_below }))
    }

    fn link_is_active(&self, bridge: &dyn ConfigSpace) -> io::Result<bool> {
        let status = bridge.read(register(self.at, LINK_STATUS, 2).map_err(io::Error::other)?)?;
        Ok(status != 0xffff && status & LINK_ACTIVE != 0)
    }
}

/// Whether the kernel is notified of a link that goes down below a bridge, and treats it as a removal of the devices.
pub fn notifies_of_removal(bridge: &dyn ConfigSpace) -> io::Result<bool> {
    let Some(express) = Express::of(bridge)?.filter(|express| express.flags & HAS_SLOT != 0) else {
        return Ok(false);
    };
    let control = bridge.read(register(express.at, SLOT_CONTROL, 2).map_err(io::Error::other)?)?;
    Ok(control & NOTIFIES != 0)
}

/// Resets all that is below a bridge. When it returns, functions there may be read; they may take up to 1 s more until they answer
/// (section 2.3.1, RRS).
pub fn reset_secondary_bus(bridge: &dyn ConfigSpace) -> io::Result<()> {
    let express = Express::of(bridge)?;
    let link = match &express {
        // Not all ports report it.
        Some(express) if express.is_below => express.link_is_active(bridge)?,
        _ => false,
    };
    let asserted =
        change(bridge, BRIDGE_CONTROL, 0, SECONDARY_BUS_RESET).and_then(|set| set.kept("Bridge Control"));
    // The specifications give these times; no event ends them.
    std::thread::sleep(ASSERTED);
    // Whether that failed or not: nothing below may stay in reset.
    change(bridge, BRIDGE_CONTROL, SECONDARY_BUS_RESET, 0)?.kept("Bridge Control")?;
    asserted?;
    if let Some(express) = express.as_ref().filter(|_| link) {
        wait_for_link(express, bridge)?;
    }
    std::thread::sleep(if express.is_some_and(|express| express.is_below) {
        SETTLING
    } else {
        CONVENTIONAL_SETTLING
    });
    Ok(())
}

fn wait_for_link(express: &Express, bridge: &dyn ConfigSpace) -> io::Result<()> {
    let deadline = Instant::now() + TRAINING;
    while !express.link_is_active(bridge)? {
        if Instant::now() >= deadline {
            return Err(io::Error::other(format!(
                "the link below it is not active {TRAINING:?} after the reset"
            )));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
