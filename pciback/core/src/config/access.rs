//! Accesses to config space whose validity is a type.

use thiserror::Error;

/// Bytes of conventional config space (PCI Local Bus 3.0, section 6.1).
pub const CONVENTIONAL_SIZE: u16 = 256;
/// Bytes of extended config space (PCI Express 6.0, section 7.2.2).
pub const EXTENDED_SIZE: u16 = 4096;

/// How many bytes one access moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Width {
    /// One byte.
    Byte = 1,
    /// Two bytes.
    Word = 2,
    /// Four bytes.
    Dword = 4,
}

impl Width {
    /// All widths, smallest first.
    pub const ALL: [Self; 3] = [Self::Byte, Self::Word, Self::Dword];

    /// The number of bytes: 1, 2 or 4.
    pub const fn bytes(self) -> u16 {
        self as u16
    }

    /// A mask of the value's bits.
    pub const fn mask(self) -> u32 {
        match self {
            Self::Byte => 0xff,
            Self::Word => 0xffff,
            Self::Dword => 0xffff_ffff,
        }
    }
}

/// A naturally aligned access of 1, 2 or 4 bytes that lies within 4,096 bytes.
///
/// ```
/// use xpci_core::config::{Access, AccessError, Width};
/// assert_eq!(Access::new(0x3e, 2)?.width(), Width::Word);
/// assert_eq!(Access::new(0x3f, 2), Err(AccessError::Unaligned { offset: 0x3f, size: 2 }));
/// # Ok::<(), AccessError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Access {
    offset: u16,
    width: Width,
}

/// Why an offset and a size are no valid access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum AccessError {
    /// The size is not 1, 2 or 4.
    #[error("config access of {size} bytes at {offset:#x}: the size must be 1, 2 or 4")]
    Size {
        /// Where.
        offset: u32,
        /// How many bytes.
        size: u32,
    },
    /// The offset is no multiple of the size.
    #[error("config access of {size} bytes at {offset:#x}: the offset must be a multiple of the size")]
    Unaligned {
        /// Where.
        offset: u32,
        /// How many bytes.
        size: u32,
    },
    /// The access ends behind config space.
    #[error("config access of {size} bytes at {offset:#x}: config space ends at 0x1000")]
    OutOfRange {
        /// Where.
        offset: u32,
        /// How many bytes.
        size: u32,
    },
}

impl Access {
    /// Checks `offset` and `size`, both as a guest gave them.
    pub fn new(offset: u32, size: u32) -> Result<Self, AccessError> {
        let width = match size {
            1 => Width::Byte,
            2 => Width::Word,
            4 => Width::Dword,
            _ => return Err(AccessError::Size { offset, size }),
        };
        if offset >= u32::from(EXTENDED_SIZE) {
            return Err(AccessError::OutOfRange { offset, size });
        }
        if !offset.is_multiple_of(size) {
            return Err(AccessError::Unaligned { offset, size });
        }
        Ok(Self { offset: offset as u16, width })
    }

    /// A register whose offset and size are known when this is compiled; what is no valid access does not compile.
    ///
    /// ```
    /// use xpci_core::config::Access;
    /// const COMMAND: Access = Access::fixed::<0x04, 2>();
    /// assert_eq!(Ok(COMMAND), Access::new(0x04, 2));
    /// ```
    ///
    /// ```compile_fail
    /// use xpci_core::config::Access;
    /// const UNALIGNED: Access = Access::fixed::<0x05, 2>();
    /// ```
    pub const fn fixed<const OFFSET: u16, const SIZE: u16>() -> Self {
        const { assert!(SIZE == 1 || SIZE == 2 || SIZE == 4, "the size must be 1, 2 or 4") };
        const {
            assert!(
                OFFSET < EXTENDED_SIZE && OFFSET.is_multiple_of(SIZE),
                "unaligned, or out of config space"
            )
        };
        let width = match SIZE {
            1 => Width::Byte,
            2 => Width::Word,
            _ => Width::Dword,
        };
        Self { offset: OFFSET, width }
    }

    /// The first byte.
    pub const fn offset(self) -> u16 {
        self.offset
    }

    /// The number of bytes.
    pub const fn width(self) -> Width {
        self.width
    }

    /// The offset of the dword that holds all bytes of the access.
    pub const fn dword(self) -> u16 {
        self.offset & !3
    }

    /// How far the access's least significant bit lies above its dword's.
    pub const fn shift(self) -> u32 {
        (self.offset as u32 & 3) * 8
    }
}

/// The config space of one physical function, as hardware answers.
///
/// An access to a function that is gone reads all ones and drops writes, as on a bus (PCI Express 6.0, section
/// 2.3.2); an error means that the access itself could not be made.
pub trait ConfigSpace: Send {
    /// Bytes that this function's config space has: 256 or 4,096 (64 where the host shows no more).
    fn size(&self) -> u16;
    /// Reads; the value's upper bits beyond the width are 0.
    fn read(&self, access: Access) -> std::io::Result<u32>;
    /// Writes the value's lower bits, as one access of this width.
    fn write(&self, access: Access, value: u32) -> std::io::Result<()>;

    /// Reads a dword of the function's Vital Product Data (PCI Express 6.0, section 7.9.18), at an address in it that is a multiple of 4;
    /// `None` behind its end. An error: the function has none, or hardware did not deliver it in time.
    fn read_vpd(&self, address: u16) -> std::io::Result<Option<u32>> {
        let _nowhere = address;
        Err(std::io::ErrorKind::Unsupported.into())
    }

    /// Reads all of it, in dwords; one system call where the host has one for that.
    fn read_all(&self) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(usize::from(self.size()));
        for offset in (0..self.size().min(EXTENDED_SIZE)).step_by(4) {
            let access = Access { offset, width: Width::Dword };
            bytes.extend_from_slice(&self.read(access)?.to_le_bytes());
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_aligned_accesses_of_1_2_4_bytes_within_4096_are_valid() {
        for offset in 0..0x1010u32 {
            for size in 0..10u32 {
                let valid = matches!(size, 1 | 2 | 4) && offset % size == 0 && offset + size <= 0x1000;
                assert_eq!(Access::new(offset, size).is_ok(), valid, "{offset:#x}/{size}");
            }
        }
        assert!(Access::new(u32::MAX, 1).is_err());
        assert!(Access::new(u32::MAX - 3, 4).is_err());
    }
}
