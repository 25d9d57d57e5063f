//! Whether a function has MSI-X: Xen 4.17 panics when it is asked to prepare one that has none.

use crate::config::{Access, ConfigSpace, Width};

/// Offset of the first capability's offset (PCI Local Bus 3.0, section 6.7).
const CAPABILITIES: u32 = 0x34;
/// Capability id of MSI-X (PCI Local Bus 3.0, appendix H).
const MSI_X: u32 = 0x11;
/// The first offset that a capability can have.
const FIRST: u32 = 0x40;
/// As many capabilities of 4 bytes as fit: a longer list is a loop.
const MOST: usize = 48;

/// Looks for the capability; an unreadable or malformed list has none.
pub fn has_msix(config: &dyn ConfigSpace) -> bool {
    let read = |offset, width: Width| {
        let access = Access::new(offset, width.bytes().into()).ok()?;
        config.read(access).ok()
    };
    let mut next = read(CAPABILITIES, Width::Byte);
    for _ in 0..MOST {
        let Some(offset) = next.map(|offset| offset & 0xfc).filter(|offset| *offset >= FIRST) else {
            return false;
        };
        match read(offset, Width::Word) {
            Some(0xffff) | None => return false,
            Some(header) if header & 0xff == MSI_X => return true,
            Some(header) => next = Some(header >> 8),
        }
    }
    false
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
