//! Which shared libraries a program needs, read from its dynamic section.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;

/// The names a 64-bit little-endian ELF file asks the loader for; `None` for a file that is no such program.
pub fn needed(path: &Path) -> Result<Option<Vec<String>>> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    if !bytes.starts_with(b"\x7fELF\x02\x01") {
        return Ok(None);
    }
    parse(&bytes).map(Some).with_context(|| format!("{} is a damaged ELF file", path.display()))
}

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    size: u64,
}

fn parse(bytes: &[u8]) -> Option<Vec<String>> {
    let table = usize::try_from(u64_at(bytes, 32)?).ok()?;
    let entry = usize::from(u16_at(bytes, 54)?);
    let count = usize::from(u16_at(bytes, 56)?);
    let segments = (0..count).map(|i| segment(bytes, table + i * entry)).collect::<Option<Vec<_>>>()?;
    let Some(dynamic) = segments.iter().find(|s| s.kind == PT_DYNAMIC) else {
        return Some(Vec::new());
    };
    let start = usize::try_from(dynamic.offset).ok()?;
    let items: Vec<(u64, u64)> = (0..dynamic.size as usize / 16)
        .map(|i| Some((u64_at(bytes, start + i * 16)?, u64_at(bytes, start + i * 16 + 8)?)))
        .collect::<Option<_>>()?;
    let strings = items.iter().find(|(tag, _)| *tag == DT_STRTAB)?.1;
    let load =
        segments.iter().find(|s| s.kind == PT_LOAD && (s.address..s.address + s.size).contains(&strings))?;
    let strings = strings - load.address + load.offset;
    items.iter().filter(|(tag, _)| *tag == DT_NEEDED).map(|(_, at)| text(bytes, strings + at)).collect()
}

fn segment(bytes: &[u8], at: usize) -> Option<Segment> {
    Some(Segment {
        kind: u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?),
        offset: u64_at(bytes, at + 8)?,
        address: u64_at(bytes, at + 16)?,
        size: u64_at(bytes, at + 32)?,
    })
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn text(bytes: &[u8], at: u64) -> Option<String> {
    let rest = bytes.get(usize::try_from(at).ok()?..)?;
    let end = rest.iter().position(|b| *b == 0)?;
    Some(String::from_utf8_lossy(&rest[..end]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_very_test_needs_libc() {
        let needed = needed(&std::env::current_exe().unwrap()).unwrap().unwrap();
        assert!(needed.iter().any(|n| n.starts_with("libc.so")), "{needed:?}");
    }

    #[test]
    fn a_script_is_no_program() {
        assert_eq!(needed(Path::new(file!()).file_name().map(Path::new).unwrap()).ok().flatten(), None);
    }
}
