//! Domains, as described in xenstore.

use std::collections::BTreeSet;

use pciback::DomId;
use pciback::platform::{PlatformError, Store, StoreOps};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::outcome::Failure;

const DEVICE_MODELS: &str = "/local/domain/0/device-model/";

/// A domain as the user names it: by name or number.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct DomainName(pub String);

/// The type of a guest, in xl's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainType {
    /// Paravirtualized: it gets functions through xen-pcifront.
    Pv,
    /// Hardware-virtualized, with a device model.
    Hvm,
    /// Hardware-virtualized, without emulated devices: it has no PCI bus.
    Pvh,
    /// The toolstack that created it did not note its type.
    Unknown,
}

/// The domains that run, except dom0.
pub fn present(store: &dyn Store) -> Result<BTreeSet<DomId>, PlatformError> {
    let mut present = BTreeSet::new();
    for number in store.list("/local/domain")? {
        // A domain's nodes exist before it is introduced; its memory does not.
        if let Some(domain) = number.parse().ok().map(DomId).filter(|domain| *domain != DomId::DOM0)
            && store.domain_exists(domain)?
        {
            present.insert(domain);
        }
    }
    Ok(present)
}

/// Finds a domain by name or number; as for xl, digits are always a number.
pub fn find(store: &dyn StoreOps, wanted: &DomainName) -> Result<DomId, Failure> {
    let domain = match wanted.0.parse::<u16>() {
        Ok(number) => read_text(store, &format!("/local/domain/{number}/domid"))?
            .or(read_text(store, &format!("/local/domain/{number}/name"))?)
            .map(|_| DomId(number)),
        Err(_) => by_name(store, &wanted.0)?,
    };
    let domain = domain.ok_or_else(|| {
        let shown: String = wanted.0.chars().take(64).collect();
        Failure::not_found(format!("there is no domain '{shown}'")).hint("'xl list' shows the domains")
    })?;
    if domain == DomId::DOM0 {
        return Err(Failure::refused("domain 0 is the host itself: it has every function that no guest has")
            .of(domain));
    }
    Ok(domain)
}

fn by_name(store: &dyn StoreOps, name: &str) -> Result<Option<DomId>, Failure> {
    for number in store.list("/local/domain")? {
        let Ok(domain) = number.parse::<u16>() else { continue };
        if read_text(store, &format!("/local/domain/{domain}/name"))?.as_deref() == Some(name) {
            return Ok(Some(DomId(domain)));
        }
    }
    Ok(None)
}

/// The name of a domain.
pub fn name(store: &dyn StoreOps, domain: DomId) -> Result<Option<String>, PlatformError> {
    read_text(store, &format!("/local/domain/{domain}/name"))
}

/// The name and number of a domain, or only its number, for messages.
pub fn called(store: &dyn StoreOps, domain: DomId) -> String {
    let name = name(store, domain).ok().flatten();
    name.map_or_else(|| format!("domain {domain}"), |name| format!("'{name}' (domain {domain})"))
}

/// The type of a domain, as libxl noted it.
pub fn kind(store: &dyn StoreOps, domain: DomId) -> Result<DomainType, PlatformError> {
    Ok(match read_text(store, &format!("/libxl/{domain}/type"))?.as_deref() {
        Some("pv") => DomainType::Pv,
        Some("hvm") => DomainType::Hvm,
        Some("pvh") => DomainType::Pvh,
        _ => DomainType::Unknown,
    })
}

/// The node with the state of a domain's device model.
pub fn device_model_state(domain: DomId) -> String {
    format!("{DEVICE_MODELS}{domain}/state")
}

/// The domain whose device model has this node.
pub fn of_device_model(node: &str) -> Option<DomId> {
    node.strip_prefix(DEVICE_MODELS)?.strip_suffix("/state")?.parse().ok().map(DomId)
}

/// Whether the device model of a domain is running.
pub fn device_model_runs(store: &dyn StoreOps, domain: DomId) -> Result<bool, PlatformError> {
    Ok(read_text(store, &device_model_state(domain))?.as_deref() == Some("running"))
}

/// Whether an HVM guest has ACPI, as libxl noted it for the firmware (`acpi=` in xl.cfg).
pub fn has_acpi(store: &dyn StoreOps, domain: DomId) -> Result<bool, PlatformError> {
    Ok(read_text(store, &format!("/local/domain/{domain}/platform/acpi"))?.as_deref() != Some("0"))
}

/// Why a domain has power over other domains, in words that follow "it"; `None` if xenstore shows no reason.
///
/// Xen has no interface that lists privileged domains, so this uses what toolstacks write to xenstore, where guests cannot write.
pub fn privilege(store: &dyn StoreOps, domain: DomId) -> Result<Option<String>, PlatformError> {
    if read_text(store, "/tool/xenstored/domid")?.as_deref() == Some(domain.to_string().as_str()) {
        return Ok(Some("runs xenstored".to_owned()));
    }
    if let Some(target) = read_text(store, &format!("/local/domain/{domain}/target"))? {
        return Ok(Some(format!("is the device model of domain {target}")));
    }
    let backends = format!("/local/domain/{domain}/backend");
    for kind in store.list(&backends)? {
        if !store.list(&format!("{backends}/{kind}"))?.is_empty() {
            return Ok(Some(format!("is a driver domain, its {kind} devices are other guests'")));
        }
    }
    Ok(None)
}

fn read_text(store: &dyn StoreOps, path: &str) -> Result<Option<String>, PlatformError> {
    Ok(store.read(path)?.and_then(|bytes| String::from_utf8(bytes).ok()))
}
