//! The audit log: errors, decisions and outcomes, one JSON object per line, in two files of bounded size.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::protocol::EventView;

/// The newer file, in the state directory.
const NEWER: &str = "errors.jsonl";
/// The previous file.
const OLDER: &str = "errors.1.jsonl";
/// The size at which the newer file replaces the older one, in bytes.
const SIZE_LIMIT: u64 = 1 << 20;

/// The audit log.
pub struct AuditLog {
    directory: PathBuf,
}

impl AuditLog {
    /// A log in this directory.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Appends a line.
    pub fn add(&self, event: &EventView) -> io::Result<()> {
        let path = self.directory.join(NEWER);
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
        if file.metadata()?.len() + line.len() as u64 > SIZE_LIMIT {
            fs::rename(&path, self.directory.join(OLDER))?;
            file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
        }
        file.write_all(&line)
    }

    /// The events of both files, the oldest first. Unreadable lines are skipped: a killed service may have left an incomplete one.
    pub fn read(&self) -> Vec<EventView> {
        let mut events = Vec::new();
        for name in [OLDER, NEWER] {
            let Ok(file) = File::open(self.directory.join(name)) else { continue };
            let lines = BufReader::new(file.take(2 * SIZE_LIMIT)).split(b'\n').map_while(Result::ok);
            events.extend(lines.filter_map(|line| serde_json::from_slice::<EventView>(&line).ok()));
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use pciback::Sbdf;

    use super::*;
    use crate::protocol::Happening;

    fn outcome(number: u32) -> EventView {
        let text = format!("{number} {}", "x".repeat(200));
        EventView::now(Sbdf::from_devfn(0, 1, 0x80), None, Happening::Outcome { ok: true, text })
    }

    #[test]
    fn events_are_read_back_and_an_incomplete_line_is_skipped() {
        let directory = tempfile::tempdir().unwrap();
        let log = AuditLog::new(directory.path());
        assert!(log.read().is_empty());
        let events = [outcome(1), outcome(2)];
        log.add(&events[0]).unwrap();
        let mut file = OpenOptions::new().append(true).open(directory.path().join(NEWER)).unwrap();
        file.write_all(b"{\"at\": \"20\n").unwrap();
        log.add(&events[1]).unwrap();
        assert_eq!(log.read(), events);
    }

    #[test]
    fn the_log_is_bounded_and_keeps_the_newest_events() {
        let directory = tempfile::tempdir().unwrap();
        let log = AuditLog::new(directory.path());
        for number in 0..12_000 {
            log.add(&outcome(number)).unwrap();
        }
        let size = |name| fs::metadata(directory.path().join(name)).unwrap().len();
        assert!(size(NEWER) <= SIZE_LIMIT && size(OLDER) <= SIZE_LIMIT);
        let events = log.read();
        assert!(events.len() > 3000, "{}", events.len());
        let Happening::Outcome { text, .. } = &events[events.len() - 1].what else { panic!() };
        assert!(text.starts_with("11999 "));
    }
}
