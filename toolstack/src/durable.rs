//! Files that are replaced atomically: a reader finds either the old contents or the new ones.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use pciback::hash::Fnv;
use serde::Serialize;

/// The extension of a file that is being written, or that has the contents before the last write.
const TEMPORARY: &str = "new";

/// Syncs a directory, so that renames and removals in it survive a power failure.
pub(crate) fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// What the new contents of a file survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Survives {
    /// The end of the process.
    Exit,
    /// A power failure, too: they are synced to the disk.
    PowerFailure,
}

/// Replaces a file atomically.
pub(crate) fn replace(path: &Path, content: &impl Serialize, survives: Survives) -> io::Result<()> {
    write(path, &serde_json::to_vec_pretty(content)?, survives)
}

/// Writes a file that survives a power failure, unless it has these contents already: syncing takes milliseconds, in which guests may
/// wait.
pub(crate) fn keep(path: &Path, content: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(content)?;
    let has_length = fs::metadata(path).is_ok_and(|file| file.len() == text.len() as u64);
    if has_length && fs::read(path)? == text {
        return Ok(());
    }
    write(path, &text, Survives::PowerFailure)
}

/// Reads a file, at most `limit` bytes: a longer one is an error.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > limit {
        true => Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {limit} bytes"))),
        false => Ok(bytes),
    }
}

/// Removes a file and the rest of its last write; succeeds if there is none.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    for path in [path, &path.with_extension(TEMPORARY)] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// One for each of some files: two threads that replace the same file would take the temporary file from each other.
static WRITERS: [Mutex<()>; 16] = [const { Mutex::new(()) }; 16];

fn write(path: &Path, text: &[u8], survives: Survives) -> io::Result<()> {
    let mut hash = Fnv::new();
    hash.add_bytes(path.as_os_str().as_bytes());
    let writer = &WRITERS[(hash.finish() % WRITERS.len() as u64) as usize];
    let _only = writer.lock().unwrap_or_else(PoisonError::into_inner);
    let durable = survives == Survives::PowerFailure;
    let temporary = path.with_extension(TEMPORARY);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(text)?;
    if durable {
        file.sync_all()?;
    }
    // The old file becomes the temporary file of the next write, because creating and deleting thousands of files is slow.
    match renameat2(AT_FDCWD, &temporary, AT_FDCWD, path, RenameFlags::RENAME_EXCHANGE) {
        // ENOENT: there was no file. EINVAL: the file system does not support the exchange.
        Err(Errno::ENOENT | Errno::EINVAL) => fs::rename(&temporary, path)?,
        exchanged => exchanged?,
    }
    match path.parent().filter(|_| durable) {
        Some(directory) => sync(directory),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn threads_that_replace_the_same_file_do_not_disturb_each_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        std::thread::scope(|scope| {
            for number in 0..8u32 {
                let path = &path;
                scope.spawn(move || {
                    (0..200).for_each(|round| replace(path, &[number, round], Survives::Exit).unwrap())
                });
            }
        });
        let written: [u32; 2] = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(written[1], 199);
    }

    #[test]
    fn a_file_is_read_up_to_its_limit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        fs::write(&path, [7; 10]).unwrap();
        assert_eq!(read(&path, 10).unwrap(), [7; 10]);
        assert_eq!(read(&path, 9).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        // A hole of a file costs nothing to make.
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(read(&path, 10).is_err());
    }

    #[test]
    fn unchanged_contents_are_not_written_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("copy");
        let number = || fs::metadata(&path).unwrap().ino();
        keep(&path, &["first"]).unwrap();
        let first = number();
        keep(&path, &["first"]).unwrap();
        assert_eq!(number(), first);
        keep(&path, &["second"]).unwrap();
        assert_ne!(number(), first);
        assert!(fs::read_to_string(&path).unwrap().contains("second"));
    }
}
