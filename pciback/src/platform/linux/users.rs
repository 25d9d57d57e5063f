//! Who in dom0 uses a function through its driver: what sysfs and procfs know of its block devices, network interfaces and
//! device files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{major, minor};

use super::attributes::{is_absent, link_name, names, parse_hex, read_text};
use crate::platform::{Cause, Use};
use crate::{DomId, Sbdf};

/// More bytes of mounts than any host has.
const LONGEST: u64 = 16 << 20;
/// `IFF_UP`.
const UP: u64 = 1;

type Result<T> = std::result::Result<T, Cause>;

/// Where to look for the users of one function.
pub struct Users<'a> {
    /// sysfs.
    pub root: &'a Path,
    /// procfs.
    pub processes: &'a Path,
    /// The function's own directory.
    pub directory: &'a Path,
    /// The function.
    pub address: Sbdf,
    /// Whether a block device, by its name below `/dev`, is opened exclusively.
    pub is_claimed: &'a dyn Fn(&str) -> Result<bool>,
}

impl Users<'_> {
    /// All of them. The function is bound to this driver.
    pub fn find(&self, driver: Option<&str>) -> Result<Vec<Use>> {
        let mut uses = self.of_block_devices()?;
        uses.extend(self.of_interfaces()?);
        uses.extend(self.of_device_files(driver)?);
        Ok(uses)
    }

    /// The members of a class whose devices have one of these names on their path, as symbolic links of the class show it.
    fn below(&self, class: &str, owners: &BTreeSet<String>) -> Result<Vec<(String, PathBuf)>> {
        let class = self.root.join("class").join(class);
        let mut members = Vec::new();
        for name in names(&class)?.unwrap_or_default() {
            let path = class.join(&name);
            // A file among them is no member, and a member that disappears in between is not in use.
            let Ok(target) = fs::read_link(&path) else { continue };
            if target.iter().filter_map(|part| part.to_str()).any(|part| owners.contains(part)) {
                members.push((name, path));
            }
        }
        Ok(members)
    }

    /// The function, and the NVMe namespaces that it is one of the paths to: they do not lie below it.
    fn owners(&self) -> Result<BTreeSet<String>> {
        let mut owners = BTreeSet::from([self.address.to_string()]);
        let controllers = self.directory.join("nvme");
        for controller in names(&controllers)?.unwrap_or_default() {
            let paths = names(&controllers.join(controller))?.unwrap_or_default();
            owners.extend(paths.iter().filter_map(|path| shared_namespace(path)));
        }
        Ok(owners)
    }

    fn of_block_devices(&self) -> Result<Vec<Use>> {
        let devices = self.below("block", &self.owners()?)?;
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        let (mut uses, mut numbers) = (Vec::new(), BTreeMap::new());
        for (name, path) in &devices {
            let device = device_file(name);
            if let Some(number) = read_text(&path.join("dev"))? {
                numbers.insert(number, device.clone());
            }
            for holder in names(&path.join("holders"))?.unwrap_or_default() {
                let known_as = read_text(&self.root.join("class/block").join(&holder).join("dm/name"))?;
                let holder = known_as.map_or_else(|| holder.clone(), |name| format!("{holder} ({name})"));
                uses.push(Use::Holder { device: device.clone(), holder });
            }
        }
        let files: BTreeSet<&String> = numbers.values().collect();
        for line in read_long(&self.processes.join("self/mountinfo"))?.lines() {
            let Some((number, at, source)) = mount(line) else { continue };
            // A file system with several devices has a number of its own, and names one of them as its source.
            let device = numbers.get(number).or_else(|| files.get(&source).copied());
            uses.extend(device.map(|device| Use::Mount { device: device.clone(), at }));
        }
        for line in read_long(&self.processes.join("swaps"))?.lines().skip(1) {
            let path = unescaped(line.split_ascii_whitespace().next().unwrap_or_default());
            uses.extend(files.get(&path).map(|device| Use::Swap { device: (*device).clone() }));
        }
        uses.extend(self.disks(&numbers)?);
        let claimed = self.claimed(&devices, &uses)?;
        uses.extend(claimed);
        Ok(uses)
    }

    /// Block devices whose users only the kernel knows. A disk is claimed, too, when one of its partitions is.
    fn claimed(&self, devices: &[(String, PathBuf)], uses: &[Use]) -> Result<Vec<Use>> {
        let is_named = |name: &str| uses.iter().any(|known| known.block_device() == Some(&device_file(name)));
        let mut claimed = BTreeSet::new();
        for (name, path) in devices {
            // The paths of a shared NVMe namespace have no device file.
            if path.join("dev").exists() && (self.is_claimed)(&name.replace('!', "/"))? {
                claimed.insert(name);
            }
        }
        let explains = |(partition, _): &&(String, PathBuf), disk: &Path| {
            disk.join(partition).exists() && (claimed.contains(partition) || is_named(partition))
        };
        let unexplained = devices.iter().filter(|(name, path)| {
            claimed.contains(name) && !is_named(name) && !devices.iter().any(|other| explains(&other, path))
        });
        Ok(unexplained.map(|(name, _)| Use::Claimed { device: device_file(name) }).collect())
    }

    /// Guests' disks that xen-blkback serves.
    fn disks(&self, numbers: &BTreeMap<String, String>) -> Result<Vec<Use>> {
        let backends = self.root.join("bus/xen-backend/devices");
        let mut uses = Vec::new();
        for name in names(&backends)?.unwrap_or_default() {
            let domain = name.strip_prefix("vbd-").and_then(|rest| rest.split('-').next()?.parse().ok());
            let (Some(domain), Some(text)) =
                (domain, read_text(&backends.join(&name).join("physical_device"))?)
            else {
                continue;
            };
            // Hexadecimal here, decimal in the device's own attribute.
            let number = text.split_once(':').and_then(|(major, minor)| {
                let [major, minor] = [major, minor].map(|part| u32::from_str_radix(part, 16).ok());
                Some(format!("{}:{}", major?, minor?))
            });
            let device = number.and_then(|number| numbers.get(&number));
            uses.extend(device.map(|device| Use::Disk { device: device.clone(), domain: DomId(domain) }));
        }
        Ok(uses)
    }

    fn of_interfaces(&self) -> Result<Vec<Use>> {
        let mut uses = Vec::new();
        for (name, path) in self.below("net", &BTreeSet::from([self.address.to_string()]))? {
            let flags = read_text(&path.join("flags"))?;
            let flags = flags.map(|text| parse_hex(&text, u32::MAX.into())).transpose()?.unwrap_or(0);
            let (up, master) = (flags & UP != 0, link_name(&path.join("master"))?);
            if up || master.is_some() {
                uses.push(Use::Interface { name, up, master });
            }
        }
        Ok(uses)
    }

    /// The device files of the function, by kind and number.
    fn device_files(&self) -> Result<BTreeMap<(bool, String), PathBuf>> {
        let owners = self.owners()?;
        let mut files = BTreeMap::new();
        for (block, class) in [(true, "block"), (false, "char")] {
            let class = self.root.join("dev").join(class);
            for number in names(&class)?.unwrap_or_default() {
                let path = class.join(&number);
                let Ok(target) = fs::read_link(&path) else { continue };
                if !target.iter().filter_map(|part| part.to_str()).any(|part| owners.contains(part)) {
                    continue;
                }
                let about = read_text(&path.join("uevent"))?.unwrap_or_default();
                let name = about.lines().find_map(|line| line.strip_prefix("DEVNAME="));
                files.extend(name.map(|name| ((block, number), Path::new("/dev").join(name))));
            }
        }
        Ok(files)
    }

    /// Processes that have one of its device files open, or its group of vfio.
    fn of_device_files(&self, driver: Option<&str>) -> Result<Vec<Use>> {
        let numbers = self.device_files()?;
        let mut files: BTreeSet<PathBuf> = numbers.values().cloned().collect();
        if driver == Some("vfio-pci")
            && let Some(group) = link_name(&self.directory.join("iommu_group"))?
        {
            files.insert(Path::new("/dev/vfio").join(group));
        }
        if files.is_empty() {
            return Ok(Vec::new());
        }
        let mut uses = Vec::new();
        for process in names(self.processes)?.unwrap_or_default() {
            let Ok(pid) = process.parse() else { continue };
            let directory = self.processes.join(&process);
            // Processes end while they are looked at.
            let Ok(Some(descriptors)) = names(&directory.join("fd")) else { continue };
            let open: BTreeSet<PathBuf> = descriptors
                .iter()
                .filter_map(|descriptor| opened(&directory.join("fd").join(descriptor), &numbers))
                .collect();
            for file in files.iter().filter(|file| open.contains(*file)) {
                let name = read_text(&directory.join("comm")).ok().flatten().unwrap_or_default();
                uses.push(Use::Process { device: file.display().to_string(), pid, name });
            }
        }
        Ok(uses)
    }
}

/// The device file that a descriptor of a process leads to. In a container it can have another name, but not another number.
fn opened(descriptor: &Path, numbers: &BTreeMap<(bool, String), PathBuf>) -> Option<PathBuf> {
    let target = fs::read_link(descriptor).ok()?;
    // Of files elsewhere not even the kind is asked: a file system whose server is gone never answers.
    if !target.to_string_lossy().contains("/dev/") {
        return None;
    }
    let known = fs::metadata(descriptor).ok().and_then(|file| {
        let (block, number) = (file.file_type().is_block_device(), file.rdev());
        let is_device = block || file.file_type().is_char_device();
        let key = (block, format!("{}:{}", major(number), minor(number)));
        numbers.get(&key).filter(|_| is_device).cloned()
    });
    Some(known.unwrap_or(target))
}

/// Whether a block device is opened exclusively, as file systems, volume managers and mkfs do. One without a file or a medium is not.
pub(super) fn is_claimed(path: &Path) -> Result<bool> {
    let flags = (OFlag::O_EXCL | OFlag::O_NONBLOCK).bits();
    let Err(error) = OpenOptions::new().read(true).custom_flags(flags).open(path) else { return Ok(false) };
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBUSY) => Ok(true),
        Some(Errno::ENOENT | Errno::ENXIO | Errno::ENODEV | Errno::ENOMEDIUM) => Ok(false),
        _ => Err(error.into()),
    }
}

/// The namespace that a path of it leads to: `nvme0n1` for `nvme0c1n1`, its path through the controller with number 1.
fn shared_namespace(path: &str) -> Option<String> {
    let (subsystem, rest) = path.strip_prefix("nvme")?.split_once('c')?;
    let (controller, namespace) = rest.split_once('n')?;
    let numbers = [subsystem, controller, namespace];
    let plain = |text: &&str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    numbers.iter().all(plain).then(|| format!("nvme{subsystem}n{namespace}"))
}

/// sysfs writes `!` for a `/` in the name of a block device.
fn device_file(name: &str) -> String {
    format!("/dev/{}", name.replace('!', "/"))
}

/// Device number, place and source of a line of `mountinfo`.
fn mount(line: &str) -> Option<(&str, String, String)> {
    let (mounted, kind) = line.split_once(" - ")?;
    let mut fields = mounted.split(' ').skip(2);
    let (number, at) = (fields.next()?, fields.nth(1)?);
    Some((number, unescaped(at), unescaped(kind.split(' ').nth(1)?)))
}

/// Blanks and the like are written as `\040`.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits =
            after.get(..3).filter(|digits| first == b'\\' && digits.iter().all(|d| (b'0'..b'8').contains(d)));
        let code =
            digits.map(|digits| digits.iter().fold(0, |code: u32, digit| code * 8 + u32::from(digit - b'0')));
        match code.and_then(|code| u8::try_from(code).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A file of procfs; empty where there is none.
pub(super) fn read_long(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    match File::open(path).and_then(|file| file.take(LONGEST).read_to_end(&mut bytes)) {
        Ok(_) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if is_absent(&error) => Ok(String::new()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
