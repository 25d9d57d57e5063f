//! Memory that others read and write too: a guest's page, or a file that outlives the service.

use std::fs::File;
use std::io;
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use super::BarMemory;
use crate::memory::SharedWords;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// A mapping seen as words that are only ever accessed atomically, so that a concurrent change by the other side is a
/// value like any other and never undefined behaviour. Words are in the machine's order (x86: little endian).
#[derive(Debug)]
pub struct SharedMemory {
    words: NonNull<AtomicU32>,
    len: usize,
    owner: Owner,
}

#[derive(Debug)]
enum Owner {
    /// Unmapped when dropped.
    Mapping,
    /// The caller unmaps it, after this value is dropped.
    Borrowed,
}

impl SharedMemory {
    /// Maps the first `bytes` of a file, shared: what is stored stays in the file when the process is killed. The file must
    /// be that long, and may not be shortened while it is mapped. Its holes are filled first: a store into one would end the process
    /// (SIGBUS) once the file system is full, while here that is an error.
    pub fn map_file(file: &File, bytes: usize) -> io::Result<Self> {
        let length = Self::checked_length(bytes)?;
        if file.metadata()?.len() < bytes as u64 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter than its mapping"));
        }
        fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, bytes as i64)?;
        #[expect(unsafe_code, reason = "mapping memory")]
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let mapped = unsafe {
            mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, 0)
        }?;
        Ok(Self { words: mapped.cast(), len: bytes / 4, owner: Owner::Mapping })
    }

    /// Zeroed memory of this process and the children it forks.
    pub fn anonymous(bytes: usize) -> io::Result<Self> {
        let length = Self::checked_length(bytes)?;
        #[expect(unsafe_code, reason = "mapping memory")]
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let mapped = unsafe {
            mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED)
        }?;
        Ok(Self { words: mapped.cast(), len: bytes / 4, owner: Owner::Mapping })
    }

    /// Wraps a mapping that the caller makes and unmaps.
    ///
    /// # Safety
    /// `address` must be aligned to 4, and `bytes` from there readable, writable and mapped until the value is dropped.
    #[expect(unsafe_code, reason = "the caller vouches for the mapping")]
    pub unsafe fn borrowed(address: NonNull<u8>, bytes: usize) -> Self {
        Self { words: address.cast(), len: bytes / 4, owner: Owner::Borrowed }
    }

    fn checked_length(bytes: usize) -> io::Result<NonZeroUsize> {
        NonZeroUsize::new(bytes)
            .filter(|length| length.get().is_multiple_of(4096))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a mapping must be whole pages"))
    }
}

impl Deref for SharedMemory {
    type Target = [AtomicU32];

    fn deref(&self) -> &[AtomicU32] {
        #[expect(unsafe_code, reason = "view of the mapping")]
        // SAFETY: `words` points to `len` aligned words that stay mapped as long as `self`, and atomics allow change by others.
        unsafe {
            std::slice::from_raw_parts(self.words.as_ptr(), self.len)
        }
    }
}

impl SharedWords for SharedMemory {
    fn words(&self) -> &[AtomicU32] {
        self
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        if matches!(self.owner, Owner::Mapping) {
            #[expect(unsafe_code, reason = "unmapping memory")]
            // SAFETY: this value made the mapping, and no reference into it outlives it.
            let unmapped = unsafe { munmap(self.words.cast(), self.len * 4) };
            if let Err(errno) = unmapped {
                log::error!("unmap {} bytes: {errno}", self.len * 4);
            }
        }
    }
}

#[expect(unsafe_code, reason = "the words are atomics")]
// SAFETY: all access goes through atomics, and the mapping belongs to the process, not to a thread.
unsafe impl Send for SharedMemory {}
#[expect(unsafe_code, reason = "the words are atomics")]
// SAFETY: as for `Send`.
unsafe impl Sync for SharedMemory {}

/// The registers of a device, mapped. Each access is one of the width that is asked for.
#[derive(Debug)]
pub struct Registers {
    start: NonNull<u8>,
    /// What is mapped.
    bytes: NonZeroUsize,
    /// Where in it the registers begin: what lies before is another device's.
    skip: usize,
}

impl Registers {
    /// Maps a file that is a device's memory, `bytes` of it after the first `skip`; 0 bytes are an error.
    pub fn map_file(file: &File, skip: u64, bytes: u64) -> io::Result<Self> {
        let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let end = NonZeroU64::new(bytes).ok_or_else(|| invalid("it has no memory"))?.checked_add(skip);
        let bytes = end.and_then(|end| NonZeroUsize::try_from(end).ok());
        let (bytes, skip) =
            bytes.zip(usize::try_from(skip).ok()).ok_or_else(|| invalid("it is too large"))?;
        #[expect(unsafe_code, reason = "mapping memory")]
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let mapped = unsafe {
            mmap(None, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, 0)
        }?;
        Ok(Self { start: mapped.cast(), bytes, skip })
    }

    /// A register of this width that lies within the mapping and is aligned.
    fn place<T>(&self, offset: u64) -> Option<NonNull<T>> {
        let offset = usize::try_from(offset).ok()?.checked_add(self.skip)?;
        let end = offset.checked_add(size_of::<T>())?;
        let inside = end <= self.bytes.get() && offset.is_multiple_of(size_of::<T>());
        #[expect(unsafe_code, reason = "address within the mapping")]
        // SAFETY: the offset lies within the mapping.
        inside.then(|| unsafe { self.start.add(offset).cast() })
    }

    fn load<T: Copy>(&self, offset: u64) -> Option<T> {
        #[expect(unsafe_code, reason = "access to the mapping")]
        // SAFETY: the place is mapped, aligned and of this size; any value that a device returns is a valid number.
        self.place::<T>(offset).map(|place| unsafe { place.read_volatile() })
    }

    fn store<T: Copy>(&self, offset: u64, value: T) {
        if let Some(place) = self.place::<T>(offset) {
            #[expect(unsafe_code, reason = "access to the mapping")]
            // SAFETY: the place is mapped, aligned and of this size, and no reference to it exists.
            unsafe {
                place.write_volatile(value);
            }
        }
    }
}

impl BarMemory for Registers {
    fn read(&self, offset: u64, bytes: u8) -> u64 {
        let value = match bytes {
            1 => self.load::<u8>(offset).map(u64::from),
            2 => self.load::<u16>(offset).map(u64::from),
            4 => self.load::<u32>(offset).map(u64::from),
            8 => self.load::<u64>(offset),
            _ => None,
        };
        value.unwrap_or(u64::MAX)
    }

    fn write(&self, offset: u64, bytes: u8, value: u64) {
        match bytes {
            1 => self.store(offset, value as u8),
            2 => self.store(offset, value as u16),
            4 => self.store(offset, value as u32),
            8 => self.store(offset, value),
            _ => {}
        }
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "unmapping memory")]
        // SAFETY: this value made the mapping, and no reference into it exists.
        let unmapped = unsafe { munmap(self.start.cast(), self.bytes.get()) };
        if let Err(errno) = unmapped {
            log::error!("unmap {} bytes of registers: {errno}", self.bytes);
        }
    }
}

#[expect(unsafe_code, reason = "the mapping belongs to the process")]
// SAFETY: the mapping belongs to the process, not to a thread, and one thread has this value at a time.
unsafe impl Send for Registers {}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn what_is_stored_in_a_mapped_file_is_there_when_it_is_mapped_again() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let memory = SharedMemory::map_file(&file, 8192).unwrap();
        memory[2047].store(0xdead_beef, Relaxed);
        drop(memory);
        assert_eq!(SharedMemory::map_file(&file, 8192).unwrap()[2047].load(Relaxed), 0xdead_beef);
    }

    #[test]
    fn holes_of_a_mapped_file_are_filled_before_anybody_can_store_into_them() {
        use std::os::unix::fs::MetadataExt as _;
        let file = tempfile::tempfile().unwrap();
        file.set_len(65536).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), 0, "this file system has no holes");
        let _memory = SharedMemory::map_file(&file, 65536).unwrap();
        // In units of 512 bytes (stat(2)).
        assert!(file.metadata().unwrap().blocks() * 512 >= 65536);
        assert_eq!(file.metadata().unwrap().len(), 65536);
    }

    #[test]
    fn registers_are_reached_at_their_width_and_nowhere_else() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let registers = Registers::map_file(&file, 0, 4096).unwrap();
        registers.write(0xff8, 8, 0x8877_6655_4433_2211);
        assert_eq!(
            [1, 2, 4, 8].map(|bytes| registers.read(0xff8, bytes)),
            [0x11, 0x2211, 0x4433_2211, 0x8877_6655_4433_2211]
        );
        registers.write(0xffe, 1, 0xaa);
        assert_eq!(registers.read(0xffc, 4), 0x88aa_6655);
        for (offset, bytes) in [(0x1000, 1), (0xffc, 8), (0xffd, 2), (0, 3), (u64::MAX, 4)] {
            registers.write(offset, bytes, 0);
            assert_eq!(registers.read(offset, bytes), u64::MAX, "{offset:#x}/{bytes}");
        }
        assert_eq!(registers.read(0xff8, 8), 0x88aa_6655_4433_2211);
        assert!(
            Registers::map_file(&file, 0, 0).is_err() && Registers::map_file(&file, 1, u64::MAX).is_err()
        );
    }

    #[test]
    fn registers_that_share_a_page_with_another_devices_begin_behind_those() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let (whole, own) =
            (Registers::map_file(&file, 0, 4096).unwrap(), Registers::map_file(&file, 0x100, 0x100).unwrap());
        own.write(0, 4, 0x1122_3344);
        assert_eq!((whole.read(0, 4), whole.read(0x100, 4), own.read(0, 4)), (0, 0x1122_3344, 0x1122_3344));
        own.write(0x100, 4, 1);
        assert_eq!((whole.read(0x200, 4), own.read(0x100, 4)), (0, u64::MAX));
    }

    #[test]
    fn a_file_that_is_too_short_or_a_length_of_no_whole_pages_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(SharedMemory::map_file(&file, 8192).is_err());
        assert!(SharedMemory::map_file(&file, 100).is_err());
        assert!(SharedMemory::anonymous(0).is_err());
    }
}
