//! The ACPI table that describes extended config space to an HVM guest.

use super::ECAM_BASE;

/// The bytes of an MCFG table for bus 0 of segment 0 (PCI Firmware Specification 3.3, section 4.1.2; ACPI 6.5, section 5.2.6).
pub fn mcfg() -> Vec<u8> {
    const LENGTH: u32 = 36 + 8 + 16;
    let mut table = Vec::with_capacity(LENGTH as usize);
    table.extend(b"MCFG");
    table.extend(LENGTH.to_le_bytes());
    // Revision; the checksum, below.
    table.extend([1, 0]);
    table.extend(b"XPCI  ");
    table.extend(b"XPCIECAM");
    table.extend(1u32.to_le_bytes());
    table.extend(b"XPCI");
    table.extend(1u32.to_le_bytes());
    table.extend([0; 8]);
    // Where; segment, first and last bus.
    table.extend(ECAM_BASE.to_le_bytes());
    table.extend([0; 8]);
    let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    table[9] = sum.wrapping_neg();
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_its_length_and_its_bytes_add_up_to_nothing() {
        let table = mcfg();
        assert_eq!(table.len(), 60);
        assert_eq!(table[4..8], 60u32.to_le_bytes());
        assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!(table[44..52], 0xfe00_0000u64.to_le_bytes());
        assert_eq!(table[52..], [0; 8]);
    }
}
