//! Linux's answers: sysfs and drivers.

use std::cmp::Reverse;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::errno::Errno;

use super::failures::{Failures, Subject};
use super::world::World;
use super::{Answer, locked};
use crate::Sbdf;
use crate::config::{Access, ConfigSpace};
use crate::platform::{
    AddressMap, BarMemory, Cause, Host, HostEvents, HostFunction, Names, PlatformError, Resource, Result, Use,
};

pub(super) struct SimHost {
    world: Arc<Mutex<World>>,
    failures: Failures,
}

/// What every simulated host has at its memory addresses and its I/O ports.
const MEMORY: &str = "00001000-3fffffff : System RAM\n";
const PORTS: &str = "0000-001f : dma1\n";
/// The longest name of a driver (`MODULE_NAME_LEN`).
const LONGEST_DRIVER_NAME: usize = 56;

impl SimHost {
    pub fn new(world: &Arc<Mutex<World>>, failures: &Failures) -> Self {
        Self { world: Arc::clone(world), failures: failures.clone() }
    }

    fn call<T>(
        &self,
        (operation, action): (&str, &'static str),
        address: Sbdf,
        limit: Option<Duration>,
        body: impl FnOnce(&mut World) -> Answer<T>,
    ) -> Result<T> {
        let failed = self.failures.check(operation, Subject { limit, ..Subject::from(address) });
        let call = || {
            let mut world = locked(&self.world);
            if !world.functions.contains_key(&address) {
                return Err(Cause::Missing);
            }
            body(&mut world).map_err(|errno| match errno {
                // sysfs answers so where there is no such file, and io::Error calls both the same.
                Errno::ENOENT => Cause::Missing,
                errno => Cause::Os(errno),
            })
        };
        let looks = matches!(operation, "function" | "config" | "ports_above" | "uses");
        let answer = failed.and_then(|()| if looks { call() } else { self.failures.fuse.change(call) });
        answer.map_err(|cause| PlatformError::new(action, address, cause))
    }
}

impl World {
    fn describe(&self, address: Sbdf) -> Option<HostFunction> {
        let function = self.functions.get(&address)?;
        let registers = &function.registers;
        let (vendor, device) = function.ids(&self.functions);
        let own_driver = self.driver_of(address).is_some_and(|kind| !kind.any);
        Some(HostFunction {
            address,
            incarnation: function.incarnation,
            vendor,
            device,
            subsystem_vendor: registers.peek16(0x2c),
            subsystem: registers.peek16(0x2e),
            class: registers.peek32(8) >> 8,
            revision: registers.peek(8),
            resources: function.resources,
            driver: function.driver.clone(),
            driver_override: function.driver_override.clone(),
            irq: function.irq,
            physical_function: function.physical_function,
            virtual_functions: function.virtual_functions.clone(),
            total_vfs: self.total_vfs(address),
            num_vfs: function.virtual_functions.len() as u16,
            numa_node: function.numa_node,
            reset_methods: function.kind.reset_methods.clone(),
            interfaces: if own_driver { function.interfaces.clone() } else { Vec::new() },
        })
    }
}

/// The class of PCI-to-PCI bridges.
const BRIDGE: u32 = 0x0604;
/// Offsets of a bridge's Secondary and Subordinate Bus Number.
const SECONDARY: u16 = 0x19;
const SUBORDINATE: u16 = 0x1a;

impl World {
    fn ports_above(&self, address: Sbdf) -> Vec<Sbdf> {
        let mut ports = Vec::new();
        let mut below = address;
        let leads_there = |port: &Sbdf, below: Sbdf| {
            let registers = &self.functions[port].registers;
            let buses = registers.peek(SECONDARY)..=registers.peek(SUBORDINATE);
            registers.peek32(8) >> 16 == BRIDGE
                && port.segment() == below.segment()
                && port.bus() < below.bus()
                && buses.contains(&below.bus())
        };
        while let Some(port) = self.functions.keys().rev().find(|port| leads_there(port, below)) {
            ports.push(*port);
            below = *port;
        }
        ports
    }

    /// A reset of a bridge's secondary bus.
    pub fn reset_below(&mut self, bridge: Sbdf) {
        let below: Vec<Sbdf> = self
            .functions
            .keys()
            .copied()
            .filter(|address| self.ports_above(*address).contains(&bridge))
            .collect();
        for address in below {
            self.hardware_reset(address);
        }
    }

    /// What `/proc/iomem` or `/proc/ioports` lists of functions, without its indentation: a PF's VF BARs stand before its VFs'.
    fn address_map(&self, is_kind: impl Fn(&Resource) -> bool) -> String {
        let mut ranges = Vec::new();
        for (address, function) in &self.functions {
            for range in function.resources.iter().filter(|range| range.is_placed() && is_kind(range)) {
                ranges.push((range.start, Reverse(range.start + (range.size - 1)), address));
            }
        }
        ranges.sort();
        let lines =
            ranges.iter().map(|(first, Reverse(last), name)| format!("{first:08x}-{last:08x} : {name}\n"));
        lines.collect()
    }

    fn uses(&self, address: Sbdf) -> Vec<Use> {
        let own_driver = self.driver_of(address).is_some_and(|kind| !kind.any);
        let uses = self.functions.get(&address).filter(|_| own_driver).map(|function| function.uses.clone());
        uses.unwrap_or_default()
    }
}

impl Host for SimHost {
    fn events(&self) -> Result<Box<dyn HostEvents>> {
        let subscribed = locked(&self.world).listeners.subscribe();
        let events = subscribed.map_err(|errno| {
            PlatformError::new("subscribe to", "the simulated host's PCI events", Cause::Os(errno))
        })?;
        Ok(Box::new(events))
    }

    fn functions(&self) -> Result<Vec<Sbdf>> {
        let failed = self.failures.check("functions", Subject::default());
        failed.map_err(|cause| PlatformError::new("list the functions of", "the simulated host", cause))?;
        Ok(locked(&self.world).functions.keys().copied().collect())
    }

    fn function(&self, address: Sbdf) -> Result<HostFunction> {
        let described =
            self.call(("function", "read"), address, None, |world| Ok(world.describe(address)))?;
        described.ok_or_else(|| PlatformError::new("read", address, Cause::Missing))
    }

    fn memory_map(&self) -> Result<AddressMap> {
        let what = "the simulated host's map of memory";
        let failed = self.failures.check("memory_map", Subject::default());
        failed.map_err(|cause| PlatformError::new("read", what, cause))?;
        let world = locked(&self.world);
        let functions = world.address_map(|bar| !bar.is_io());
        AddressMap::parse(what, &format!("{MEMORY}{functions}{}", world.memory))
    }

    fn port_map(&self) -> Result<AddressMap> {
        let what = "the simulated host's map of I/O ports";
        let failed = self.failures.check("port_map", Subject::default());
        failed.map_err(|cause| PlatformError::new("read", what, cause))?;
        let world = locked(&self.world);
        let functions = world.address_map(Resource::is_io);
        AddressMap::parse(what, &format!("{PORTS}{functions}{}", world.ports))
    }

    fn names(&self, functions: &[HostFunction]) -> Vec<Names> {
        let world = locked(&self.world);
        let name = |key: String| world.names.get(&key).cloned();
        let of = |function: &HostFunction| Names {
            vendor: name(format!("{:04x}", function.vendor)),
            device: name(format!("{:04x}:{:04x}", function.vendor, function.device)),
            class: name(format!("class {:04x}", function.class >> 8)),
        };
        functions.iter().map(of).collect()
    }

    fn config(&self, address: Sbdf) -> Result<Box<dyn ConfigSpace>> {
        self.call(("config", "open the config space of"), address, None, |world| {
            let size = world.function(address)?.registers.size();
            let (world, failures) = (Arc::clone(&self.world), self.failures.clone());
            Ok(Box::new(SimConfig { world, failures, address, size }) as Box<dyn ConfigSpace>)
        })
    }

    fn bar_memory(&self, address: Sbdf, bar: u8) -> Result<Box<dyn BarMemory>> {
        self.call(("bar_memory", "map the memory of"), address, None, |world| {
            world.function(address)?;
            let size = world.function(address)?.resources.get(usize::from(bar)).map_or(0, |bar| bar.size);
            Ok(Box::new(SimBar { bytes: Mutex::new(vec![0; size as usize]) }) as Box<dyn BarMemory>)
        })
    }

    fn rom(&self, address: Sbdf, most: usize) -> Result<Vec<u8>> {
        self.call(("rom", "read the expansion ROM of"), address, None, |world| {
            let function = world.function(address)?;
            if !function.resources[6].exists() {
                return Err(Errno::ENOENT);
            }
            // The kernel finds no image in one that is erased.
            if function.rom.is_empty() {
                return Err(Errno::EIO);
            }
            Ok(function.rom.iter().copied().take(most).collect())
        })
    }

    fn ports_above(&self, address: Sbdf) -> Result<Vec<Sbdf>> {
        self.call(("ports_above", "find the ports above"), address, None, |world| {
            Ok(world.ports_above(address))
        })
    }

    fn uses(&self, address: Sbdf) -> Result<Vec<Use>> {
        self.call(("uses", "find out who uses"), address, None, |world| Ok(world.uses(address)))
    }

    fn drivers(&self) -> Result<Vec<String>> {
        Ok(locked(&self.world).drivers.clone())
    }

    fn set_driver_override(&self, address: Sbdf, driver: Option<&str>) -> Result<()> {
        let action = "set the driver override of";
        let valid = |name: &str| {
            (1..=LONGEST_DRIVER_NAME).contains(&name.len())
                && name.bytes().all(|byte| byte.is_ascii_graphic())
        };
        if driver.is_some_and(|name| !valid(name)) {
            let cause = Cause::Malformed("not the name of a driver".into());
            return Err(PlatformError::new(action, address, cause));
        }
        self.call(("set_driver_override", action), address, None, |world| {
            world.function(address)?.driver_override = driver.map(str::to_owned);
            Ok(())
        })
    }

    fn forget_slot(&self, address: Sbdf) -> Result<()> {
        // The simulated xen-pciback goes by overrides only.
        self.call(("forget_slot", "make xen-pciback forget the slot of"), address, None, |_| Ok(()))
    }

    fn unbind(&self, address: Sbdf, limit: Duration) -> Result<()> {
        self.call(("unbind", "unbind"), address, Some(limit), |world| {
            world.unbind(address);
            Ok(())
        })
    }

    fn probe(&self, address: Sbdf, limit: Duration) -> Result<()> {
        self.call(("probe", "probe drivers for"), address, Some(limit), |world| {
            world.bind(address);
            Ok(())
        })
    }

    fn reset(&self, address: Sbdf, limit: Duration) -> Result<()> {
        if self.function(address)?.reset_methods.is_empty() {
            let text = "Linux knows no way to reset this function alone";
            return Err(PlatformError::new("reset", address, Cause::Unavailable(text.into())));
        }
        self.call(("reset", "reset"), address, Some(limit), |world| world.reset(address))
    }

    fn set_num_vfs(&self, address: Sbdf, count: u16, limit: Duration) -> Result<()> {
        self.call(("set_num_vfs", "set the number of VFs of"), address, Some(limit), |world| {
            world.set_num_vfs(address, count)
        })
    }

    fn set_vf_autoprobe(&self, address: Sbdf, enabled: bool) -> Result<bool> {
        self.call(("set_vf_autoprobe", "set the automatic probing of the VFs of"), address, None, |world| {
            let pf = world.function(address)?;
            pf.masks().layout.sriov.ok_or(Errno::ENOENT)?;
            Ok(std::mem::replace(&mut pf.vf_autoprobe, enabled))
        })
    }
}

/// The open config space of a function, which may leave while it is open.
struct SimConfig {
    world: Arc<Mutex<World>>,
    failures: Failures,
    address: Sbdf,
    size: u16,
}

impl SimConfig {
    fn check(&self, operation: &str) -> io::Result<()> {
        self.failures.check(operation, self.address.into()).map_err(|cause| match cause {
            Cause::Os(errno) => errno.into(),
            cause => io::Error::other(cause),
        })
    }
}

impl ConfigSpace for SimConfig {
    fn size(&self) -> u16 {
        self.size
    }

    fn read(&self, access: Access) -> io::Result<u32> {
        self.check("config_read")?;
        let world = locked(&self.world);
        Ok(world.config_read(self.address, access))
    }

    fn write(&self, access: Access, value: u32) -> io::Result<()> {
        self.check("config_write")?;
        self.failures.fuse.change(|| locked(&self.world).config_write(self.address, access, value));
        Ok(())
    }

    fn read_vpd(&self, address: u16) -> io::Result<Option<u32>> {
        self.check("vpd_read")?;
        let world = locked(&self.world);
        let function = world.functions.get(&self.address);
        let vpd = function.and_then(|function| function.kind.vpd.as_ref()).ok_or(Errno::ENOENT)?;
        Ok(vpd.get(usize::from(address / 4)).copied())
    }
}

/// The memory of a BAR: bytes that keep what is written, new for each mapping.
struct SimBar {
    bytes: Mutex<Vec<u8>>,
}

impl BarMemory for SimBar {
    fn read(&self, offset: u64, bytes: u8) -> u64 {
        let memory = locked(&self.bytes);
        let at = offset as usize;
        match memory.get(at..at + usize::from(bytes)) {
            Some(found) => found.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)),
            None => u64::MAX,
        }
    }

    fn write(&self, offset: u64, bytes: u8, value: u64) {
        let at = offset as usize;
        if let Some(place) = locked(&self.bytes).get_mut(at..at + usize::from(bytes)) {
            place.copy_from_slice(&value.to_le_bytes()[..usize::from(bytes)]);
        }
    }
}
