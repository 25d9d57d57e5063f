//! The machine: a real Debian, the packages to install, and a disk that nothing needs.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use xpci_tests::packages::run;
use xpci_tests::scenes::Machine;
use xpci_tests::{Builder, Devices, Lab, XenVersion, built, scratch, workspace};

/// An NVMe controller with a file system on its disk.
pub const DISK: &str = "0000:02:00.0";
/// The version of the package that the other one is upgraded to.
pub const NEWER: &str = "99.0";

/// The Debian release of the host, whose libraries the package fits.
pub static REAL_DOM0: Machine = Machine { name: "real-dom0", builder, clean: |_| Ok(()), end: None };
/// Debian 13, whatever release the package was built on.
pub static DEBIAN_13: Machine =
    Machine { name: "debian-13", builder: debian_13, clean: |_| Ok(()), end: None };

fn builder() -> Result<Builder> {
    let disk = scratch("real-dom0.disk")?;
    fs::File::create(&disk)?.set_len(32 << 20)?;
    run(Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&disk))?;
    let file = disk.to_str().context("a path that is no text")?;
    let devices = Devices::none()
        .igb("igb0")
        .arg("-blockdev", format!("file,node-name=disk-file,filename={file}"))
        .device("nvme,id=disk,serial=disk,drive=disk-file");
    let (package, newer) = packages()?;
    Ok(Lab::builder()
        .xen(XenVersion::of_the_host()?)
        .debian()
        .devices(devices)
        .install(package, "/lab/xpci.deb")
        .install(newer, "/lab/xpci-newer.deb"))
}

fn debian_13() -> Result<Builder> {
    let (package, _) = packages()?;
    let devices = Devices::none().igb("igb0");
    Ok(Lab::builder().xen(XenVersion::V4_20).debian().devices(devices).install(package, "/lab/xpci.deb"))
}

/// The Debian package of the programs beside this one, and the same under a newer version.
fn packages() -> Result<(std::path::PathBuf, std::path::PathBuf)> {
    let (service, _) = (built("xpcid")?, built("xpci")?);
    let folder = scratch("real-dom0.packages")?;
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    // Unpacking is what takes time under emulation.
    let quick = ("DPKG_DEB_COMPRESSOR_TYPE", "gzip");
    let programs = service.parent().context("a program without a folder")?;
    let mut command = Command::new(workspace().join("packaging/deb.sh"));
    run(command.env(quick.0, quick.1).arg(programs).arg(&folder))?;
    let made = fs::read_dir(&folder)?.next().context("packaging/deb.sh made no package")??.path();
    let (tree, newer) = (folder.join("newer"), folder.join("newer.deb"));
    run(Command::new("dpkg-deb").arg("-R").arg(&made).arg(&tree))?;
    let control = tree.join("DEBIAN/control");
    let lines = fs::read_to_string(&control)?;
    let lines = lines.lines().map(|line| {
        if line.starts_with("Version: ") { format!("Version: {NEWER}\n") } else { format!("{line}\n") }
    });
    fs::write(&control, lines.collect::<String>())?;
    let mut command = Command::new("dpkg-deb");
    run(command.env(quick.0, quick.1).args(["--root-owner-group", "-b"]).arg(&tree).arg(&newer))?;
    Ok((made, newer))
}
