//! Any bytes as an expansion ROM.

use pciback::config::{ROM_LIMIT, rom_contents};

/// What is accepted begins a ROM, is kept, and fills what a BAR can decode; filling it up changes nothing of the check.
pub fn rom(data: &[u8]) {
    match rom_contents(data.to_vec()) {
        Ok(contents) => {
            assert!(contents.starts_with(&[0x55, 0xaa]) && contents.starts_with(data));
            assert!(contents.len().is_power_of_two() && (2048..=ROM_LIMIT).contains(&contents.len()));
            assert_eq!(rom_contents(contents.clone()).as_ref(), Ok(&contents));
        }
        Err(error) => assert!(error.to_string().len() < 200),
    }
}
