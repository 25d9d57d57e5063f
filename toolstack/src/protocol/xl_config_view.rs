//! The result of converting an xl configuration file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings for the functions that an xl configuration file gives to its guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct XlConfigView {
    /// The guest's name.
    pub guest: String,
    /// The file.
    pub file: String,
    /// The functions, in the format of `guests` in the settings: `FUNCTION[@SLOT]`, the device number in hexadecimal.
    pub functions: Vec<String>,
    /// The settings, in YAML.
    pub settings: String,
    /// The text that replaces `pci` in the file.
    pub instead: String,
    /// Notes about options that have no effect.
    pub notes: Vec<String>,
}
