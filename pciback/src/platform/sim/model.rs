//! The YAML form of a simulated host.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::platform::Use;
use crate::{Sbdf, Uuid};

/// The models and drivers that every simulated host knows.
const BUILT_IN: &str = include_str!("models.yaml");

/// A whole host.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Description {
    /// Xen's version, `major.minor`.
    #[serde(default = "usual_version")]
    pub xen: String,
    /// How many interrupts a guest can have besides the host's lines.
    #[serde(default = "usual_irqs")]
    pub extra_guest_irqs: u32,
    /// Whether dom0's kernel reports added and removed functions to Xen.
    #[serde(default = "yes")]
    pub report_to_xen: bool,
    /// The PCI drivers that are loaded in dom0.
    pub drivers: Vec<String>,
    /// What further drivers take, by name.
    #[serde(default)]
    pub driver_kinds: BTreeMap<String, DriverKind>,
    /// How dom0 is set up: the texts of files by path, and what `xl info` and `xl dmesg` print, in place of what is built in; without a text
    /// there is no such file.
    #[serde(default)]
    pub machine: BTreeMap<String, Option<String>>,
    /// What the host's hardware database has besides what is built in: by vendor (`8086`), by vendor and device (`8086:10c9`), by class
    /// and subclass (`class 0200`).
    #[serde(default)]
    pub names: BTreeMap<String, String>,
    /// Further kinds of functions, by name.
    #[serde(default)]
    pub models: BTreeMap<String, Model>,
    /// The functions that are there at first.
    pub functions: Vec<Function>,
    /// What else is at memory addresses, as lines of `/proc/iomem`.
    #[serde(default)]
    pub memory: String,
    /// What else is at I/O ports, as lines of `/proc/ioports`.
    #[serde(default)]
    pub ports: String,
    /// The domains besides dom0.
    #[serde(default)]
    pub domains: Vec<Domain>,
    /// Operations that fail.
    #[serde(default)]
    pub failures: Vec<Failure>,
}

/// The part of a description that is built in.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Library {
    pub machine: BTreeMap<String, Option<String>>,
    pub names: BTreeMap<String, String>,
    pub driver_kinds: BTreeMap<String, DriverKind>,
    pub models: BTreeMap<String, Model>,
}

/// What a driver takes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct DriverKind {
    /// Vendor and device ids, as `8086:10c9`.
    #[serde(default)]
    pub ids: Vec<String>,
    /// Takes every function, but only by `driver_override`.
    #[serde(default)]
    pub any: bool,
    /// Lets a PF have VFs.
    #[serde(default)]
    pub sriov: bool,
    /// The most VFs the driver allows, if it allows fewer than the hardware.
    pub max_vfs: Option<u16>,
    /// What it can set for its VFs: `mac`, `vlan`, `spoof-check`, `trust`, `rate`, `min-rate`, `link-state`.
    #[serde(default)]
    pub vf_settings: Vec<String>,
    /// Counts as an assigned function's holder: a PF driver keeps VFs that it holds. It prepares MSI-X for its functions.
    #[serde(default)]
    pub holds_for_guests: bool,
}

/// A kind of function: what its config space holds.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Model {
    /// Rows as `lspci -xxxx` prints them; what is not listed is 0.
    pub config: String,
    /// Bytes of config space: 64, 256 or 4096.
    #[serde(default = "extended")]
    pub size: u16,
    /// Bytes of each BAR by index, the expansion ROM's under 6, hexadecimal. What kind it is, config space says.
    #[serde(default)]
    pub bars: BTreeMap<u8, String>,
    /// Bits that keep what is written besides those of the specification, by offset of their dword, hexadecimal.
    #[serde(default)]
    pub writable: BTreeMap<String, String>,
    /// Bits that a written 1 clears, likewise.
    #[serde(default)]
    pub clear_on_one: BTreeMap<String, String>,
    /// What the kernel reads as its VPD, as rows like those of `config`, of up to 256 bytes; without it there is no such file.
    pub vpd: Option<String>,
    /// How Linux can reset it.
    #[serde(default)]
    pub reset_methods: Vec<String>,
    /// The kind its VFs are of, for a PF. Where they are and how many follows from its SR-IOV capability.
    pub virtual_function: Option<String>,
}

/// One function.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Function {
    /// Where it is.
    pub address: Sbdf,
    /// Its kind.
    pub model: String,
    /// Where its BARs start, hexadecimal, by index; the others are placed as firmware would.
    #[serde(default)]
    pub bars: BTreeMap<u8, String>,
    /// Where the BARs of its first VF start, likewise.
    #[serde(default)]
    pub vf_bars: BTreeMap<u8, String>,
    /// Its interrupt line.
    #[serde(default)]
    pub irq: u32,
    /// Its NUMA node.
    pub numa_node: Option<u32>,
    /// Network interfaces that its own driver makes.
    #[serde(default)]
    pub interfaces: Vec<String>,
    /// What uses it while it is bound to its own driver.
    #[serde(default)]
    pub uses: Vec<Use>,
    /// How many VFs are enabled at first.
    #[serde(default)]
    pub num_vfs: u16,
    /// What keeps Xen from giving its reserved memory (RMRR) to a domain.
    pub reserved_memory: Option<ReservedMemory>,
    /// The first and the last bus below a bridge.
    pub buses: Option<(u8, u8)>,
}

/// What is the matter with the reserved memory of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ReservedMemory {
    /// Other functions have the same.
    Shared,
    /// Guests have memory of their own at its addresses.
    InGuestMemory,
}

/// One domain.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Domain {
    /// Its number.
    pub id: u16,
    /// Its name.
    pub name: String,
    /// By what it is known over reboots.
    #[serde(default)]
    pub uuid: Option<Uuid>,
    /// `pv`, `pvh` or `hvm`.
    #[serde(rename = "type", default = "usual_type")]
    pub kind: String,
    /// Whether it was created with passthrough.
    #[serde(default)]
    pub passthrough: bool,
    /// Whether it is an HVM guest without hardware-assisted paging.
    #[serde(default)]
    pub shadow_paging: bool,
    /// Whether it is an HVM guest without ACPI, as by `acpi=0` in its xl.cfg.
    #[serde(default)]
    pub without_acpi: bool,
    /// Whether it was created paused and has not run yet, as by `xl create -p`.
    #[serde(default)]
    pub paused: bool,
}

/// An operation that fails.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Failure {
    /// Which: the name of a method of the platform's traits, for example `reset`.
    pub operation: String,
    /// Only for this function.
    pub address: Option<Sbdf>,
    /// Only for this domain.
    pub domain: Option<u16>,
    /// Only for this xenstore node and those below it.
    pub path: Option<String>,
    /// The error number, as `EBUSY`; without one it only takes long.
    pub errno: Option<String>,
    /// How long it takes, in milliseconds.
    #[serde(default)]
    pub delay_ms: u64,
    /// How many calls succeed before.
    #[serde(default)]
    pub after: u32,
    /// How many fail.
    #[serde(default = "once")]
    pub times: u32,
}

fn usual_version() -> String {
    "4.17".to_owned()
}

fn usual_irqs() -> u32 {
    32
}

fn usual_type() -> String {
    "pv".to_owned()
}

fn yes() -> bool {
    true
}

fn extended() -> u16 {
    4096
}

fn once() -> u32 {
    1
}

impl Description {
    /// Reads a description and completes it by what is built in; its own models and drivers go first.
    pub fn read(text: &str) -> Result<Self, String> {
        let mut description: Self = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        let library: Library = serde_saphyr::from_str(BUILT_IN).map_err(|error| error.to_string())?;
        for (name, model) in library.models {
            description.models.entry(name).or_insert(model);
        }
        for (name, kind) in library.driver_kinds {
            description.driver_kinds.entry(name).or_insert(kind);
        }
        for (path, text) in library.machine {
            description.machine.entry(path).or_insert(text);
        }
        for (key, name) in library.names {
            description.names.entry(key).or_insert(name);
        }
        Ok(description)
    }

    /// The texts that describe how dom0 is set up; the version of Xen is in them too.
    pub fn texts(&self) -> BTreeMap<String, String> {
        let (major, minor) = self.xen.split_once('.').unwrap_or((&self.xen, "0"));
        let version = [("major", major), ("minor", minor)];
        let version = version.map(|(key, text)| (format!("/sys/hypervisor/version/{key}"), text.to_owned()));
        let texts = self.machine.iter().filter_map(|(path, text)| Some((path.clone(), text.clone()?)));
        version.into_iter().chain(texts).collect()
    }
}

/// A hexadecimal number, with or without `0x`.
pub(super) fn hex(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).map_err(|_| format!("'{text}' is no hexadecimal number"))
}

/// Rows of `lspci -xxxx` as bytes.
pub(super) fn rows(text: &str, size: u16) -> Result<Vec<u8>, String> {
    if !matches!(size, 64 | 256 | 4096) {
        return Err(format!("config space has 64, 256 or 4096 bytes, not {size}"));
    }
    let mut bytes = vec![0; usize::from(size)];
    for row in text.lines().map(str::trim).filter(|row| !row.is_empty()) {
        let (offset, values) =
            row.split_once(':').ok_or_else(|| format!("'{row}' is no row 'OFFSET: BYTES'"))?;
        let offset = hex(offset)?;
        for (at, value) in (offset..).zip(values.split_whitespace()) {
            let value = u8::try_from(hex(value)?).map_err(|_| format!("'{value}' is no byte"))?;
            let place = usize::try_from(at).ok().and_then(|at| bytes.get_mut(at));
            *place.ok_or_else(|| format!("row '{row}' ends behind {size:#x}"))? = value;
        }
    }
    Ok(bytes)
}
