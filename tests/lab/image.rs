//! The initramfs of dom0 and of the guests.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::packages::{self, Trees, XenVersion};
use crate::{elf, modules};

const DOM0_INIT: &str = include_str!("assets/dom0-init.sh");
const GUEST_INIT: &str = include_str!("assets/guest-init.sh");

/// The modules that dom0 has, with what they depend on.
pub const DOM0_MODULES: [&str; 21] = [
    "8021q",
    "aer_inject",
    "crc32c_generic",
    "e1000e",
    "ext4",
    "igb",
    "igbvf",
    "nvme",
    "pci-pf-stub",
    "pci-stub",
    "virtio_console",
    "virtio_net",
    "virtio_pci",
    "xen-evtchn",
    "xen-gntalloc",
    "xen-gntdev",
    "xen-pciback",
    "xen-privcmd",
    "xenfs",
    "tun",
    "bridge",
];
const GUEST_MODULES: [&str; 9] = [
    "e1000e",
    "igb",
    "igbvf",
    "nvme",
    "virtio_net",
    "virtio_pci",
    "xen-evtchn",
    "xen-gntalloc",
    "xen-pcifront",
];
const DOM0_PROGRAMS: [&str; 12] = [
    "/bin/bash",
    "/sbin/ip",
    "/bin/ping",
    "/bin/kmod",
    "/usr/bin/lspci",
    "/usr/bin/setpci",
    "/usr/bin/xenstore-ls",
    "/usr/bin/xenstore-read",
    "/usr/bin/xenstore-write",
    "/usr/bin/xenstore-rm",
    "/usr/bin/xenstore-watch",
    "/usr/bin/xenstore-chmod",
];
/// The real programs, not the wrappers that choose one by Xen's version.
const XEN_PROGRAMS: [&str; 6] =
    ["xl", "xenstored", "xenconsoled", "xenconsole", "xen-init-dom0", "libxl-save-helper"];
/// What HVM guests need in dom0: the device model where Debian's libxl looks for it, and the files it insists on.
const DEVICE_MODEL: [&str; 6] = [
    "/usr/libexec/xen-qemu-system-i386",
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/keymaps/en-us",
];
const KMOD_NAMES: [&str; 5] = ["modprobe", "insmod", "rmmod", "lsmod", "modinfo"];

/// What a boot needs from the cache.
#[derive(Debug, Clone)]
pub struct Images {
    /// The packages behind it.
    pub trees: Trees,
    /// Multiboot hypervisor.
    pub hypervisor: PathBuf,
    /// Kernel of dom0 and guests.
    pub kernel: PathBuf,
    /// Initramfs of dom0, without agent and guests' files; a real Debian has one of its own.
    pub dom0: PathBuf,
    /// Initramfs of guests, without agent.
    pub guest: PathBuf,
}

/// Part of the cache's key: a change here makes other images.
const THIS_FILE: &str = include_str!("image.rs");

/// Everything for this Xen, made or taken from the cache.
pub fn images(version: XenVersion) -> Result<Images> {
    let _lock = packages::lock()?;
    let trees = packages::trees(version)?;
    let folder = packages::cache()?.join(format!("image-{}", version.name()));
    let key = format!(
        "{THIS_FILE}{}{DOM0_INIT}{GUEST_INIT}{DOM0_MODULES:?}{GUEST_MODULES:?}{DOM0_PROGRAMS:?}",
        trees.key()?
    );
    let kernel = trees.find(&format!("boot/vmlinuz-{}", trees.kernel_release()?))?;
    let images = Images {
        hypervisor: folder.join("xen.elf"),
        kernel,
        dom0: folder.join("dom0.cpio"),
        guest: folder.join("guest.cpio"),
        trees,
    };
    if fs::read_to_string(folder.join("key")).is_ok_and(|found| found == key) {
        return Ok(images);
    }
    let work = tempfile::Builder::new().prefix("image-new-").tempdir_in(packages::cache()?)?;
    let new = work.path().join("image");
    fs::create_dir(&new)?;
    fs::write(new.join("xen.elf"), images.trees.hypervisor()?)?;
    write(&new.join("dom0.cpio"), |archive| dom0(archive, &images.trees))
        .context("making dom0's initramfs")?;
    write(&new.join("guest.cpio"), |archive| guest(archive, &images.trees))
        .context("making the guests' initramfs")?;
    fs::write(new.join("key"), key)?;
    if folder.exists() {
        fs::rename(&folder, work.path().join("old"))?;
    }
    fs::rename(&new, &folder)?;
    Ok(images)
}

/// Writes an archive to a file.
pub fn write(path: &Path, fill: impl FnOnce(&mut Archive<BufWriter<File>>) -> Result<()>) -> Result<()> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    fill(&mut archive)?;
    archive.finish()?;
    Ok(())
}

fn dom0(archive: &mut Archive<impl Write>, trees: &Trees) -> Result<()> {
    archive.file("/init", 0o755, DOM0_INIT.as_bytes())?;
    skeleton(archive)?;
    archive.directory("/var/log/xen/console")?;
    archive.directory("/var/lib/xen")?;
    let mut programs = Programs::new(trees);
    for path in DOM0_PROGRAMS {
        programs.add(archive, path, &trees.find(path)?)?;
    }
    for name in KMOD_NAMES {
        archive.link(&format!("/sbin/{name}"), "/bin/kmod")?;
    }
    let xen = format!("/usr/lib/xen-{}/bin", trees.version.name());
    for name in XEN_PROGRAMS {
        let path = format!("{xen}/{name}");
        programs.add(archive, &path, &trees.find(&path)?)?;
        archive.link(&format!("/usr/sbin/{name}"), &path)?;
    }
    programs.add_dlopened(archive)?;
    archive.file("/etc/xen/xl.conf", 0o644, b"autoballoon=\"off\"\n")?;
    busybox(archive, trees)?;
    modules::add(archive, trees, &DOM0_MODULES)
}

/// Adds what HVM guests need to dom0's initramfs.
pub fn device_model(archive: &mut Archive<impl Write>, trees: &Trees) -> Result<()> {
    let trees = {
        let _lock = packages::lock()?;
        trees.clone().with_device_model()?
    };
    let mut programs = Programs::new(&trees);
    let hvmloader = format!("/usr/lib/xen-{}/boot/hvmloader", trees.version.name());
    for path in DEVICE_MODEL.into_iter().chain([hvmloader.as_str()]) {
        programs.add(archive, path, &trees.find(path)?)?;
    }
    Ok(())
}

fn guest(archive: &mut Archive<impl Write>, trees: &Trees) -> Result<()> {
    archive.file("/init", 0o755, GUEST_INIT.as_bytes())?;
    skeleton(archive)?;
    let mut programs = Programs::new(trees);
    for path in ["/usr/bin/lspci", "/usr/bin/setpci"] {
        programs.add(archive, path, &trees.find(path)?)?;
    }
    for name in ["libgcc_s.so.1", "libm.so.6"] {
        programs.library(archive, name)?;
    }
    busybox(archive, trees)?;
    modules::add(archive, trees, &GUEST_MODULES)
}

/// The folders and files that every initramfs has.
pub fn skeleton(archive: &mut Archive<impl Write>) -> Result<()> {
    for folder in ["bin", "dev", "etc", "lab", "proc", "root", "run", "sbin", "sys", "tmp", "var"] {
        archive.directory(folder)?;
    }
    archive.file("/etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    archive.file("/etc/group", 0o644, b"root:x:0:\n")?;
    archive.file("/etc/hosts", 0o644, b"127.0.0.1 localhost\n")
}

/// Adds busybox under all its names; last: a real program of the same name is already there and stays.
pub fn busybox(archive: &mut Archive<impl Write>, trees: &Trees) -> Result<()> {
    let path = trees.find("/bin/busybox")?;
    archive.copy("/bin/busybox", &path, 0o755)?;
    let list = packages::run(Command::new(&path).arg("--list"))?;
    let shadowed = |name: &str| ["ip", "ping", "sh"].contains(&name) || KMOD_NAMES.contains(&name);
    let real = archive.contains("/bin/kmod");
    if real {
        // busybox's own shell would run its own ip, regardless of PATH.
        archive.link("/bin/sh", "bash")?;
    }
    for name in String::from_utf8_lossy(&list).lines().filter(|n| !(real && shadowed(n))) {
        archive.link(&format!("/bin/{name}"), "busybox")?;
    }
    Ok(())
}

/// Programs with the libraries that they need, taken from the trees.
pub struct Programs<'a> {
    trees: &'a Trees,
    done: BTreeSet<String>,
}

impl<'a> Programs<'a> {
    /// None yet.
    pub fn new(trees: &'a Trees) -> Self {
        Self { trees, done: BTreeSet::new() }
    }

    /// Adds a program (or any other file) at `to`, with its libraries.
    pub fn add(&mut self, archive: &mut Archive<impl Write>, to: &str, from: &Path) -> Result<()> {
        let mode =
            from.metadata().with_context(|| format!("reading {}", from.display()))?.permissions().mode();
        archive.copy(to, from, mode & 0o7777)?;
        self.needs_of(archive, from)
    }

    fn needs_of(&mut self, archive: &mut Archive<impl Write>, from: &Path) -> Result<()> {
        for name in elf::needed(from)?.unwrap_or_default() {
            self.library(archive, &name).with_context(|| format!("for {}", from.display()))?;
        }
        Ok(())
    }

    /// Adds a library by the name that programs ask for.
    pub fn library(&mut self, archive: &mut Archive<impl Write>, name: &str) -> Result<()> {
        if !self.done.insert(name.to_owned()) {
            return Ok(());
        }
        let from = self.trees.library(name)?;
        // The loader's path is fixed in every program.
        let folder = if name.starts_with("ld-linux") { "/lib64" } else { "/lib/x86_64-linux-gnu" };
        archive.copy(&format!("{folder}/{name}"), &from, 0o755)?;
        self.needs_of(archive, &from)
    }

    /// Libraries that programs open by themselves: Xen's (by xpcid), gcc's (when a thread ends), those of kmod.
    fn add_dlopened(&mut self, archive: &mut Archive<impl Write>) -> Result<()> {
        for name in ["libgcc_s.so.1", "libm.so.6", "libudev.so.1", "liblzma.so.5", "libzstd.so.1"] {
            self.library(archive, name)?;
        }
        let libxenctrl = self.trees.library(&format!("libxenctrl.so.{}", self.trees.version.name()))?;
        let folder = libxenctrl.parent().context("a library without a folder")?.to_owned();
        let mut names: Vec<String> = fs::read_dir(folder)?
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .filter(|n| n.starts_with("libxen") && n.contains(".so."))
            .collect();
        names.sort();
        names.iter().try_for_each(|name| self.library(archive, name))
    }
}
