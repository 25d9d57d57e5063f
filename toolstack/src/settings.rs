//! The service's settings: `/etc/xpci/xpcid.yaml`, all optional.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use thiserror::Error;

use crate::transaction::ResetPlan;

/// Where the settings are when the command line names no other file.
pub const DEFAULT_PATH: &str = "/etc/xpci/xpcid.yaml";
/// Where the service listens when neither side is told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/xpci/control";

/// The settings, with their defaults.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Which driver holds functions that no guest has.
    pub holder: Holder,
    /// How long a guest may take to accept or let go of a function, in seconds, 1-600.
    pub guest_limit_seconds: u64,
    /// How long binding and unbinding a driver, or changing the number of VFs, may take, in seconds, 1-600.
    pub driver_limit_seconds: u64,
    /// How functions are reset.
    pub reset: ResetPlan,
    /// Where policy files are; a file in a later directory replaces one of the same name in an earlier one.
    pub policy_directories: Vec<PathBuf>,
    /// What goes away with a reboot: the socket, the lock, the images of attached functions.
    pub run_directory: PathBuf,
    /// What survives a reboot: the journal.
    pub state_directory: PathBuf,
}

/// Which driver holds functions that no guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Holder {
    /// xen-pciback where it is loaded, else pci-stub.
    #[default]
    Auto,
    /// xen-pciback: takes part in error recovery.
    Pciback,
    /// pci-stub: always there, but vetoes error recovery.
    PciStub,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            holder: Holder::Auto,
            guest_limit_seconds: 10,
            driver_limit_seconds: 30,
            reset: ResetPlan::default(),
            policy_directories: vec![
                PathBuf::from("/usr/share/xpci/policies"),
                PathBuf::from("/etc/xpci/policies"),
            ],
            run_directory: PathBuf::from("/run/xpci"),
            state_directory: PathBuf::from("/var/lib/xpci"),
        }
    }
}

/// Why settings cannot be used.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("read settings {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file says something that is no setting.
    #[error("settings {path}: {reason}")]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
}

impl Settings {
    /// Reads `path`; a default file that is not there means the defaults.
    pub fn load(path: Option<&Path>) -> Result<Self, SettingsError> {
        let (path, required) = path.map_or((Path::new(DEFAULT_PATH), false), |path| (path, true));
        match fs::read_to_string(path) {
            Ok(text) => {
                Self::parse(&text).map_err(|reason| SettingsError::Invalid { path: path.to_owned(), reason })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && !required => Ok(Self::default()),
            Err(source) => Err(SettingsError::Read { path: path.to_owned(), source }),
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let settings =
            if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
                Self::default()
            } else {
                serde_saphyr::from_str::<Self>(text).map_err(|error| error.to_string())?
            };
        for (key, seconds) in [
            ("guest-limit-seconds", settings.guest_limit_seconds),
            ("driver-limit-seconds", settings.driver_limit_seconds),
            ("reset: limit-seconds", settings.reset.limit_seconds),
        ] {
            if !(1..=600).contains(&seconds) {
                return Err(format!("{key} is {seconds}; it must be 1 to 600"));
            }
        }
        Ok(settings)
    }

    /// How long a guest may take.
    pub fn guest_limit(&self) -> Duration {
        Duration::from_secs(self.guest_limit_seconds)
    }

    /// How long a driver may take.
    pub fn driver_limit(&self) -> Duration {
        Duration::from_secs(self.driver_limit_seconds)
    }

    /// Where the service listens.
    pub fn socket(&self) -> PathBuf {
        self.run_directory.join("control")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_says_the_defaults() {
        let shipped = include_str!("../../configs/xpcid.yaml");
        assert_eq!(Settings::parse(shipped).unwrap(), Settings::default());
        let without_comments = shipped.lines().filter(|line| !line.trim_start().starts_with('#')).count();
        assert!(without_comments > 5, "the shipped file names each setting");
    }

    #[test]
    fn an_unknown_key_a_wrong_word_and_a_limit_out_of_range_are_named() {
        for (text, named) in [
            ("holdr: auto", "holdr"),
            ("holder: vfio", "vfio"),
            ("guest-limit-seconds: 0", "guest-limit-seconds"),
            ("guest-limit-seconds: 601", "601"),
            ("reset:\n  checks: [answers, sings]", "sings"),
        ] {
            let error = Settings::parse(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
        assert_eq!(Settings::parse("# nothing\n").unwrap(), Settings::default());
    }
}
