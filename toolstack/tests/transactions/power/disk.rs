//! A disk whose power fails: what was written and what was synced, from the system calls of a program, as strace has recorded them.
//!
//! The rules are those of POSIX, which are stricter than what most file systems do: the contents of a file survive once the file is
//! synced, its name once its directory is.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A change of what is on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Opened { path: PathBuf, creates: bool, truncates: bool },
    Written { path: PathBuf, text: Vec<u8> },
    Truncated { path: PathBuf, length: usize },
    Synced { path: PathBuf },
    Renamed { from: PathBuf, to: PathBuf, exchanges: bool },
    Removed { path: PathBuf },
    MadeDirectory { path: PathBuf },
}

/// What of the changes that were not synced a power failure leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    Everything,
    /// Names and truncations, which file systems keep in a journal, but not the contents of files.
    Metadata,
    Nothing,
}

#[derive(Debug, Clone, Default)]
struct File {
    text: Vec<u8>,
    synced: Vec<u8>,
    /// Since it was synced.
    is_truncated: bool,
}

impl File {
    fn left(&self, left: Left) -> &[u8] {
        match left {
            Left::Everything => &self.text,
            Left::Metadata if self.is_truncated => &[],
            Left::Metadata | Left::Nothing => &self.synced,
        }
    }
}

/// What a directory has under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Directory,
    File(usize),
}

/// A disk, with one directory at first.
#[derive(Debug, Clone)]
pub struct Disk {
    root: PathBuf,
    files: Vec<File>,
    entries: BTreeMap<PathBuf, Entry>,
    synced: BTreeMap<PathBuf, Entry>,
}

impl Disk {
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), files: Vec::new(), entries: BTreeMap::new(), synced: BTreeMap::new() }
    }

    fn file(&mut self, path: &Path) -> &mut File {
        match self.entries.get(path) {
            Some(&Entry::File(number)) => &mut self.files[number],
            other => panic!("{} is {other:?}", path.display()),
        }
    }

    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Opened { path, creates, truncates } => {
                if *creates && !self.entries.contains_key(path) {
                    self.entries.insert(path.clone(), Entry::File(self.files.len()));
                    self.files.push(File::default());
                }
                if *truncates {
                    self.truncate(path, 0);
                }
            }
            // Each file is written from its beginning, or appended to.
            Change::Written { path, text } => self.file(path).text.extend(text),
            Change::Truncated { path, length } => self.truncate(path, *length),
            Change::Synced { path } => self.sync(path),
            Change::Renamed { from, to, exchanges } => {
                let moved = self.entries.remove(from).unwrap();
                let replaced = self.entries.insert(to.clone(), moved);
                if *exchanges {
                    self.entries.insert(from.clone(), replaced.unwrap());
                }
            }
            Change::Removed { path } => drop(self.entries.remove(path).unwrap()),
            Change::MadeDirectory { path } => drop(self.entries.insert(path.clone(), Entry::Directory)),
        }
    }

    fn truncate(&mut self, path: &Path, length: usize) {
        let file = self.file(path);
        file.text.truncate(length);
        file.is_truncated = true;
    }

    fn sync(&mut self, path: &Path) {
        if let Some(Entry::File(_)) = self.entries.get(path) {
            let file = self.file(path);
            (file.synced, file.is_truncated) = (file.text.clone(), false);
            return;
        }
        self.synced.retain(|entry, _| entry.parent() != Some(path));
        let now = self.entries.iter().filter(|(entry, _)| entry.parent() == Some(path));
        self.synced.extend(now.map(|(entry, what)| (entry.clone(), *what)));
    }

    /// The directories and files that are left, sorted by path.
    pub fn after_power_failure(&self, left: Left) -> Vec<(PathBuf, Option<&[u8]>)> {
        let entries = if left == Left::Nothing { &self.synced } else { &self.entries };
        let is_left = |path: &Path| {
            let above = path.ancestors().skip(1).take_while(|above| *above != self.root);
            above.into_iter().all(|above| entries.contains_key(above))
        };
        let text = |entry: &Entry| match *entry {
            Entry::Directory => None,
            Entry::File(number) => Some(self.files[number].left(left)),
        };
        entries
            .iter()
            .filter(|(path, _)| is_left(path))
            .map(|(path, entry)| (path.strip_prefix(&self.root).unwrap().to_owned(), text(entry)))
            .collect()
    }
}

/// Makes such files.
pub fn write(left: &[(PathBuf, Option<&[u8]>)], directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    for (path, text) in left {
        let path = directory.join(path);
        match text {
            Some(text) => fs::write(path, text).unwrap(),
            None => fs::create_dir(path).unwrap(),
        }
    }
}
