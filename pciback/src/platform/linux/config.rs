//! Config space through sysfs.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::attributes::is_absent;
use crate::config::access::{CONVENTIONAL_SIZE, EXTENDED_SIZE};
use crate::config::{Access, ConfigSpace};

/// Bytes that sysfs shows where it may not show more.
const HEADER_SIZE: u16 = 64;

/// The `config` attribute of one function, and the `vpd` beside it. Rust opens every file with close-on-exec.
pub struct SysfsConfig {
    file: File,
    vpd: PathBuf,
    size: u16,
}

impl SysfsConfig {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let size = match file.metadata()?.len() {
            4096.. => EXTENDED_SIZE,
            256.. => CONVENTIONAL_SIZE,
            _ => HEADER_SIZE,
        };
        Ok(Self { file, vpd: path.with_file_name("vpd"), size })
    }

    fn reaches(&self, access: Access) -> bool {
        access.offset() + access.width().bytes() <= self.size
    }
}

impl ConfigSpace for SysfsConfig {
    fn size(&self) -> u16 {
        self.size
    }

    fn read(&self, access: Access) -> io::Result<u32> {
        let gone = access.width().mask();
        if !self.reaches(access) {
            return Ok(gone);
        }
        let mut bytes = [0; 4];
        let wanted = usize::from(access.width().bytes());
        // One call: the kernel makes one access of this width from an aligned read of 1, 2 or 4 bytes.
        match self.file.read_at(&mut bytes[..wanted], access.offset().into()) {
            Ok(count) if count == wanted => Ok(u32::from_le_bytes(bytes)),
            Ok(_) => Ok(gone),
            Err(error) if is_absent(&error) => Ok(gone),
            Err(error) => Err(error),
        }
    }

    fn write(&self, access: Access, value: u32) -> io::Result<()> {
        if !self.reaches(access) {
            return Ok(());
        }
        let wanted = usize::from(access.width().bytes());
        match self.file.write_at(&value.to_le_bytes()[..wanted], access.offset().into()) {
            Ok(_) => Ok(()),
            Err(error) if is_absent(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The kernel takes the lock of the function's VPD, waits for hardware for at most 125 ms a dword, and knows where VPD ends and which
    /// devices must not be asked.
    fn read_vpd(&self, address: u16) -> io::Result<Option<u32>> {
        let mut bytes = [0; 4];
        let count = File::open(&self.vpd)?.read_at(&mut bytes, address.into())?;
        Ok((count != 0).then_some(u32::from_le_bytes(bytes)))
    }

    fn read_all(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0xff; usize::from(self.size)];
        match self.file.read_at(&mut bytes, 0) {
            // What a function that vanishes on the way does not answer reads all ones.
            Ok(_) => Ok(bytes),
            Err(error) if is_absent(&error) => Ok(bytes),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn access(offset: u32, size: u32) -> Access {
        Access::new(offset, size).unwrap()
    }

    #[test]
    fn reads_and_writes_exactly_the_width_of_the_access() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), (0..=255).collect::<Vec<u8>>()).unwrap();
        let config = SysfsConfig::open(file.path()).unwrap();
        assert_eq!(config.size(), 256);
        assert_eq!(config.read(access(4, 4)).unwrap(), 0x0706_0504);
        assert_eq!(config.read(access(6, 2)).unwrap(), 0x0706);
        assert_eq!(config.read(access(7, 1)).unwrap(), 0x07);
        config.write(access(6, 2), 0xaabb_ccdd).unwrap();
        assert_eq!(config.read(access(4, 4)).unwrap(), 0xccdd_0504);
        assert_eq!(config.read(access(8, 4)).unwrap(), 0x0b0a_0908);
    }

    #[test]
    fn behind_the_end_reads_are_all_ones_and_writes_are_dropped() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), [0; 256]).unwrap();
        let config = SysfsConfig::open(file.path()).unwrap();
        assert_eq!(config.read(access(0x100, 4)).unwrap(), u32::MAX);
        assert_eq!(config.read(access(0xffe, 2)).unwrap(), 0xffff);
        config.write(access(0x100, 4), 1).unwrap();
        assert_eq!(fs::metadata(file.path()).unwrap().len(), 256);
    }

    #[test]
    fn vpd_is_read_from_the_kernels_file_to_its_end() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("config"), [0; 256]).unwrap();
        let config = SysfsConfig::open(&directory.path().join("config")).unwrap();
        assert!(config.read_vpd(0).is_err(), "it has none");
        fs::write(directory.path().join("vpd"), [0x82, 1, 0, 0x41, 0x78, 9]).unwrap();
        assert_eq!(config.read_vpd(0).unwrap(), Some(0x4100_0182));
        assert_eq!(config.read_vpd(4).unwrap(), Some(0x0978), "the last bytes");
        assert_eq!(config.read_vpd(8).unwrap(), None);
    }

    #[test]
    fn a_function_whose_file_ends_early_reads_all_ones() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), [0; 4096]).unwrap();
        let config = SysfsConfig::open(file.path()).unwrap();
        assert_eq!(config.size(), 4096);
        fs::write(file.path(), [0; 2]).unwrap();
        assert_eq!(config.read(access(0, 4)).unwrap(), u32::MAX);
        assert_eq!(config.read(access(0, 2)).unwrap(), 0);
    }
}
