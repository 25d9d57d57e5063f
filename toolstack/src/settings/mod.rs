//! The service's settings, `/etc/xpci/xpcid.yaml`; all of them are optional.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use pciback::DeviceNumber;
use pciback::platform::{Host, HostFunction, PlatformError, VfPlace, VfSettings};
use pciback::policy::{RESET_METHODS, nearest};
use serde::Deserialize;

mod file;

pub use file::{DEFAULT_PATH, Loaded, SettingsError, keep_copy, load, read_copy};

use crate::names::{self, Names, printed};
use crate::protocol::STATUS_SOCKET;
use crate::reset_plan::ResetPlan;
use crate::spec::serial_number;
use crate::target::{Parent, Target};

/// The control socket, unless the settings or arguments name another one.
pub const DEFAULT_SOCKET: &str = "/run/xpci/control";

/// The settings, with their defaults.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// The driver that holds functions for guests.
    pub holder: Holder,
    /// Whether libxl is shown that functions which the service holds are assigned, so that xl and libvirt refuse them.
    pub keep_from_libxl: bool,
    /// The limit for a guest to accept or release a function, counted from its last access to a register, in seconds, 1-600. The total
    /// limit is six times as long.
    pub guest_limit_seconds: u64,
    /// The limit for keeping a starting HVM guest paused until it has its persistent functions, in seconds, 1-600.
    pub start_limit_seconds: u64,
    /// The limit for binding and unbinding a driver, and for changing the number of VFs, in seconds, 1-600.
    pub driver_limit_seconds: u64,
    /// How functions are reset.
    pub reset: ResetPlan,
    /// The largest number of PCI functions of the host, VFs included, 1-65536.
    pub function_limit: u32,
    /// Names of functions.
    pub names: Names,
    /// Functions that guests have persistently, by the guest's name or UUID.
    pub guests: BTreeMap<String, Vec<Assigned>>,
    /// The VFs to enable when the service starts, on PFs that have none.
    pub virtual_functions: Vec<WantedVfs>,
    /// The directories with policy files; a file in a later directory replaces one of the same name in an earlier one.
    pub policy_directories: Vec<PathBuf>,
    /// The directory for files that a reboot discards: the socket, the lock, the images of attached functions.
    pub run_directory: PathBuf,
    /// The directory for files that survive a reboot, for example the journal.
    pub state_directory: PathBuf,
    /// The group whose members may send requests that change nothing, to a socket of their own; `None`: there is no such socket.
    pub status_group: Option<String>,
}

/// VFs to enable when the service starts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WantedVfs {
    /// The PF by its address, a name or a network interface. Each entry has exactly one of `pf`, `id` and `serial`.
    #[serde(default)]
    pub pf: Option<Parent>,
    /// All PFs with these ids, `vendor:device`.
    #[serde(default)]
    pub id: Option<PciId>,
    /// The PF with this Device Serial Number, in lspci's format `01-23-45-67-89-ab-cd-ef`.
    #[serde(default)]
    pub serial: Option<String>,
    /// The number of VFs.
    pub count: u16,
    /// The network settings of each VF, set when it is created and when a guest gets it.
    #[serde(default)]
    pub network: VfSettings,
    /// Different settings for some VFs, by their index, from 0.
    #[serde(default)]
    pub vfs: BTreeMap<u16, VfSettings>,
    /// Whether a PF without a driver is bound to pci-pf-stub, which does not manage VFs.
    #[serde(default)]
    pub unmanaged: bool,
}

/// A function that the settings assign to a guest: `FUNCTION[@SLOT]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Assigned {
    /// The function.
    pub target: Target,
    /// The guest's device number, 0-31; any free one if it is absent.
    pub slot: Option<DeviceNumber>,
}

impl TryFrom<String> for Assigned {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (function, slot) = match text.split_once('@') {
            Some((function, slot)) => (function, Some(slot)),
            None => (text.as_str(), None),
        };
        let number = |slot: &str| {
            DeviceNumber::from_hex(slot)
                .ok_or_else(|| format!("'@{slot}' is no device number: it must be hexadecimal, 0 to 1f"))
        };
        Ok(Self { target: function.parse()?, slot: slot.map(number).transpose()? })
    }
}

/// Vendor and device id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PciId {
    vendor: u16,
    device: u16,
}

impl TryFrom<String> for PciId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = |part: &str| {
            let valid = part.len() == 4 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            valid.then(|| u16::from_str_radix(part, 16).ok()).flatten()
        };
        let ids = text.split_once(':').and_then(|(vendor, device)| Some((digits(vendor)?, digits(device)?)));
        let (vendor, device) =
            ids.ok_or_else(|| format!("'{text}' is not an id: VVVV:DDDD is expected, as in 8086:10c9"))?;
        Ok(Self { vendor, device })
    }
}

impl fmt::Display for WantedVfs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.pf, self.id, &self.serial) {
            (Some(pf), ..) => write!(f, "{pf}"),
            (_, Some(id), _) => write!(f, "{:04x}:{:04x}", id.vendor, id.device),
            (_, _, serial) => write!(f, "serial number {}", serial.as_deref().unwrap_or("none")),
        }
    }
}

impl WantedVfs {
    /// Whether the entry means a PF.
    pub fn means(&self, host: &dyn Host, names: &Names, pf: &HostFunction) -> bool {
        self.pf.as_ref().is_some_and(|wanted| names::means(host, names, wanted, pf))
            || self.id.is_some_and(|id| (id.vendor, id.device) == (pf.vendor, pf.device))
            || self.serial.as_ref().is_some_and(|wanted| {
                serial_number(host, pf.address)
                    .is_some_and(|found| printed(found).eq_ignore_ascii_case(wanted))
            })
    }
}

/// The driver that holds functions for guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Holder {
    /// xen-pciback if it is loaded, else pci-stub.
    #[default]
    Auto,
    /// xen-pciback, which takes part in error recovery.
    Pciback,
    /// pci-stub, which is usually loaded, but makes error recovery fail.
    PciStub,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            holder: Holder::Auto,
            keep_from_libxl: true,
            guest_limit_seconds: 10,
            start_limit_seconds: 60,
            driver_limit_seconds: 30,
            reset: ResetPlan::default(),
            function_limit: 8192,
            names: Names::new(),
            guests: BTreeMap::new(),
            virtual_functions: Vec::new(),
            policy_directories: vec![
                PathBuf::from("/usr/share/xpci/policies"),
                PathBuf::from("/etc/xpci/policies"),
            ],
            run_directory: PathBuf::from("/run/xpci"),
            state_directory: PathBuf::from("/var/lib/xpci"),
            status_group: None,
        }
    }
}

impl Settings {
    /// Refuses values that are out of range; the message begins with the key.
    fn check(&self) -> Result<(), String> {
        let settings = self;
        for (key, seconds) in [
            ("guest-limit-seconds", settings.guest_limit_seconds),
            ("start-limit-seconds", settings.start_limit_seconds),
            ("driver-limit-seconds", settings.driver_limit_seconds),
            ("reset: limit-seconds", settings.reset.limit_seconds),
            ("reset: answer-seconds", settings.reset.answer_seconds),
        ] {
            if !(1..=600).contains(&seconds) {
                return Err(format!("{key} is {seconds}; it must be 1 to 600"));
            }
        }
        if !(1..=65536).contains(&settings.function_limit) {
            return Err(format!("function-limit is {}; it must be 1 to 65536", settings.function_limit));
        }
        for entry in &settings.virtual_functions {
            let names = [entry.pf.is_some(), entry.id.is_some(), entry.serial.is_some()];
            if names.iter().filter(|named| **named).count() != 1 {
                return Err("virtual-functions: each entry names its PF by one of pf, id, serial".to_owned());
            }
            if entry.count == 0 {
                return Err(format!("virtual-functions: {entry}: the count must be at least 1"));
            }
            if let Some(index) = entry.vfs.keys().find(|index| **index >= entry.count) {
                return Err(format!(
                    "virtual-functions: {entry}: there is no VF {index}; VFs are numbered from 0"
                ));
            }
        }
        for (guest, functions) in &settings.guests {
            for one in functions {
                if let Target::One(Parent::Word(word)) = &one.target
                    && !settings.names.contains_key(word)
                {
                    return Err(format!(
                        "guests: '{}' of '{guest}' is not in 'names': a function that is held has no network interface; \
                         write its address, a name from 'names', PF:N or any:PF",
                        word.as_str()
                    ));
                }
            }
        }
        let certain = settings.guests.iter().flat_map(|(guest, functions)| {
            let certain = functions.iter().filter(|one| !matches!(one.target, Target::Any(_)));
            certain.map(move |one| (guest, &one.target))
        });
        let mut owners: BTreeMap<&Target, &String> = BTreeMap::new();
        for (guest, target) in certain {
            if let Some(other) = owners.insert(target, guest) {
                return Err(format!("guests: {target} is assigned twice, to '{other}' and to '{guest}'"));
            }
        }
        for method in &self.reset.methods {
            if !RESET_METHODS.contains(&method.as_str()) {
                let meant = nearest(method, RESET_METHODS.iter().copied());
                let meant = meant.map_or_else(
                    || format!("; it is one of {}", RESET_METHODS.join(", ")),
                    |word| format!("; did you mean '{word}'?"),
                );
                return Err(format!("reset: methods: '{method}' is not a reset method{meant}"));
            }
        }
        Ok(())
    }

    /// Replaces the settings with these keys by those of another file.
    fn lay_over(&mut self, other: Self, keys: &BTreeSet<String>) {
        let has = |key: &str| keys.contains(key);
        macro_rules! take {
            ($($key:literal => $field:ident),* $(,)?) => {
                // A setting that is missing below is a mistake that the compiler finds.
                let Self { $($field),* } = other;
                $(if has($key) { self.$field = $field; })*
            };
        }
        take! {
            "holder" => holder,
            "keep-from-libxl" => keep_from_libxl,
            "guest-limit-seconds" => guest_limit_seconds,
            "start-limit-seconds" => start_limit_seconds,
            "driver-limit-seconds" => driver_limit_seconds,
            "reset" => reset,
            "function-limit" => function_limit,
            "names" => names,
            "guests" => guests,
            "virtual-functions" => virtual_functions,
            "policy-directories" => policy_directories,
            "run-directory" => run_directory,
            "state-directory" => state_directory,
            "status-group" => status_group,
        }
    }

    /// The network settings of a VF, from the first entry that means its PF.
    pub fn network(&self, host: &dyn Host, vf: VfPlace) -> Result<VfSettings, PlatformError> {
        if self.virtual_functions.iter().all(|entry| entry.network.is_empty() && entry.vfs.is_empty()) {
            return Ok(VfSettings::default());
        }
        let pf = host.function(vf.physical_function)?;
        let entry = self.virtual_functions.iter().find(|entry| entry.means(host, &self.names, &pf));
        Ok(entry.map_or_else(VfSettings::default, |entry| {
            let own = entry.vfs.get(&vf.index).copied().unwrap_or_default();
            own.or(entry.network)
        }))
    }

    /// The limit for a guest, counted from its last access.
    pub fn guest_limit(&self) -> Duration {
        Duration::from_secs(self.guest_limit_seconds)
    }

    /// The total limit for a guest that keeps making accesses.
    pub fn longest_guest_limit(&self) -> Duration {
        self.guest_limit() * 6
    }

    /// The limit for keeping a starting guest paused.
    pub fn start_limit(&self) -> Duration {
        Duration::from_secs(self.start_limit_seconds)
    }

    /// The limit for operations of a driver.
    pub fn driver_limit(&self) -> Duration {
        Duration::from_secs(self.driver_limit_seconds)
    }

    /// The path of the control socket.
    pub fn socket(&self) -> PathBuf {
        self.run_directory.join("control")
    }

    /// The path of the socket for the status group.
    pub fn status_socket(&self) -> PathBuf {
        self.run_directory.join(STATUS_SOCKET)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Settings {
        file::parse("s.yaml", text).unwrap().0
    }

    #[test]
    fn the_shipped_file_has_the_defaults() {
        let shipped = include_str!("../../../configs/xpcid.yaml");
        assert_eq!(parse(shipped), Settings::default());
        let without_comments = shipped.lines().filter(|line| !line.trim_start().starts_with('#')).count();
        assert!(without_comments > 5, "the shipped file names each setting");
    }

    #[test]
    fn unknown_keys_wrong_words_and_values_out_of_range_are_reported() {
        for (text, named) in [
            ("holdr: auto", "holdr"),
            ("holder: vfio", "vfio"),
            ("guest-limit-seconds: 0", "guest-limit-seconds"),
            ("guest-limit-seconds: 601", "601"),
            ("function-limit: 0", "function-limit"),
            ("reset: {answer-seconds: 0}", "reset: answer-seconds is 0"),
            ("reset: {answer-seconds: 18446744073709551615}", "it must be 1 to 600"),
            ("holder: \"pci-\\tstub\"", "'pci-\\tstub' is not a valid value"),
            ("virtual-functions: [{pf: 01:00.0, count: 0}]", "at least 1"),
            ("virtual-functions: [{id: 8086, count: 1}]", "VVVV:DDDD"),
            ("virtual-functions: [{pf: 01:00.0, id: '8086:10c9', count: 1}]", "one of pf, id, serial"),
            ("virtual-functions: [{count: 1}]", "one of pf, id, serial"),
            ("guests: {web: [01:10.0@20]}", "0 to 1f"),
            ("guests: {web: [eth1]}", "'eth1' of 'web' is not in 'names'"),
            ("guests: {web: ['01:10']}", "not a PCI address"),
            ("guests: {web: [eth0:1], db: [eth0:1]}", "eth0:1 is assigned twice, to 'db' and to 'web'"),
            ("names: {nic: {}}", "one of address, serial, path"),
            ("names: {nic: {serial: '1'}}", "as lspci does"),
            ("names: {any: {address: 01:00.0}}", "'any' is not a name"),
            ("names: {nic: {address: 01:00.0, function: 1}}", "goes with 'serial'"),
            ("virtual-functions: [{pf: 01:00.0, count: 2, vfs: {2: {trust: true}}}]", "no VF 2"),
            ("virtual-functions: [{pf: 01:00.0, count: 2, network: {vlan: '4095'}}]", "is not a VLAN"),
            (
                "virtual-functions: [{pf: 01:00.0, count: 2, network: {mac: '01:00:5e:00:00:01'}}]",
                "multicast",
            ),
            ("virtual-functions: [{pf: 01:00.0, count: 2, network: {vlans: 1}}]", "vlans"),
            ("reset:\n  checks: [answers, sings]", "sings"),
            ("reset: {methods: [flr, buss]}", "'buss' is not a reset method; did you mean 'bus'?"),
        ] {
            let error = file::parse("s.yaml", text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
        assert_eq!(parse("# nothing\n"), Settings::default());
        let some = parse("reset: {methods: [flr, bus]}\n");
        let reset = ResetPlan { methods: vec!["flr".to_owned(), "bus".to_owned()], ..ResetPlan::default() };
        assert_eq!(some, Settings { reset, ..Settings::default() });
    }

    #[test]
    fn network_settings_of_vfs_are_written_as_in_the_shipped_example() {
        let text = "virtual-functions:\n  - {pf: 01:00.0, count: 4, network: {vlan: 100, spoof-check: true}, \
                    vfs: {1: {mac: '52:54:00:12:34:01', vlan: '100:3'}}}\n";
        let settings = parse(text);
        let [entry] = settings.virtual_functions.as_slice() else { panic!("{settings:?}") };
        let shown = |settings: &VfSettings| format!("{:?}", settings.words());
        assert_eq!(shown(&entry.network), r#"[("vlan", "100"), ("spoof-check", "on")]"#);
        assert_eq!(shown(&entry.vfs[&1]), r#"[("mac", "52:54:00:12:34:01"), ("vlan", "100:3")]"#);
    }
}
