//! Views of network settings of VFs.

use pciback::platform::VfSettings;
use pciback::{DomId, FunctionState, Sbdf};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The network settings of one VF.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct VfNetworkView {
    /// The VF.
    pub address: Sbdf,
    /// Its PF.
    pub physical_function: Sbdf,
    /// Its index among the PF's VFs, from 0.
    pub index: u16,
    /// The PF's network interface in dom0. If it is absent, the VF has no settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// Its state.
    pub state: FunctionState,
    /// The guest that has it, or gets or loses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomId>,
    /// The name of that guest, if it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_name: Option<String>,
    /// The settings that the PF's driver reports; absent if it reports none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_force: Option<VfSettings>,
    /// The requested settings: those of 'vf set', and for the others those of the service's settings.
    #[serde(default, skip_serializing_if = "VfSettings::is_empty")]
    pub wished: VfSettings,
    /// The earlier values of the requested settings, which are restored when the VF goes back to dom0.
    #[serde(default, skip_serializing_if = "VfSettings::is_empty")]
    pub before: VfSettings,
    /// The settings whose values differ from the requested ones.
    pub differing: Vec<String>,
}
