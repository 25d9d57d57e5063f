//! Offsets in the SR-IOV extended capability (PCI Express 6.0, section 9.3.3).

/// SR-IOV Capabilities.
pub const CAPABILITIES: u16 = 0x04;
/// SR-IOV Control; bit 0 is VF Enable.
pub const CONTROL: u16 = 0x08;
/// SR-IOV Control: VF Enable.
pub const VF_ENABLE: u16 = 1 << 0;
/// SR-IOV Control: VF MSE, the memory space enable of all VFs.
pub const VF_MSE: u16 = 1 << 3;
/// SR-IOV Control: ARI Capable Hierarchy.
pub const ARI_CAPABLE_HIERARCHY: u16 = 1 << 4;
/// InitialVFs.
pub const INITIAL_VFS: u16 = 0x0c;
/// TotalVFs.
pub const TOTAL_VFS: u16 = 0x0e;
/// NumVFs.
pub const NUM_VFS: u16 = 0x10;
/// Function Dependency Link; one byte.
pub const FUNCTION_DEPENDENCY_LINK: u16 = 0x12;
/// First VF Offset, in Routing IDs from the PF's.
pub const FIRST_VF_OFFSET: u16 = 0x14;
/// VF Stride, in Routing IDs.
pub const VF_STRIDE: u16 = 0x16;
/// VF Device ID.
pub const VF_DEVICE_ID: u16 = 0x1a;
/// Supported Page Sizes: bit n for 2^(n+12) bytes.
pub const SUPPORTED_PAGE_SIZES: u16 = 0x1c;
/// System Page Size.
pub const SYSTEM_PAGE_SIZE: u16 = 0x20;
/// The first of six VF BARs.
pub const VF_BAR0: u16 = 0x24;
/// VF Migration State Array Offset.
pub const VF_MIGRATION_STATE: u16 = 0x3c;
