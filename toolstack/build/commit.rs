// The commit that a checkout stands at. Used by the build script and by the tests of what is installed.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A commit, and the file that changes when another one is checked out or made.
pub struct Commit {
    /// The first twelve digits of its hash.
    pub hash: String,
    /// The file.
    pub changes: PathBuf,
}

/// The commit of a checkout whose top folder this is; `None` for sources from elsewhere, also inside of another checkout, and where
/// git is missing.
pub fn commit(top: &Path) -> Option<Commit> {
    let top = top.canonicalize().ok()?;
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(&top).args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    if Path::new(&git(&["rev-parse", "--show-toplevel"])?) != top {
        return None;
    }
    let hash = git(&["rev-parse", "--short=12", "HEAD"])?;
    let file = |name| Some(top.join(git(&["rev-parse", "--git-path", name])?)).filter(|path| path.exists());
    Some(Commit { hash, changes: file("logs/HEAD").or_else(|| file("HEAD"))? })
}
