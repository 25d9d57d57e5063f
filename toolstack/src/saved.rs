//! What a guest had when it was saved, in a file beside its checkpoint, so that it gets the same when it is restored on this host or
//! another.
//!
//! The file is copied along with the checkpoint and is not trusted: its size is bounded, and its contents are checked once, when it is
//! read.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use pciback::config::CapabilityList;
use pciback::host::Resource;
use pciback::platform::{Host, HostFunction, VfSettings};
use pciback::spec::{AnyId, CapabilityId, ExtendedCapabilityId};
use pciback::{DeviceNumber, Sbdf, Uuid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::durable;
use crate::outcome::{ErrorCode, Failure, excerpt};
use crate::spec::function_spec;

/// The format version of the file; others are refused.
pub const VERSION: u32 = 1;
/// The largest size of a file, in bytes; 32 functions need a tenth of that.
const SIZE_LIMIT: u64 = 1 << 20;
/// The number of devices on a guest's bus.
const MAX_FUNCTIONS: usize = 32;
/// The longest domain name that Xen's tools accept, in bytes.
const LONGEST_NAME: usize = 255;
/// The flags of a BAR that a guest can see.
const KIND: u64 = Resource::IO | Resource::MEMORY | Resource::PREFETCH | Resource::MEMORY_64;

/// A saved guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SavedGuest {
    /// The format version, 1.
    pub version: u32,
    /// The guest's UUID, which is the same on every host.
    pub guest: Uuid,
    /// Its name, for messages.
    pub name: Option<String>,
    /// Its functions.
    pub functions: Vec<SavedFunction>,
}

/// A function of a saved guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SavedFunction {
    /// The device.
    pub device: Device,
    /// The device number in the guest, 0-31.
    pub slot: DeviceNumber,
    /// Whether the guest had it persistently.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub persistent: bool,
    /// A VF's network settings: those that were requested, and the MAC address and VLAN that were in force.
    #[serde(default, skip_serializing_if = "VfSettings::is_empty")]
    pub network: VfSettings,
    /// Properties on which the guest's driver relies.
    pub shape: Shape,
}

/// Properties on which a driver relies, in addition to the ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    bars: [Bar; 6],
    capabilities: Vec<At>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Bar {
    size: u64,
    flags: u64,
}

/// A capability and its offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct At {
    offset: u16,
    id: u16,
    extended: bool,
}

impl At {
    fn name(self) -> String {
        match self.extended {
            true => ExtendedCapabilityId(self.id).to_string(),
            // Ids of the legacy list have one byte.
            false => CapabilityId(self.id as u8).to_string(),
        }
    }
}

impl Shape {
    /// The shape of a function.
    ///
    /// # Errors
    /// The function cannot be read.
    pub fn of(host: &dyn Host, address: Sbdf) -> Result<Self, Failure> {
        let spec = function_spec(host, address)?;
        let mut bars = [Bar::default(); 6];
        for (bar, resource) in bars.iter_mut().zip(&spec.resources) {
            *bar = Bar { size: resource.size, flags: resource.flags & KIND };
        }
        let list = CapabilityList::walk(&spec.bytes);
        let capabilities = list.capabilities.iter().map(|capability| match capability.id {
            AnyId::Legacy(id) => At { offset: capability.offset, id: u16::from(id.0), extended: false },
            AnyId::Extended(id) => At { offset: capability.offset, id: id.0, extended: true },
        });
        Ok(Self { bars, capabilities: capabilities.collect() })
    }

    /// The difference of another function to this one, in words that follow its address.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let bars = self.bars.iter().zip(&other.bars).enumerate().find(|(_, (was, is))| was != is);
        if let Some((index, (was, is))) = bars {
            return Some(match was.size == is.size {
                true => format!("has a BAR {index} of another type"),
                false => format!("has a BAR {index} of {} bytes, not {}", is.size, was.size),
            });
        }
        let missing = self.capabilities.iter().find(|at| !other.capabilities.contains(at));
        if let Some(at) = missing {
            return Some(format!("has no capability {} at {:#x}", at.name(), at.offset));
        }
        let more = other.capabilities.iter().find(|at| !self.capabilities.contains(at))?;
        Some(format!("has an additional capability {} at {:#x}", more.name(), more.offset))
    }
}

impl SavedFunction {
    /// Why a function cannot replace this one, in words that follow its address.
    ///
    /// # Errors
    /// The function cannot be read.
    pub fn difference(&self, host: &dyn Host, function: &HostFunction) -> Result<Option<String>, Failure> {
        match self.device.is_kind_of(function) {
            false => Ok(Some(format!("is another device ({:04x}:{:04x})", function.vendor, function.device))),
            true => Ok(self.shape.difference(&Shape::of(host, function.address)?)),
        }
    }
}

impl SavedGuest {
    /// The guest's name or UUID, for messages.
    pub fn called(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.guest.to_string())
    }

    /// Refuses contents that this program never writes.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("it has version {}, this xpci reads {VERSION}", self.version));
        }
        if self.functions.len() > MAX_FUNCTIONS {
            return Err(format!(
                "it has {} functions, a guest has at most {MAX_FUNCTIONS}",
                self.functions.len()
            ));
        }
        let is_name = |name: &String| name.len() <= LONGEST_NAME && !name.chars().any(char::is_control);
        if self.name.as_ref().is_some_and(|name| !is_name(name)) {
            return Err("its guest's name is no name".to_owned());
        }
        let mut taken = BTreeSet::new();
        for function in &self.functions {
            if !taken.insert(function.slot) {
                return Err(format!("two functions are device {:x}", function.slot));
            }
        }
        Ok(())
    }

    /// The path of the file for a checkpoint.
    pub fn path(checkpoint: &Path) -> PathBuf {
        let mut name = checkpoint.as_os_str().to_owned();
        name.push(".xpci");
        name.into()
    }

    /// Writes the file beside a checkpoint, synced to the disk.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, checkpoint: &Path) -> Result<(), Failure> {
        let path = Self::path(checkpoint);
        durable::replace(&path, self, durable::Survives::PowerFailure)
            .map_err(|error| failed("write", &path, &error))
    }

    /// Removes the file beside a checkpoint.
    ///
    /// # Errors
    /// The file exists and cannot be removed.
    pub fn remove(checkpoint: &Path) -> Result<(), Failure> {
        let path = Self::path(checkpoint);
        durable::remove(&path).map_err(|error| failed("remove", &path, &error))
    }

    /// Reads the file beside a checkpoint.
    ///
    /// # Errors
    /// There is no such file, or it cannot be used.
    pub fn read(checkpoint: &Path) -> Result<Self, Failure> {
        let (path, shown) = (Self::path(checkpoint), checkpoint.display());
        let mut text = String::new();
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Failure::not_found(format!(
                "there is no {}, which 'xpci save' writes beside a checkpoint",
                path.display()
            ))
            .hint(format!("without it, 'xl restore {shown}' restores the guest, without functions")),
            _ => failed("open", &path, &error),
        })?;
        file.take(SIZE_LIMIT).read_to_string(&mut text).map_err(|error| failed("read", &path, &error))?;
        let saved = serde_json::from_str::<Self>(&text).map_err(|error| excerpt(&error.to_string()));
        saved.and_then(|saved| saved.check().map(|()| saved)).map_err(|why| {
            Failure::new(ErrorCode::Failed, format!("{} cannot be used: {why}", path.display()))
                .hint(format!("'xl restore {shown}' restores the guest, without functions"))
        })
    }
}

fn failed(action: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new(ErrorCode::Failed, format!("{action} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use pciback::platform::sim::Simulation;

    use super::*;

    const HOST: &str =
        "drivers: []\nfunctions: [{address: 02:00.0, model: virtio-net}, {address: 03:00.0, model: nvme}]\n";

    fn saved() -> SavedGuest {
        let platform = Simulation::from_yaml(HOST).unwrap().platform("test").unwrap();
        let host = platform.host.as_ref();
        let address = "02:00.0".parse().unwrap();
        let device = Device::of(host, &host.function(address).unwrap()).unwrap();
        let shape = Shape::of(host, address).unwrap();
        let network = VfSettings { trust: Some(true), ..VfSettings::default() };
        let function = SavedFunction { device, slot: DeviceNumber::LAST, persistent: true, network, shape };
        let (guest, name) = (Uuid([7; 16]), Some("web".to_owned()));
        SavedGuest { version: VERSION, guest, name, functions: vec![function] }
    }

    #[test]
    fn the_file_beside_a_checkpoint_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let checkpoint = directory.path().join("web.save");
        assert_eq!(SavedGuest::read(&checkpoint).unwrap_err().code, ErrorCode::NotFound);
        saved().write(&checkpoint).unwrap();
        assert_eq!(SavedGuest::read(&checkpoint).unwrap(), saved());
        SavedGuest::remove(&checkpoint).unwrap();
        assert_eq!(SavedGuest::read(&checkpoint).unwrap_err().code, ErrorCode::NotFound);
    }

    #[test]
    fn an_invalid_file_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let checkpoint = directory.path().join("web.save");
        let one = saved().functions[0].clone();
        let many = SavedGuest { functions: vec![one.clone(); 33], ..saved() };
        let twice = SavedGuest { functions: vec![one.clone(); 2], ..saved() };
        let named = SavedGuest { name: Some("\u{1b}[2J".to_owned()), ..saved() };
        let other = SavedGuest { version: 9, ..saved() };
        for wrong in [many, twice, named, other] {
            wrong.write(&checkpoint).unwrap();
            let failure = SavedGuest::read(&checkpoint).unwrap_err();
            assert!(failure.message.contains("web.save.xpci cannot be used"), "{failure}");
        }
        saved().write(&checkpoint).unwrap();
        let path = SavedGuest::path(&checkpoint);
        let good = fs::read(&path).unwrap();
        for length in 0..good.len() {
            fs::write(&path, &good[..length]).unwrap();
            assert!(SavedGuest::read(&checkpoint).is_err(), "cut to {length} bytes");
        }
        let mut outside: serde_json::Value = serde_json::from_slice(&good).unwrap();
        outside["functions"][0]["slot"] = 32.into();
        fs::write(&path, outside.to_string()).unwrap();
        let failure = SavedGuest::read(&checkpoint).unwrap_err();
        assert!(failure.message.contains("0x20 is not a device number (0 to 1f)"), "{failure}");
    }

    #[test]
    fn a_different_function_is_refused_with_the_difference() {
        let platform = Simulation::from_yaml(HOST).unwrap().platform("test").unwrap();
        let host = platform.host.as_ref();
        let function = |address: &str| host.function(address.parse().unwrap()).unwrap();
        let one = saved().functions.remove(0);
        assert_eq!(one.difference(host, &function("02:00.0")).unwrap(), None);
        let other = one.difference(host, &function("03:00.0")).unwrap().unwrap();
        assert!(other.starts_with("is another device ("), "{other}");
        let differs = |change: &dyn Fn(&mut Shape)| {
            let mut changed = one.clone();
            change(&mut changed.shape);
            changed.difference(host, &function("02:00.0")).unwrap().unwrap()
        };
        let bar = differs(&|shape| shape.bars[5].size = 4096);
        assert_eq!(bar, "has a BAR 5 of 0 bytes, not 4096");
        let missing = differs(&|shape| shape.capabilities[0].offset = 0xf0);
        assert!(missing.starts_with("has no capability ") && missing.ends_with(" at 0xf0"), "{missing}");
        let more = differs(&|shape| shape.capabilities.truncate(1));
        assert!(more.starts_with("has an additional capability "), "{more}");
    }
}
