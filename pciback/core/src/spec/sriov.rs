//! Offsets in the SR-IOV extended capability (PCI Express 6.0, section 9.3.3).

/// SR-IOV Control; bit 0 is VF Enable.
pub const CONTROL: u16 = 0x08;
/// SR-IOV Control: VF Enable.
pub const VF_ENABLE: u16 = 1 << 0;
/// SR-IOV Control: ARI Capable Hierarchy.
pub const ARI_CAPABLE_HIERARCHY: u16 = 1 << 4;
/// NumVFs.
pub const NUM_VFS: u16 = 0x10;
/// First VF Offset, in Routing IDs from the PF's.
pub const FIRST_VF_OFFSET: u16 = 0x14;
/// VF Stride, in Routing IDs.
pub const VF_STRIDE: u16 = 0x16;
/// VF Device ID.
pub const VF_DEVICE_ID: u16 = 0x1a;
/// The first of six VF BARs.
pub const VF_BAR0: u16 = 0x24;
