//! How dom0 is set up, apart from its functions: small files of its kernel and its administrator, and what xl reports about Xen.

use super::Result;

/// What xl is asked; both print text and change nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum XlQuestion {
    /// `xl info`: Xen's version, command line and capabilities, one `key : value` a line.
    Info,
    /// `xl dmesg`: Xen's log, as far as its ring still holds it.
    Log,
}

impl XlQuestion {
    /// The word after `xl`.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Log => "dmesg",
        }
    }
}

/// How dom0 is set up. Nothing here changes anything.
pub trait Machine: Send + Sync {
    /// The text of a small file, without the white space around it; `None` where there is none.
    fn text(&self, path: &str) -> Result<Option<String>>;
    /// Whether there is something at a path.
    fn exists(&self, path: &str) -> bool;
    /// What xl prints.
    fn xl(&self, question: XlQuestion) -> Result<String>;
}
