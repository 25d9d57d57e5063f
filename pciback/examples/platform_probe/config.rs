//! The little of config space that the probe needs.

use pciback::config::{Access, ConfigSpace};

/// Reads; all ones where the access is invalid or fails.
pub fn read(config: &dyn ConfigSpace, offset: u32, size: u32) -> u32 {
    Access::new(offset, size).ok().and_then(|access| config.read(access).ok()).unwrap_or(u32::MAX)
}

/// Writes; what fails shows when the probe reads back.
pub fn write(config: &dyn ConfigSpace, offset: u32, size: u32, value: u32) {
    if let Ok(access) = Access::new(offset, size)
        && let Err(error) = config.write(access, value)
    {
        println!("PROBE: config write {offset:#x}/{size}: {error}");
    }
}

/// The offset of a capability.
pub fn capability(config: &dyn ConfigSpace, id: u32) -> Option<u32> {
    let mut offset = read(config, 0x34, 1) & 0xfc;
    for _ in 0..48 {
        if offset < 0x40 {
            return None;
        }
        let header = read(config, offset, 2);
        if header & 0xff == id {
            return Some(offset);
        }
        offset = header >> 8 & 0xfc;
    }
    None
}
