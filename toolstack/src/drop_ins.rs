//! Directories in which administrators put files.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

/// Whether a file in such a directory is read: `*.yaml` as a shell expands it, without the hidden files that editors create.
pub(crate) fn is_read(path: &Path) -> bool {
    let is_hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !is_hidden && path.extension().is_some_and(|extension| extension == "yaml")
}

/// Opens such a file. A pipe is an error: the service would wait for its writer.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    match fs::metadata(path)?.file_type().is_fifo() {
        true => Err(io::Error::other("it is a pipe")),
        false => File::open(path),
    }
}
