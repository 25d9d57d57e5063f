//! The words by which policy files name capabilities.

use crate::config::{Selector, VendorPart};
use crate::spec::{AnyId, CapabilityId, ExtendedCapabilityId as Extended};

const fn legacy(id: CapabilityId) -> AnyId {
    AnyId::Legacy(id)
}

/// The word for each capability that has a name, in the order of lists and ids.
pub const CAPABILITIES: &[(&str, AnyId)] = &[
    ("power-management", legacy(CapabilityId::POWER_MANAGEMENT)),
    ("agp", legacy(CapabilityId::AGP)),
    ("vpd", legacy(CapabilityId::VPD)),
    ("slot-id", legacy(CapabilityId::SLOT_ID)),
    ("msi", legacy(CapabilityId::MSI)),
    ("compact-pci-hot-swap", legacy(CapabilityId::COMPACT_PCI_HOT_SWAP)),
    ("pci-x", legacy(CapabilityId::PCI_X)),
    ("hyper-transport", legacy(CapabilityId::HYPER_TRANSPORT)),
    ("vendor-specific", legacy(CapabilityId::VENDOR_SPECIFIC)),
    ("debug-port", legacy(CapabilityId::DEBUG_PORT)),
    ("compact-pci-resource-control", legacy(CapabilityId::COMPACT_PCI_RESOURCE)),
    ("hot-plug-controller", legacy(CapabilityId::HOT_PLUG)),
    ("subsystem-id", legacy(CapabilityId::SUBSYSTEM_ID)),
    ("agp-8x", legacy(CapabilityId::AGP_8X)),
    ("secure-device", legacy(CapabilityId::SECURE_DEVICE)),
    ("pci-express", legacy(CapabilityId::PCI_EXPRESS)),
    ("msi-x", legacy(CapabilityId::MSI_X)),
    ("sata", legacy(CapabilityId::SATA)),
    ("advanced-features", legacy(CapabilityId::ADVANCED_FEATURES)),
    ("enhanced-allocation", legacy(CapabilityId::ENHANCED_ALLOCATION)),
    ("flattening-portal-bridge", legacy(CapabilityId::FLATTENING_PORTAL_BRIDGE)),
    ("aer", AnyId::Extended(Extended::AER)),
    ("virtual-channel", AnyId::Extended(Extended::VIRTUAL_CHANNEL)),
    ("serial-number", AnyId::Extended(Extended::SERIAL_NUMBER)),
    ("power-budgeting", AnyId::Extended(Extended::POWER_BUDGETING)),
    ("rc-link-declaration", AnyId::Extended(Extended::RC_LINK_DECLARATION)),
    ("rc-internal-link-control", AnyId::Extended(Extended::RC_INTERNAL_LINK)),
    ("rc-event-collector", AnyId::Extended(Extended::RC_EVENT_COLLECTOR)),
    ("mfvc", AnyId::Extended(Extended::MFVC)),
    ("virtual-channel-mfvc", AnyId::Extended(Extended::VIRTUAL_CHANNEL_MFVC)),
    ("rcrb-header", AnyId::Extended(Extended::RCRB_HEADER)),
    ("vsec", AnyId::Extended(Extended::VENDOR_SPECIFIC)),
    ("config-access-correlation", AnyId::Extended(Extended::CONFIG_ACCESS_CORRELATION)),
    ("acs", AnyId::Extended(Extended::ACS)),
    ("ari", AnyId::Extended(Extended::ARI)),
    ("ats", AnyId::Extended(Extended::ATS)),
    ("sr-iov", AnyId::Extended(Extended::SR_IOV)),
    ("mr-iov", AnyId::Extended(Extended::MR_IOV)),
    ("multicast", AnyId::Extended(Extended::MULTICAST)),
    ("page-request", AnyId::Extended(Extended::PAGE_REQUEST)),
    ("resizable-bar", AnyId::Extended(Extended::RESIZABLE_BAR)),
    ("dynamic-power-allocation", AnyId::Extended(Extended::DYNAMIC_POWER_ALLOCATION)),
    ("tph-requester", AnyId::Extended(Extended::TPH_REQUESTER)),
    ("ltr", AnyId::Extended(Extended::LTR)),
    ("secondary-pci-express", AnyId::Extended(Extended::SECONDARY_PCI_EXPRESS)),
    ("protocol-multiplexing", AnyId::Extended(Extended::PMUX)),
    ("pasid", AnyId::Extended(Extended::PASID)),
    ("ln-requester", AnyId::Extended(Extended::LN_REQUESTER)),
    ("dpc", AnyId::Extended(Extended::DPC)),
    ("l1-pm-substates", AnyId::Extended(Extended::L1_PM_SUBSTATES)),
    ("ptm", AnyId::Extended(Extended::PTM)),
    ("m-pcie", AnyId::Extended(Extended::MPCIE)),
    ("frs-queueing", AnyId::Extended(Extended::FRS_QUEUEING)),
    ("readiness-time-reporting", AnyId::Extended(Extended::READINESS_TIME)),
    ("dvsec", AnyId::Extended(Extended::DVSEC)),
    ("vf-resizable-bar", AnyId::Extended(Extended::VF_RESIZABLE_BAR)),
    ("data-link-feature", AnyId::Extended(Extended::DATA_LINK_FEATURE)),
    ("physical-layer-16gt", AnyId::Extended(Extended::PHYSICAL_LAYER_16GT)),
    ("lane-margining", AnyId::Extended(Extended::LANE_MARGINING)),
    ("hierarchy-id", AnyId::Extended(Extended::HIERARCHY_ID)),
    ("npem", AnyId::Extended(Extended::NPEM)),
    ("physical-layer-32gt", AnyId::Extended(Extended::PHYSICAL_LAYER_32GT)),
    ("alternate-protocol", AnyId::Extended(Extended::ALTERNATE_PROTOCOL)),
    ("system-firmware-intermediary", AnyId::Extended(Extended::SFI)),
    ("shadow-functions", AnyId::Extended(Extended::SHADOW_FUNCTIONS)),
    ("doe", AnyId::Extended(Extended::DOE)),
    ("device-3", AnyId::Extended(Extended::DEVICE_3)),
    ("ide", AnyId::Extended(Extended::IDE)),
    ("physical-layer-64gt", AnyId::Extended(Extended::PHYSICAL_LAYER_64GT)),
    ("flit-logging", AnyId::Extended(Extended::FLIT_LOGGING)),
    ("flit-performance", AnyId::Extended(Extended::FLIT_PERFORMANCE)),
    ("flit-error-injection", AnyId::Extended(Extended::FLIT_ERROR_INJECTION)),
    ("streamlined-virtual-channel", AnyId::Extended(Extended::STREAMLINED_VIRTUAL_CHANNEL)),
    ("mmio-register-block-locator", AnyId::Extended(Extended::MMIO_REGISTER_BLOCK_LOCATOR)),
    ("nop-flit", AnyId::Extended(Extended::NOP_FLIT)),
];

/// The word for a capability: its name, or its list and number.
pub fn word(id: AnyId) -> String {
    match (CAPABILITIES.iter().find(|(_, known)| *known == id), id) {
        (Some((word, _)), _) => (*word).to_owned(),
        (None, AnyId::Legacy(id)) => format!("legacy-{:#04x}", id.0),
        (None, AnyId::Extended(id)) => format!("extended-{:#06x}", id.0),
    }
}

/// The word for some capabilities, as a policy file writes it.
pub fn selector_word(which: &Selector) -> String {
    match which.part {
        None => word(which.id),
        Some(VendorPart::Vsec(id)) => format!("vsec:{id:04x}"),
        Some(VendorPart::Dvsec { vendor, id }) => format!("dvsec:{vendor:04x}:{id:04x}"),
    }
}

/// Which capabilities a word means: a name; `legacy-0x77` or `extended-0x0027` for a number; `vsec:0001` for one VSEC ID,
/// `dvsec:1e98:0008` for one vendor's DVSEC ID. `None` where it means none.
pub fn selector(word: &str) -> Option<Selector> {
    if let Some((_, id)) = CAPABILITIES.iter().find(|(known, _)| *known == word) {
        return Some((*id).into());
    }
    if let Some(number) = word.strip_prefix("legacy-") {
        return Some(legacy(CapabilityId(u8::try_from(hexadecimal(number)?).ok()?)).into());
    }
    if let Some(number) = word.strip_prefix("extended-") {
        return Some(AnyId::Extended(Extended(hexadecimal(number)?)).into());
    }
    let mut parts = word.split(':');
    let (kind, numbers) = (parts.next()?, parts.map(hexadecimal).collect::<Option<Vec<u16>>>()?);
    let (id, part) = match (kind, numbers.as_slice()) {
        ("vsec", [id]) => (Extended::VENDOR_SPECIFIC, VendorPart::Vsec(*id)),
        ("dvsec", [vendor, id]) => (Extended::DVSEC, VendorPart::Dvsec { vendor: *vendor, id: *id }),
        _ => return None,
    };
    Some(Selector { id: AnyId::Extended(id), part: Some(part) })
}

/// One to four hexadecimal digits, `0x` before them or not, as PCI ids are written.
pub fn hexadecimal(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
    let is_id = matches!(digits.len(), 1..=4) && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_id.then(|| u16::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_with_a_name_has_one_word() {
        let legacy = CapabilityId::NAMED.iter().map(|id| AnyId::Legacy(*id));
        let all = legacy.chain(Extended::NAMED.iter().map(|id| AnyId::Extended(*id)));
        let null = [AnyId::Legacy(CapabilityId::NULL), AnyId::Extended(Extended::NULL)];
        let named: Vec<AnyId> = all.filter(|id| !null.contains(id)).collect();
        assert_eq!(CAPABILITIES.iter().map(|(_, id)| *id).collect::<Vec<_>>(), named);
        for (position, (word, _)) in CAPABILITIES.iter().enumerate() {
            assert!(CAPABILITIES[position + 1..].iter().all(|(other, _)| other != word), "{word}");
        }
    }

    #[test]
    fn every_word_means_what_it_was_made_from() {
        let numbers = [AnyId::Legacy(CapabilityId(0x77)), AnyId::Extended(Extended(0xfff0))];
        for id in CAPABILITIES.iter().map(|(_, id)| *id).chain(numbers) {
            assert_eq!(selector(&word(id)), Some(id.into()));
        }
        for text in ["vsec:00ab", "dvsec:1e98:0008"] {
            assert_eq!(selector_word(&selector(text).unwrap()), text);
        }
        for text in
            ["vsec:", "vsec:1:2", "dvsec:1e98", "dvsec:1:2:3", "legacy-0x100", "legacy-", "vpd:1", "+1"]
        {
            assert_eq!(selector(text), None, "{text}");
        }
    }
}
