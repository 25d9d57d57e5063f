//! Linux's answers: sysfs and drivers.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::errno::Errno;

use super::fuse::Fuse;
use super::locked;
use super::world::{SimFunction, World};
use crate::Sbdf;
use crate::config::{Access, ConfigSpace};
use crate::platform::{Host, HostFunction, PlatformError, Result};

pub(super) struct SimHost {
    world: Arc<Mutex<World>>,
    fuse: Fuse,
}

type Answer<T> = std::result::Result<T, Errno>;

impl SimHost {
    pub fn new(world: &Arc<Mutex<World>>, fuse: &Fuse) -> Self {
        Self { world: Arc::clone(world), fuse: fuse.clone() }
    }

    fn change<T>(
        &self,
        action: &'static str,
        operation: &str,
        address: Sbdf,
        body: impl FnOnce(&mut World) -> Answer<T>,
    ) -> Result<T> {
        self.fuse.change(|| self.call(action, operation, address, body))
    }

    fn call<T>(
        &self,
        action: &'static str,
        operation: &str,
        address: Sbdf,
        body: impl FnOnce(&mut World) -> Answer<T>,
    ) -> Result<T> {
        self.fuse.look();
        let mut world = locked(&self.world);
        let answer = world.injected(operation, Some(address)).and_then(|()| body(&mut world));
        // sysfs answers ENOENT where there is no such device, which the platform calls missing.
        answer
            .map_err(|errno| PlatformError::new(action, address, io::Error::from_raw_os_error(errno as i32)))
    }
}

fn function(world: &mut World, address: Sbdf) -> Answer<&mut SimFunction> {
    world.functions.get_mut(&address).ok_or(Errno::ENOENT)
}

impl World {
    fn describe(&self, address: Sbdf) -> Option<HostFunction> {
        let function = self.functions.get(&address)?;
        let model = self.models.get(&function.model)?;
        let word =
            |at: u16| u16::from_le_bytes([function.registers.peek(at), function.registers.peek(at + 1)]);
        let id = model.id.as_deref().and_then(|id| {
            let (vendor, device) = id.split_once(':')?;
            Some((u16::from_str_radix(vendor, 16).ok()?, u16::from_str_radix(device, 16).ok()?))
        });
        let (vendor, device) = id.unwrap_or((word(0), word(2)));
        Some(HostFunction {
            address,
            vendor,
            device,
            subsystem_vendor: word(0x2c),
            subsystem: word(0x2e),
            class: u32::from(word(0x0a)) << 8 | u32::from(function.registers.peek(9)),
            revision: function.registers.peek(8),
            resources: function.resources,
            driver: function.driver.clone(),
            driver_override: function.driver_override.clone(),
            irq: function.irq,
            physical_function: function.physical_function,
            virtual_functions: function.virtual_functions.clone(),
            total_vfs: model.sriov.as_ref().map_or(0, |sriov| sriov.total),
            num_vfs: function.virtual_functions.len() as u16,
            numa_node: None,
            reset_methods: model.reset_methods.clone(),
            interfaces: Vec::new(),
        })
    }

    /// The driver that a probe ends with.
    fn matching(&self, address: Sbdf) -> Option<String> {
        let function = self.functions.get(&address)?;
        let wanted = match &function.driver_override {
            Some(driver) => Some(driver.clone()),
            None => self.models.get(&function.model)?.driver.clone(),
        };
        wanted.filter(|driver| self.drivers.contains(driver))
    }
}

impl Host for SimHost {
    fn functions(&self) -> Result<Vec<Sbdf>> {
        Ok(locked(&self.world).functions.keys().copied().collect())
    }

    fn function(&self, address: Sbdf) -> Result<HostFunction> {
        self.call("look at", "function", address, |world| world.describe(address).ok_or(Errno::ENOENT))
    }

    fn config(&self, address: Sbdf) -> Result<Box<dyn ConfigSpace>> {
        self.call("open config space of", "config", address, |world| {
            function(world, address)?;
            let space = SimConfig { world: Arc::clone(&self.world), fuse: self.fuse.clone(), address };
            Ok(Box::new(space) as Box<dyn ConfigSpace>)
        })
    }

    fn drivers(&self) -> Result<Vec<String>> {
        Ok(locked(&self.world).drivers.clone())
    }

    fn set_driver_override(&self, address: Sbdf, driver: Option<&str>) -> Result<()> {
        self.change("set driver_override of", "set_driver_override", address, |world| {
            function(world, address)?.driver_override = driver.map(str::to_owned);
            Ok(())
        })
    }

    fn unbind(&self, address: Sbdf, _limit: Duration) -> Result<()> {
        self.change("unbind", "unbind", address, |world| {
            function(world, address)?.driver = None;
            Ok(())
        })
    }

    fn probe(&self, address: Sbdf, _limit: Duration) -> Result<()> {
        self.change("probe", "probe", address, |world| {
            let driver = world.matching(address);
            let function = function(world, address)?;
            if function.driver.is_none() {
                function.driver = driver;
            }
            Ok(())
        })
    }

    fn reset(&self, address: Sbdf, _limit: Duration) -> Result<()> {
        self.change("reset", "reset", address, |world| {
            let methods = world.describe(address).ok_or(Errno::ENOENT)?.reset_methods;
            if methods.is_empty() {
                return Err(Errno::ENOENT);
            }
            function(world, address)?.registers.reset();
            Ok(())
        })
    }

    fn set_num_vfs(&self, pf: Sbdf, count: u16, _limit: Duration) -> Result<()> {
        self.change("set the number of VFs of", "set_num_vfs", pf, |world| world.set_num_vfs(pf, count))
    }

    fn set_vf_autoprobe(&self, pf: Sbdf, enabled: bool) -> Result<()> {
        self.change("set sriov_drivers_autoprobe of", "set_vf_autoprobe", pf, |world| {
            function(world, pf)?.vf_autoprobe = enabled;
            Ok(())
        })
    }
}

struct SimConfig {
    world: Arc<Mutex<World>>,
    fuse: Fuse,
    address: Sbdf,
}

impl ConfigSpace for SimConfig {
    fn size(&self) -> u16 {
        locked(&self.world).functions.get(&self.address).map_or(0, |function| function.registers.size())
    }

    fn read(&self, access: Access) -> io::Result<u32> {
        self.fuse.look();
        let mut world = locked(&self.world);
        world.injected("config_read", Some(self.address))?;
        // sysfs lets nobody use a file that was open when its function left (kernfs: ENODEV).
        let function = world.functions.get(&self.address).ok_or(Errno::ENODEV)?;
        Ok(function.registers.read(access))
    }

    fn write(&self, access: Access, value: u32) -> io::Result<()> {
        self.fuse.change(|| {
            let mut world = locked(&self.world);
            world.injected("config_write", Some(self.address))?;
            let function = world.functions.get_mut(&self.address).ok_or(Errno::ENODEV)?;
            function.registers.write(access, value);
            Ok(())
        })
    }
}
