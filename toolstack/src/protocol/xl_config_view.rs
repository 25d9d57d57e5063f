//! What becomes of an xl configuration file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings for the functions that an xl configuration file gives its guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct XlConfigView {
    /// The guest's name.
    pub guest: String,
    /// The file.
    pub file: String,
    /// The functions, each as `guests` in the settings takes it: `FUNCTION[@SLOT]`, the device number in hexadecimal.
    pub functions: Vec<String>,
    /// The settings, in YAML.
    pub settings: String,
    /// What takes the place of `pci` in the file.
    pub instead: String,
    /// What is said of options that have no effect.
    pub notes: Vec<String>,
}
