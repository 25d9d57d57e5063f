//! What the service shows of a VF's network settings.

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
    /// Its number among the PF's VFs, from 0.
    pub index: u16,
    /// The PF's network interface in dom0; absent where it has none, and the VF no settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// Where it stands.
    pub state: FunctionState,
    /// The guest that has it, or gets or loses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomId>,
    /// What the PF's driver reports now; absent where it reports nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_force: Option<VfSettings>,
    /// What 'vf set' set, and where that says nothing the service's settings.
    #[serde(default, skip_serializing_if = "VfSettings::is_empty")]
    pub wished: VfSettings,
    /// What was there before, of that; it comes back when the VF goes back to dom0.
    #[serde(default, skip_serializing_if = "VfSettings::is_empty")]
    pub before: VfSettings,
    /// Which settings are in force otherwise than wished.
    pub differing: Vec<String>,
}
