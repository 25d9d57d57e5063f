//! Capabilities of extended config space.

use super::{CapabilityRules, hidden, row, shown};
use crate::config::policy::{Initial, Treatment};
use crate::spec::{AnyId, ExtendedCapabilityId as Id};

const fn id(id: Id) -> AnyId {
    AnyId::Extended(id)
}

/// Virtual, as hardware showed it at first.
const KEPT: Treatment = Treatment::Virtual(Initial::Hardware);

/// When a policy shows it, sizes begin as they are.
const fn resizable(bar: Id) -> CapabilityRules {
    let reason = "resizing a BAR would move it over what the host placed behind it";
    CapabilityRules { controls: (KEPT, reason), ..hidden(id(bar), reason) }
}

/// The capabilities.
pub const RULES: &[CapabilityRules] = &[
    shown(
        id(Id::AER),
        KEPT,
        "which errors are reported, and how severe they count, is the host's decision",
        &[
            row(0x2c, 0x0000_0007, Treatment::ZERO, "an endpoint is no root port"),
            row(0x30, 0x0000_01ff, Treatment::ZERO, "an endpoint is no root port"),
            row(0x30, 0xf800_0000, Treatment::ZERO, "an endpoint is no root port"),
            row(0x34, 0xffff_ffff, Treatment::ZERO, "an endpoint is no root port"),
        ],
    ),
    shown(id(Id::SERIAL_NUMBER), Treatment::ReadOnly, "a number does not change", &[]),
    shown(
        id(Id::POWER_BUDGETING),
        Treatment::Pass,
        "the selector only chooses which number the data register shows",
        &[],
    ),
    hidden(id(Id::CONFIG_ACCESS_CORRELATION), "it belongs to the platform's trusted configuration"),
    shown(id(Id::ACS), KEPT, "access control keeps guests apart: the host's decision", &[]),
    shown(
        id(Id::ARI),
        KEPT,
        "function groups concern the other functions of the device",
        &[row(4, 0xff00, Treatment::ZERO, "a guest gets functions singly: there is no next one")],
    ),
    shown(
        id(Id::ATS),
        Treatment::VIRTUAL,
        "translated requests bypass the IOMMU: only the host may allow them",
        &[],
    ),
    hidden(id(Id::SR_IOV), "creating virtual functions is the host's"),
    hidden(id(Id::MR_IOV), "it concerns other hosts on the fabric"),
    shown(id(Id::MULTICAST), Treatment::VIRTUAL, "multicast groups span the fabric", &[]),
    shown(id(Id::PAGE_REQUEST), Treatment::VIRTUAL, "page requests go to the host's IOMMU", &[])
        .quiet("errors of page requests are the host's"),
    resizable(Id::RESIZABLE_BAR),
    resizable(Id::VF_RESIZABLE_BAR),
    shown(
        id(Id::TPH_REQUESTER),
        Treatment::VIRTUAL,
        "steering tags name the host's processors, not the guest's",
        &[],
    ),
    shown(id(Id::PASID), Treatment::VIRTUAL, "address spaces are chosen by the host's IOMMU tables", &[]),
    shown(id(Id::LN_REQUESTER), Treatment::VIRTUAL, "notifications go through the host's root complex", &[]),
    shown(id(Id::READINESS_TIME), Treatment::ReadOnly, "times do not change", &[]),
    shown(id(Id::HIERARCHY_ID), Treatment::ReadOnly, "the hierarchy is the host's", &[]),
    hidden(id(Id::NPEM), "it controls the lamps of the enclosure"),
    hidden(id(Id::SHADOW_FUNCTIONS), "it ties the function to one that the guest does not have"),
    hidden(
        id(Id::DOE),
        "a mailbox into the device's firmware and security state: denied unless a policy opens it",
    ),
    shown(id(Id::DEVICE_3), KEPT, "tags, tunnels and ordering of the path to the root are the host's", &[]),
    hidden(id(Id::IDE), "keys and streams of the link are the host's"),
    shown(id(Id::VIRTUAL_CHANNEL), KEPT, "channels are agreed with the other end of the link", &[]),
    shown(id(Id::VIRTUAL_CHANNEL_MFVC), KEPT, "channels are agreed with the other end of the link", &[]),
    shown(id(Id::MFVC), KEPT, "arbitration is between all functions of the device", &[]),
    hidden(id(Id::RC_LINK_DECLARATION), "it describes the host's root complex"),
    hidden(id(Id::RC_INTERNAL_LINK), "it controls the host's root complex"),
    hidden(id(Id::RC_EVENT_COLLECTOR), "it describes the host's root complex"),
    hidden(id(Id::RCRB_HEADER), "it controls the host's root complex"),
    shown(
        id(Id::DYNAMIC_POWER_ALLOCATION),
        KEPT,
        "the power that a device may draw is the host's decision",
        &[],
    )
    .quiet("clearing it would give up the host's control of power"),
    shown(id(Id::LTR), KEPT, "latencies concern the power management of the whole path", &[]),
    shown(id(Id::SECONDARY_PCI_EXPRESS), KEPT, "equalization concerns every function on the link", &[])
        .quiet("lane errors are the link's"),
    hidden(id(Id::PMUX), "other protocols on the link are the host's"),
    hidden(id(Id::DPC), "containment belongs to ports"),
    shown(id(Id::L1_PM_SUBSTATES), KEPT, "both ends of the link must agree", &[])
        .quiet("events of the link are the host's"),
    shown(id(Id::PTM), KEPT, "time is handed down by the host's ports", &[]),
    hidden(id(Id::MPCIE), "it controls the link"),
    hidden(id(Id::FRS_QUEUEING), "it belongs to root ports"),
    shown(id(Id::DATA_LINK_FEATURE), KEPT, "both ends of the link must agree", &[]),
    shown(id(Id::PHYSICAL_LAYER_16GT), KEPT, "equalization concerns every function on the link", &[])
        .quiet("lane errors and requests are the link's"),
    hidden(id(Id::LANE_MARGINING), "margining disturbs the link of every function on it"),
    shown(id(Id::PHYSICAL_LAYER_32GT), KEPT, "equalization concerns every function on the link", &[])
        .quiet("lane errors and requests are the link's"),
    hidden(id(Id::ALTERNATE_PROTOCOL), "other protocols on the link are the host's"),
    hidden(id(Id::SFI), "it stands between the host and its slots"),
    shown(id(Id::PHYSICAL_LAYER_64GT), KEPT, "equalization concerns every function on the link", &[])
        .quiet("lane errors and requests are the link's"),
    shown(id(Id::FLIT_LOGGING), KEPT, "errors of the link are the host's", &[])
        .quiet("errors of the link are the host's"),
    shown(id(Id::FLIT_PERFORMANCE), KEPT, "measurements of the link are the host's", &[]),
    hidden(id(Id::FLIT_ERROR_INJECTION), "it injects errors into the link"),
    shown(
        id(Id::STREAMLINED_VIRTUAL_CHANNEL),
        KEPT,
        "channels are agreed with the other end of the link",
        &[],
    ),
    shown(
        id(Id::MMIO_REGISTER_BLOCK_LOCATOR),
        Treatment::ReadOnly,
        "where registers are does not change",
        &[],
    ),
    shown(id(Id::NOP_FLIT), KEPT, "what the link sends is the host's", &[])
        .quiet("events of the link are the host's"),
    shown(id(Id::VENDOR_SPECIFIC), KEPT, "the vendor's registers follow the policy for unknown bytes", &[]),
    shown(id(Id::DVSEC), KEPT, "the vendor's registers follow the policy for unknown bytes", &[]),
];
