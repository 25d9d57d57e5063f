//! How the simulated dom0 is set up: texts.

use std::collections::BTreeMap;

use nix::errno::Errno;

use super::failures::{Failures, Subject};
use crate::platform::machine::{Machine, XlQuestion};
use crate::platform::{Cause, PlatformError, Result};

/// Texts by path, and what xl prints under `xl info` and `xl dmesg`.
pub(super) struct SimMachine {
    pub texts: BTreeMap<String, String>,
    pub failures: Failures,
}

impl SimMachine {
    fn check(&self, path: &str) -> std::result::Result<(), Cause> {
        self.failures.check("machine", Subject { path: Some(path), ..Subject::default() })
    }
}

impl Machine for SimMachine {
    fn text(&self, path: &str) -> Result<Option<String>> {
        self.check(path).map_err(|cause| PlatformError::new("read", path, cause))?;
        Ok(self.texts.get(path).map(|text| text.trim().to_owned()))
    }

    fn exists(&self, path: &str) -> bool {
        let below = format!("{path}/");
        self.texts.keys().any(|known| known == path || known.starts_with(&below))
    }

    fn xl(&self, question: XlQuestion) -> Result<String> {
        let key = format!("xl {}", question.word());
        let answer = self.check(&key).and_then(|()| Ok(self.texts.get(&key).ok_or(Errno::ENOENT)?));
        answer.cloned().map_err(|cause| PlatformError::new("run", format!("'{key}'"), cause))
    }
}
