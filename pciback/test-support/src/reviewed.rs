//! Files that are generated from the code and reviewed by people.

use std::fs;
use std::io;
use std::path::Path;

/// Compares such a file with what is generated now, line by line; with `XPCI_BLESS=1` it is written first.
///
/// # Errors
/// The file cannot be read or written.
///
/// # Panics
/// They differ.
pub fn assert_is(path: impl AsRef<Path>, generated: &str) -> io::Result<()> {
    let path = path.as_ref();
    if std::env::var_os("XPCI_BLESS").is_some() {
        fs::write(path, generated)?;
    }
    let reviewed = fs::read_to_string(path)?;
    for (line, (found, expected)) in generated.lines().zip(reviewed.lines()).enumerate() {
        assert_eq!(found, expected, "{}, line {}: XPCI_BLESS=1 writes it anew", path.display(), line + 1);
    }
    assert_eq!(generated.len(), reviewed.len(), "{}", path.display());
    Ok(())
}
