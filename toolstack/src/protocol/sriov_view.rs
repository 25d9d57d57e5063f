//! The view of a PF's SR-IOV capability.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the registers of a PF's SR-IOV capability have now (PCI Express 6.0, section 9.3.3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SriovView {
    /// VF Enable: whether the VFs exist in hardware.
    pub enabled: bool,
    /// NumVFs.
    pub num_vfs: u16,
    /// InitialVFs.
    pub initial_vfs: u16,
    /// TotalVFs. The PF's driver may permit fewer.
    pub total_vfs: u16,
    /// First VF Offset, in Routing IDs from the PF's.
    pub first_vf_offset: u16,
    /// VF Stride, in Routing IDs.
    pub vf_stride: u16,
    /// ARI Capable Hierarchy, on which offset and stride may depend.
    pub ari_capable_hierarchy: bool,
    /// The bits of SR-IOV Capabilities that are 1, as the specification calls them: for example `VF Migration Capable`.
    pub capabilities: Vec<String>,
    /// The same of SR-IOV Control: for example `VF Enable`, `VF Migration Enable`.
    pub control: Vec<String>,
    /// The same of SR-IOV Status: `VF Migration Status`.
    pub status: Vec<String>,
}
