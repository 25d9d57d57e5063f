//! Whether a program is newer than what it is built from.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};

/// Fails for a program that is older than its sources, as cargo lists them beside it: the lab would show what is no longer so.
pub(crate) fn check(program: &Path) -> Result<()> {
    let built = changed(program)?;
    let list = program.with_extension("d");
    let text = fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
    for source in sources(&text) {
        let changed = changed(&source).with_context(|| {
            format!("{} was built from it; `make lab-test` builds it again", program.display())
        })?;
        ensure!(
            changed <= built,
            "{} is older than {}; `make lab-test` builds all that the lab needs",
            program.display(),
            source.display()
        );
    }
    Ok(())
}

fn changed(path: &Path) -> Result<SystemTime> {
    let time = fs::metadata(path).and_then(|metadata| metadata.modified());
    time.with_context(|| format!("looking when {} was changed", path.display()))
}

/// The files of a list of dependencies as cargo writes it, in the syntax of make: 'PROGRAM: FILE FILE', spaces in names escaped.
fn sources(list: &str) -> Vec<PathBuf> {
    let files = list.lines().next().and_then(|line| line.split_once(": ")).map_or("", |(_, files)| files);
    let names = files.replace("\\ ", "\0");
    names.split_whitespace().map(|name| PathBuf::from(name.replace('\0', " "))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program with one source and what cargo writes beside it.
    fn built(folder: &Path) -> (PathBuf, PathBuf) {
        let (program, source) = (folder.join("xpcid"), folder.join("main file.rs"));
        for file in [&source, &program] {
            fs::write(file, "").unwrap();
        }
        let name = source.to_str().unwrap().replace(' ', "\\ ");
        fs::write(folder.join("xpcid.d"), format!("{}: {name}\n", program.display())).unwrap();
        (program, source)
    }

    #[test]
    fn a_program_that_is_older_than_its_sources_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (program, _) = built(folder.path());
        check(&program).unwrap();
        fs::File::open(&program).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let error = check(&program).unwrap_err();
        assert!(error.to_string().contains("xpcid is older than"), "{error}");
    }

    #[test]
    fn what_a_program_is_not_built_from_may_be_newer() {
        let folder = tempfile::tempdir().unwrap();
        let (program, _) = built(folder.path());
        fs::write(folder.path().join("other.rs"), "").unwrap();
        check(&program).unwrap();
    }

    #[test]
    fn a_program_whose_source_is_gone_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (program, source) = built(folder.path());
        fs::remove_file(source).unwrap();
        let error = format!("{:#}", check(&program).unwrap_err());
        assert!(error.contains("builds it again"), "{error}");
    }
}
