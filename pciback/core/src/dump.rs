//! Reading config spaces from the output of `lspci -x`, `-xxx` or `-xxxx`.
//!
//! A dump comes from someone else's machine, perhaps by mail: it is bounded, nothing in it is guessed, what is wrong is named with
//! its line, and the rest is read.

use std::collections::BTreeSet;
use std::fmt;

use thiserror::Error;

use crate::address::{Sbdf, SbdfError};

/// The longest text that is read, in bytes; a host with a thousand functions needs about 14 MiB.
pub const MAX_TEXT: usize = 64 << 20;
/// The most functions in one file: as many as one segment has.
pub const MAX_FUNCTIONS: usize = 1 << 16;
/// The longest title that is kept, in characters.
pub const MAX_TITLE: usize = 256;
/// The most damaged places that are reported.
const MAX_DAMAGE: usize = 100;
/// The most regions of one function that are kept: six BARs, an expansion ROM, and six VF BARs.
const MAX_REGIONS: usize = 13;

/// How long a dump can be: `-x`, `-x` of a CardBus bridge, `-xxx`, `-xxxx`.
const LENGTHS: [usize; 4] = [64, 128, 256, LONGEST];
const LONGEST: usize = 4096;
const LINE: usize = 16;

/// One function of a dump. It is printed as lspci prints it.
///
/// ```
/// let mut text = String::from("01:10.0 Ethernet controller\r\n\tSubsystem: ignored\r\n");
/// for line in 0..4 {
///     text += &format!("{line:x}0: 86 80 CA 10 00 00 10 00 01 00 00 02 00 00 00 00\r\n");
/// }
/// let functions = xpci_core::dump::parse(&text)?;
/// assert_eq!(functions[0].address.to_string(), "0000:01:10.0");
/// assert_eq!(functions[0].bytes.len(), 64);
/// assert!(functions[0].to_string().starts_with("0000:01:10.0 Ethernet controller\n00: 86 80 ca 10 "));
/// # Ok::<(), xpci_core::dump::DumpError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DumpedFunction {
    /// Where it was.
    pub address: Sbdf,
    /// The text behind the address, without control characters and at most [`MAX_TITLE`] characters long.
    pub title: String,
    /// Its config space: 64, 128, 256 or 4096 bytes.
    pub bytes: Vec<u8>,
    /// The line of its address, counted from 1.
    pub line: usize,
    /// The ranges that lspci -v printed of its BARs and expansion ROM, where it printed their sizes.
    pub regions: Vec<Region>,
}

/// A range of memory or I/O ports in a dump, as `Memory at e0000000 (64-bit, prefetchable) [size=256M]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Its first address or port.
    pub start: u64,
    /// Its size in bytes, a power of two.
    pub size: u64,
}

/// A dump as far as it can be read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dump {
    /// The functions, in their order. One with a damaged line is here with what stands before that line, cut to 64 or 256 bytes.
    pub functions: Vec<DumpedFunction>,
    /// What could not be read, by line; at most 100 entries.
    pub damage: Vec<DumpError>,
}

/// Why a text is no dump, or why a part of it is not read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DumpError {
    /// The text is longer than any host's dump.
    #[error("the dump has {length} bytes; at most {MAX_TEXT} are read")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// There is no function in it.
    #[error(
        "no PCI function in it: the output of 'lspci -xxxx' is expected, an address such as '0000:01:10.0' and then lines \
         such as '00: 86 80 ca 10 ...'"
    )]
    Empty,
    /// More functions than a segment has.
    #[error("line {line}: more than {MAX_FUNCTIONS} functions")]
    TooMany {
        /// Where the first one too many is.
        line: usize,
    },
    /// What stands where an address is expected is none.
    #[error("line {line}: {source}")]
    Address {
        /// Where.
        line: usize,
        /// What is wrong with it.
        source: SbdfError,
    },
    /// Linux numbers the domains behind Intel VMD from 10000; Xen and PCI have 16 bits.
    #[error(
        "line {line}: domain {domain} is over ffff: Linux made it up (Intel VMD) and Xen cannot address it; take this \
         function out of the file"
    )]
    Domain {
        /// Where.
        line: usize,
        /// The domain as it stands there.
        domain: String,
    },
    /// The same address twice.
    #[error("line {line}: {address} is in the file for the second time")]
    Repeated {
        /// Where it is for the second time.
        line: usize,
        /// Which one.
        address: Sbdf,
    },
    /// Bytes before the first address, or behind the empty line that ends a function.
    #[error("line {line}: bytes that belong to no function: a line with its address must stand before them")]
    NoAddress {
        /// Where.
        line: usize,
    },
    /// A line of bytes starts where it should not.
    #[error("line {line}: bytes of offset {found:#x}, where those of {expected:#x} should follow")]
    Offset {
        /// Where.
        line: usize,
        /// The offset that would have continued the function.
        expected: usize,
        /// The offset of the line.
        found: usize,
    },
    /// A line of bytes has not 16 of them, or something else in it.
    #[error("line {line}: '{text}' is not an offset and 16 bytes of two hexadecimal digits each")]
    Bytes {
        /// Where.
        line: usize,
        /// The beginning of the line.
        text: String,
    },
    /// A function has a number of bytes that lspci never prints.
    #[error(
        "line {line}: {address} has {length} bytes; lspci prints 64 (-x), 128 (CardBus), 256 (-xxx) or 4096 (-xxxx)"
    )]
    Length {
        /// Where the function begins, or where its first byte too many is.
        line: usize,
        /// Which one.
        address: Sbdf,
        /// How many there are.
        length: usize,
    },
}

/// Reads all functions of a dump that is whole, in their order.
///
/// # Errors
/// The first damaged place.
pub fn parse(text: &str) -> Result<Vec<DumpedFunction>, DumpError> {
    let dump = read(text)?;
    match dump.damage.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(dump.functions),
    }
}

/// Reads a dump as far as it can be read.
///
/// Lines of `-v` and other text are skipped, but for the sizes of regions. What looks like an address or like bytes must be right:
/// where it is not, the place is named in [`Dump::damage`] and the rest of that function is skipped.
///
/// # Errors
/// The text is longer than [`MAX_TEXT`] bytes, or nothing in it can be read.
pub fn read(text: &str) -> Result<Dump, DumpError> {
    if text.len() > MAX_TEXT {
        return Err(DumpError::TooLong { length: text.len() });
    }
    let mut reader = Reader::default();
    // Editors and PowerShell begin a file with a byte order mark.
    for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        if let Err(error) = reader.line(index + 1, line.trim_end()) {
            reader.damaged(error);
        }
    }
    if let Err(error) = reader.end_function() {
        reader.damaged(error);
    }
    let Dump { functions, damage } = reader.dump;
    if !functions.is_empty() {
        return Ok(Dump { functions, damage });
    }
    Err(damage.into_iter().next().unwrap_or(DumpError::Empty))
}

#[derive(Default)]
struct Reader {
    dump: Dump,
    seen: BTreeSet<Sbdf>,
    /// The function whose bytes are being read.
    open: Option<DumpedFunction>,
    /// Until the next address: bytes that follow a damaged place belong to no function.
    skipping: bool,
}

impl Reader {
    fn line(&mut self, line: usize, text: &str) -> Result<(), DumpError> {
        if text.is_empty() {
            // lspci prints an empty line behind each function; bytes after it would be anybody's.
            return self.end_function();
        }
        // Lines of -v are indented.
        if text.starts_with(char::is_whitespace) {
            self.region(text);
            return Ok(());
        }
        let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        // Anything but an address or an offset is a message that came between.
        if !word.contains(':') || !word.bytes().all(|b| b.is_ascii_hexdigit() || b == b':' || b == b'.') {
            return Ok(());
        }
        match word.strip_suffix(':') {
            Some(_) if self.skipping => Ok(()),
            Some(offset) => self.bytes(line, text, offset, rest),
            None => self.address(line, word, rest),
        }
    }

    /// Notes a damaged place. What the function has before it is kept, as far as lspci would print it.
    fn damaged(&mut self, error: DumpError) {
        if self.dump.damage.len() < MAX_DAMAGE {
            self.dump.damage.push(error);
        }
        self.skipping = true;
        let Some(mut function) = self.open.take() else { return };
        if let Some(length) = [256, 64].into_iter().find(|length| *length <= function.bytes.len()) {
            function.bytes.truncate(length);
            self.dump.functions.push(function);
        }
    }

    fn address(&mut self, line: usize, word: &str, title: &str) -> Result<(), DumpError> {
        if let Err(error) = self.end_function() {
            self.damaged(error);
        }
        self.skipping = false;
        let domain = word.split(':').next().filter(|_| word.split(':').count() == 3).unwrap_or_default();
        if domain.len() > 4 && domain.len() <= 8 {
            return Err(DumpError::Domain { line, domain: domain.to_owned() });
        }
        let address = word.parse().map_err(|source| DumpError::Address { line, source })?;
        if self.dump.functions.len() == MAX_FUNCTIONS {
            return Err(DumpError::TooMany { line });
        }
        if !self.seen.insert(address) {
            return Err(DumpError::Repeated { line, address });
        }
        let title = printable(title, MAX_TITLE);
        let (bytes, regions) = (Vec::new(), Vec::new());
        self.open = Some(DumpedFunction { address, title, bytes, line, regions });
        Ok(())
    }

    /// Takes the size of a region from a line such as `Region 0: Memory at e0000000 (64-bit, prefetchable) [size=256M]`.
    fn region(&mut self, text: &str) {
        let Some(function) = self.open.as_mut().filter(|function| function.regions.len() < MAX_REGIONS)
        else {
            return;
        };
        let what = text.trim_start();
        let what = match what.strip_prefix("Region ") {
            Some(numbered) => numbered.split_once(": ").map_or("", |(_, what)| what),
            None => what,
        };
        let at = ["Memory at ", "I/O ports at ", "Expansion ROM at "];
        let Some(place) = at.iter().find_map(|prefix| what.strip_prefix(prefix)) else { return };
        let start = place.split_whitespace().next().and_then(|word| u64::from_str_radix(word, 16).ok());
        let size =
            place.split_once("[size=").and_then(|(_, size)| size.split_once(']')).map(|(size, _)| size);
        if let Some((start, size)) = start.zip(size.and_then(byte_count)) {
            function.regions.push(Region { start, size });
        }
    }

    fn bytes(&mut self, line: usize, text: &str, offset: &str, rest: &str) -> Result<(), DumpError> {
        let malformed = || DumpError::Bytes { line, text: printable(text, 64) };
        let found = (offset.len() <= 4)
            .then(|| usize::from_str_radix(offset, 16).ok())
            .flatten()
            .ok_or_else(malformed)?;
        let function = self.open.as_mut().ok_or(DumpError::NoAddress { line })?;
        let expected = function.bytes.len();
        if found != expected {
            return Err(DumpError::Offset { line, expected, found });
        }
        if expected == LONGEST {
            return Err(DumpError::Length { line, address: function.address, length: expected + LINE });
        }
        let mut words = rest.split_ascii_whitespace();
        let mut bytes = [0; LINE];
        for slot in &mut bytes {
            *slot = words.next().and_then(byte).ok_or_else(malformed)?;
        }
        if words.next().is_some() {
            return Err(malformed());
        }
        function.bytes.extend(bytes);
        Ok(())
    }

    fn end_function(&mut self) -> Result<(), DumpError> {
        let Some(function) = &self.open else { return Ok(()) };
        let (line, address, length) = (function.line, function.address, function.bytes.len());
        if !LENGTHS.contains(&length) {
            return Err(DumpError::Length { line, address, length });
        }
        self.dump.functions.extend(self.open.take());
        Ok(())
    }
}

/// A size as lspci prints it, in bytes: digits and perhaps K, M, G or T. Regions are powers of two.
fn byte_count(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    let count: u64 = digits.parse().ok()?;
    let size = count.checked_mul(1 << shift)?;
    size.is_power_of_two().then_some(size)
}

/// The beginning of a text, without what a terminal would obey.
fn printable(text: &str, length: usize) -> String {
    let text: String = text.trim().chars().filter(|c| !c.is_control()).take(length).collect();
    text.trim().to_owned()
}

/// Two digits and nothing else; `from_str_radix` alone would take "+1".
fn byte(word: &str) -> Option<u8> {
    let digits = word.len() == 2 && word.bytes().all(|b| b.is_ascii_hexdigit());
    digits.then(|| u8::from_str_radix(word, 16).ok()).flatten()
}

impl fmt::Display for DumpedFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)?;
        if !self.title.is_empty() {
            write!(f, " {}", self.title)?;
        }
        writeln!(f)?;
        for (index, bytes) in self.bytes.chunks(LINE).enumerate() {
            write!(f, "{:02x}:", index * LINE)?;
            for byte in bytes {
                write!(f, " {byte:02x}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
