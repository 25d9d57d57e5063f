//! What other backends do with each capability, for `docs/capabilities.md`: xen-pciback of Linux 6.x (drivers/xen/xen-pciback), QEMU's
//! xen_pt (hw/xen/xen_pt_config_init.c), vfio-pci (drivers/vfio/pci/vfio_pci_config.c), each without its permissive mode.

use pciback::spec::{AnyId, CapabilityId, ExtendedCapabilityId};

pub const INTRODUCTION: &str = "
**Elsewhere**, under each table, says what other backends do with the capability, as their sources do it without a permissive mode:
xen-pciback (PV guests), QEMU's xen_pt (HVM guests of Xen), vfio-pci (KVM; where it leaves something to QEMU, that is said).
xen-pciback keeps every capability in the list, and drops writes of what it does not know. xen_pt takes what it does not know out of the list,
reads hardware there and drops writes; it has no extended config space. vfio-pci takes what it does not know out of the list, and passes reads
and writes of bytes that belong to no capability it knows.
";

/// What the header is elsewhere.
pub const HEADER: [&str; 3] = [
    "Command is virtual (since XSA-120): its enables, Bus Master and Memory Write and Invalidate are carried out by the kernel, Interrupt \
     Disable with `allow_interrupt_control`; BARs show the host's address, or the size after a write of 32 bits; Cache Line Size and BIST \
     reach hardware",
    "Memory and I/O Space Enable, Parity Error Response and SERR# Enable are virtual (since XSA-126), Bus Master reaches hardware, Interrupt \
     Disable is cleared in hardware only with a line; BARs, the ROM's BAR, Cache Line Size, Latency Timer and Interrupt Line are virtual",
    "Command reaches hardware, but Interrupt Disable is virtual, and BARs are unmapped before memory is switched off; BARs, the ROM's BAR, \
     Interrupt Line and Pin are virtual; Cache Line Size, Latency Timer and BIST reach hardware",
];

/// What vfio-pci keeps in the list read-only.
const READ_ONLY: &str = "shown; hardware, read only";
const NOT_LISTED: &str = "not in the list";

/// What xen-pciback, xen_pt and vfio-pci do with a capability.
pub fn peers(id: AnyId) -> [&'static str; 3] {
    match id {
        AnyId::Legacy(id) => [pciback(id), xen_pt(id), vfio(id)],
        AnyId::Extended(id) => [READ_ONLY, "no extended config space", vfio_extended(id)],
    }
}

fn pciback(id: CapabilityId) -> &'static str {
    match id {
        CapabilityId::POWER_MANAGEMENT => {
            "shown without PME; the guest's power state is set in hardware by the kernel; PME Status and Data Select reach hardware"
        }
        CapabilityId::VPD => {
            "shown; an address without the flag reaches hardware, without the kernel's lock and size; no writes of VPD"
        }
        CapabilityId::MSI => {
            "shown; read only; the guest asks by a request; with `allow_interrupt_control` MSI Enable reaches hardware"
        }
        CapabilityId::MSI_X => {
            "shown; read only; the guest asks by a request; with `allow_interrupt_control` MSI-X Enable and Function Mask reach hardware"
        }
        _ => READ_ONLY,
    }
}

fn xen_pt(id: CapabilityId) -> &'static str {
    match id {
        CapabilityId::POWER_MANAGEMENT => "shown; no PME, power state virtual, No_Soft_Reset reads 1",
        CapabilityId::VPD => "shown; writes are dropped, so that nothing can be read by it",
        CapabilityId::MSI => {
            "shown; address and data are virtual, one vector; Enable makes QEMU bind it; masks read only"
        }
        CapabilityId::MSI_X => "shown; Enable and Function Mask reach hardware, and QEMU follows them",
        CapabilityId::PCI_EXPRESS => {
            "shown; Device Control, Link Control and both of their second registers are virtual; no FLR; not for ports and bridges, hidden \
             for the 82599's VF"
        }
        CapabilityId::VENDOR_SPECIFIC => READ_ONLY,
        CapabilityId::AGP
        | CapabilityId::SLOT_ID
        | CapabilityId::PCI_X
        | CapabilityId::HOT_PLUG
        | CapabilityId::SUBSYSTEM_ID
        | CapabilityId::AGP_8X => "not in the list; reads 0, writes are dropped",
        _ => NOT_LISTED,
    }
}

fn vfio(id: CapabilityId) -> &'static str {
    match id {
        CapabilityId::POWER_MANAGEMENT => {
            "shown; the guest's power state is set in hardware by the kernel; newer kernels keep PME from guests"
        }
        CapabilityId::VPD => "shown; read and written by the kernel's functions for VPD",
        CapabilityId::MSI => {
            "shown; address, data and the number of vectors are virtual, masks reach hardware; Enable follows the user's request"
        }
        CapabilityId::MSI_X => {
            "shown; read only, the user asks by a request; QEMU emulates control, table and pending bits"
        }
        CapabilityId::PCI_EXPRESS => {
            "shown; Device Control reaches hardware but for phantom functions, payload size (virtual), read request size (not below the \
             payload) and FLR (by the kernel); Device Control 2 but for ARI; links read only"
        }
        CapabilityId::ADVANCED_FEATURES => "shown; FLR by the kernel",
        CapabilityId::PCI_X => "shown; Command and ECC Control reach hardware",
        CapabilityId::VENDOR_SPECIFIC => "shown; reads and writes reach hardware",
        CapabilityId::AGP | CapabilityId::HYPER_TRANSPORT | CapabilityId::SATA => READ_ONLY,
        _ => NOT_LISTED,
    }
}

fn vfio_extended(id: ExtendedCapabilityId) -> &'static str {
    use ExtendedCapabilityId as Id;
    match id {
        Id::AER => "shown; status, masks, severities and ECRC enables reach hardware",
        Id::POWER_BUDGETING => "shown; Data Select reaches hardware",
        Id::VENDOR_SPECIFIC => "shown; reads and writes reach hardware",
        Id::DVSEC => "shown; reads and writes reach hardware (newer kernels; not in the list before)",
        Id::SR_IOV => "shown, read only; QEMU hides it",
        Id::ARI => "shown, read only; QEMU hides it",
        Id::RESIZABLE_BAR => "shown, read only; QEMU hides it, or emulates it with newer kernels",
        Id::ATS | Id::PAGE_REQUEST => READ_ONLY,
        Id::VIRTUAL_CHANNEL
        | Id::SERIAL_NUMBER
        | Id::MFVC
        | Id::VIRTUAL_CHANNEL_MFVC
        | Id::ACS
        | Id::MULTICAST
        | Id::DYNAMIC_POWER_ALLOCATION
        | Id::TPH_REQUESTER
        | Id::LTR => READ_ONLY,
        _ => NOT_LISTED,
    }
}
