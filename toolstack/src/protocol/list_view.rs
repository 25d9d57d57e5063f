//! What the service shows of the host's functions, whoever has them.

use pciback::platform::Names;
use pciback::{FunctionState, Sbdf};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::FunctionView;
use crate::outcome::Obstacle;

/// Which functions to list; all of it must hold.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct ListFilter {
    /// Of this class: the first hexadecimal digits of the class code, or a part of the class's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// Bound to this driver in dom0; `none`: to no driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// In this state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<FunctionState>,
    /// Those that could be attached now, as `pci-assignable-list` has them.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub assignable: bool,
}

/// One function of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ListedView {
    /// What is shown of every function.
    #[serde(flatten)]
    pub function: FunctionView,
    /// What it is called, where the host's hardware database knows it.
    #[serde(default)]
    pub names: Names,
    /// The class code, six hexadecimal digits: base class, subclass, programming interface.
    pub class: String,
    /// The base class in one word.
    pub base_class: String,
    /// The name of the guest that has it, through xpci or through xl.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_name: Option<String>,
    /// A PF: how many VFs it can have ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_vfs: Option<u16>,
    /// ... and how many are enabled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled_vfs: Option<u16>,
    /// A VF: its number among the enabled VFs of its PF, from 0 ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf_index: Option<u16>,
    /// ... and how many those are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf_count: Option<u16>,
    /// Its network interfaces in dom0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<String>,
    /// How Linux can reset it, in the order in which it tries.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reset_methods: Vec<String>,
    /// Functions of one number cannot be kept apart by the IOMMU. The groups are numbered in the order of their first functions.
    pub iommu_group: u32,
    /// The bridges above it, the nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Sbdf>,
    /// Its NUMA node, where the host knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
}

/// One function with all that is known of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ShownView {
    /// What a list has of it.
    #[serde(flatten)]
    pub listed: ListedView,
    /// Revision id, two hexadecimal digits.
    pub revision: String,
    /// `vendor:device` of the subsystem.
    pub subsystem: String,
    /// Its Device Serial Number, as lspci prints it; a VF's is its PF's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_number: Option<String>,
    /// The way to it from its root bus, which stays when bus numbers change: the function on the root bus, then device and function
    /// number below each bridge. Absent for a VF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Its BARs, as text: number, kind, address and size.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bars: Vec<String>,
    /// Its interrupt line, the GSI, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interrupt_line: Option<u32>,
    /// The functions that the IOMMU cannot keep apart from it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub group_members: Vec<Sbdf>,
    /// What uses it in dom0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uses: Vec<String>,
    /// Everything that keeps it from a guest now.
    pub obstacles: Vec<Obstacle>,
}
