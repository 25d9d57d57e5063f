//! Whether a function has MSI-X: Xen 4.17 panics when it is asked to prepare one that has none.

use crate::config::{Access, CapabilityList, ConfigSpace};
use crate::spec::{CapabilityId, header};

/// Looks for the capability; an unreadable or malformed list has none.
pub fn has_msix(config: &dyn ConfigSpace) -> bool {
    let dword = |offset| config.read(Access::new(offset, 4).ok()?).ok();
    let dwords: Option<Vec<u32>> = (0..u32::from(header::EXTENDED)).step_by(4).map(dword).collect();
    let bytes: Vec<u8> = dwords.unwrap_or_default().into_iter().flat_map(u32::to_le_bytes).collect();
    CapabilityList::walk(&bytes).legacy(CapabilityId::MSI_X).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes([u8; 256]);

    impl ConfigSpace for Bytes {
        fn size(&self) -> u16 {
            256
        }

        fn read(&self, access: Access) -> std::io::Result<u32> {
            let offset = usize::from(access.offset());
            let bytes = &self.0[offset..offset + usize::from(access.width().bytes())];
            Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
        }

        fn write(&self, _: Access, _: u32) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn with(capabilities: &[(usize, [u8; 2])]) -> Bytes {
        let mut bytes = [0; 256];
        // Status says that there is a list.
        bytes[6] = 0x10;
        bytes[0x34] = 0x40;
        for (offset, header) in capabilities {
            bytes[*offset..offset + 2].copy_from_slice(header);
        }
        Bytes(bytes)
    }

    #[test]
    fn finds_msix_behind_other_capabilities() {
        assert!(has_msix(&with(&[(0x40, [0x01, 0x50]), (0x50, [0x11, 0])])));
        assert!(!has_msix(&with(&[(0x40, [0x01, 0x50]), (0x50, [0x05, 0])])));
    }

    #[test]
    fn a_loop_a_function_that_is_gone_and_an_empty_list_have_none() {
        assert!(!has_msix(&with(&[(0x40, [0x01, 0x40])])));
        assert!(!has_msix(&Bytes([0xff; 256])));
        assert!(!has_msix(&Bytes([0; 256])));
    }
}
