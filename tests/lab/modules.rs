//! Kernel modules with what they depend on, indexed for an initramfs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::cpio::Archive;
use crate::packages::{Trees, run};

/// Adds these modules and their dependencies under /lib/modules, with depmod's indexes.
pub fn add(archive: &mut Archive<impl Write>, trees: &Trees, wanted: &[&str]) -> Result<()> {
    let stage = stage(trees, wanted)?;
    add_folder(archive, &stage.folder, &format!("/lib/modules/{}", trees.kernel_release()?))
}

/// Some of a kernel's modules in a temporary folder.
pub struct Stage {
    folder: PathBuf,
    _root: TempDir,
}

impl Stage {
    /// The folder that is named after the kernel's release.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Copies these modules and their dependencies, with depmod's indexes.
pub fn stage(trees: &Trees, wanted: &[&str]) -> Result<Stage> {
    let release = trees.kernel_release()?;
    let all = trees.find(&format!("lib/modules/{release}"))?;
    // depmod works on a copy with the wanted modules only, so that its indexes name nothing that is absent.
    let stage = tempfile::tempdir().context("creating a temporary folder")?;
    let folder = stage.path().join("lib/modules").join(&release);
    fs::create_dir_all(&folder)?;
    for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        fs::copy(all.join(name), folder.join(name))
            .with_context(|| format!("copying the kernel's {name}"))?;
    }
    let depends = dependencies(&all, &release)?;
    let by_name: BTreeMap<String, &String> = depends.keys().map(|path| (module_name(path), path)).collect();
    let builtin = fs::read_to_string(all.join("modules.builtin"))?;
    let builtin: BTreeSet<String> = builtin.lines().map(module_name).collect();
    let mut paths = BTreeSet::new();
    for name in wanted.iter().map(|n| module_name(n)).filter(|n| !builtin.contains(n)) {
        let path = by_name.get(&name).with_context(|| format!("kernel {release} has no module {name}"))?;
        paths.insert((*path).clone());
        paths.extend(depends[*path].iter().cloned());
    }
    for path in &paths {
        let bytes = read_module(&all.join(path))?;
        let to = folder.join(path.strip_suffix(".xz").unwrap_or(path));
        fs::create_dir_all(to.parent().context("a module without a folder")?)?;
        fs::write(&to, bytes)?;
    }
    run(Command::new("/sbin/depmod").arg("-b").arg(stage.path()).arg(&release))?;
    Ok(Stage { folder, _root: stage })
}

/// Newer Debian kernels have compressed modules; unpacked ones need no support in the initramfs.
fn read_module(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|e| e == "xz") {
        return run(Command::new("xz").arg("-dc").arg(path));
    }
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// Each module's path with the paths of all it needs, as depmod says.
fn dependencies(all: &Path, release: &str) -> Result<BTreeMap<String, Vec<String>>> {
    let index = all.join("modules.dep");
    if !index.exists() {
        // depmod accepts any root that has lib/modules; in a merged tree that is one folder up from "lib".
        let root = all.ancestors().nth(3).context("modules outside of lib/modules")?;
        run(Command::new("/sbin/depmod").arg("-b").arg(root).arg(release))?;
    }
    let text = fs::read_to_string(&index).with_context(|| format!("reading {}", index.display()))?;
    let parse = |line: &str| {
        let (path, needs) = line.split_once(':')?;
        Some((path.to_owned(), needs.split_whitespace().map(str::to_owned).collect()))
    };
    Ok(text.lines().filter_map(parse).collect())
}

fn module_name(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split('.').next().unwrap_or(name).replace('-', "_")
}

fn add_folder(archive: &mut Archive<impl Write>, from: &Path, to: &str) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(from)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = format!("{to}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            add_folder(archive, &entry.path(), &name)?;
        } else {
            archive.copy(&name, &entry.path(), 0o644)?;
        }
    }
    Ok(())
}
