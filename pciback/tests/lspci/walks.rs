//! Our walk, lspci's walk, and the comparison.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pciback::config::{AnyId, CapabilityList, FunctionKind, FunctionSpec, Identity, ListProblem};
use pciback::dump::{self, DumpedFunction};
use pciback::platform::Resource;

use crate::{composed, malformed};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dumps")
}

/// A function of which only its config space is known.
pub fn spec(function: &DumpedFunction) -> FunctionSpec {
    FunctionSpec {
        address: function.address,
        bytes: function.bytes.clone(),
        resources: [Resource::default(); 13],
        identity: Identity::default(),
        kind: FunctionKind::Physical,
        gsi: 0,
        rom: None,
    }
}

/// One capability, or the end of a list, as lspci prints it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    offset: u16,
    /// Of an extended capability.
    version: Option<u8>,
    text: String,
}

/// Where and how a list ended before its time.
type End = (u16, &'static str);

fn lspci(file: &Path, options: &[&str]) -> String {
    let output = Command::new("lspci")
        .arg("-F")
        .arg(file)
        .args(options)
        // Its words must not depend on the machine.
        .env("LC_ALL", "C")
        .output()
        .expect("lspci must be installed (package pciutils): `make deps` does it");
    assert!(output.status.success(), "lspci -F {}: {output:?}", file.display());
    String::from_utf8(output.stdout).expect("lspci prints UTF-8")
}

/// The lists as lspci sees them: capabilities, and where it met a loop, an answer of all ones, or no bytes.
fn theirs(file: &Path) -> (Vec<Line>, Vec<End>) {
    let text = lspci(file, &["-vv"]);
    let (mut capabilities, mut ends) = (Vec::new(), Vec::new());
    // Two tabs are a capability's own details.
    for line in text.lines().filter_map(|line| line.strip_prefix("\tCapabilities: ")) {
        if line == "<access denied>" {
            ends.push((0, "access denied"));
            continue;
        }
        let (place, text) = line.strip_prefix('[').and_then(|line| line.split_once("] ")).expect(line);
        let (offset, version) = match place.split_once(" v") {
            Some((offset, version)) => (offset, Some(version.parse().expect(line))),
            None => (place, None),
        };
        let offset = u16::from_str_radix(offset, 16).expect(line);
        match text {
            "<chain looped>" => ends.push((offset, "loop")),
            "<chain broken>" => ends.push((offset, "all ones")),
            _ => capabilities.push(Line { offset, version, text: text.to_owned() }),
        }
    }
    (capabilities, ends)
}

/// The same of our walk, with what each capability is.
fn ours(bytes: &[u8]) -> (Vec<(Line, AnyId)>, Vec<End>) {
    let list = CapabilityList::walk(bytes);
    let capabilities = list.capabilities.iter().map(|capability| {
        let version = matches!(capability.id, AnyId::Extended(_)).then_some(capability.version);
        let line = Line { offset: capability.offset, version, text: capability.id.to_string() };
        (line, capability.id)
    });
    let ends = list.problems.iter().filter_map(|problem| match *problem {
        ListProblem::Loop { target, .. } => Some((target & !3, "loop")),
        // lspci says nothing of an extended header of all ones.
        ListProblem::NoAnswer { at } if at < 0x100 => Some((at, "all ones")),
        ListProblem::OutOfRange { .. } => Some((0, "access denied")),
        _ => None,
    });
    (capabilities.collect(), ends.collect())
}

/// Words of lspci's for ids that it does not name as we do. It prints the number of those it does not know.
fn is_named_alike(id: AnyId, text: &str) -> bool {
    let (number, words): (String, &[&str]) = match id {
        AnyId::Legacy(id) => (
            format!("Capability ID 0x{:x} ", id.0),
            match id.0 {
                // Primary and secondary links, interrupt mapping and the like.
                0x08 => &["HyperTransport"],
                0x01 => &["Power Management version"],
                0x04 => &["Slot ID"],
                0x06 => &["CompactPCI hot-swap"],
                0x07 => &["PCI-X"],
                0x0a => &["Debug port"],
                0x0b => &["CompactPCI central resource control"],
                0x0c => &["Hot-plug capable"],
                0x0d => &["Subsystem"],
                0x0e => &["AGP3"],
                0x0f => &["Secure device"],
                0x09 => &["Vendor Specific Information", "VirtIO"],
                0x10 => &["Express"],
                0x12 => &["SATA HBA"],
                0x13 => &["PCI Advanced Features"],
                0x14 => &["Enhanced Allocation"],
                _ => &[],
            },
        ),
        AnyId::Extended(id) => (
            format!("Extended Capability ID 0x{:x}", id.0),
            match id.0 {
                0x05 => &["Root Complex Link"],
                0x06 => &["Root Complex Internal Link"],
                0x09 => &["Virtual Channel"],
                0x0a => &["Root Complex Register Block"],
                0x0b => &["Vendor Specific Information"],
                0x0f => &["Address Translation Service"],
                0x17 => &["Transaction Processing Hints"],
                0x1a => &["Protocol Multiplexing"],
                0x20 => &["PCI Express over M_PHY"],
                0x15 => &["Physical Resizable BAR"],
                0x24 => &["Virtual Resizable BAR"],
                0x23 => &["Designated Vendor-Specific"],
                0x30 => &["Integrity & Data Encryption"],
                _ => &[],
            },
        ),
    };
    let own = id.to_string();
    let unknown = format!("{text} ").starts_with(&format!("{} ", number.trim_end()));
    unknown || text.starts_with(&own) || words.iter().any(|word| text.starts_with(word))
}

fn offsets<'a>(lines: impl IntoIterator<Item = &'a Line>) -> Vec<u16> {
    lines.into_iter().map(|line| line.offset).collect()
}

/// No difference at all; the number of capabilities compared.
fn compare(name: &str, file: &Path, function: &DumpedFunction) -> usize {
    let (theirs, their_ends) = theirs(file);
    let (ours, our_ends) = ours(&function.bytes);
    let order = (offsets(&theirs), offsets(ours.iter().map(|(line, _)| line)));
    assert_eq!(order.0, order.1, "{name}: offsets, lspci's first");
    for (their, (our, id)) in theirs.iter().zip(&ours) {
        assert_eq!(their.version, our.version, "{name}: version at {:#x}, lspci's first", our.offset);
        assert!(is_named_alike(*id, &their.text), "{name}: {:#x} is {id}, lspci: {}", our.offset, their.text);
    }
    assert_eq!(their_ends, our_ends, "{name}: how the lists end, lspci's first");
    ours.len()
}

fn files(prefix: &str) -> BTreeMap<String, (PathBuf, DumpedFunction)> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder()).expect("the folder of dumps") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        if let Some(name) = name.strip_suffix(".txt").and_then(|name| name.strip_prefix(prefix)) {
            let text = fs::read_to_string(&path).expect("a dump");
            let mut functions = dump::parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(functions.len(), 1, "{name}");
            files.insert(name.to_owned(), (path, functions.remove(0)));
        }
    }
    files
}

/// Keeps the files of the composed functions what their composers make; `XPCI_BLESS=1` writes them.
fn composed(prefix: &str, functions: &[(&str, &DumpedFunction)]) {
    if std::env::var_os("XPCI_BLESS").is_some() {
        for name in files(prefix).keys().filter(|name| !functions.iter().any(|(kept, _)| kept == name)) {
            fs::remove_file(folder().join(format!("{prefix}{name}.txt"))).expect("removing a dump");
        }
        for (name, function) in functions {
            // Other tests read the folder at the same time.
            let file = folder().join(format!("{prefix}{name}"));
            fs::write(&file, function.to_string()).expect("writing a dump");
            fs::rename(&file, file.with_file_name(format!("{prefix}{name}.txt"))).expect("renaming a dump");
        }
    }
    let found: Vec<(String, DumpedFunction)> =
        files(prefix).into_iter().map(|(name, (_, function))| (name, function)).collect();
    let mut made: Vec<(String, DumpedFunction)> =
        functions.iter().map(|(name, function)| ((*name).to_owned(), (*function).clone())).collect();
    made.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(found == made, "{prefix}*.txt are not what is composed: XPCI_BLESS=1 cargo test writes them");
}

#[test]
fn qemus_devices_have_the_lists_that_lspci_sees() {
    let files = files("qemu-");
    assert!(files.len() >= 70, "{} files", files.len());
    let compared: usize = files.iter().map(|(name, (file, function))| compare(name, file, function)).sum();
    assert!(compared >= 190, "only {compared} capabilities");
    for (name, (_, function)) in &files {
        assert_eq!(malformed::problems(function), [""; 0], "{name}");
    }
}

#[test]
fn composed_devices_have_the_lists_that_lspci_sees() {
    let made = composed::all();
    composed("composed-", &made.iter().map(|(name, function)| (*name, function)).collect::<Vec<_>>());
    let files = files("composed-");
    let compared: usize = files.iter().map(|(name, (file, function))| compare(name, file, function)).sum();
    assert!(compared >= 1200, "only {compared} capabilities");
}

#[test]
fn malformed_lists_differ_from_lspcis_only_where_and_as_it_is_said() {
    let made = malformed::all();
    composed("malformed-", &made.iter().map(|made| (made.name, &made.function)).collect::<Vec<_>>());
    let files = files("malformed-");
    for made in &made {
        let (file, function) = &files[made.name];
        let problems = malformed::problems(function).join("; ");
        let as_said =
            if made.problem.is_empty() { problems.is_empty() } else { problems.contains(made.problem) };
        assert!(as_said, "{}: '{}' expected, found '{problems}'", made.name, made.problem);
        let Some((only_theirs, only_ours, reason)) = made.differs else {
            compare(made.name, file, function);
            continue;
        };
        // The same offset may be in both lists, with a version in one.
        let theirs: Vec<_> = theirs(file).0.iter().map(|line| (line.offset, line.version)).collect();
        let ours: Vec<_> =
            ours(&function.bytes).0.iter().map(|(line, _)| (line.offset, line.version)).collect();
        let without = |list: &[(u16, Option<u8>)], other: &[(u16, Option<u8>)]| -> Vec<u16> {
            list.iter().filter(|place| !other.contains(place)).map(|(offset, _)| *offset).collect()
        };
        let found = (without(&theirs, &ours), without(&ours, &theirs));
        assert_eq!((&*found.0, &*found.1), (only_theirs, only_ours), "{}: {reason}", made.name);
    }
}

#[test]
fn lspci_reads_every_dump_as_we_do() {
    let files = files("");
    assert!(files.len() >= 120, "{} files", files.len());
    for (name, (file, function)) in files {
        let mut printed = dump::parse(&lspci(&file, &["-D", "-n", "-xxxx"]))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let printed = printed.remove(0);
        assert_eq!(printed.address, function.address, "{name}");
        assert!(printed.bytes == function.bytes, "{name}: the bytes differ");
    }
}

#[test]
fn the_comparison_sees_a_difference() {
    let (_, function) = composed::all().swap_remove(0);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("dump.txt");
    fs::write(&file, function.to_string()).expect("writing");
    let fails = |change: fn(&mut Vec<u8>)| {
        let mut other = function.clone();
        change(&mut other.bytes);
        std::panic::catch_unwind(|| compare("changed", &file, &other)).is_err()
    };
    assert!(!fails(|_| {}));
    assert!(fails(|bytes| bytes[0x102] ^= 1), "version");
    assert!(fails(|bytes| bytes[0x103] ^= 0x10), "pointer");
    assert!(fails(|bytes| bytes[0x80] = 0x13), "name");
    assert!(fails(|bytes| bytes[6] = 0), "a whole list");
}
