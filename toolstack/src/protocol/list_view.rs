//! Lists of the host's functions.

use pciback::platform::Names;
use pciback::{FunctionState, Sbdf};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::FunctionView;
use crate::outcome::Obstacle;

/// A filter of functions; all of its conditions must hold.
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
    /// Only functions that can be attached now, as in `pci-assignable-list`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub assignable: bool,
}

/// One function of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ListedView {
    /// The function.
    #[serde(flatten)]
    pub function: FunctionView,
    /// Its names, if the host's hardware database has it.
    #[serde(default)]
    pub names: Names,
    /// The class code, six hexadecimal digits: base class, subclass, programming interface.
    pub class: String,
    /// The base class in one word.
    pub base_class: String,
    /// For a PF, the number of VFs that it can have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_vfs: Option<u16>,
    /// For a PF, the number of enabled VFs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled_vfs: Option<u16>,
    /// For a VF, its index among the enabled VFs of its PF, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf_index: Option<u16>,
    /// For a VF, the number of enabled VFs of its PF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf_count: Option<u16>,
    /// Its network interfaces in dom0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<String>,
    /// Linux's reset methods, in the order in which it tries them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reset_methods: Vec<String>,
    /// The group of functions that the IOMMU cannot isolate from each other. Groups are numbered in the order of their first functions.
    pub iommu_group: u32,
    /// The bridges above it, the nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Sbdf>,
    /// Its NUMA node, if the host knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
}

/// The details of one function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ShownView {
    /// The function as in a list.
    #[serde(flatten)]
    pub listed: ListedView,
    /// Revision id, two hexadecimal digits.
    pub revision: String,
    /// `vendor:device` of the subsystem.
    pub subsystem: String,
    /// Its Device Serial Number, in lspci's format; for a VF, its PF's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_number: Option<String>,
    /// Its path from the root bus, which does not depend on bus numbers: the function on the root bus, then device and function number
    /// below each bridge. Absent for a VF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Its BARs, as text: number, type, address and size.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bars: Vec<String>,
    /// Its interrupt line (GSI), if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interrupt_line: Option<u32>,
    /// The functions from which the IOMMU cannot isolate it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub group_members: Vec<Sbdf>,
    /// What uses it in dom0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uses: Vec<String>,
    /// Everything that prevents attaching it now.
    pub obstacles: Vec<Obstacle>,
}
