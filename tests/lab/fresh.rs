//! Whether a program is newer than what it is built from.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};

use crate::logs::workspace;

/// Where the sources of the programs in dom0 are.
const SOURCES: [&str; 2] = ["pciback/src", "toolstack/src"];

/// Fails for a program that is older than its sources: the lab would show what is no longer so.
pub(crate) fn check(program: &Path) -> Result<()> {
    let folders = SOURCES.map(|folder| workspace().join(folder));
    let built = changed(program)?;
    let newest = folders.iter().try_fold(None, |newest, folder| newest_file(folder, newest))?;
    if let Some((time, file)) = newest {
        ensure!(
            time <= built,
            "{} is older than {}; `make lab-test` builds all that the lab needs",
            program.display(),
            file.display()
        );
    }
    Ok(())
}

fn changed(path: &Path) -> Result<SystemTime> {
    let time = fs::metadata(path).and_then(|metadata| metadata.modified());
    time.with_context(|| format!("looking when {} was changed", path.display()))
}

type Newest = Option<(SystemTime, PathBuf)>;

fn newest_file(folder: &Path, mut newest: Newest) -> Result<Newest> {
    for entry in fs::read_dir(folder).with_context(|| format!("looking into {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            newest = newest_file(&path, newest)?;
        } else {
            let time = changed(&path)?;
            if newest.as_ref().is_none_or(|(before, _)| time > *before) {
                newest = Some((time, path));
            }
        }
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_older_than_its_sources_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("xpcid");
        fs::write(&program, "").unwrap();
        check(&program).unwrap();
        fs::File::open(&program).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let error = check(&program).unwrap_err();
        assert!(error.to_string().contains("xpcid is older than"), "{error}");
    }
}
