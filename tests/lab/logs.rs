//! Where logs go, and what is collected at the end.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::Lab;

/// The workspace's root: cargo runs tests in the member's folder.
pub fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap_or_else(|_| PathBuf::from("."))
}

/// How many machines of each name this process has booted.
static BOOTS: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());

/// An empty folder for the logs of a machine of this name. Later ones of the process get folders of their own, so that what a check
/// failed on is still there when all have run.
pub(crate) fn folder(name: &str) -> Result<PathBuf> {
    let mut boots = BOOTS.lock().unwrap_or_else(PoisonError::into_inner);
    let boot = boots.entry(name.to_owned()).and_modify(|boot| *boot += 1).or_insert(1);
    let path = workspace().join("target/lab-logs").join(numbered(name, *boot));
    let earlier = if *boot == 1 { of_earlier_runs(&path)? } else { Vec::new() };
    for path in earlier {
        fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
    Ok(path)
}

fn numbered(name: &str, boot: u32) -> String {
    if boot == 1 { name.to_owned() } else { format!("{name}.{boot}") }
}

/// The folder of the first boot and those numbered after it, as far as they exist.
fn of_earlier_runs(first: &Path) -> Result<Vec<PathBuf>> {
    let (Some(folder), Some(name)) = (first.parent(), first.file_name().and_then(|name| name.to_str()))
    else {
        return Ok(Vec::new());
    };
    let Ok(entries) = fs::read_dir(folder) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("looking into {}", folder.display()))?.path();
        let rest =
            path.file_name().and_then(|entry| entry.to_str()).and_then(|entry| entry.strip_prefix(name));
        let number = |rest: &str| rest.strip_prefix('.').is_some_and(|number| number.parse::<u32>().is_ok());
        if path.is_dir() && rest.is_some_and(|rest| rest.is_empty() || number(rest)) {
            found.push(path);
        }
    }
    Ok(found)
}

/// The path of a file for this name, next to the logs; machines run one at a time.
pub fn scratch(name: &str) -> Result<PathBuf> {
    let folder = workspace().join("target/lab-logs");
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    Ok(folder.join(name))
}

const COLLECTED: [(&str, &str); 6] = [
    // What the processors of domains and Xen's timers wait for, should something hang.
    ("xl-dmesg.log", "xl debug-keys qvar; xl dmesg"),
    ("dom0-dmesg.log", "dmesg"),
    ("xl.log", "xl list; cat /var/log/xen/*.log"),
    ("guest-consoles.log", "cat /var/log/xen/console/*.log | tr -d '\\002\\003'"),
    ("xenstore.log", "xenstore-ls -fp"),
    // Of a dom0 that is a real Debian.
    ("journal.log", "[ ! -d /run/systemd/system ] || journalctl --no-pager -o short-monotonic"),
];

/// What only dom0 can report. A dom0 that no longer answers costs a few seconds, and its console's log is there already.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_logs_of_the_same_machines_are_replaced() {
        let logs = tempfile::tempdir().unwrap();
        for name in ["host", "host.2", "host.10", "host-two", "hostile", "host.disk"] {
            fs::create_dir(logs.path().join(name)).unwrap();
        }
        let mut found = of_earlier_runs(&logs.path().join("host")).unwrap();
        found.sort();
        assert_eq!(found, ["host", "host.10", "host.2"].map(|name| logs.path().join(name)));
    }
}
