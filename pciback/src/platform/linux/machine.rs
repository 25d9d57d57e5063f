//! How the dom0 that this program runs in is set up.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::attributes::read_text;
use super::programs;
use crate::platform::machine::{Machine, XlQuestion};
use crate::platform::{PlatformError, Result};

/// How long xl may take to answer a question.
const LIMIT: Duration = Duration::from_secs(10);

/// This dom0.
pub struct LinuxMachine {
    root: PathBuf,
}

impl LinuxMachine {
    /// The files below this folder, usually `/`.
    pub const fn new(root: PathBuf) -> Self {
        Self { root }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }
}

impl Machine for LinuxMachine {
    fn text(&self, path: &str) -> Result<Option<String>> {
        read_text(&self.path(path)).map_err(|cause| PlatformError::new("read", path, cause))
    }

    fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    fn xl(&self, question: XlQuestion) -> Result<String> {
        let word = question.word();
        let mut command = Command::new("xl");
        command.arg(word);
        programs::output(command, LIMIT)
            .map_err(|error| PlatformError::new("run", format!("'xl {word}'"), error))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn files_are_those_below_its_root_and_one_that_is_missing_is_no_error() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("proc")).unwrap();
        fs::write(root.path().join("proc/cmdline"), "quiet\n").unwrap();
        let machine = LinuxMachine::new(root.path().to_owned());
        assert_eq!(machine.text("/proc/cmdline").unwrap().as_deref(), Some("quiet"));
        assert!(machine.exists("/proc") && !machine.exists("/proc/version"));
        assert_eq!(machine.text("/proc/version").unwrap(), None);
    }
}
