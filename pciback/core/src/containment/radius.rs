//! The blast radius of a function: who is hit when it fails, and who decides over its recovery.

use std::ops::RangeInclusive;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BRIDGE, ROOT_PORT};
use crate::Sbdf;
use crate::config::CapabilityList;
use crate::config::bytes::Bytes;
use crate::host::{HostFunction, Resource};
use crate::memory::PAGE;
use crate::spec::{CapabilityId, ExtendedCapabilityId, header};

/// ACS Control: Source Validation, P2P Request Redirect, P2P Completion Redirect, Upstream Forwarding (PCI Express 6.0, section 7.7.11.3):
/// what Linux, too, wants before it calls functions isolated.
const ISOLATING: u16 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4;
/// Device/Port Types (section 7.5.3.2).
const UPSTREAM_PORT: u16 = 5;
const DOWNSTREAM_PORT: u16 = 6;
/// Drivers without `error_detected`: Linux gives up the recovery of all functions below a port that has one of theirs.
const VETOING: [&str; 6] = ["pci-stub", "pci-pf-stub", "virtio-pci", "ahci", "xhci_hcd", "snd_hda_intel"];
/// Drivers with it.
const RECOVERING: [&str; 12] = [
    "pciback",
    "igb",
    "igbvf",
    "ixgbe",
    "ixgbevf",
    "i40e",
    "iavf",
    "ice",
    "mlx5_core",
    "nvme",
    "e1000e",
    "vfio-pci",
];

/// What a driver does when Linux asks it whether an error can be recovered from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Stance {
    /// It takes part.
    Recovers,
    /// It cannot be asked, and so nothing below the port is recovered.
    Vetoes,
    /// Not known to xpci.
    Unknown,
}

/// What the driver of a function does, or its lack of one.
pub fn stance(driver: Option<&str>) -> Stance {
    match driver {
        None => Stance::Vetoes,
        Some(driver) if VETOING.contains(&driver) => Stance::Vetoes,
        Some(driver) if RECOVERING.contains(&driver) => Stance::Recovers,
        Some(_) => Stance::Unknown,
    }
}

/// A bridge above the function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Where it is.
    pub address: Sbdf,
    /// The buses below it.
    pub buses: RangeInclusive<u8>,
    /// Whether it keeps those below it from each other; a text says why not.
    pub isolates: Result<(), &'static str>,
}

impl Bridge {
    /// A bridge as its config space shows it.
    pub fn read(address: Sbdf, bytes: &[u8]) -> Self {
        let buses = bytes.byte(0x19)..=bytes.byte(0x1a);
        let list = CapabilityList::walk(bytes);
        let express = list.legacy(CapabilityId::PCI_EXPRESS).map(|capability| capability.offset);
        let isolates = match express.map(|at| bytes.word(at + 2) >> 4 & 0xf) {
            // What comes up through it has been looked at by the ports below it.
            Some(UPSTREAM_PORT) => Ok(()),
            Some(ROOT_PORT | DOWNSTREAM_PORT) => match list.extended(ExtendedCapabilityId::ACS) {
                None => Err("has no ACS"),
                Some(acs) if bytes.word(acs.offset + 6) & ISOLATING == ISOLATING => Ok(()),
                Some(_) => Err("has ACS that is not switched on"),
            },
            _ => Err("is a bridge to conventional PCI, behind which functions share one requester id"),
        };
        Self { address, buses, isolates }
    }

    /// Whether a function is below it.
    pub fn covers(&self, function: Sbdf) -> bool {
        function.segment() == self.address.segment() && self.buses.contains(&function.bus())
    }
}

/// Whether config space is a bridge's.
pub fn is_bridge(bytes: &[u8]) -> bool {
    bytes.byte(header::HEADER_TYPE) & !header::MULTI_FUNCTION == BRIDGE
}

/// A function that is hit too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Sharer {
    /// Where it is.
    pub address: Sbdf,
    /// The driver it has in dom0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// What that does in a recovery.
    pub recovery: Stance,
}

impl Sharer {
    fn of(function: &HostFunction) -> Self {
        let recovery = stance(function.driver.as_deref());
        Self { address: function.address, driver: function.driver.clone(), recovery }
    }
}

/// Who is hit when a function fails. The function itself is in none of the lists but the last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Radius {
    /// The function.
    pub address: Sbdf,
    /// The ports above, the nearest first.
    pub ports: Vec<Sbdf>,
    /// Functions below the nearest port: a link reset hits them.
    pub link: Vec<Sharer>,
    /// Functions below the root port that are not below the nearest port: a reset there hits them, too.
    pub root_port: Vec<Sharer>,
    /// Functions with the same interrupt line.
    pub line: Vec<Sharer>,
    /// Functions with a BAR in a page of memory that a BAR of this one is in.
    pub page: Vec<Sharer>,
    /// Functions that the IOMMU cannot keep apart from it.
    pub iommu_group: Vec<Sharer>,
    /// How that was found out.
    pub iommu_group_because: String,
    /// Functions below the nearest port, itself included, without which Linux recovers none of them.
    pub vetoes: Vec<Sharer>,
}

impl Radius {
    /// Looks at a function, the bridges above it from the nearest on, and others: all of the host's for everything, those below the
    /// root port for all but interrupt lines.
    pub fn of(function: &HostFunction, has_pin: bool, bridges: &[Bridge], others: &[HostFunction]) -> Self {
        let address = function.address;
        let others: Vec<&HostFunction> =
            others.iter().filter(|other| other.address != address && !other.is_bridge()).collect();
        let sharers = |shares: &dyn Fn(&HostFunction) -> bool| {
            others.iter().filter(|other| shares(other)).map(|other| Sharer::of(other)).collect::<Vec<_>>()
        };
        let (nearest, root) = (bridges.first(), bridges.last());
        let below = |bridge: Option<&Bridge>, other: &HostFunction| match bridge {
            Some(bridge) => bridge.covers(other.address),
            None => false,
        };
        let link = sharers(&|other| below(nearest, other));
        let (group, iommu_group_because) = group(function, bridges, &sharers);
        let vetoes = std::iter::once(Sharer::of(function)).chain(link.iter().cloned());
        Self {
            address,
            ports: bridges.iter().map(|bridge| bridge.address).collect(),
            root_port: sharers(&|other| below(root, other) && !below(nearest, other)),
            line: sharers(&|other| has_pin && function.irq != 0 && other.irq == function.irq),
            page: sharers(&|other| share_a_page(function, other)),
            iommu_group: group,
            iommu_group_because,
            vetoes: vetoes.filter(|sharer| sharer.recovery == Stance::Vetoes).collect(),
            link,
        }
    }
}

type Sharers<'a> = &'a dyn Fn(&dyn Fn(&HostFunction) -> bool) -> Vec<Sharer>;

/// What the functions that the IOMMU cannot keep apart have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// They are below this bridge, which does not isolate.
    Below(Sbdf),
    /// They are functions of one device, given by the address of its function 0.
    Device(Sbdf),
    /// It is alone.
    Alone(Sbdf),
}

impl Group {
    /// The group of a function below these bridges, the nearest first.
    pub fn of(function: &HostFunction, bridges: &[Bridge]) -> Self {
        let address = function.address;
        match open_bridge(bridges) {
            Some((bridge, _)) => Self::Below(bridge.address),
            None if function.physical_function.is_some() => Self::Alone(address),
            None => {
                Self::Device(Sbdf::from_devfn(address.segment(), address.bus(), address.device().devfn().0))
            }
        }
    }
}

/// Whether the IOMMU keeps a function apart from all others on any host: true of VFs below ports that isolate.
pub fn is_alone(function: &HostFunction, bridges: &[Bridge]) -> bool {
    matches!(Group::of(function, bridges), Group::Alone(_))
}

/// The bridge that does not isolate, and why. The one nearest to the root decides: nothing below it is kept apart.
fn open_bridge(bridges: &[Bridge]) -> Option<(&Bridge, &'static str)> {
    bridges.iter().rev().find_map(|bridge| Some((bridge, bridge.isolates.err()?)))
}

/// Xen shows no IOMMU groups in dom0's sysfs: they follow from the ports, as in Linux.
fn group(function: &HostFunction, bridges: &[Bridge], sharers: Sharers<'_>) -> (Vec<Sharer>, String) {
    let address = function.address;
    if let Some((bridge, why)) = open_bridge(bridges) {
        let group = sharers(&|other| bridge.covers(other.address));
        return (group, format!("{} {why}", bridge.address));
    }
    let because = match bridges {
        [] => "it is on a root bus".to_owned(),
        _ => "every port above it isolates with ACS".to_owned(),
    };
    if function.physical_function.is_some() {
        return (Vec::new(), because);
    }
    let same_device = |other: &HostFunction| {
        let place = |address: Sbdf| (address.segment(), address.bus(), address.device());
        place(other.address) == place(address) && other.physical_function.is_none()
    };
    let group = sharers(&same_device);
    match group.is_empty() {
        true => (group, because),
        false => (group, format!("{because}, but functions of one device may reach each other")),
    }
}

/// Whether memory BARs lie in the same page. VF BARs are the VFs'.
fn share_a_page(own: &HostFunction, other: &HostFunction) -> bool {
    own.bars().iter().any(|bar| has_bar_in_pages_of(other, bar))
}

/// Whether a memory BAR of a function lies in a page that a range of memory is in.
pub fn has_bar_in_pages_of(function: &HostFunction, range: &Resource) -> bool {
    let pages = |range: &Resource| {
        let is_memory = range.is_placed() && !range.is_io();
        is_memory.then(|| (range.start / PAGE, range.start.saturating_add(range.size - 1) / PAGE))
    };
    let Some((first, last)) = pages(range) else { return false };
    function.bars().iter().filter_map(pages).any(|(from, to)| first <= to && from <= last)
}
