//! A dom0 that is a real Debian: systemd, udev and Xen's own scripts, on a disk that keeps what is written until the lab ends.
//!
//! mmdebstrap makes the root file system from packages, as an installer would: their scripts run, as root or with sudo. The image is kept in
//! the cache; machines write to a copy that is QEMU's own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::unistd::Uid;

use crate::apt;
use crate::image::{self, DOM0_MODULES};
use crate::modules;
use crate::packages::{self, Trees, run};

const INIT: &str = include_str!("assets/debian/init.sh");
const FINISH: &str = include_str!("assets/debian/finish.sh");
const READY: &str = include_str!("assets/debian/ready.sh");
const UNITS: [(&str, &str); 2] = [
    ("lab-agent.service", include_str!("assets/debian/lab-agent.service")),
    ("lab-ready.service", include_str!("assets/debian/lab-ready.service")),
];

/// What a dom0 has, with what these need and Debian's essential packages. The libraries are those that the product's package needs: it is
/// installed with dpkg, which fetches nothing.
const PACKAGES: [&str; 18] = [
    "busybox-static",
    "dbus",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libxencall1",
    "libxendevicemodel1",
    "libxenevtchn1",
    "libxenforeignmemory1",
    "libxengnttab1",
    "pciutils",
    "procps",
    "qemu-system-xen",
    "systemd",
    "systemd-sysv",
    "udev",
    "xen-utils-common",
    "xenstore-utils",
];

/// What only readers need.
const LEFT_OUT: [&str; 4] =
    ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"];

/// Modules that its initramfs loads; by virtio_console the harness hears of the boot before udev has loaded drivers.
const BOOT_MODULES: [&str; 5] = ["crc32c_generic", "ext4", "virtio_blk", "virtio_console", "virtio_pci"];

/// What changes here makes another image.
const THIS_FILE: &str = include_str!("debian.rs");

/// The image of the root file system for these packages, made or taken from the cache.
pub fn root(trees: &Trees) -> Result<PathBuf> {
    let _lock = packages::lock()?;
    let version = trees.version.name();
    let folder = packages::cache()?.join(format!("debian-{version}"));
    let (image, mark) = (folder.join("root.img"), folder.join("key"));
    let key = format!("{THIS_FILE}{FINISH}{UNITS:?}{DOM0_MODULES:?}{}", trees.key()?);
    if fs::read_to_string(&mark).is_ok_and(|found| found == key) {
        return Ok(image);
    }
    println!("lab: making a Debian for dom0");
    let work = tempfile::Builder::new().prefix("debian-new-").tempdir_in(packages::cache()?)?;
    let new = work.path().join("image");
    fs::create_dir(&new)?;
    make(trees, work.path(), &new.join("root.img"))?;
    fs::write(new.join("key"), key)?;
    if folder.exists() {
        fs::rename(&folder, work.path().join("old"))?;
    }
    fs::rename(&new, &folder)?;
    Ok(image)
}

fn make(trees: &Trees, work: &Path, image: &Path) -> Result<()> {
    let (files, empty, finish, settings) =
        (work.join("files"), work.join("empty"), work.join("finish.sh"), work.join("apt.conf"));
    fs::create_dir(&empty)?;
    let units = files.join("etc/systemd/system");
    fs::create_dir_all(&units)?;
    for (name, text) in UNITS {
        fs::write(units.join(name), text)?;
    }
    let stage = modules::stage(trees, &DOM0_MODULES)?;
    let modules = files.join("usr/lib/modules");
    fs::create_dir_all(&modules)?;
    run(Command::new("cp").arg("-R").arg(stage.folder()).arg(&modules))?;
    fs::write(&finish, FINISH)?;
    fs::write(&settings, apt::network_settings()?)?;

    let (suite, version) = (trees.version.suite(), trees.version.name());
    let xen = [format!("xen-utils-{version}"), format!("libxenmisc{version}"), "libxenstore4".to_owned()];
    let mut packages: Vec<&str> = PACKAGES.to_vec();
    packages.extend(xen.iter().map(String::as_str));
    let mut command = Command::new(if Uid::effective().is_root() { "env" } else { "sudo" });
    if !Uid::effective().is_root() {
        command.args(["-n", "env"]);
    }
    for (name, path) in [("FILES", files.as_path()), ("EMPTY", &empty), ("IMAGE", image)] {
        command.arg(format!("XPCI_{name}={}", text(path)?));
    }
    command.args([
        "LC_ALL=C",
        "mmdebstrap",
        "--mode=root",
        "--quiet",
        "--variant=essential",
        "--architectures=amd64",
        "--format=null",
    ]);
    command.arg(format!("--include={}", packages.join(",")));
    command.arg(format!("--aptopt={}", text(&settings)?));
    command.args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
    command.arg(format!("--customize-hook=sh '{}' \"$1\"", text(&finish)?));
    command.args([suite, "/dev/null", &apt::source(suite)?]);
    let output = command.output().context("starting mmdebstrap (`make deps` installs it)")?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "mmdebstrap failed ({}):\n{said}", output.status);
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    ensure!(!text.contains(['\'', ',']), "mmdebstrap cannot take quotes or commas in {text}");
    Ok(text)
}

/// Writes the initramfs that mounts the root file system. The files, with their paths below /lab, are not part of the image: they are what
/// was just built.
pub fn initramfs(to: &Path, trees: &Trees, files: &[(PathBuf, String)]) -> Result<()> {
    image::write(to, |archive| {
        archive.file("/init", 0o755, INIT.as_bytes())?;
        image::skeleton(archive)?;
        archive.file("/payload/ready", 0o755, READY.as_bytes())?;
        for (from, path) in files {
            let below = path.strip_prefix("/lab/");
            let below =
                below.with_context(|| format!("a real dom0 is given files below /lab, not {path}"))?;
            let mode =
                from.metadata().with_context(|| format!("reading {}", from.display()))?.permissions().mode();
            archive.copy(&format!("/payload/{below}"), from, mode & 0o7777)?;
        }
        image::busybox(archive, trees)?;
        modules::add(archive, trees, &BOOT_MODULES)
    })
}
