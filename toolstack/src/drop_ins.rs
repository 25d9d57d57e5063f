//! Directories with files of the administrator, for example drop-in settings.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

/// Whether a file in such a directory is read: as with `*.yaml` in a shell, hidden files, which editors create, are not.
pub(crate) fn is_read(path: &Path) -> bool {
    let is_hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !is_hidden && path.extension().is_some_and(|extension| extension == "yaml")
}

/// Opens such a file. A pipe is an error, because opening it would block until there is a writer.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    match fs::metadata(path)?.file_type().is_fifo() {
        true => Err(io::Error::other("it is a pipe")),
        false => File::open(path),
    }
}
