//! Policy files on disk: reading the directories, and keeping a copy of the policies in force.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use pciback::policy::{Diagnostic, FILE_LIMIT, PolicyFile, PolicySet};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::outcome::{ErrorCode, Failure};
use crate::{drop_ins, durable};

/// The largest number of policy files, as a protection against wrong directories.
const MAX_FILES: usize = 1000;
/// The copy of the policies in force, in the state directory.
const COPY: &str = "policies-in-force";
/// The largest size of the copy, in bytes.
const COPY_LIMIT: u64 = 64 << 20;

/// Why policies cannot be used. No file is used then, because the unusable one might forbid something.
#[derive(Debug, Error)]
pub enum PolicyError {
    /// A file or directory cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// There are too many files.
    #[error("{directory}: more than {MAX_FILES} policy files")]
    TooMany {
        /// The directory.
        directory: PathBuf,
    },
    /// Some files have mistakes.
    #[error("{0}")]
    Invalid(Mistakes),
}

/// All mistakes in all files, one per line.
#[derive(Debug)]
pub struct Mistakes(pub Vec<Diagnostic>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, mistake) in self.0.iter().enumerate() {
            write!(f, "{}{mistake}", if position == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl From<PolicyError> for Failure {
    fn from(error: PolicyError) -> Self {
        let failure = |code| Self::new(code, error.to_string());
        match &error {
            PolicyError::Invalid(mistakes) => failure(ErrorCode::Refused).mistakes(mistakes.0.clone()),
            _ => failure(ErrorCode::Failed),
        }
    }
}

/// The contents of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Its path.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// Reads a file, up to the size limit of policy files.
pub fn read(path: &Path) -> Result<Source, PolicyError> {
    read_from(path, File::open(path))
}

fn read_from(path: &Path, file: io::Result<File>) -> Result<Source, PolicyError> {
    let failed = |source| PolicyError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    // One byte more than allowed, so that the parser reports a file that is too long.
    file.map_err(failed)?.take(FILE_LIMIT as u64 + 1).read_to_string(&mut text).map_err(failed)?;
    Ok(Source { name: path.display().to_string(), text })
}

/// Reads all `*.yaml` files of some directories; a missing directory has none.
fn read_directories(directories: &[PathBuf]) -> Result<Vec<Source>, PolicyError> {
    let mut paths: BTreeMap<std::ffi::OsString, PathBuf> = BTreeMap::new();
    for directory in directories {
        let failed = |source| PolicyError::Read { path: directory.clone(), source };
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            if drop_ins::is_read(&path)
                && let Some(name) = path.file_name()
            {
                paths.insert(name.to_owned(), path);
            }
        }
        if paths.len() > MAX_FILES {
            return Err(PolicyError::TooMany { directory: directory.clone() });
        }
    }
    paths.values().map(|path| read_from(path, drop_ins::open(path))).collect()
}

/// Parses files; a mistake in one makes all unusable.
pub fn parse(sources: &[Source]) -> Result<PolicySet, PolicyError> {
    let (mut files, mut mistakes) = (Vec::new(), Vec::new());
    for source in sources {
        match PolicyFile::parse(&source.name, &source.text) {
            Ok(file) => files.push(file),
            Err(found) => mistakes.extend(found),
        }
    }
    if mistakes.is_empty() {
        Ok(PolicySet::new(files))
    } else {
        Err(PolicyError::Invalid(Mistakes(mistakes)))
    }
}

/// Reads and parses all files of some directories.
pub fn load(directories: &[PathBuf]) -> Result<(Vec<Source>, PolicySet), PolicyError> {
    let sources = read_directories(directories)?;
    let set = parse(&sources)?;
    Ok((sources, set))
}

/// Keeps a copy of the policies in force, so that a service that starts while a file has mistakes can still serve its guests.
pub fn keep_copy(state_directory: &Path, sources: &[Source]) -> io::Result<()> {
    durable::keep(&state_directory.join(COPY), &sources)
}

/// The copy of the policies in force; `None` if there is no usable one.
pub fn read_copy(state_directory: &Path) -> Option<PolicySet> {
    let text = durable::read(&state_directory.join(COPY), COPY_LIMIT).ok()?;
    let sources: Vec<Source> = serde_json::from_slice(&text).ok()?;
    parse(&sources).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_directory_replaces_files_of_the_same_name() {
        let (shipped, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(shipped.path().join("a.yaml"), "profile: strict\n").unwrap();
        fs::write(shipped.path().join("b.yaml"), "profile: hidden\n").unwrap();
        fs::write(own.path().join("a.yaml"), "profile: passthrough\n").unwrap();
        fs::write(own.path().join("notes.txt"), "no policy").unwrap();
        let directories = [shipped.path().to_owned(), own.path().to_owned(), PathBuf::from("/nonexistent")];
        let sources = read_directories(&directories).unwrap();
        let texts: Vec<&str> = sources.iter().map(|source| source.text.as_str()).collect();
        assert_eq!(texts, ["profile: passthrough\n", "profile: hidden\n"]);
    }

    #[test]
    fn lock_files_of_editors_are_skipped_and_pipes_are_refused() {
        let own = tempfile::tempdir().unwrap();
        fs::write(own.path().join("a.yaml"), "profile: strict\n").unwrap();
        // Emacs marks a file that is being edited by a dangling link.
        std::os::unix::fs::symlink("admin@host.1234:1", own.path().join(".#a.yaml")).unwrap();
        let directories = [own.path().to_owned()];
        assert_eq!(read_directories(&directories).unwrap().len(), 1);
        nix::unistd::mkfifo(&own.path().join("b.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = read_directories(&directories).unwrap_err().to_string();
        assert!(error.ends_with("b.yaml: it is a pipe"), "{error}");
        fs::remove_file(own.path().join("b.yaml")).unwrap();
        // An administrator disables a shipped file like this.
        std::os::unix::fs::symlink("/dev/null", own.path().join("b.yaml")).unwrap();
        assert_eq!(read_directories(&directories).unwrap()[1].text, "");
    }

    #[test]
    fn one_bad_file_makes_the_whole_set_unusable_and_all_mistakes_are_reported() {
        let source = |name: &str, text: &str| Source { name: name.into(), text: text.into() };
        let sources = [
            source("a.yaml", "profil: strict\n"),
            source("b.yaml", "profile: strict\n"),
            source("c.yaml", "- 1\n"),
        ];
        let error = parse(&sources).unwrap_err().to_string();
        assert_eq!(
            error,
            "a.yaml:1:1: 'profil' is not a valid key of a policy; did you mean 'profile'?\nc.yaml:1:1: a policy is a mapping, not a list"
        );
    }

    #[test]
    fn the_copy_is_read_back_if_it_is_usable() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(read_copy(state.path()), None);
        let sources = [Source { name: "a.yaml".into(), text: "profile: strict\n".into() }];
        keep_copy(state.path(), &sources).unwrap();
        assert_eq!(read_copy(state.path()), Some(parse(&sources).unwrap()));
        fs::write(state.path().join(COPY), "{").unwrap();
        assert_eq!(read_copy(state.path()), None);
    }
}
