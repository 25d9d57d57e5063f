//! Reading sysfs attributes: small texts that are checked before they are believed.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::path::Path;
use std::str::FromStr;

use nix::errno::Errno;

use crate::Sbdf;
use crate::platform::{Cause, Resource};

/// The longest attribute: sysfs gives at most one page.
const LONGEST: u64 = 4096;
/// More entries than any directory read here has.
const MOST_ENTRIES: usize = 65_536;

type Result<T> = std::result::Result<T, Cause>;

/// Whether an error says that the function, or only this attribute of it, is not there.
pub fn is_absent(error: &std::io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    error.kind() == ErrorKind::NotFound || matches!(errno, Some(Errno::ENODEV | Errno::ENXIO))
}

/// An attribute's text without the white space around it; `None` where there is none.
pub fn read_text(path: &Path) -> Result<Option<String>> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?.take(LONGEST + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = match read() {
        Ok(bytes) => bytes,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if bytes.len() as u64 > LONGEST {
        return Err(Cause::Malformed(format!("longer than {LONGEST} bytes")));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(_) => Err(Cause::Malformed("not UTF-8".into())),
    }
}

/// The last component of what a link points to; `None` where there is no link.
pub fn link_name(path: &Path) -> Result<Option<String>> {
    match fs::read_link(path) {
        Ok(target) => match target.file_name().and_then(|name| name.to_str()) {
            Some(name) => Ok(Some(name.to_owned())),
            None => Err(Cause::Malformed("a link to nothing with a name".into())),
        },
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The names in a directory, sorted; `None` where there is no directory. Names that are not UTF-8 are left out.
pub fn names(path: &Path) -> Result<Option<Vec<String>>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(name) = entry?.file_name().into_string() {
            names.push(name);
        }
        if names.len() > MOST_ENTRIES {
            return Err(Cause::Malformed(format!("more than {MOST_ENTRIES} entries")));
        }
    }
    names.sort_unstable();
    Ok(Some(names))
}

fn malformed(text: &str, what: &str) -> Cause {
    Cause::Malformed(format!("'{}' is not {what}", text.chars().take(40).collect::<String>().escape_debug()))
}

/// A decimal number.
pub fn parse_decimal<T: FromStr>(text: &str) -> Result<T> {
    text.parse().map_err(|_| malformed(text, "a decimal number in range"))
}

/// A hexadecimal number with `0x` before it, no greater than `max`.
pub fn parse_hex(text: &str, max: u64) -> Result<u64> {
    text.strip_prefix("0x")
        .filter(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .filter(|value| *value <= max)
        .ok_or_else(|| malformed(text, &format!("a hexadecimal number up to {max:#x}")))
}

/// A function's address.
pub fn parse_address(text: &str) -> Result<Sbdf> {
    text.parse().map_err(|_| malformed(text, "a PCI address"))
}

/// `resource`: one line of start, end and flags for each BAR, the ROM and, for a PF, each VF BAR. More lines are bridge
/// windows and not of interest here.
pub fn parse_resources(text: &str) -> Result<[Resource; 13]> {
    let mut resources = [Resource::default(); 13];
    for (resource, line) in resources.iter_mut().zip(text.lines()) {
        let mut fields = line.split_ascii_whitespace();
        let (Some(start), Some(end), Some(flags), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Err(malformed(line, "a resource: start, end and flags"));
        };
        let (start, end) = (parse_hex(start, u64::MAX)?, parse_hex(end, u64::MAX)?);
        let flags = parse_hex(flags, u64::MAX)?;
        if flags == 0 || (start == 0 && end == 0) {
            continue;
        }
        let size = end
            .checked_sub(start)
            .and_then(|last| last.checked_add(1))
            .ok_or_else(|| malformed(line, "a resource: it ends before it starts"))?;
        *resource = Resource { start, size, flags };
    }
    Ok(resources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_have_their_places_sizes_and_flags() {
        let text = "0x00000000fe800000 0x00000000fe81ffff 0x0000000000040200\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x000000000000c000 0x000000000000c01f 0x0000000000040101\n";
        let resources = parse_resources(text).unwrap();
        assert_eq!(resources[0], Resource { start: 0xfe80_0000, size: 0x2_0000, flags: 0x4_0200 });
        assert!(!resources[1].exists());
        assert!(resources[2].is_io() && resources[2].size == 0x20);
        assert!(resources[3..].iter().all(|resource| !resource.exists()));
    }

    #[test]
    fn an_unassigned_resource_does_not_exist() {
        let text = "0x0000000000000000 0x0000000000000000 0x0000000000140204\n";
        assert!(!parse_resources(text).unwrap()[0].exists());
    }

    #[test]
    fn malformed_resources_are_refused() {
        for text in [
            "0x1 0x2\n",
            "0x1 0x2 0x3 0x4\n",
            "1 2 3\n",
            "0x2000 0x1000 0x200\n",
            "0x0 0xffffffffffffffff 0x200\n",
            "0x 0x1 0x200\n",
            "0x+1 0x2 0x200\n",
            "0x11111111111111111 0x2 0x200\n",
        ] {
            assert!(matches!(parse_resources(text), Err(Cause::Malformed(_))), "{text}");
        }
    }

    #[test]
    fn more_lines_than_a_function_has_ranges_are_ignored() {
        let line = "0x0000000000001000 0x0000000000001fff 0x0000000000000200\n";
        assert!(parse_resources(&line.repeat(17)).unwrap().iter().all(Resource::exists));
    }

    #[test]
    fn numbers_are_checked() {
        assert_eq!(parse_hex("0x10c9", 0xffff).unwrap(), 0x10c9);
        assert!(parse_hex("0x10000", 0xffff).is_err());
        assert!(parse_hex("10c9", 0xffff).is_err());
        assert!(parse_decimal::<u16>("65536").is_err());
        assert!(parse_decimal::<i32>("-1").is_ok());
    }

    #[test]
    fn an_attribute_that_never_ends_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), vec![b'x'; 5000]).unwrap();
        assert!(matches!(read_text(file.path()), Err(Cause::Malformed(_))));
        fs::write(file.path(), [0xff, 0xfe]).unwrap();
        assert!(matches!(read_text(file.path()), Err(Cause::Malformed(_))));
        assert!(read_text(Path::new("/nonexistent")).unwrap().is_none());
    }
}
