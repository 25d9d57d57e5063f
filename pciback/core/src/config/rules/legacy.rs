//! Capabilities of the first 256 bytes.

use super::{CapabilityRules, EVENT, hidden, row, shown};
use crate::config::policy::{Initial, Treatment};
use crate::spec::{AnyId, CapabilityId, express, legacy as spec};

const fn id(id: CapabilityId) -> AnyId {
    AnyId::Legacy(id)
}

/// Virtual, as hardware showed it at first.
const KEPT: Treatment = Treatment::Virtual(Initial::Hardware);

/// The capabilities.
pub const RULES: &[CapabilityRules] = &[
    shown(
        id(CapabilityId::POWER_MANAGEMENT),
        Treatment::VIRTUAL,
        "the host keeps the function in D0: a sleeping one would lose its config space and not answer",
        &[
            row(2, 0xf800, Treatment::ZERO, "a guest's function cannot wake the host"),
            row(
                spec::PMCSR,
                1 << 3,
                Treatment::Fixed(1 << 3),
                "the power state is the guest's own: hardware stays in D0 and loses nothing",
            ),
            row(spec::PMCSR, 1 << 8, Treatment::ZERO, "PME would wake the host"),
            row(spec::PMCSR, 1 << 15, Treatment::ZERO, "PME belongs to the host"),
            row(spec::PMCSR, 0x1e00, Treatment::ZERO, "the data register shows its first value only"),
        ],
    ),
    shown(
        id(CapabilityId::AGP),
        Treatment::VIRTUAL,
        "AGP transfers are set up together with the host bridge",
        &[],
    ),
    shown(
        id(CapabilityId::VPD),
        Treatment::VIRTUAL,
        "the host reads VPD for the guest, through its kernel, which has its size, its lock and quirks of devices",
        &[
            row(
                spec::VPD_ADDRESS,
                0x8000,
                Treatment::VIRTUAL,
                "the host sets it when it has read; a guest's 1, which would change the card permanently, starts nothing",
            ),
            row(
                4,
                0xffff_ffff,
                Treatment::VIRTUAL,
                "what the host has read; it is never written to the card",
            ),
        ],
    ),
    shown(id(CapabilityId::SLOT_ID), Treatment::ReadOnly, "chassis numbers are the host's", &[]),
    CapabilityRules {
        id: id(CapabilityId::MSI),
        hidden: None,
        controls: (Treatment::VIRTUAL, "Xen programs MSI: a guest's message could reach any interrupt"),
        events: (Treatment::Event, EVENT),
        rows: &[
            row(spec::MESSAGE_CONTROL, 0x000e, Treatment::ZERO, "one vector is delivered, not several"),
            row(spec::MESSAGE_CONTROL, 0x0600, Treatment::ZERO, "extended message data is not offered"),
        ],
        guarded: true,
    },
    hidden(id(CapabilityId::COMPACT_PCI_HOT_SWAP), "hot swap is between the host and the operator"),
    shown(
        id(CapabilityId::PCI_X),
        KEPT,
        "the bus and its bridge are set up by the host",
        &[row(2, 1 << 1, Treatment::Pass, "relaxed ordering concerns the function's own requests only")],
    ),
    shown(
        id(CapabilityId::HYPER_TRANSPORT),
        Treatment::ReadOnly,
        "link and interrupt mapping are the host's",
        &[],
    )
    .quiet("errors of the link are the host's"),
    shown(id(CapabilityId::DEBUG_PORT), Treatment::ReadOnly, "where the debug port is, does not change", &[]),
    shown(
        id(CapabilityId::VENDOR_SPECIFIC),
        KEPT,
        "the vendor's registers follow the policy for unknown bytes",
        &[],
    ),
    hidden(id(CapabilityId::COMPACT_PCI_RESOURCE), "it controls the chassis"),
    hidden(id(CapabilityId::HOT_PLUG), "it controls slots"),
    shown(id(CapabilityId::SUBSYSTEM_ID), Treatment::ReadOnly, "ids do not change", &[]),
    shown(
        id(CapabilityId::AGP_8X),
        Treatment::VIRTUAL,
        "AGP transfers are set up together with the host bridge",
        &[],
    ),
    hidden(id(CapabilityId::SECURE_DEVICE), "it is the host's IOMMU"),
    CapabilityRules {
        id: id(CapabilityId::MSI_X),
        hidden: None,
        controls: (Treatment::VIRTUAL, "Xen programs MSI-X: a guest's message could reach any interrupt"),
        events: (Treatment::Event, EVENT),
        rows: &[],
        guarded: true,
    },
    shown(
        id(CapabilityId::SATA),
        Treatment::Pass,
        "index and data reach registers that the function's BARs show too",
        &[],
    ),
    shown(
        id(CapabilityId::ADVANCED_FEATURES),
        Treatment::ZERO,
        "it has no other controls",
        &[row(
            spec::AF_CONTROL,
            1 << 0,
            Treatment::ZERO,
            "reads 0; a function level reset is carried out by the host, which saves and restores",
        )],
    ),
    shown(
        id(CapabilityId::ENHANCED_ALLOCATION),
        Treatment::ReadOnly,
        "addresses are the host's to place",
        &[],
    ),
    hidden(id(CapabilityId::FLATTENING_PORTAL_BRIDGE), "it routes the host's bus numbers"),
    shown(
        id(CapabilityId::PCI_EXPRESS),
        KEPT,
        "link, slot, port and fabric are the host's and shared with others",
        &[
            row(
                express::DEVICE_CONTROL,
                0x000f,
                KEPT,
                "which errors are reported is the host's decision: an error storm would hit it",
            ),
            row(
                express::DEVICE_CONTROL,
                0x0810,
                Treatment::Pass,
                "ordering and snooping concern the function's own requests only",
            ),
            row(
                express::DEVICE_CONTROL,
                express::PAYLOAD_SIZE as u32,
                KEPT,
                "a payload larger than a switch takes is a fatal error for all below it",
            ),
            row(
                express::DEVICE_CONTROL,
                express::READ_REQUEST_SIZE as u32,
                KEPT,
                "read requests larger than the host allows starve the functions beside it; from the payload's size to the host's they pass",
            ),
            row(
                express::DEVICE_CONTROL,
                0x0700,
                KEPT,
                "tags, phantom functions and auxiliary power are agreed with the path to the root",
            ),
            row(
                express::DEVICE_CONTROL,
                express::INITIATE_FLR as u32,
                Treatment::ZERO,
                "reads 0; a function level reset is carried out by the host, which saves and restores",
            ),
            row(
                express::LINK_CONTROL,
                express::LINK_POWER as u32,
                Treatment::Pass,
                "a 0 passes, a 1 does not: drivers of devices that fail in power saving states switch them off",
            ),
            row(
                express::DEVICE_CONTROL_2,
                0x001f,
                Treatment::Pass,
                "how long the function waits for an answer concerns its own requests only",
            ),
            row(
                express::DEVICE_CONTROL_2,
                1 << 6,
                Treatment::ZERO,
                "AtomicOps need every switch up to the root, which the guest does not see",
            ),
            row(
                express::DEVICE_CONTROL_2,
                0x0300,
                Treatment::Pass,
                "ordering concerns the function's own requests and answers only",
            ),
            row(
                express::LINK_CONTROL,
                0x0030,
                Treatment::ZERO,
                "disabling or retraining the link would hit every function on it",
            ),
            row(0x12, 0xc000, Treatment::ReadOnly, "link events are the port's"),
            row(0x18, 0x7fff, Treatment::ZERO, "an endpoint has no slot"),
            row(0x1a, 0x011f, Treatment::ZERO, "an endpoint has no slot"),
            row(0x1c, 0x003f, Treatment::ZERO, "an endpoint is no root port"),
            row(0x20, 1 << 16, Treatment::ZERO, "an endpoint is no root port"),
            row(0x32, 0x8020, Treatment::ReadOnly, "link events are the port's"),
        ],
    ),
];
