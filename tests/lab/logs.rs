//! Where logs go, and what is collected at the end.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::Lab;

/// The workspace's root: cargo runs tests in the member's folder.
pub(crate) fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap_or_else(|_| PathBuf::from("."))
}

/// An empty folder for the logs of this name.
pub(crate) fn folder(name: &str) -> Result<PathBuf> {
    let path = workspace().join("target/lab-logs").join(name);
    if path.exists() {
        fs::remove_dir_all(&path).with_context(|| format!("emptying {}", path.display()))?;
    }
    fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
    Ok(path)
}

/// The path of a file for this name, next to the logs; machines run one at a time.
pub fn scratch(name: &str) -> Result<PathBuf> {
    let folder = workspace().join("target/lab-logs");
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    Ok(folder.join(name))
}

const COLLECTED: [(&str, &str); 5] = [
    // What the processors of domains and Xen's timers wait for, should something hang.
    ("xl-dmesg.log", "xl debug-keys qvar; xl dmesg"),
    ("dom0-dmesg.log", "dmesg"),
    ("xl.log", "xl list; cat /var/log/xen/*.log"),
    ("guest-consoles.log", "cat /var/log/xen/console/*.log | tr -d '\\002\\003'"),
    ("xenstore.log", "xenstore-ls -fp"),
];

/// What only dom0 can tell. A dom0 that no longer answers costs a few seconds, and its console's log is there already.
pub(crate) fn collect(lab: &Lab) {
    for (name, script) in COLLECTED {
        let Ok(output) = lab.dom0(&format!("{{ {script}; }} 2>&1")).limit(Duration::from_secs(10)).run()
        else {
            return;
        };
        if let Err(error) = fs::write(lab.logs().join(name), &output.bytes) {
            println!("lab: cannot keep {name}: {error}");
        }
    }
}
