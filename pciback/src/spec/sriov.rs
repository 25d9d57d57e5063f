//! Offsets in the SR-IOV extended capability (PCI Express 6.0, section 9.3.3).

/// VF Device ID.
pub const VF_DEVICE_ID: u16 = 0x1a;
/// The first of six VF BARs.
pub const VF_BAR0: u16 = 0x24;
