//! A folder for files that are read as the service reads them.

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

/// One folder of this process.
pub struct Folder(PathBuf);

impl Folder {
    /// The one that all inputs of this process use, one after the other. `run.sh` removes what is left of it.
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<Folder> = LazyLock::new(|| {
            let all = std::env::var_os("XPCI_FUZZ_FILES").map_or_else(std::env::temp_dir, PathBuf::from);
            let folder = all.join(format!("xpci-fuzz-{}", std::process::id()));
            fs::create_dir_all(&folder).expect("a folder");
            Folder(folder)
        });
        &SHARED
    }

    /// A folder in it with nothing but this file.
    pub fn with(&self, folder: &str, file: &str, contents: &[u8]) -> PathBuf {
        let folder = self.0.join(folder);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(file), contents).expect("a file");
        folder
    }

    /// Writes a file.
    pub fn write(&self, file: &str, contents: &[u8]) -> PathBuf {
        let path = self.0.join(file);
        fs::write(&path, contents).expect("a file");
        path
    }
}
