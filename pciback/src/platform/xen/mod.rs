//! The real hypervisor, xenstore and guests, through Xen's own libraries.
//!
//! Together with [`linux`](super::linux) this is the platform of a dom0. The libraries are loaded by [`open`], never
//! linked, so that one binary serves several versions of Xen and starts where there is none.
#![expect(
    unsafe_code,
    reason = "every call into Xen's C libraries is unsafe; nothing outside this folder makes one"
)]

mod bindings;
mod device_models;
mod hvm;
mod hypervisor;
mod ioreq;
mod messages;
mod msix;
mod physdev;
mod qmp;
mod rings;
mod store;

#[cfg(fuzzing)]
pub use device_models::converse;

use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use super::linux::attributes::{parse_decimal, read_text};
use super::linux::{LinuxErrors, LinuxHost, LinuxMachine, LinuxVfNetwork};
use super::{Cause, Platform, PlatformError, Result};

/// The sysfs of every ordinary host.
const SYSFS: &str = "/sys";
/// How the program finds itself again, for writes that may block.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// Opens the host this program runs on, which must be a dom0.
///
/// The program's `main` must begin with [`run_if_child`](super::linux::blocking::run_if_child).
pub fn open() -> Result<Platform> {
    let version = Version::read(Path::new(SYSFS))?;
    check_dom0(Path::new("/proc"), Path::new("/dev"))?;
    check_kind(Path::new(SYSFS))?;
    let libraries = bindings::Libraries::load((version.major, version.minor))?;
    let host = Arc::new(LinuxHost::new(SYSFS.into()).with_child(OWN_PROGRAM.into()));
    Ok(Platform {
        hypervisor: Arc::new(hypervisor::XenHypervisor::open(&libraries, Arc::clone(&host) as _)?),
        host,
        store: Arc::new(store::XenStoreConnection::open(&libraries)?),
        rings: Arc::new(rings::XenRings::new(&libraries)),
        hvm: Arc::new(hvm::XenHvmDomains::open(&libraries)?),
        device_models: Arc::new(device_models::QemuDeviceModels::default()),
        network: Arc::new(LinuxVfNetwork::new(SYSFS.into())),
        errors: Arc::new(LinuxErrors::new(SYSFS.into())),
        machine: Arc::new(LinuxMachine::new("/".into())),
        description: format!("Xen {}.{}{}", version.major, version.minor, version.extra),
    })
}

fn unavailable(why: &str) -> PlatformError {
    PlatformError::new("open", "the Xen host", Cause::Unavailable(why.to_owned()))
}

fn not_yet(why: &str) -> PlatformError {
    PlatformError::new("open", "the Xen host", Cause::NotYet(why.to_owned()))
}

/// The running Xen, as the kernel shows it.
#[derive(Debug, PartialEq, Eq)]
struct Version {
    major: u32,
    minor: u32,
    /// What follows, for example `.6`.
    extra: String,
}

impl Version {
    fn read(sysfs: &Path) -> Result<Self> {
        let directory = sysfs.join("hypervisor");
        let kind = read_text(&directory.join("type")).ok().flatten();
        if kind.as_deref() != Some("xen") {
            return Err(unavailable(
                "this machine does not run under Xen; boot it with Xen (Debian: package xen-system-amd64), or use \
                 --platform sim:FILE",
            ));
        }
        let number = |name: &str| {
            let path = directory.join("version").join(name);
            let error = |cause| PlatformError::new("read Xen's version from", path.display(), cause);
            let text = read_text(&path).map_err(error)?.ok_or_else(|| error(Cause::Missing))?;
            parse_decimal(&text).map_err(error)
        };
        let extra = read_text(&directory.join("version/extra")).ok().flatten();
        Ok(Self { major: number("major")?, minor: number("minor")?, extra: extra.unwrap_or_default() })
    }
}

fn check_dom0(proc: &Path, dev: &Path) -> Result<()> {
    match fs::read_to_string(proc.join("xen/capabilities")) {
        Ok(capabilities) if capabilities.contains("control_d") => {}
        Ok(_) => return Err(unavailable("this is a guest of Xen, not dom0; run xpcid in dom0")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(not_yet(
                "/proc/xen is not mounted, so this may be no dom0; in dom0: modprobe xenfs; mount -t xenfs xenfs \
                 /proc/xen",
            ));
        }
        Err(error) => {
            return Err(unavailable(&format!(
                "whether this is dom0 is unknown: read /proc/xen/capabilities: {error}"
            )));
        }
    }
    for (node, module) in [("privcmd", "xen-privcmd"), ("gntdev", "xen-gntdev"), ("evtchn", "xen-evtchn")] {
        if !dev.join("xen").join(node).exists() {
            return Err(not_yet(&format!("/dev/xen/{node} is missing; load its driver: modprobe {module}")));
        }
    }
    Ok(())
}

/// The kernel says since Linux 4.13 as what it runs; an older one is no PVH dom0.
fn check_kind(sysfs: &Path) -> Result<()> {
    match read_text(&sysfs.join("hypervisor/guest_type")).ok().flatten().as_deref() {
        Some("PVH") => Err(unavailable(
            "dom0 is a PVH domain, to which Xen refuses calls that giving a function to a guest takes; remove dom0=pvh \
             from Xen's command line and boot again",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pvh_dom0_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("hypervisor");
        fs::create_dir(&directory).unwrap();
        assert!(check_kind(root.path()).is_ok(), "of an old kernel");
        fs::write(directory.join("guest_type"), "PV\n").unwrap();
        assert!(check_kind(root.path()).is_ok());
        fs::write(directory.join("guest_type"), "PVH\n").unwrap();
        let error = check_kind(root.path()).unwrap_err().to_string();
        assert!(error.contains("dom0=pvh"), "{error}");
    }

    #[test]
    fn a_machine_without_xen_is_told_so() {
        let root = tempfile::tempdir().unwrap();
        let error = Version::read(root.path()).unwrap_err().to_string();
        assert!(error.contains("does not run under Xen"), "{error}");
        assert!(error.contains("--platform sim:FILE"), "{error}");
    }

    #[test]
    fn the_version_is_read_from_sysfs() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("hypervisor");
        fs::create_dir_all(directory.join("version")).unwrap();
        for (name, text) in [
            ("type", "xen\n"),
            ("version/major", "4\n"),
            ("version/minor", "17\n"),
            ("version/extra", ".6\n"),
        ] {
            fs::write(directory.join(name), text).unwrap();
        }
        let expected = Version { major: 4, minor: 17, extra: ".6".into() };
        assert_eq!(Version::read(root.path()).unwrap(), expected);
        fs::write(directory.join("version/minor"), "x\n").unwrap();
        assert!(Version::read(root.path()).unwrap_err().to_string().contains("malformed"));
    }

    #[test]
    fn a_guest_a_missing_mount_an_unreadable_file_and_a_missing_driver_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let check = || check_dom0(root.path(), root.path()).unwrap_err().to_string();
        assert!(check().contains("mount -t xenfs"), "{}", check());
        fs::create_dir(root.path().join("xen")).unwrap();
        // It can be read as little as a file that the kernel denies.
        fs::create_dir(root.path().join("xen/capabilities")).unwrap();
        assert!(check().contains("capabilities: Is a directory"), "{}", check());
        fs::remove_dir(root.path().join("xen/capabilities")).unwrap();
        fs::write(root.path().join("xen/capabilities"), "").unwrap();
        assert!(check().contains("guest of Xen"), "{}", check());
        fs::write(root.path().join("xen/capabilities"), "control_d\n").unwrap();
        assert!(check().contains("modprobe xen-privcmd"), "{}", check());
    }
}
