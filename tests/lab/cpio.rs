//! Writing an initramfs: the "newc" cpio format, uncompressed (unpacking is slower than loading under emulation).

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};

/// An archive being written. Parent folders are added by themselves.
pub struct Archive<W: Write> {
    out: W,
    inode: u32,
    seen: BTreeSet<String>,
}

const DIRECTORY: u32 = 0o040_755;
const SYMLINK: u32 = 0o120_777;
const REGULAR: u32 = 0o100_000;

impl<W: Write> Archive<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Self { out, inode: 0, seen: BTreeSet::new() }
    }

    /// Adds a folder.
    pub fn directory(&mut self, path: &str) -> Result<()> {
        self.parents(path)?;
        if self.seen.insert(clean(path)) {
            self.entry(&clean(path), DIRECTORY, &[])?;
        }
        Ok(())
    }

    /// Adds a file with these bytes. The first of two files of the same path wins.
    pub fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.parents(path)?;
        if self.seen.insert(clean(path)) {
            self.entry(&clean(path), REGULAR | mode, bytes)?;
        }
        Ok(())
    }

    /// Adds a copy of a file of this machine.
    pub fn copy(&mut self, path: &str, from: &Path, mode: u32) -> Result<()> {
        let bytes = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        self.file(path, mode, &bytes)
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.parents(path)?;
        if self.seen.insert(clean(path)) {
            self.entry(&clean(path), SYMLINK, target.as_bytes())?;
        }
        Ok(())
    }

    /// Whether this path was added.
    pub fn contains(&self, path: &str) -> bool {
        self.seen.contains(&clean(path))
    }

    /// Ends the archive and gives the writer back. Another archive may follow it.
    pub fn finish(mut self) -> Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, path: &str) -> Result<()> {
        let path = clean(path);
        for (end, _) in path.match_indices('/') {
            if self.seen.insert(path[..end].to_owned()) {
                self.entry(&path[..end], DIRECTORY, &[])?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(bytes.len()).context("a file too large for cpio")?;
        let name = path.len() as u32 + 1;
        write!(self.out, "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}", self.inode, 0, 0, 1, 0)?;
        write!(self.out, "{size:08x}{:08x}{:08x}{:08x}{:08x}{name:08x}{:08x}", 0, 0, 0, 0, 0)?;
        self.out.write_all(path.as_bytes())?;
        self.out.write_all(&[0])?;
        pad(&mut self.out, 110 + name)?;
        self.out.write_all(bytes)?;
        pad(&mut self.out, size)?;
        Ok(())
    }
}

fn clean(path: &str) -> String {
    path.trim_matches('/').to_owned()
}

fn pad(out: &mut impl Write, written: u32) -> io::Result<()> {
    out.write_all(&[0; 3][..(written.wrapping_neg() % 4) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_110_bytes_names_and_data_end_on_four() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/etc/a", 0o644, b"xyz").unwrap();
        archive.file("/etc/a", 0o644, b"again").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let names: Vec<usize> =
            bytes.windows(6).enumerate().filter(|(_, w)| w == b"070701").map(|(i, _)| i).collect();
        assert_eq!(names, [0, 116, 116 + 116 + 4]);
        assert_eq!(&bytes[110..113], b"etc");
        assert_eq!(&bytes[116 + 116..116 + 119], b"xyz");
    }
}
