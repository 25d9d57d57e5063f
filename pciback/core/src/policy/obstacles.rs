//! What prevents an attach of a function, as far as its config space and the policies show.

use super::file::Permission;
use super::rom::RomSource;
use super::set::Merged;
use crate::config::bytes::Bytes;
use crate::config::{CapabilityList, FunctionSpec};
use crate::spec::{CapabilityId, ExtendedCapabilityId, express, legacy};

/// The base class of bridges (PCI Code and ID Assignment 1.16, section 1).
pub(super) const BRIDGE: u32 = 0x06;
/// Device Capabilities, in the PCI Express capability (PCI Express 6.0, section 7.5.3.3).
const DEVICE_CAPABILITIES: u16 = 0x04;
/// AF Capabilities, in the Advanced Features capability (Advanced Capabilities for Conventional PCI ECN).
const AF_CAPABILITIES: u16 = 0x03;
/// Power Management Control/Status, in its capability (PCI Express 6.0, section 7.5.2.2).
const POWER_CONTROL: u16 = 0x04;
const NO_SOFT_RESET: u16 = 1 << 3;
/// Total VFs, in the SR-IOV capability (section 9.3.3.5).
const TOTAL_VFS: u16 = 0x0e;
/// The part of config space that capabilities stand in, in bytes.
const CAPABILITIES_END: usize = 256;

/// The obstacles, each with what to do about it. `resets`: the ways in which Linux can reset the function, where a host was asked.
pub fn obstacles(spec: &FunctionSpec, merged: &Merged<'_>, resets: Option<&[String]>) -> Vec<String> {
    let list = CapabilityList::walk(&spec.bytes);
    let mut found = Vec::new();
    if spec.identity.class >> 16 == BRIDGE {
        // Nothing helps.
        return found;
    }
    let vfs =
        list.extended(ExtendedCapabilityId::SR_IOV).map_or(0, |at| spec.bytes.word(at.offset + TOTAL_VFS));
    if vfs > 0 && !spec.is_virtual() && !merged.permits.contains(&Permission::PhysicalFunction) {
        found.push(format!(
            "it is a PF with up to {vfs} VFs, which its owner controls: guests get it only where a policy says \
             'permit: [physical-function]'"
        ));
    }
    let can_be_reset = match resets {
        Some(resets) => !resets.is_empty(),
        // VFs have FLR (PCI Express 6.0, section 9.2.2.2).
        None if spec.bytes.len() < CAPABILITIES_END => true,
        None => spec.is_virtual() || !own_resets(&spec.bytes).is_empty(),
    };
    // Only the host knows what is on its bus and who owns it.
    if !can_be_reset && !merged.reset.permits_none() && !merged.reset.wants_together() {
        let names = "FLR, AF FLR, a reset by power management";
        found.push(match resets {
            Some(_) => format!(
                "Linux cannot reset it (it has none of {names}, and its bus cannot be reset for it alone): guests get it only where a \
                 policy says 'reset: {{together: true}}', with all functions on its bus, or 'reset: {{none: permit}}'"
            ),
            None => format!(
                "it has none of {names}: only a reset of its bus is left, which Linux makes where it is the only function there, and which \
                 a policy must accept with 'reset: {{methods: [bus]}}'; where it is not the only one, 'reset: {{together: true}}' resets \
                 all functions on the bus"
            ),
        });
    }
    found
}

/// What is not known of the expansion ROM that a guest would be given: its size is that of its contents, which attach reads.
pub fn rom_unknown(spec: &FunctionSpec, merged: &Merged<'_>) -> Option<String> {
    let (source, file) = &merged.rom;
    (*source != RomSource::Hide && spec.rom.is_none()).then(|| {
        format!(
            "the size of the expansion ROM that an HVM guest gets ('rom: {source}' of {}): the register is shown as a guest that gets none \
             sees it",
            file.unwrap_or("the policies")
        )
    })
}

/// The resets that the function itself has, in the words of Linux's `reset_method` and the order in which Linux tries them.
pub fn own_resets(bytes: &[u8]) -> Vec<&'static str> {
    let list = CapabilityList::walk(bytes);
    let own =
        [(flr(bytes, &list), "flr"), (af_flr(bytes, &list), "af_flr"), (power_reset(bytes, &list), "pm")];
    own.into_iter().filter_map(|(has, word)| has.then_some(word)).collect()
}

fn flr(bytes: &[u8], list: &CapabilityList) -> bool {
    list.legacy(CapabilityId::PCI_EXPRESS)
        .is_some_and(|at| bytes.dword(at.offset + DEVICE_CAPABILITIES) & express::FLR_CAPABLE != 0)
}

fn af_flr(bytes: &[u8], list: &CapabilityList) -> bool {
    list.legacy(CapabilityId::ADVANCED_FEATURES)
        .is_some_and(|at| bytes.word(at.offset + AF_CAPABILITIES) & u16::from(legacy::AF_FLR_CAPABLE) != 0)
}

/// A function that loses its state on the way from D3hot to D0: No_Soft_Reset is clear.
fn power_reset(bytes: &[u8], list: &CapabilityList) -> bool {
    list.legacy(CapabilityId::POWER_MANAGEMENT)
        .is_some_and(|at| bytes.word(at.offset + POWER_CONTROL) & NO_SOFT_RESET == 0)
}
