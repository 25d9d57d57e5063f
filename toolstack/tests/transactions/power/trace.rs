//! What strace has recorded of the changes at some places.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::disk::Change;

/// The system calls that change files. What of it a program uses and this does not know fails the test.
pub const CALLS: &str = "openat,open,creat,write,writev,pwrite64,pwritev,fsync,fdatasync,ftruncate,truncate,rename,renameat,renameat2,\
                         unlink,unlinkat,rmdir,mkdir,mkdirat,link,linkat,symlink,symlinkat,copy_file_range,sendfile,fallocate";

/// The successful changes at or below these paths, in the order in which they ended.
pub fn changes(record: &str, places: &[&Path]) -> Vec<Change> {
    let mut unfinished: BTreeMap<&str, &str> = BTreeMap::new();
    let mut changes = Vec::new();
    for line in record.lines() {
        let (thread, rest) = line.split_once(' ').unwrap();
        let rest = rest.trim_start();
        let call = if let Some((begun, _)) = rest.split_once(" <unfinished ...>") {
            unfinished.insert(thread, begun);
            continue;
        } else if let Some((_, end)) = rest.split_once(" resumed>") {
            format!("{}{end}", unfinished.remove(thread).unwrap())
        } else {
            rest.to_owned()
        };
        // Signals and ends of threads are no calls.
        let Some((call, outcome)) = call.rsplit_once(" = ") else { continue };
        if !outcome.starts_with('-') {
            changes.extend(change(call.trim_end(), places));
        }
    }
    changes
}

fn change(call: &str, places: &[&Path]) -> Option<Change> {
    let (name, arguments) = call.strip_suffix(')').unwrap().split_once('(').unwrap();
    let arguments: Vec<&str> = arguments.split(", ").collect();
    let path = |index: usize| PathBuf::from(std::ffi::OsString::from_vec(bytes(arguments[index])));
    let is_inside = |path: &PathBuf| places.iter().any(|place| path.starts_with(place));
    let flags = |index: usize, flag: &str| arguments[index].split('|').any(|one| one == flag);
    match name {
        "openat" => {
            let path = Some(path(1)).filter(is_inside)?;
            let (creates, truncates) = (flags(2, "O_CREAT"), flags(2, "O_TRUNC"));
            (creates || truncates).then_some(Change::Opened { path, creates, truncates })
        }
        "write" => {
            Some(Change::Written { path: Some(path(0)).filter(is_inside)?, text: bytes(arguments[1]) })
        }
        "ftruncate" => {
            let length = arguments[1].parse().unwrap();
            Some(Change::Truncated { path: Some(path(0)).filter(is_inside)?, length })
        }
        "fsync" | "fdatasync" => Some(Change::Synced { path: Some(path(0)).filter(is_inside)? }),
        "rename" => {
            Some(Change::Renamed { from: Some(path(0)).filter(is_inside)?, to: path(1), exchanges: false })
        }
        "renameat2" => {
            let exchanges = flags(4, "RENAME_EXCHANGE");
            Some(Change::Renamed { from: Some(path(1)).filter(is_inside)?, to: path(3), exchanges })
        }
        "unlink" => Some(Change::Removed { path: Some(path(0)).filter(is_inside)? }),
        "unlinkat" => Some(Change::Removed { path: Some(path(1)).filter(is_inside)? }),
        "mkdir" => Some(Change::MadeDirectory { path: Some(path(0)).filter(is_inside)? }),
        // Sockets, pipes and files elsewhere.
        _ if !(0..arguments.len()).any(|index| is_inside(&path(index))) => None,
        _ => panic!("{name} is not known here: {call}"),
    }
}

/// The bytes of a string, or of the path of a file descriptor; strace shows both as `\xHH`.
fn bytes(argument: &str) -> Vec<u8> {
    argument.split("\\x").skip(1).map(|digits| u8::from_str_radix(&digits[..2], 16).unwrap()).collect()
}
