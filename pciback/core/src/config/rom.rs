//! The contents of an expansion ROM that a guest is given: images one after another, each with a header and a PCI data structure
//! (PCI Firmware Specification 3.3, section 5.1).

use thiserror::Error;

use super::bytes::Bytes;

/// The most bytes that an expansion ROM can have (PCI 3.0, section 6.2.5.2).
pub const ROM_LIMIT: usize = 16 << 20;
/// The fewest bytes that its BAR can decode: ten of its bits are reserved.
const SMALLEST: usize = 2048;
/// The first bytes of each image.
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// In the header of an image: where its PCI data structure is.
const POINTER: usize = 0x18;
/// The unit of lengths of images.
const UNIT: usize = 512;

/// Offsets in a PCI data structure.
mod data {
    pub const SIGNATURE: &[u8] = b"PCIR";
    pub const LENGTH: u16 = 0x10;
    pub const INDICATOR: u16 = 0x15;
    pub const LAST: u8 = 0x80;
    /// What every revision has.
    pub const BYTES: usize = 0x18;
}

/// What is wrong with the contents of an expansion ROM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RomError {
    /// It is larger than any can be.
    #[error("it has more than {ROM_LIMIT:#x} bytes, the most that an expansion ROM can have")]
    TooLarge,
    /// It ends before the header of an image, or in it.
    #[error("it has {bytes:#x} bytes, and at {at:#x} the header of an image is expected")]
    Short {
        /// Where the image begins.
        at: usize,
        /// How many bytes there are.
        bytes: usize,
    },
    /// An image begins with something else.
    #[error("at {at:#x}, where an image begins, are {:02x} {:02x} instead of 55 aa", .found[0], .found[1])]
    Signature {
        /// Where the image begins.
        at: usize,
        /// What is there.
        found: [u8; 2],
    },
    /// The header does not lead to a PCI data structure.
    #[error(
        "the image at {at:#x} names {pointer:#x} as the place of its PCI data structure, and there is none"
    )]
    NoData {
        /// Where the image begins.
        at: usize,
        /// Where the structure should be in it.
        pointer: u16,
    },
    /// An image says that it has no bytes, or fewer than its own header and PCI data structure.
    #[error("the image at {at:#x} gives its length as {length:#x} bytes, too few for its own header")]
    Length {
        /// Where the image begins.
        at: usize,
        /// What it says.
        length: usize,
    },
    /// It ends before its last image does.
    #[error("the image at {at:#x} ends at {end:#x}, and only {bytes:#x} bytes are there")]
    CutShort {
        /// Where the image begins.
        at: usize,
        /// Where it should end.
        end: usize,
        /// How many bytes there are.
        bytes: usize,
    },
}

/// The contents as a BAR shows them: checked, and filled up to a power of two as erased memory reads.
pub fn rom_contents(mut bytes: Vec<u8>) -> Result<Vec<u8>, RomError> {
    if bytes.len() > ROM_LIMIT {
        return Err(RomError::TooLarge);
    }
    let mut at = 0;
    while let Some(next) = next_image(&bytes, at)? {
        at = next;
    }
    let size = bytes.len().next_power_of_two().max(SMALLEST);
    bytes.resize(size, 0xff);
    Ok(bytes)
}

/// Where the image behind this one begins; `None`: this is the last.
fn next_image(bytes: &[u8], at: usize) -> Result<Option<usize>, RomError> {
    let short = RomError::Short { at, bytes: bytes.len() };
    let image = bytes.get(at..).filter(|image| image.len() >= POINTER + 2).ok_or(short)?;
    if image[..2] != SIGNATURE {
        return Err(RomError::Signature { at, found: [image[0], image[1]] });
    }
    let pointer = image.word(POINTER as u16);
    let place = usize::from(pointer);
    let data = image
        .get(place..place + data::BYTES)
        .filter(|data| place >= POINTER + 2 && data.starts_with(data::SIGNATURE))
        .ok_or(RomError::NoData { at, pointer })?;
    let length = UNIT * usize::from(data.word(data::LENGTH));
    if length < place + data::BYTES {
        return Err(RomError::Length { at, length });
    }
    let end = at + length;
    if end > bytes.len() {
        return Err(RomError::CutShort { at, end, bytes: bytes.len() });
    }
    Ok((data.byte(data::INDICATOR) & data::LAST == 0).then_some(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image of so many units.
    fn image(units: u8, last: bool) -> Vec<u8> {
        let mut bytes = vec![0x90; UNIT * usize::from(units)];
        bytes[..2].copy_from_slice(&SIGNATURE);
        bytes[0x18..0x1a].copy_from_slice(&[0x1c, 0]);
        bytes[0x1c..0x20].copy_from_slice(b"PCIR");
        bytes[0x2c..0x2e].copy_from_slice(&[units, 0]);
        bytes[0x31] = if last { 0x80 } else { 0 };
        bytes
    }

    fn changed(at: usize, with: &[u8]) -> Vec<u8> {
        let mut bytes = image(2, true);
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes
    }

    #[test]
    fn contents_are_filled_up_to_what_a_bar_can_decode() {
        for (contents, size) in [
            (image(1, true), 2048),
            (image(4, true), 2048),
            ([image(2, false), image(3, true)].concat(), 4096),
            // What lies behind the last image is the device's own affair.
            ([image(4, true), vec![7; 1]].concat(), 4096),
            ([image(8, true), vec![7; ROM_LIMIT - 4096]].concat(), ROM_LIMIT),
        ] {
            let filled = rom_contents(contents.clone()).unwrap();
            assert_eq!(filled.len(), size);
            assert!(filled.starts_with(&contents));
            assert!(filled[contents.len()..].iter().all(|byte| *byte == 0xff));
        }
    }

    #[test]
    fn what_is_no_expansion_rom_is_refused_and_said_why() {
        use RomError::{CutShort, Length, NoData, Short, Signature, TooLarge};
        for (what, contents, error) in [
            ("nothing", vec![], Short { at: 0, bytes: 0 }),
            ("a header cut short", image(1, true)[..0x19].to_vec(), Short { at: 0, bytes: 0x19 }),
            ("all ones", vec![0xff; 4096], Signature { at: 0, found: [0xff, 0xff] }),
            ("a vendor's wrapper", changed(0, b"NVGI"), Signature { at: 0, found: *b"NV" }),
            ("a pointer to the end", changed(0x18, &[0xe9, 0x03]), NoData { at: 0, pointer: 0x3e9 }),
            ("a pointer beyond it", changed(0x18, &[0xff, 0xff]), NoData { at: 0, pointer: 0xffff }),
            ("a pointer into the header", changed(0x18, &[0, 0]), NoData { at: 0, pointer: 0 }),
            ("another structure", changed(0x1c, b"PCIE"), NoData { at: 0, pointer: 0x1c }),
            ("no length", changed(0x2c, &[0, 0]), Length { at: 0, length: 0 }),
            ("half an image", image(4, true)[..1536].to_vec(), CutShort { at: 0, end: 2048, bytes: 1536 }),
            ("no last image", image(2, false), Short { at: 1024, bytes: 1024 }),
            (
                "an image behind it that is none",
                [image(2, false), vec![0; 512]].concat(),
                Signature { at: 1024, found: [0, 0] },
            ),
            (
                "half an image behind it",
                [image(2, false), image(2, true)[..1000].to_vec()].concat(),
                CutShort { at: 1024, end: 2048, bytes: 2024 },
            ),
            ("too much", [image(2, true), vec![0; ROM_LIMIT - 1023]].concat(), TooLarge),
        ] {
            assert_eq!(rom_contents(contents), Err(error), "{what}");
        }
        let far = [image(2, true), vec![0; 512]].concat();
        let mut moved = far;
        moved[0x18..0x1a].copy_from_slice(&[0x00, 0x04]);
        let data = image(2, true)[0x1c..0x34].to_vec();
        moved[0x400..0x418].copy_from_slice(&data);
        assert_eq!(rom_contents(moved), Err(Length { at: 0, length: 1024 }), "a structure behind its image");
    }
}
