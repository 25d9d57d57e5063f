//! Settings on disk: the file, its drop-in files, and the copy of the settings in force.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use pciback::policy::{Diagnostic, Spot, nearest};
use serde::de::IgnoredAny;
use thiserror::Error;

use super::Settings;
use crate::outcome::excerpt;
use crate::{drop_ins, durable};

/// The settings file, unless the command line names another one.
pub const DEFAULT_PATH: &str = "/etc/xpci/xpcid.yaml";
/// The suffix of the directory with drop-in files, after the name of the file.
const DROP_INS: &str = "d";
/// The copy of the settings in force, in the state directory.
const COPY: &str = "settings-in-force";
/// The largest size of a file, in bytes.
const SIZE_LIMIT: u64 = 1 << 20;
/// The largest number of drop-in files, as a protection against wrong directories.
const MAX_FILES: usize = 100;

/// Why settings cannot be used.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// A file or directory cannot be read.
    #[error("cannot read the settings {path}: {source}")]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// There are too many files.
    #[error("{directory}: more than {MAX_FILES} files with settings")]
    TooMany {
        /// The directory.
        directory: PathBuf,
    },
    /// A file has an invalid setting.
    #[error(transparent)]
    Invalid(Box<Diagnostic>),
}

/// Settings, and the files that they come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The merged settings.
    pub settings: Settings,
    /// The name and text of each file, in the order in which they are merged.
    pub sources: Vec<(String, String)>,
}

/// Reads `path`, then the files `*.yaml` in the directory `PATH.d` in the order of their names. A key in a later file replaces the same
/// key of an earlier one. If the default file is missing, the defaults apply.
///
/// # Errors
/// The first file that cannot be read or used.
pub fn load(path: Option<&Path>) -> Result<Loaded, SettingsError> {
    let (path, required) = path.map_or((Path::new(DEFAULT_PATH), false), |path| (path, true));
    let mut sources = Vec::new();
    match File::open(path).and_then(read_text) {
        Ok(text) => sources.push((path.display().to_string(), text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !required => {}
        Err(source) => return Err(SettingsError::Read { path: path.to_owned(), source }),
    }
    for path in drop_ins(path)? {
        let text = drop_ins::open(&path)
            .and_then(read_text)
            .map_err(|source| SettingsError::Read { path: path.clone(), source })?;
        sources.push((path.display().to_string(), text));
    }
    together(sources)
}

/// The drop-in files of a settings file.
fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, SettingsError> {
    let directory = PathBuf::from(format!("{}.{DROP_INS}", path.display()));
    let failed = |source| SettingsError::Read { path: directory.clone(), source };
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if drop_ins::is_read(&path) {
            paths.push(path);
        }
        if paths.len() > MAX_FILES {
            return Err(SettingsError::TooMany { directory });
        }
    }
    paths.sort_unstable();
    Ok(paths)
}

fn read_text(file: File) -> io::Result<String> {
    let mut text = String::new();
    file.take(SIZE_LIMIT).read_to_string(&mut text)?;
    Ok(text)
}

fn together(sources: Vec<(String, String)>) -> Result<Loaded, SettingsError> {
    let mut settings = Settings::default();
    for (name, text) in &sources {
        let (own, keys) = parse(name, text)?;
        settings.lay_over(own, &keys);
    }
    Ok(Loaded { settings, sources })
}

/// Parses one file: its settings, with defaults for missing keys, and its keys.
pub(super) fn parse(name: &str, text: &str) -> Result<(Settings, BTreeSet<String>), SettingsError> {
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok((Settings::default(), BTreeSet::new()));
    }
    let mistake = |error| SettingsError::Invalid(Box::new(mistake(name, &error)));
    let settings: Settings = serde_saphyr::from_str(text).map_err(mistake)?;
    let keys: BTreeMap<String, IgnoredAny> = serde_saphyr::from_str(text).map_err(mistake)?;
    let keys: BTreeSet<String> = keys.into_keys().collect();
    settings.check().map_err(|message| {
        // The message begins with the key.
        let key = message.split([':', ' ']).next().unwrap_or_default();
        let line =
            text.lines().position(|line| line.trim_start().starts_with(key)).map_or(1, |index| index + 1);
        let at = Spot { line: line as u32, column: 1 };
        let message = excerpt(&message);
        SettingsError::Invalid(Box::new(Diagnostic { file: name.to_owned(), at, message, suggestion: None }))
    })?;
    Ok((settings, keys))
}

fn mistake(name: &str, error: &serde_saphyr::Error) -> Diagnostic {
    let plain = error.without_snippet();
    let at = plain.location().map_or(Spot { line: 1, column: 1 }, |location| Spot {
        line: location.line() as u32,
        column: location.column() as u32,
    });
    let (message, suggestion) = match plain {
        serde_saphyr::Error::SerdeUnknownField { field, expected, .. } => unknown(field, "setting", expected),
        serde_saphyr::Error::SerdeUnknownVariant { variant, expected, .. } => {
            unknown(variant, "value here", expected)
        }
        serde_saphyr::Error::InvalidScalar { ty, .. } => (format!("the value must be {}", kind(ty)), None),
        serde_saphyr::Error::Unexpected { expected, .. } => {
            (format!("there must be {}", kind(expected)), None)
        }
        other => {
            // The parser's text contains the position as well.
            let text = other.to_string();
            let text = text.lines().next().unwrap_or_default();
            let (before, after) = (
                format!("line {} column {}: ", at.line, at.column),
                format!(" at line {}, column {}", at.line, at.column),
            );
            let text = text.split_once(&before).map_or(text, |(_, message)| message);
            (text.strip_suffix(&after).unwrap_or(text).to_owned(), None)
        }
    };
    Diagnostic { file: name.to_owned(), at, message: excerpt(&message), suggestion }
}

/// What the parser expects, in the words of YAML instead of those of the parser.
fn kind(expected: &str) -> &str {
    match expected {
        "mapping start" => "a mapping: {KEY: VALUE}, or lines of KEY: VALUE",
        "sequence start" => "a list: [A, B], or lines that begin with '- '",
        "bool" | "boolean" => "true or false",
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, not negative",
        other => other,
    }
}

fn unknown(found: &str, what: &str, expected: &[&'static str]) -> (String, Option<String>) {
    let found: String = found.chars().take(60).collect();
    match nearest(&found, expected.iter().copied()) {
        Some(word) => (format!("'{found}' is not a valid {what}"), Some(word.to_owned())),
        None => (format!("'{found}' is not a valid {what}; it is one of {}", expected.join(", ")), None),
    }
}

/// Keeps a copy of the settings in force, so that a service that starts while a file has mistakes can still serve its guests.
///
/// # Errors
/// The copy cannot be written.
pub fn keep_copy(state_directory: &Path, sources: &[(String, String)]) -> io::Result<()> {
    durable::keep(&state_directory.join(COPY), &sources)
}

/// The copy of the settings in force; `None` if there is no usable one.
pub fn read_copy(state_directory: &Path) -> Option<Settings> {
    let text = File::open(state_directory.join(COPY)).and_then(read_text).ok()?;
    let sources: Vec<(String, String)> = serde_json::from_str(&text).ok()?;
    together(sources).ok().map(|loaded| loaded.settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        parse("xpcid.yaml", text).unwrap_err().to_string()
    }

    #[test]
    fn a_mistake_is_reported_once_with_position_and_nearest_word() {
        assert_eq!(
            error("guest-limit-seconds: 10\nholdr: auto\n"),
            "xpcid.yaml:2:1: 'holdr' is not a valid setting; did you mean 'holder'?"
        );
        assert_eq!(
            error("reset:\n  checks: [answers, sings]\n"),
            "xpcid.yaml:2:21: 'sings' is not a valid value here; it is one of answers, cleared"
        );
        let vlan = error("virtual-functions: [{pf: 01:00.0, count: 2, network: {vlan: \"4095\"}}]\n");
        assert!(vlan.starts_with("xpcid.yaml:1:61: '4095' is not a VLAN"), "{vlan}");
        assert_eq!(vlan.matches("is not a VLAN").count(), 1);
        assert!(
            error("guests:\n  web: [eth0:1]\n  db:\n    - 'any:eth0'\n    - 'eth0:'\n")
                .starts_with("xpcid.yaml:5:7: 'eth0:' is not")
        );
        let name = error("names:\n  web: {address: 01:00.0}\n  nic: {path: eth0}\n");
        assert!(name.starts_with("xpcid.yaml:3:"), "{name}");
        assert_eq!(name.matches("is not a path").count(), 1, "{name}");
        for (text, message) in [
            (
                "\nguest-limit-seconds: long\n",
                "xpcid.yaml:2:22: the value must be a whole number, not negative",
            ),
            (
                "guests: [web]\n",
                "xpcid.yaml:1:9: there must be a mapping: {KEY: VALUE}, or lines of KEY: VALUE",
            ),
            (
                "guests:\n  web: 01:10.0\n",
                "xpcid.yaml:2:8: there must be a list: [A, B], or lines that begin with '- '",
            ),
        ] {
            assert_eq!(error(text), message);
        }
        assert!(!error("guests:\n  web: ['01:10']\n").contains("at line"));
        assert_eq!(
            error("\nfunction-limit: 0\n"),
            "xpcid.yaml:2:1: function-limit is 0; it must be 1 to 65536"
        );
    }

    #[test]
    fn files_beside_the_settings_replace_single_keys_in_the_order_of_their_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("xpcid.yaml");
        fs::write(&path, "guest-limit-seconds: 5\nfunction-limit: 7\n").unwrap();
        fs::create_dir(directory.path().join("xpcid.yaml.d")).unwrap();
        for (name, text) in [
            ("20.yaml", "function-limit: 9\n"),
            ("10.yaml", "function-limit: 8\nholder: pci-stub\n"),
            ("notes.txt", "no settings"),
            (".20.yaml", "an editor's"),
        ] {
            fs::write(directory.path().join("xpcid.yaml.d").join(name), text).unwrap();
        }
        let loaded = load(Some(&path)).unwrap();
        let wanted = Settings {
            guest_limit_seconds: 5,
            function_limit: 9,
            holder: super::super::Holder::PciStub,
            ..Settings::default()
        };
        assert_eq!((loaded.settings, loaded.sources.len()), (wanted, 3));
    }

    #[test]
    fn the_copy_is_read_back_if_it_is_usable() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(read_copy(state.path()), None);
        keep_copy(state.path(), &[("a.yaml".into(), "function-limit: 9\n".into())]).unwrap();
        assert_eq!(read_copy(state.path()).map(|settings| settings.function_limit), Some(9));
        fs::write(state.path().join(COPY), "[[\"a.yaml\",\"holdr: 1\"]]").unwrap();
        assert_eq!(read_copy(state.path()), None);
    }
}
