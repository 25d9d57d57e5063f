//! The Debian packages a lab is made of, downloaded once and unpacked into trees in the cache.
//!
//! Xen, its tools and the kernel come from the release that has that Xen. The base userland (libc, bash, lspci...) comes
//! from the newer one of that release and the host's, because xpcid is built on the host and needs at least its libc;
//! newer libraries run older programs, so one search order serves both: base tree first, then Xen's.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};

use crate::apt::{Apt, host_release};

/// Part of every cache key: change it when the way trees or images are made changes.
pub const RECIPE: &str = "2";

/// The Xen versions that the lab can boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum XenVersion {
    V4_17,
    V4_20,
}

impl XenVersion {
    /// All of them, oldest first.
    pub const ALL: [Self; 2] = [Self::V4_17, Self::V4_20];

    /// `4.17`
    pub fn name(self) -> &'static str {
        match self {
            Self::V4_17 => "4.17",
            Self::V4_20 => "4.20",
        }
    }

    /// The version written like this.
    pub fn parse(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|v| v.name() == name);
        found.with_context(|| format!("no lab for Xen {name:?}; there are 4.17 and 4.20"))
    }

    /// That of the release whose programs the lab's base userland is made of, which is the host's where the lab can boot that.
    pub fn of_the_host() -> Result<Self> {
        let base = base_suite(Self::ALL[0])?;
        let found = Self::ALL.into_iter().find(|version| version.suite() == base);
        found.with_context(|| format!("no lab for the Xen of {base}"))
    }

    /// The Debian release that has it.
    pub fn suite(self) -> &'static str {
        match self {
            Self::V4_17 => "bookworm",
            Self::V4_20 => "trixie",
        }
    }

    fn packages(self) -> [&'static str; 4] {
        match self {
            Self::V4_17 => {
                ["linux-image-amd64", "xen-hypervisor-4.17-amd64", "xen-utils-4.17", "xenstore-utils"]
            }
            Self::V4_20 => {
                ["linux-image-amd64", "xen-hypervisor-4.20-amd64", "xen-utils-4.20", "xenstore-utils"]
            }
        }
    }
}

const BASE: [&str; 10] = [
    "bash",
    "busybox-static",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libgcc-s1",
    "liblzma5",
    "libudev1",
    "libzstd1",
    "pciutils",
];

/// What HVM guests need besides: QEMU as their device model, its files, their BIOS.
const DEVICE_MODEL: [&str; 3] = ["qemu-system-xen", "qemu-system-data", "seabios"];

/// udev itself, for labs that show what its rules do.
const UDEV: [&str; 1] = ["udev"];

/// Unpacked packages, in the order in which files are looked up.
#[derive(Debug, Clone)]
pub struct Trees {
    /// Which Xen they are for.
    pub version: XenVersion,
    /// Base userland first.
    pub roots: Vec<PathBuf>,
}

/// `${XDG_CACHE_HOME:-~/.cache}/xpci-lab`
pub fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|p| !p.is_empty()) {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    let path = base.join("xpci-lab");
    fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
    Ok(path)
}

/// Holds off everybody else who wants to fill the cache, until dropped.
pub fn lock() -> Result<Flock<File>> {
    lock_by("lock")
}

/// The same for a part of the cache that has a lock of its own, because filling it takes long.
pub fn lock_by(name: &str) -> Result<Flock<File>> {
    let path = cache()?.join(name);
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).context("locking the lab's cache")
}

/// The trees of this Xen; downloads what the cache lacks. The caller holds the lock.
pub fn trees(version: XenVersion) -> Result<Trees> {
    let base = base_suite(version)?;
    let mut xen = version.packages().to_vec();
    let mut roots = Vec::new();
    if base == version.suite() {
        xen.extend(BASE);
    } else {
        roots.push(tree(&format!("base-{base}"), &base, &BASE)?);
    }
    roots.push(tree(&format!("xen-{}", version.name()), version.suite(), &xen)?);
    Ok(Trees { version, roots })
}

impl Trees {
    /// The same with the device model of HVM guests, in a tree of its own: only labs with such guests need it.
    pub fn with_device_model(mut self) -> Result<Self> {
        let suite = self.version.suite();
        self.roots.push(tree(&format!("device-model-{suite}"), suite, &DEVICE_MODEL)?);
        Ok(self)
    }

    /// The same with udev, of the release that the base userland is from.
    pub fn with_udev(mut self) -> Result<Self> {
        let suite = base_suite(self.version)?;
        self.roots.push(tree(&format!("udev-{suite}"), &suite, &UDEV)?);
        Ok(self)
    }
}

fn base_suite(version: XenVersion) -> Result<String> {
    const ORDER: [&str; 2] = ["bookworm", "trixie"];
    // For trying, on one host, what another host would do.
    let host = std::env::var("XPCI_LAB_BASE").or_else(|_| host_release())?;
    let rank = |name: &str| ORDER.iter().position(|s| *s == name);
    let host = rank(&host).with_context(|| format!("the lab knows the hosts {ORDER:?}, not {host}"))?;
    let own = rank(version.suite()).context("unknown suite")?;
    Ok(ORDER[host.max(own)].to_owned())
}

/// One unpacked set of packages. Complete or absent: it is made beside and renamed, with its recipe as a mark.
fn tree(name: &str, suite: &str, roots: &[&str]) -> Result<PathBuf> {
    let cache = cache()?;
    let path = cache.join(format!("tree-{name}"));
    let recipe = format!("{RECIPE} {suite} {}\n", roots.join(" "));
    let mark = path.join(".recipe");
    if fs::read_to_string(&mark).is_ok_and(|found| found.starts_with(&recipe)) {
        return Ok(path);
    }
    println!("lab: downloading {} packages of {suite} and what they need", roots.len());
    let apt = Apt::open(&cache.join("apt"), suite).with_context(|| {
        format!("the packages for the lab ({suite}) cannot be had from this machine's apt mirror")
    })?;
    let mut packages = apt.resolve(roots)?;
    packages.retain(|p| roots.contains(&p.name.as_str()) || is_wanted(&p.name));
    packages.sort();
    let work = tempfile::Builder::new().prefix("unpack-").tempdir_in(&cache)?;
    let (debs, new) = (work.path().join("debs"), work.path().join("tree"));
    fs::create_dir_all(&debs)?;
    apt.download(&packages, &debs)?;
    for entry in fs::read_dir(&debs)? {
        run(Command::new("dpkg").arg("-x").arg(entry?.path()).arg(&new))?;
    }
    let versions: String = packages.iter().map(|p| format!("{} {}\n", p.name, p.version)).collect();
    fs::write(new.join(".recipe"), format!("{recipe}{versions}"))?;
    if path.exists() {
        fs::rename(&path, work.path().join("old"))?;
    }
    fs::rename(&new, &path)?;
    Ok(path)
}

/// Libraries and the kernel; the rest of what apt would install (python, systemd, perl) has no place in the lab.
fn is_wanted(name: &str) -> bool {
    let wanted = name.starts_with("lib")
        || name.starts_with("zlib")
        || name.starts_with("linux-image-")
        || name == "xen-utils-common";
    wanted && !name.starts_with("libpython") && !name.starts_with("libsystemd-shared")
}

impl Trees {
    /// What identifies these trees: recipes and package versions.
    pub fn key(&self) -> Result<String> {
        self.roots.iter().map(|r| Ok(fs::read_to_string(r.join(".recipe"))?)).collect()
    }

    /// The file at this path in the first tree that has it; both spellings of merged folders are tried.
    pub fn find(&self, path: &str) -> Result<PathBuf> {
        let path = path.trim_start_matches('/');
        let other = path.strip_prefix("usr/").map_or_else(|| format!("usr/{path}"), str::to_owned);
        let mut candidates = self.roots.iter().flat_map(|root| [root.join(path), root.join(&other)]);
        candidates
            .find(|p| p.symlink_metadata().is_ok())
            .with_context(|| format!("no package of the Xen {} lab has /{path}", self.version.name()))
    }

    /// A shared library by the name that programs ask for, with links followed inside its tree.
    pub fn library(&self, name: &str) -> Result<PathBuf> {
        let found = ["lib/x86_64-linux-gnu", "lib64", "lib"]
            .iter()
            .find_map(|d| self.find(&format!("{d}/{name}")).ok());
        let path =
            found.with_context(|| format!("no package of the Xen {} lab has {name}", self.version.name()))?;
        path.canonicalize().with_context(|| format!("following {}", path.display()))
    }

    /// The hypervisor, ready for a multiboot loader.
    pub fn hypervisor(&self) -> Result<Vec<u8>> {
        let path = self.find(&format!("boot/xen-{}-amd64.gz", self.version.name()))?;
        let mut xen = Vec::new();
        flate2::read::GzDecoder::new(File::open(&path)?)
            .read_to_end(&mut xen)
            .with_context(|| format!("unpacking {}", path.display()))?;
        Ok(xen)
    }

    /// The release of the kernel for dom0 and guests, `6.1.0-50-amd64`.
    pub fn kernel_release(&self) -> Result<String> {
        let modules = self.find("lib/modules")?;
        let mut entries =
            fs::read_dir(&modules)?.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
        let release = entries.next().context("no kernel in the packages")?;
        ensure!(entries.next().is_none(), "several kernels in {}", modules.display());
        Ok(release)
    }
}

/// Runs a program of the host and insists on success.
pub fn run(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .output()
        .with_context(|| format!("starting {:?} (try `make deps`)", command.get_program()))?;
    if !output.status.success() {
        bail!("{command:?} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

/// Whether `a` is at least as new as every file in `others`.
pub fn is_newer(a: &Path, others: &[PathBuf]) -> bool {
    let time = |p: &Path| p.metadata().and_then(|m| m.modified()).ok();
    let Some(mine) = time(a) else { return false };
    others.iter().all(|o| time(o).is_some_and(|t| t <= mine))
}
