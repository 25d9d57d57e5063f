//! Reading a PF's SR-IOV capability, as it is shown.

use pciback::Sbdf;
use pciback::config::CapabilityList;
use pciback::platform::Host;
use pciback::spec::{self, AnyId, ExtendedCapabilityId, sriov};

use crate::outcome::{ErrorCode, Failure};
use crate::protocol::SriovView;

/// SR-IOV Status, in the capability.
const STATUS: u16 = sriov::CONTROL + 2;

/// Reads the capability of a PF; `None`: config space has none, as that of a function that does not answer.
pub(super) fn read(host: &dyn Host, pf: Sbdf) -> Result<Option<SriovView>, Failure> {
    let bytes = host.config(pf)?.read_all().map_err(|error| {
        let text = format!("cannot read the SR-IOV capability of {pf}: {error}");
        Failure::new(ErrorCode::Failed, text).on(pf)
    })?;
    Ok(view(&bytes))
}

fn view(bytes: &[u8]) -> Option<SriovView> {
    let at = CapabilityList::walk(bytes).extended(ExtendedCapabilityId::SR_IOV)?.offset;
    // A capability at the end of config space is cut off, and reads 0 behind it.
    let byte = |offset: u16| {
        let place = usize::from(at) + usize::from(offset);
        bytes.get(place).copied().unwrap_or_default()
    };
    let word = |offset: u16| u16::from_le_bytes([byte(offset), byte(offset + 1)]);
    let control = word(sriov::CONTROL);
    let capabilities = u32::from(word(sriov::CAPABILITIES)) | u32::from(word(sriov::CAPABILITIES + 2)) << 16;
    Some(SriovView {
        enabled: control & sriov::VF_ENABLE != 0,
        num_vfs: word(sriov::NUM_VFS),
        initial_vfs: word(sriov::INITIAL_VFS),
        total_vfs: word(sriov::TOTAL_VFS),
        first_vf_offset: word(sriov::FIRST_VF_OFFSET),
        vf_stride: word(sriov::VF_STRIDE),
        ari_capable_hierarchy: control & sriov::ARI_CAPABLE_HIERARCHY != 0,
        capabilities: set_bits(sriov::CAPABILITIES, capabilities),
        control: set_bits(sriov::CONTROL, control.into()),
        status: set_bits(STATUS, word(STATUS).into()),
    })
}

/// The names of the one-bit fields of a register that are 1.
fn set_bits(register: u16, value: u32) -> Vec<String> {
    let capability = spec::capability(AnyId::Extended(ExtendedCapabilityId::SR_IOV));
    let registers = capability.into_iter().flat_map(|capability| capability.registers);
    let fields = registers.filter(|one| one.offset == register).flat_map(|one| one.fields);
    let set = fields.filter(|field| field.mask.is_power_of_two() && value & field.mask != 0);
    set.map(|field| field.name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Config space with a capability at 0x100 that has these registers.
    fn config(capabilities: u32, control: u16, status: u16) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &0x8086_u16.to_le_bytes());
        put(0x100, &0x0001_0010_u32.to_le_bytes());
        put(0x104, &capabilities.to_le_bytes());
        put(0x108, &control.to_le_bytes());
        put(0x10a, &status.to_le_bytes());
        for (at, value) in [(0x10c, 8_u16), (0x10e, 64), (0x110, 7), (0x114, 0x180), (0x116, 2)] {
            put(at, &value.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn the_bits_of_vf_migration_are_named_where_they_are_set() {
        let all = view(&config(1 << 0 | 3 << 21, 1 << 0 | 1 << 1 | 1 << 2, 1)).unwrap();
        assert_eq!(all.capabilities, ["VF Migration Capable"]);
        assert_eq!(all.control, ["VF Enable", "VF Migration Enable", "VF Migration Interrupt Enable"]);
        assert_eq!(all.status, ["VF Migration Status"]);
        let none = view(&config(0, 0, 0)).unwrap();
        assert!([none.capabilities, none.control, none.status].iter().all(Vec::is_empty));
    }

    #[test]
    fn numbers_are_those_of_the_registers() {
        let seen = view(&config(0, 1 << 4, 0)).unwrap();
        assert_eq!((seen.initial_vfs, seen.total_vfs, seen.num_vfs), (8, 64, 7));
        assert_eq!((seen.first_vf_offset, seen.vf_stride), (0x180, 2));
        assert_eq!((seen.enabled, seen.ari_capable_hierarchy), (false, true));
    }

    #[test]
    fn a_function_that_does_not_answer_or_has_no_such_capability_shows_nothing() {
        assert_eq!(view(&[0xff; 4096]), None);
        assert_eq!(view(&[0; 256]), None);
        let mut at_the_end = vec![0; 4096];
        at_the_end[0x100..0x104].copy_from_slice(&0xffc1_0001_u32.to_le_bytes());
        at_the_end[0xffc..].copy_from_slice(&0x0001_0010_u32.to_le_bytes());
        assert_eq!(view(&at_the_end).map(|seen| seen.total_vfs).unwrap_or_default(), 0);
    }
}
