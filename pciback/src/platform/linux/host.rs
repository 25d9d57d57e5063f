//! The host's PCI functions, as sysfs shows and takes them.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;

use super::attributes::{
    link_name, names, parse_address, parse_decimal, parse_hex, parse_resources, read_text,
};
use super::blocking::Blocking;
use super::config::SysfsConfig;
use super::events::{PciEvents, Source};
use super::names::names as names_of;
use super::users::{Users, is_claimed, read_long};
use crate::Sbdf;
use crate::config::ConfigSpace;
use crate::platform::memory::Registers;
use crate::platform::{
    AddressMap, BarMemory, Cause, Host, HostEvents, HostFunction, Names, PAGE, PlatformError, Result, Use,
};
use crate::policy::own_resets;

/// How long a write may take that only waits for another change of the same function.
const QUICK: Duration = Duration::from_secs(5);
/// The longest name of a kernel module, and so of a driver (`MODULE_NAME_LEN`).
const LONGEST_DRIVER_NAME: usize = 56;
/// The part of config space that the capabilities with resets stand in, in bytes.
const CAPABILITIES_END: u64 = 256;
/// What the kernel prints where a pointer is null.
const NULL: &str = "(null)";

/// The host's PCI functions through sysfs.
pub struct LinuxHost {
    root: PathBuf,
    processes: PathBuf,
    device_files: PathBuf,
    blocking: Blocking,
    changing: Arc<Mutex<Changing>>,
}

/// Functions that a child process is changing, perhaps longer than anybody waits.
#[derive(Default)]
struct Changing {
    children: HashMap<Sbdf, usize>,
    /// The last `driver_override` seen: reading it waits for the change to end.
    overrides: HashMap<Sbdf, Option<String>>,
}

impl Changing {
    fn begin(&mut self, address: Sbdf) {
        *self.children.entry(address).or_default() += 1;
    }

    fn end(&mut self, address: Sbdf) {
        if let Some(children) = self.children.get_mut(&address) {
            *children -= 1;
            if *children == 0 {
                self.children.remove(&address);
            }
        }
    }
}

impl LinuxHost {
    /// The functions below this sysfs, usually `/sys`. Writes are made in this process until `with_child` is called.
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            processes: PathBuf::from("/proc"),
            device_files: PathBuf::from("/dev"),
            blocking: Blocking::default(),
            changing: Arc::default(),
        }
    }

    /// Makes writes that may block in children which run `program`; its `main` must begin with
    /// [`run_if_child`](super::blocking::run_if_child).
    pub fn with_child(mut self, program: PathBuf) -> Self {
        self.blocking = Blocking::new(Some(program));
        self
    }

    /// Asks this procfs, instead of `/proc`, who uses functions.
    pub fn with_processes(mut self, root: PathBuf) -> Self {
        self.processes = root;
        self
    }

    /// Finds device files here instead of in `/dev`.
    pub fn with_device_files(mut self, root: PathBuf) -> Self {
        self.device_files = root;
        self
    }

    fn devices(&self) -> PathBuf {
        self.root.join("bus/pci/devices")
    }

    fn directory(&self, address: Sbdf) -> PathBuf {
        self.devices().join(address.to_string())
    }

    /// A write in a child, during which attributes that wait for its end are not read.
    fn change(
        &self,
        address: Sbdf,
        path: &Path,
        value: &str,
        limit: Duration,
    ) -> std::result::Result<(), Cause> {
        self.changing().begin(address);
        let changing = Arc::clone(&self.changing);
        let finished = move || changing.lock().unwrap_or_else(PoisonError::into_inner).end(address);
        self.blocking.write(path, value, limit, finished)
    }

    fn address_map(&self, file: &str, what: &'static str) -> Result<AddressMap> {
        let path = self.processes.join(file);
        let text = read_long(&path).map_err(|cause| PlatformError::new("read", path.display(), cause))?;
        AddressMap::parse(what, &text)
    }

    fn changing(&self) -> MutexGuard<'_, Changing> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel shows `driver_override` under the lock that a reset or a probe of the function holds until its end.
    fn driver_override(&self, address: Sbdf, directory: &Path) -> Result<Option<String>> {
        {
            let changing = self.changing();
            if changing.children.contains_key(&address) {
                return Ok(changing.overrides.get(&address).cloned().flatten());
            }
        }
        let text = Attributes { directory, address }.text("driver_override")?;
        let text = text.filter(|text| !text.is_empty() && text != NULL);
        self.changing().overrides.insert(address, text.clone());
        Ok(text)
    }
}

/// The attributes of one function.
struct Attributes<'a> {
    directory: &'a Path,
    address: Sbdf,
}

impl Attributes<'_> {
    fn error(&self, name: &str, cause: Cause) -> PlatformError {
        PlatformError::new("read", format!("{} of {}", name, self.address), cause)
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        read_text(&self.directory.join(name)).map_err(|cause| self.error(name, cause))
    }

    /// An attribute that every function has; without it the function has just left.
    fn required<T>(&self, name: &str, parse: impl Fn(&str) -> std::result::Result<T, Cause>) -> Result<T> {
        let text = self.text(name)?.ok_or_else(|| self.error(name, Cause::Missing))?;
        parse(&text).map_err(|cause| self.error(name, cause))
    }

    fn optional<T>(
        &self,
        name: &str,
        parse: impl Fn(&str) -> std::result::Result<T, Cause>,
    ) -> Result<Option<T>> {
        self.text(name)?.map(|text| parse(&text).map_err(|cause| self.error(name, cause))).transpose()
    }

    fn hex16(&self, name: &str) -> Result<u16> {
        self.required(name, |text| parse_hex(text, 0xffff).map(|value| value as u16))
    }

    fn link(&self, name: &str) -> Result<Option<String>> {
        link_name(&self.directory.join(name)).map_err(|cause| self.error(name, cause))
    }

    fn linked_address(&self, name: &str) -> Result<Option<Sbdf>> {
        let name_of = self.link(name)?;
        name_of.map(|text| parse_address(&text).map_err(|cause| self.error(name, cause))).transpose()
    }

    fn names(&self, path: &Path) -> Result<Vec<String>> {
        names(path)
            .map(Option::unwrap_or_default)
            .map_err(|cause| PlatformError::new("list", path.display(), cause))
    }

    /// The VFs in order. The kernel sets the links without the lock under which `sriov_numvfs` is shown.
    fn virtual_functions(&self, total: u16) -> Result<Vec<Sbdf>> {
        let mut functions = Vec::new();
        for index in 0..total {
            match self.linked_address(&format!("virtfn{index}"))? {
                Some(address) => functions.push(address),
                None => break,
            }
        }
        Ok(functions)
    }

    /// The ways to reset it, in the order in which the kernel tries them. Before Linux 5.15 it does not name them, but has the file
    /// `reset` for a function that it can reset: then by the function's own means, or else by its bus.
    fn reset_methods(&self) -> Result<Vec<String>> {
        if let Some(methods) = self.text("reset_method")? {
            return Ok(methods.split_ascii_whitespace().map(str::to_owned).collect());
        }
        if !self.directory.join("reset").exists() {
            return Ok(Vec::new());
        }
        let mut bytes = Vec::new();
        File::open(self.directory.join("config"))
            .and_then(|file| file.take(CAPABILITIES_END).read_to_end(&mut bytes))
            .map_err(|error| missing("read the config space of", self.address)(error.into()))?;
        let own = own_resets(&bytes);
        Ok(if own.is_empty() { vec!["bus".to_owned()] } else { own.into_iter().map(str::to_owned).collect() })
    }

    /// Network interfaces, also those that hang on the function's virtio device.
    fn interfaces(&self) -> Result<Vec<String>> {
        let mut interfaces = self.names(&self.directory.join("net"))?;
        for name in self.names(self.directory)? {
            if name.starts_with("virtio") {
                interfaces.extend(self.names(&self.directory.join(name).join("net"))?);
            }
        }
        Ok(interfaces)
    }
}

/// Turns what only says that a file is missing into "the function is missing".
fn missing(action: &'static str, address: Sbdf) -> impl Fn(Cause) -> PlatformError {
    move |cause| match cause {
        Cause::Os(Errno::ENODEV | Errno::ENXIO) => PlatformError::new(action, address, Cause::Missing),
        cause => PlatformError::new(action, address, cause),
    }
}

impl Host for LinuxHost {
    fn events(&self) -> Result<Box<dyn HostEvents>> {
        Ok(Box::new(PciEvents::open(Source::Kernel)?))
    }

    fn functions(&self) -> Result<Vec<Sbdf>> {
        let path = self.devices();
        let names = names(&path)
            .and_then(|names| names.ok_or(Cause::Missing))
            .map_err(|cause| PlatformError::new("list the functions in", path.display(), cause))?;
        // A segment above ffff (Intel VMD) has a name that is no address: Xen cannot assign such a function.
        let mut functions: Vec<Sbdf> = names.iter().filter_map(|name| name.parse().ok()).collect();
        functions.sort_unstable();
        Ok(functions)
    }

    fn function(&self, address: Sbdf) -> Result<HostFunction> {
        let directory = self.directory(address);
        // The inode of the directory is the kernel's own serial number of the device object.
        let Ok(metadata) = fs::metadata(&directory) else {
            return Err(PlatformError::new("read", address, Cause::Missing));
        };
        let attributes = Attributes { directory: &directory, address };
        let total_vfs = attributes.optional("sriov_totalvfs", parse_decimal)?.unwrap_or(0);
        let virtual_functions = attributes.virtual_functions(total_vfs)?;
        let node: Option<i32> = attributes.optional("numa_node", parse_decimal)?;
        Ok(HostFunction {
            address,
            incarnation: metadata.ino(),
            vendor: attributes.hex16("vendor")?,
            device: attributes.hex16("device")?,
            subsystem_vendor: attributes.hex16("subsystem_vendor")?,
            subsystem: attributes.hex16("subsystem_device")?,
            class: attributes.required("class", |text| parse_hex(text, 0xff_ffff))? as u32,
            revision: attributes.required("revision", |text| parse_hex(text, 0xff))? as u8,
            resources: attributes.required("resource", parse_resources)?,
            driver: attributes.link("driver")?,
            driver_override: self.driver_override(address, &directory)?,
            irq: attributes.optional("irq", parse_decimal)?.unwrap_or(0),
            physical_function: attributes.linked_address("physfn")?,
            total_vfs,
            num_vfs: virtual_functions.len() as u16,
            virtual_functions,
            numa_node: node.and_then(|node| u32::try_from(node).ok()),
            reset_methods: attributes.reset_methods()?,
            interfaces: attributes.interfaces()?,
        })
    }

    fn memory_map(&self) -> Result<AddressMap> {
        self.address_map("iomem", "the kernel's map of memory")
    }

    fn port_map(&self) -> Result<AddressMap> {
        self.address_map("ioports", "the kernel's map of I/O ports")
    }

    fn names(&self, functions: &[HostFunction]) -> Vec<Names> {
        names_of(functions)
    }

    fn config(&self, address: Sbdf) -> Result<Box<dyn ConfigSpace>> {
        match SysfsConfig::open(&self.directory(address).join("config")) {
            Ok(config) => Ok(Box::new(config)),
            Err(error) => Err(missing("open the config space of", address)(error.into())),
        }
    }

    fn bar_memory(&self, address: Sbdf, bar: u8) -> Result<Box<dyn BarMemory>> {
        let directory = self.directory(address);
        let resources =
            Attributes { directory: &directory, address }.required("resource", parse_resources)?;
        let start = resources.get(usize::from(bar)).map_or(0, |resource| resource.start);
        let map = || {
            let path = directory.join(format!("resource{bar}"));
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            // The file's length is the BAR's, but what the kernel maps begins where the BAR's page does.
            Registers::map_file(&file, start % PAGE, file.metadata()?.len())
        };
        match map() {
            Ok(registers) => Ok(Box::new(registers)),
            Err(error) => {
                Err(PlatformError::new("map the memory of", format!("{address}, BAR {bar}"), error))
            }
        }
    }

    fn rom(&self, address: Sbdf, most: usize) -> Result<Vec<u8>> {
        let path = self.directory(address).join("rom");
        let read = || {
            let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
            // Without that the kernel answers EINVAL; it decodes the ROM during each read only. Both words count at the beginning.
            file.write_at(b"1", 0)?;
            let mut contents = Vec::new();
            let read = file.by_ref().take(most as u64).read_to_end(&mut contents);
            file.write_at(b"0\n", 0)?;
            read.map(|_| contents)
        };
        read().map_err(|error| missing("read the expansion ROM of", address)(error.into()))
    }

    fn ports_above(&self, address: Sbdf) -> Result<Vec<Sbdf>> {
        let path = fs::canonicalize(self.directory(address))
            .map_err(|error| missing("find the ports above", address)(error.into()))?;
        let names = path.parent().into_iter().flat_map(Path::iter).rev();
        Ok(names.map_while(|name| name.to_str()?.parse().ok()).collect())
    }

    fn uses(&self, address: Sbdf) -> Result<Vec<Use>> {
        let directory = self.directory(address);
        let driver = Attributes { directory: &directory, address }.link("driver")?;
        if driver.is_none() {
            let there = directory.exists().then(Vec::new);
            return there.ok_or_else(|| PlatformError::new("find out who uses", address, Cause::Missing));
        }
        let is_claimed = |name: &str| is_claimed(&self.device_files.join(name));
        let (root, processes, directory) = (&self.root, &self.processes, &directory);
        Users { root, processes, directory, address, is_claimed: &is_claimed }
            .find(driver.as_deref())
            .map_err(|cause| PlatformError::new("find out who uses", address, cause))
    }

    fn drivers(&self) -> Result<Vec<String>> {
        let path = self.root.join("bus/pci/drivers");
        names(&path)
            .and_then(|names| names.ok_or(Cause::Missing))
            .map_err(|cause| PlatformError::new("list the drivers in", path.display(), cause))
    }

    fn set_driver_override(&self, address: Sbdf, driver: Option<&str>) -> Result<()> {
        let error = missing("set the driver override of", address);
        let valid = |name: &str| {
            (1..=LONGEST_DRIVER_NAME).contains(&name.len())
                && name.bytes().all(|byte| byte.is_ascii_graphic())
        };
        if driver.is_some_and(|name| !valid(name) || name == NULL) {
            return Err(error(Cause::Malformed("not the name of a driver".into())));
        }
        let path = self.directory(address).join("driver_override");
        // An empty line clears it.
        let value = format!("{}\n", driver.unwrap_or_default());
        self.change(address, &path, &value, QUICK).map_err(error)?;
        self.changing().overrides.insert(address, driver.map(str::to_owned));
        Ok(())
    }

    fn forget_slot(&self, address: Sbdf) -> Result<()> {
        let path = self.root.join("bus/pci/drivers/pciback/remove_slot");
        match self.change(address, &path, &address.to_string(), QUICK) {
            // Not loaded, or it does not know the address.
            Ok(()) | Err(Cause::Missing) => Ok(()),
            Err(cause) => Err(PlatformError::new("make xen-pciback forget the slot of", address, cause)),
        }
    }

    fn unbind(&self, address: Sbdf, limit: Duration) -> Result<()> {
        let directory = self.directory(address);
        if !directory.exists() {
            return Err(PlatformError::new("unbind", address, Cause::Missing));
        }
        let path = directory.join("driver/unbind");
        if !path.exists() {
            return Ok(());
        }
        match self.change(address, &path, &address.to_string(), limit) {
            // It has lost its driver in between.
            Ok(()) | Err(Cause::Missing | Cause::Os(Errno::ENODEV)) => Ok(()),
            Err(cause) => Err(PlatformError::new("unbind", address, cause)),
        }
    }

    fn probe(&self, address: Sbdf, limit: Duration) -> Result<()> {
        let path = self.root.join("bus/pci/drivers_probe");
        match self.change(address, &path, &address.to_string(), limit) {
            // The kernel's answer where no driver wants the function: a probe without effect, not a failure.
            Err(Cause::Os(Errno::EINVAL)) if self.directory(address).exists() => Ok(()),
            result => result.map_err(missing("probe drivers for", address)),
        }
    }

    fn reset(&self, address: Sbdf, limit: Duration) -> Result<()> {
        let directory = self.directory(address);
        match self.change(address, &directory.join("reset"), "1", limit) {
            Err(Cause::Missing) if directory.exists() => {
                let text = "Linux knows no way to reset this function alone; choose another function or reset its bus";
                Err(PlatformError::new("reset", address, Cause::Unavailable(text.into())))
            }
            result => result.map_err(|cause| PlatformError::new("reset", address, cause)),
        }
    }

    fn set_num_vfs(&self, physical_function: Sbdf, count: u16, limit: Duration) -> Result<()> {
        let path = self.directory(physical_function).join("sriov_numvfs");
        self.change(physical_function, &path, &count.to_string(), limit)
            .map_err(|cause| PlatformError::new("set the number of VFs of", physical_function, cause))
    }

    fn set_vf_autoprobe(&self, physical_function: Sbdf, enabled: bool) -> Result<bool> {
        let path = self.directory(physical_function).join("sriov_drivers_autoprobe");
        let read = read_text(&path).map_err(|cause| PlatformError::new("read", path.display(), cause))?;
        let before = read.as_deref() != Some("0");
        self.change(physical_function, &path, if enabled { "1" } else { "0" }, QUICK)
            .map_err(missing("set the automatic probing of the VFs of", physical_function))?;
        Ok(before)
    }
}

#[cfg(test)]
mod tests;
