//! Persistent settings of administrators: functions to be held, and network settings of VFs, in one small file.
//!
//! PersistentSettings are for devices, not addresses, and survive restarts of the service and of the host. Each change is synced to the disk. That
//! takes milliseconds, so only threads that may block make changes.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pciback::platform::{Host, HostFunction, VfSettings};
use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::durable;
use crate::journal::{JournalError, VERSION, parse_versioned};
use crate::outcome::{ErrorCode, Failure};

/// The largest size of the file, in bytes; 8192 functions need about half of that.
const SIZE_LIMIT: u64 = 1 << 22;

/// The persistent settings of one function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSettings {
    device: Device,
    /// Whether it is held when it appears.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hold: bool,
    /// A VF's network settings.
    #[serde(default, skip_serializing_if = "VfSettings::is_empty")]
    pub network: VfSettings,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    version: u32,
    #[serde(rename = "wishes")]
    settings: Vec<DeviceSettings>,
}

/// All persistent settings. Clones share them.
#[derive(Debug, Clone)]
pub struct PersistentSettings {
    path: PathBuf,
    /// `None`: the file is unusable.
    known: Arc<Mutex<Option<Vec<DeviceSettings>>>>,
}

impl PersistentSettings {
    /// Reads the file; a missing one has none. The second value is the error if it is unusable.
    pub fn open(path: PathBuf) -> (Self, Option<JournalError>) {
        let (known, problem) = match read(&path) {
            Ok(settings) => (Some(settings), None),
            Err(error) => (None, Some(error)),
        };
        (Self { path, known: Arc::new(Mutex::new(known)) }, problem)
    }

    fn known(&self) -> MutexGuard<'_, Option<Vec<DeviceSettings>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The settings of a function, if it has any.
    pub fn of(&self, host: &dyn Host, function: &HostFunction) -> Option<DeviceSettings> {
        if self.is_empty() {
            return None;
        }
        let device = match Device::of(host, function) {
            Ok(device) => device,
            Err(failure) => {
                log::warn!("{}: read its persistent settings: {failure}", function.address);
                return None;
            }
        };
        self.of_device(&device)
    }

    /// The settings of a device, if it has any.
    pub fn of_device(&self, device: &Device) -> Option<DeviceSettings> {
        self.known().iter().flatten().find(|one| one.device.is(device)).cloned()
    }

    /// Whether no device has settings, as far as that is known.
    pub fn is_empty(&self) -> bool {
        self.known().as_ref().is_none_or(Vec::is_empty)
    }

    /// Changes the settings of a device, synced to the disk; returns those before.
    ///
    /// # Errors
    /// The file cannot be used or written; nothing is changed.
    pub fn change(
        &self,
        device: Device,
        change: impl FnOnce(&mut DeviceSettings),
    ) -> Result<Option<DeviceSettings>, Failure> {
        let mut known = self.known();
        let failed = |text: String| Failure::new(ErrorCode::Failed, text).on(device.address);
        let Some(settings) = known.as_ref() else {
            let text = format!("the persistent settings are unknown: {} cannot be used", self.path.display());
            return Err(failed(text).hint(
                "see xpcid's log; remove the file and restart xpcid; the persistent settings in it are lost",
            ));
        };
        let (mut settings, mut before) = (settings.clone(), None);
        if let Some(at) = settings.iter().position(|one| one.device.is(&device)) {
            before = Some(settings.remove(at));
        }
        let none = DeviceSettings { device: device.clone(), hold: false, network: VfSettings::default() };
        let mut one =
            before.clone().map_or(none, |before| DeviceSettings { device: device.clone(), ..before });
        change(&mut one);
        if one.hold || !one.network.is_empty() {
            settings.push(one);
        }
        let kept = Kept { version: VERSION, settings };
        durable::replace(&self.path, &kept, durable::Survives::PowerFailure)
            .map_err(|error| failed(format!("cannot write {}: {error}", self.path.display())))?;
        *known = Some(kept.settings);
        Ok(before)
    }

    /// Removes the settings of a function; returns whether there were any.
    ///
    /// # Errors
    /// As of [`Self::change`].
    pub fn forget(&self, host: &dyn Host, function: &HostFunction) -> Result<bool, Failure> {
        let Some(one) = self.of(host, function) else { return Ok(false) };
        let nothing = |one: &mut DeviceSettings| (one.hold, one.network) = (false, VfSettings::default());
        self.change(one.device, nothing).map(|_| true)
    }
}

fn read(path: &Path) -> Result<Vec<DeviceSettings>, JournalError> {
    let failed = |source| JournalError::Io { action: "read", path: path.to_owned(), source };
    let mut text = String::new();
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file.and_then(|file| file.take(SIZE_LIMIT).read_to_string(&mut text)).map_err(failed)?,
    };
    parse_versioned(path, &text, |kept: &Kept| kept.version).map(|kept| kept.settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unusable_file_is_reported_and_not_changed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wanted.json");
        assert!(PersistentSettings::open(path.clone()).1.is_none(), "one that is not there is no mistake");
        for text in ["{", r#"{"version":9,"wishes":[]}"#] {
            std::fs::write(&path, text).unwrap();
            let (settings, problem) = PersistentSettings::open(path.clone());
            assert!(problem.is_some(), "{text}");
            let host = pciback::platform::sim::Simulation::from_yaml(
                "drivers: []\nfunctions: [{address: 02:00.0, model: virtio-net}]\n",
            );
            let platform = host.unwrap().platform("test").unwrap();
            let function = platform.host.function("02:00.0".parse().unwrap()).unwrap();
            let device = Device::of(platform.host.as_ref(), &function).unwrap();
            assert!(settings.change(device, |one| one.hold = true).is_err());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }
}
