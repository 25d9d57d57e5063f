//! Answers about guests that are saved and restored, and about those that move.

use pciback::platform::VfSettings;
use pciback::{DeviceNumber, Sbdf, Uuid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DomainName, Request, Scope};

/// A host's part of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The guest leaves this host.
    Leaving,
    /// The guest comes to this host.
    Arriving,
}

/// A function that is reserved for a guest that is to be restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ReservedFunction {
    /// Its address on this host.
    pub address: Sbdf,
    /// The device number in the guest, 0-31.
    pub slot: DeviceNumber,
    /// Whether it was reserved by this command, and not when the guest was saved.
    #[serde(default)]
    pub is_new: bool,
    /// Whether this command took it from dom0.
    #[serde(default)]
    pub newly_held: bool,
    /// The network settings that this command has changed, as they were before.
    #[serde(default, skip_serializing_if = "VfSettings::is_empty")]
    pub network_before: VfSettings,
}

impl ReservedFunction {
    /// The requests that undo the reservation, if the guest is not restored.
    pub fn undoing(&self, guest: Uuid) -> Vec<Request> {
        let Self { address, is_new, newly_held, network_before, .. } = *self;
        let domain = DomainName(guest.to_string());
        let network = Request::VfSet { address, settings: network_before, persist: false };
        let forget = Request::PciDetach { domain, address, force: false, scope: Scope::Persistent };
        let release = Request::PciAssignableRemove { address, force: false, trust_former_owner: false };
        // A VF that goes back to dom0 gets its settings back by that.
        [(!newly_held && !network_before.is_empty(), network), (is_new, forget), (newly_held, release)]
            .into_iter()
            .filter_map(|(wanted, request)| wanted.then_some(request))
            .collect()
    }
}
