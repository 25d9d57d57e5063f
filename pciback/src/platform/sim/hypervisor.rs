//! The hypercalls of the simulated host.

use std::fmt::Display;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use super::Simulation;
use super::failures::{Failures, Subject};
use super::locked;
use super::world::World;
use crate::platform::hypervisor::{DeviceReport, ResetReach};
use crate::platform::{DomainInfo, Edit, Hypervisor, MsiSource, Pirq, PlatformError, Result};
use crate::policy::RdmPolicy;
use crate::{DomId, Sbdf};

pub(super) struct SimHypervisor {
    world: Arc<Mutex<World>>,
    /// All of it: a domain that ends leaves traces everywhere.
    simulation: Simulation,
    failures: Failures,
}

impl SimHypervisor {
    pub fn new(simulation: &Simulation, failures: &Failures) -> Self {
        let world = Arc::clone(&simulation.world);
        Self { world, simulation: simulation.clone(), failures: failures.clone() }
    }

    /// Runs one hypercall, unless it shall fail.
    fn call<'a, T>(
        &self,
        (operation, action): (&str, &'static str),
        subject: impl Into<Subject<'a>>,
        text: impl Display,
        body: impl FnOnce(&mut World) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        let failed = self.failures.check(operation, subject.into());
        let answer =
            failed.and_then(|()| Ok(self.failures.fuse.change(|| body(&mut locked(&self.world)))?));
        answer.map_err(|cause| PlatformError::new(action, text, cause))
    }
}

fn both<'a>(domain: DomId, address: Sbdf) -> Subject<'a> {
    Subject { domain: Some(domain), ..Subject::from(address) }
}

impl Hypervisor for SimHypervisor {
    fn version(&self) -> (u32, u32) {
        locked(&self.world).xen.version
    }

    fn device_known(&self, address: Sbdf) -> Result<bool> {
        self.call(("device_known", "look up"), address, format!("{address} in Xen"), |world| {
            Ok(world.xen.devices.contains_key(&address))
        })
    }

    fn device_add(&self, address: Sbdf, report: DeviceReport) -> Result<()> {
        self.call(("device_add", "report"), address, format!("{address} to Xen"), |world| {
            world.report(address, report.physical_function)
        })
    }

    fn device_remove(&self, address: Sbdf) -> Result<()> {
        self.call(("device_remove", "withdraw"), address, format!("{address} from Xen"), |world| {
            world.xen.remove(address)
        })
    }

    fn assign(&self, domain: DomId, address: Sbdf, rdm: RdmPolicy) -> Result<()> {
        let text = format!("{address} to domain {domain}");
        self.call(("assign", "assign"), both(domain, address), text, |world| {
            world.xen.assign(domain, address, rdm)
        })
    }

    fn deassign(&self, domain: DomId, address: Sbdf) -> Result<()> {
        let text = format!("{address} from domain {domain}");
        self.call(("deassign", "deassign"), both(domain, address), text, |world| {
            world.xen.deassign(domain, address)
        })
    }

    fn assignable(&self, address: Sbdf) -> Result<bool> {
        self.call(("assignable", "test the assignment of"), address, address, |world| {
            Ok(world.xen.assignable(address))
        })
    }

    fn prepare_msix(&self, address: Sbdf) -> Result<bool> {
        self.call(("prepare_msix", "prepare the MSI-X table of"), address, address, |world| {
            let memory = world.decodes_memory(address);
            world.xen.prepare_msix(address, memory)
        })
    }

    fn release_msix(&self, address: Sbdf) -> Result<()> {
        self.call(("release_msix", "release the MSI-X table of"), address, address, |world| {
            world.xen.release_msix(address)
        })
    }

    fn restore_msi(&self, address: Sbdf) -> Result<()> {
        self.call(("restore_msi", "restore the interrupts of"), address, address, |world| {
            world.restore_msi(address)
        })
    }

    fn note_reset(&self, address: Sbdf, reach: ResetReach) -> Result<bool> {
        self.call(("note_reset", "tell Xen of the reset of"), address, address, |world| {
            world.xen.note_reset(address, reach)
        })
    }

    fn iomem_permission(&self, domain: DomId, first: u64, frames: u64, edit: Edit) -> Result<()> {
        let text = format!("domain {domain} the {frames} page frames from {first:#x} on");
        self.call(("iomem_permission", edit.verb("allow", "forbid")), domain, text, |world| {
            world.xen.frames(domain, first, frames, edit)
        })
    }

    fn ioport_permission(&self, domain: DomId, first: u32, count: u32, edit: Edit) -> Result<()> {
        let text = format!("domain {domain} the {count} I/O ports from {first:#x} on");
        self.call(("ioport_permission", edit.verb("allow", "forbid")), domain, text, |world| {
            world.xen.ports(domain, first, count, edit)
        })
    }

    fn map_msi(&self, domain: DomId, address: Sbdf, source: MsiSource) -> Result<Pirq> {
        let text = format!("{source} of {address} to domain {domain}");
        self.call(("map_msi", "map"), both(domain, address), text, |world| {
            let memory = world.decodes_memory(address);
            world.xen.map_msi(domain, address, source, memory).map(Pirq)
        })
    }

    fn map_msi_as(&self, domain: DomId, address: Sbdf, source: MsiSource, pirq: Pirq) -> Result<()> {
        let text = format!("{source} of {address} to interrupt {} of domain {domain}", pirq.0);
        self.call(("map_msi_as", "map"), both(domain, address), text, |world| {
            let memory = world.decodes_memory(address);
            world.xen.map_msi_as(domain, address, source, memory, pirq.0)
        })
    }

    fn map_gsi(&self, domain: DomId, gsi: u32) -> Result<Pirq> {
        self.call(("map_gsi", "map"), domain, format!("interrupt line {gsi} to domain {domain}"), |world| {
            world.xen.map_gsi(domain, gsi).map(Pirq)
        })
    }

    fn unmap_gsi(&self, domain: DomId, gsi: u32, pirq: Pirq) -> Result<()> {
        let text = format!("interrupt line {gsi} from domain {domain}");
        self.call(("unmap_gsi", "unmap"), domain, text, |world| world.xen.unmap_pirq(domain, pirq.0))
    }

    fn unmap_pirq(&self, domain: DomId, pirq: Pirq) -> Result<()> {
        let text = format!("interrupt {} from domain {domain}", pirq.0);
        self.call(("unmap_pirq", "unmap"), domain, text, |world| world.xen.unmap_pirq(domain, pirq.0))
    }

    fn domain(&self, domain: DomId) -> Result<DomainInfo> {
        self.call(("domain", "look at"), domain, format!("domain {domain}"), |world| {
            let found = world.xen.domain(domain)?;
            Ok(DomainInfo {
                uuid: found.uuid,
                paused: found.pauses > 0,
                dying: false,
                suspended: found.suspended,
                has_run: found.has_run,
                shadow_paging: found.shadow_paging,
            })
        })
    }

    fn pause(&self, domain: DomId) -> Result<()> {
        self.call(("pause", "pause"), domain, format!("domain {domain}"), |world| {
            world.xen.domain(domain)?.pauses += 1;
            Ok(())
        })
    }

    fn unpause(&self, domain: DomId) -> Result<()> {
        self.call(("unpause", "unpause"), domain, format!("domain {domain}"), |world| {
            world.xen.unpause(domain)
        })
    }

    fn destroy(&self, domain: DomId) -> Result<()> {
        self.call(("destroy", "destroy"), domain, format!("domain {domain}"), |world| {
            world.xen.domain(domain).map(drop)
        })?;
        self.simulation.destroy(domain);
        Ok(())
    }
}
