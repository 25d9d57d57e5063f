//! Xen's answers.

use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use super::fuse::Fuse;
use super::locked;
use super::world::{EXTRA_PIRQS, LINES, Owner, SimDomain, Vector, World, XenDevice};
use crate::platform::hypervisor::DeviceReport;
use crate::platform::{Hypervisor, MsiSource, Pirq, PlatformError, Result};
use crate::{DomId, Sbdf};

pub(super) struct SimHypervisor {
    world: Arc<Mutex<World>>,
    fuse: Fuse,
}

type Answer<T> = std::result::Result<T, Errno>;

impl SimHypervisor {
    pub fn new(world: &Arc<Mutex<World>>, fuse: &Fuse) -> Self {
        Self { world: Arc::clone(world), fuse: fuse.clone() }
    }

    /// Runs one hypercall, unless it shall fail.
    fn call<T>(
        &self,
        action: &'static str,
        operation: &str,
        address: Option<Sbdf>,
        subject: impl std::fmt::Display,
        body: impl FnOnce(&mut World) -> Answer<T>,
    ) -> Result<T> {
        let answer = self.fuse.change(|| {
            let mut world = locked(&self.world);
            world.injected(operation, address).and_then(|()| body(&mut world))
        });
        answer.map_err(|errno| PlatformError::new(action, subject, errno))
    }
}

fn device(world: &mut World, address: Sbdf) -> Answer<&mut XenDevice> {
    world.functions.get_mut(&address).and_then(|function| function.xen.as_mut()).ok_or(Errno::ENODEV)
}

fn domain(world: &mut World, id: DomId) -> Answer<&mut SimDomain> {
    world.domains.get_mut(&id).ok_or(Errno::ESRCH)
}

fn owner_of(id: DomId) -> Owner {
    if id == DomId::IO { Owner::Quarantine } else { Owner::Guest(id) }
}

impl Hypervisor for SimHypervisor {
    fn version(&self) -> (u32, u32) {
        locked(&self.world).version
    }

    fn device_known(&self, address: Sbdf) -> Result<bool> {
        self.call("look up", "device_known", Some(address), address, |world| {
            Ok(device(world, address).is_ok())
        })
    }

    fn device_add(&self, address: Sbdf, report: DeviceReport) -> Result<()> {
        self.call("report to Xen", "device_add", Some(address), address, |world| {
            if let Some(pf) = report.physical_function {
                device(world, pf)?;
            }
            let function = world.functions.get_mut(&address).ok_or(Errno::ENODEV)?;
            function.xen.get_or_insert(XenDevice { owner: Owner::Host, msix_prepared: false });
            Ok(())
        })
    }

    fn device_remove(&self, address: Sbdf) -> Result<()> {
        self.call("withdraw from Xen", "device_remove", Some(address), address, |world| {
            device(world, address)?;
            let vfs =
                world.functions.values().any(|vf| vf.physical_function == Some(address) && vf.xen.is_some());
            if vfs {
                return Err(Errno::EBUSY);
            }
            if let Some(function) = world.functions.get_mut(&address) {
                function.xen = None;
            }
            Ok(())
        })
    }

    fn assign(&self, id: DomId, address: Sbdf) -> Result<()> {
        self.call("assign", "assign", Some(address), format!("{address} to domain {id}"), |world| {
            if id != DomId::IO {
                let domain = domain(world, id)?;
                if !domain.passthrough {
                    return Err(Errno::EOPNOTSUPP);
                }
            }
            let device = device(world, address)?;
            match device.owner {
                owner if owner == owner_of(id) && id == DomId::IO => Ok(()),
                Owner::Host | Owner::Quarantine => {
                    device.owner = owner_of(id);
                    Ok(())
                }
                Owner::Guest(_) => Err(Errno::EBUSY),
            }
        })
    }

    fn deassign(&self, id: DomId, address: Sbdf) -> Result<()> {
        self.call("deassign", "deassign", Some(address), format!("{address} from domain {id}"), |world| {
            if id != DomId::IO {
                domain(world, id)?;
            }
            let device = device(world, address)?;
            if device.owner != owner_of(id) {
                return Err(Errno::ENODEV);
            }
            device.owner = if id == DomId::IO { Owner::Host } else { Owner::Quarantine };
            Ok(())
        })
    }

    fn assignable(&self, address: Sbdf) -> Result<bool> {
        self.call("ask for", "assignable", Some(address), address, |world| {
            Ok(device(world, address).is_ok_and(|device| !matches!(device.owner, Owner::Guest(_))))
        })
    }

    fn prepare_msix(&self, address: Sbdf) -> Result<bool> {
        self.call("prepare MSI-X of", "prepare_msix", Some(address), address, |world| {
            let device = device(world, address)?;
            let before = std::mem::replace(&mut device.msix_prepared, true);
            Ok(!before)
        })
    }

    fn release_msix(&self, address: Sbdf) -> Result<()> {
        self.call("release MSI-X of", "release_msix", Some(address), address, |world| {
            let mapped = world
                .domains
                .values()
                .any(|domain| domain.vectors.values().any(|vector| vector.address == address));
            let device = device(world, address)?;
            if mapped || !device.msix_prepared {
                return Err(Errno::EBUSY);
            }
            device.msix_prepared = false;
            Ok(())
        })
    }

    fn restore_msi(&self, address: Sbdf) -> Result<()> {
        self.call("restore MSI of", "restore_msi", Some(address), address, |world| {
            device(world, address).map(drop)
        })
    }

    fn iomem_permission(&self, id: DomId, first: u64, frames: u64, allow: bool) -> Result<()> {
        self.call("change the memory of domain", "iomem_permission", None, id, |world| {
            let domain = domain(world, id)?;
            for frame in first..first + frames {
                if allow {
                    domain.frames.insert(frame)
                } else {
                    domain.frames.remove(&frame)
                };
            }
            Ok(())
        })
    }

    fn ioport_permission(&self, id: DomId, first: u32, count: u32, allow: bool) -> Result<()> {
        self.call("change the ports of domain", "ioport_permission", None, id, |world| {
            if count == 0 || first + count > 0x1_0000 {
                return Err(Errno::EINVAL);
            }
            let domain = domain(world, id)?;
            for port in first..first + count {
                if allow {
                    domain.ports.insert(port)
                } else {
                    domain.ports.remove(&port)
                };
            }
            Ok(())
        })
    }

    fn map_msi(&self, id: DomId, address: Sbdf, source: MsiSource) -> Result<Pirq> {
        self.call("map an interrupt of", "map_msi", Some(address), address, |world| {
            world.check_source(address, source)?;
            let domain = domain(world, id)?;
            let pirq = (LINES..LINES + EXTRA_PIRQS).rev().find(|pirq| !domain.vectors.contains_key(pirq));
            let pirq = pirq.ok_or(Errno::ENOSPC)?;
            let entry = match source {
                MsiSource::Msi => None,
                MsiSource::MsiX { entry, .. } => Some(entry),
            };
            domain.vectors.insert(pirq, Vector { address, entry });
            Ok(Pirq(pirq))
        })
    }

    fn map_gsi(&self, id: DomId, gsi: u32) -> Result<Pirq> {
        self.call("map an interrupt line for domain", "map_gsi", None, id, |world| {
            if gsi >= LINES {
                return Err(Errno::EINVAL);
            }
            domain(world, id)?.lines.insert(gsi);
            Ok(Pirq(gsi))
        })
    }

    fn unmap_gsi(&self, id: DomId, gsi: u32, _pirq: Pirq) -> Result<()> {
        self.call("unmap an interrupt line of domain", "unmap_gsi", None, id, |world| {
            let removed = domain(world, id)?.lines.remove(&gsi);
            removed.then_some(()).ok_or(Errno::EINVAL)
        })
    }

    fn unmap_pirq(&self, id: DomId, pirq: Pirq) -> Result<()> {
        self.call("unmap an interrupt of domain", "unmap_pirq", None, id, |world| {
            let removed = domain(world, id)?.vectors.remove(&pirq.0);
            removed.map(drop).ok_or(Errno::EINVAL)
        })
    }
}
