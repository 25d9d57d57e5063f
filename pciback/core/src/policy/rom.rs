//! The key `rom` of a policy file: which expansion ROM a guest finds.

use std::fmt;
use std::path::PathBuf;

use super::diagnostic::Diagnostics;
use super::read;
use super::yaml::Node;

/// The longest path (`PATH_MAX` of Linux, less its end).
const PATH_LIMIT: usize = 4095;

/// Where the contents of a function's expansion ROM come from, for a guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum RomSource {
    /// There is none.
    #[default]
    Hide,
    /// The device's own ROM: for an HVM guest a copy of it.
    Device,
    /// A file, by its absolute path.
    File(PathBuf),
}

impl RomSource {
    /// The words of a policy file, beside paths.
    pub const WORDS: [&str; 2] = ["hide", "device"];
}

impl fmt::Display for RomSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hide => f.write_str("hide"),
            Self::Device => f.write_str("device"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

pub(super) fn rom(node: &Node, diagnostics: &mut Diagnostics) -> Option<RomSource> {
    match read::scalar(node, "rom", diagnostics)? {
        "hide" => Some(RomSource::Hide),
        "device" => Some(RomSource::Device),
        path if is_path(path) => Some(RomSource::File(path.into())),
        other => {
            let other: String = other.chars().take(60).collect();
            let expected = "hide, device or the absolute path of a file is expected";
            diagnostics.say(node.at, format!("'{other}' is not a valid rom: {expected}"));
            None
        }
    }
}

fn is_path(text: &str) -> bool {
    text.starts_with('/') && text.len() <= PATH_LIMIT && !text.chars().any(char::is_control)
}
