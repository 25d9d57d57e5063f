//! The YAML form of a simulated host.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::Sbdf;

/// A whole host.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Description {
    /// Xen's version, `major.minor`.
    pub xen: String,
    /// The PCI drivers that are loaded in dom0.
    pub drivers: Vec<String>,
    /// Kinds of functions, by name.
    pub models: BTreeMap<String, Model>,
    /// The functions that are there at first.
    pub functions: Vec<Function>,
    /// The domains besides dom0.
    #[serde(default)]
    pub domains: Vec<Domain>,
    /// Operations that fail.
    #[serde(default)]
    pub failures: Vec<Failure>,
}

/// A kind of function: what its config space holds and how hardware treats writes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Model {
    /// Rows as `lspci -xxxx` prints them; what is not listed is 0.
    pub config: String,
    /// Bytes of config space: 64, 256 or 4096.
    #[serde(default = "extended")]
    pub size: u16,
    /// Bits that keep what is written, by offset of their dword, both hexadecimal.
    #[serde(default)]
    pub writable: BTreeMap<String, String>,
    /// Bits that a written 1 clears, likewise.
    #[serde(default)]
    pub clear_on_one: BTreeMap<String, String>,
    /// Size and Linux's resource flags of each BAR, hexadecimal, by index.
    #[serde(default)]
    pub bars: BTreeMap<String, Bar>,
    /// The driver that takes it when nothing is overridden.
    pub driver: Option<String>,
    /// Vendor and device id as Linux shows them, `8086:10ca`; by default what config space says.
    pub id: Option<String>,
    /// How Linux can reset it.
    #[serde(default)]
    pub reset_methods: Vec<String>,
    /// Entries of its MSI-X table; 0 where it has none.
    #[serde(default)]
    pub msix_entries: u16,
    /// What SR-IOV adds.
    pub sriov: Option<Sriov>,
}

fn extended() -> u16 {
    4096
}

/// One BAR of a kind of function.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Bar {
    /// Bytes.
    pub size: String,
    /// `IORESOURCE_*`.
    pub flags: String,
}

/// What SR-IOV adds to a PF.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Sriov {
    /// The kind its VFs are of.
    pub model: String,
    /// Most VFs.
    pub total: u16,
    /// Routing id of the first VF after the PF's.
    pub first_offset: u32,
    /// Distance of the next ones.
    pub stride: u32,
    /// The offset of NumVFs in config space, hexadecimal.
    pub num_vfs_register: String,
    /// Start of each VF BAR for VF 0, hexadecimal, by index; size and flags are the VF model's.
    pub bars: BTreeMap<String, String>,
}

/// One function.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Function {
    /// Where it is.
    pub address: Sbdf,
    /// Its kind.
    pub model: String,
    /// Where its BARs start, hexadecimal, by index.
    #[serde(default)]
    pub bars: BTreeMap<String, String>,
    /// Its interrupt line.
    #[serde(default)]
    pub irq: u32,
}

/// One domain.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Domain {
    /// Its number.
    pub id: u16,
    /// Its name.
    pub name: String,
    /// `pv`, `pvh` or `hvm`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it was created with passthrough.
    pub passthrough: bool,
}

/// An operation that fails.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Failure {
    /// Which: the name of a method of the platform's traits, for example `reset`.
    pub operation: String,
    /// Only for this function.
    pub address: Option<Sbdf>,
    /// The error number, as `EBUSY`.
    pub errno: String,
    /// How many calls succeed before.
    #[serde(default)]
    pub after: u32,
    /// How many fail.
    #[serde(default = "once")]
    pub times: u32,
}

fn once() -> u32 {
    1
}

/// A hexadecimal number, with or without `0x`.
pub(super) fn hex(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).map_err(|_| format!("'{text}' is no hexadecimal number"))
}

/// Rows of `lspci -xxxx` as bytes.
pub(super) fn rows(text: &str, size: u16) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; usize::from(size)];
    for row in text.lines().map(str::trim).filter(|row| !row.is_empty()) {
        let (offset, values) =
            row.split_once(':').ok_or_else(|| format!("'{row}' is no row 'OFFSET: BYTES'"))?;
        let offset = hex(offset)? as usize;
        for (index, value) in values.split_whitespace().enumerate() {
            let value = u8::try_from(hex(value)?).map_err(|_| format!("'{value}' is no byte"))?;
            let place =
                bytes.get_mut(offset + index).ok_or_else(|| format!("row '{row}' ends behind {size:#x}"))?;
            *place = value;
        }
    }
    Ok(bytes)
}
