//! A simulated host, made of bytes and tables: for trying things without Xen, and for fast tests.
//!
//! It answers as hardware, Linux, Xen and xenstore do, with their error numbers, and knows nothing of what xpci makes of the
//! answers. Every answer is exact and the same each time. `docs/xen-answers.md` says which answers were seen in the lab;
//! `pciback/contracts` asks both.

mod device_models;
mod drivers;
mod errors;
mod events;
mod failures;
mod fuse;
mod guest;
mod hardware;
mod home;
mod host;
mod hvm;
mod hypervisor;
mod kept;
mod machine;
mod model;
mod network;
mod placement;
mod ranges;
mod registers;
mod rings;
mod store;
#[cfg(test)]
mod tests;
mod transaction;
mod tree;
mod world;
mod xen;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::{
    Cause, ErrorEvent, HostEvent, Platform, PlatformError, ResetReach, Result, Use, VfSetting, VfSettings,
};
use crate::fault::{Detection, Fault, Severity};
use crate::{DomId, Sbdf, Uuid};

pub use device_models::SimHotplug;
pub use failures::Failure;
pub use fuse::{Fuse, Moment};
pub use guest::SimGuest;
pub use hvm::{Delivery, SimHvmGuest, SimRequest};
pub use kept::Keeper;
pub use store::SimStore;
pub use xen::{Owner, Vector};

use failures::Failures;
use tree::Tree;
use world::World;

/// A simulated host. Clones are the same host.
#[derive(Clone)]
pub struct Simulation {
    world: Arc<Mutex<World>>,
    tree: Arc<Mutex<Tree>>,
    rings: rings::SimRings,
    hvm: hvm::SimHvmDomains,
    device_models: device_models::SimDeviceModels,
    failures: Failures,
    errors: errors::Kernel,
    /// How dom0 is set up.
    texts: Arc<BTreeMap<String, String>>,
    /// What its description is known by.
    described: u64,
    changes: kept::Changes,
}

/// What Xen still lets a domain do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Grants {
    /// Page frames, as ranges from the first to the one after the last.
    pub frames: Vec<(u64, u64)>,
    /// I/O ports, likewise.
    pub ports: Vec<(u64, u64)>,
    /// Interrupt lines.
    pub lines: Vec<u32>,
    /// Mapped vectors by pirq.
    pub vectors: BTreeMap<u32, Vector>,
}

impl Grants {
    /// Whether nothing remains.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What a simulated kernel, hypervisor or xenstore answers: an error is a number.
type Answer<T> = std::result::Result<T, Errno>;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A test that failed while it held the lock says so itself.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens the host that a YAML file describes, as a platform.
pub fn open(path: &Path) -> Result<(Platform, Simulation)> {
    let simulation = Simulation::open(path)?;
    let platform = simulation.platform(&format!("simulation of {}", path.display()))?;
    Ok((platform, simulation))
}

impl Simulation {
    /// The host that a YAML file describes.
    pub fn open(path: &Path) -> Result<Self> {
        let error = |cause| PlatformError::new("read simulated host", path.display(), cause);
        let text = fs::read_to_string(path).map_err(|why| error(why.into()))?;
        Self::from_yaml(&text).map_err(|why| error(Cause::Malformed(why)))
    }

    /// The host that a YAML text describes; the error says where and why it does not.
    pub fn from_yaml(text: &str) -> std::result::Result<Self, String> {
        let description = model::Description::read(text)?;
        let world = World::new(&description)?;
        let failures = Failures::default();
        let texts = Arc::new(description.texts());
        let mut tree = Tree::new();
        for domain in world.xen.domains.values() {
            tree.introduce(domain);
        }
        for (index, failure) in description.failures.iter().enumerate() {
            let failure =
                Failure::described(failure).map_err(|why| format!("failures, number {index}: {why}"))?;
            failures.add(failure);
        }
        let world = Arc::new(Mutex::new(world));
        Ok(Self {
            hvm: hvm::SimHvmDomains::new(&world, &failures),
            device_models: device_models::SimDeviceModels::new(&world, &failures),
            world,
            tree: Arc::new(Mutex::new(tree)),
            rings: rings::SimRings::new(&failures),
            failures,
            errors: errors::Kernel::default(),
            texts,
            described: kept::identify(text),
            changes: kept::Changes::default(),
        })
    }

    /// This host as a platform, with a connection to its xenstore.
    pub fn platform(&self, description: &str) -> Result<Platform> {
        let fuse = Fuse::default();
        let changes = self.changes.clone();
        fuse.on_change(move || changes.note());
        self.platform_over(description, self.failures.of_a_run(&fuse, false))
    }

    /// The same, for a service that dies when the fuse says so and meets failures at random.
    pub fn platform_with(&self, description: &str, fuse: &Fuse) -> Result<Platform> {
        self.platform_over(description, self.failures.of_a_run(fuse, true))
    }

    fn platform_over(&self, description: &str, failures: Failures) -> Result<Platform> {
        Ok(Platform {
            host: Arc::new(host::SimHost::new(&self.world, &failures)),
            hypervisor: Arc::new(hypervisor::SimHypervisor::new(self, &failures)),
            store: Arc::new(SimStore::connect(&self.tree, DomId::DOM0, &failures)?),
            rings: Arc::new(self.rings.of_a_run(&failures)),
            hvm: Arc::new(self.hvm.of_a_run(&failures)),
            device_models: Arc::new(self.device_models.of_a_run(&failures)),
            network: Arc::new(network::SimVfNetwork::new(&self.world, &failures)),
            errors: Arc::new(errors::SimErrors::new(&self.errors, &failures)),
            machine: Arc::new(machine::SimMachine { texts: self.texts.as_ref().clone(), failures }),
            description: description.to_owned(),
        })
    }

    /// A connection to xenstore, with the rights of a domain.
    pub fn store(&self, domain: DomId) -> Result<SimStore> {
        SimStore::connect(&self.tree, domain, &self.failures)
    }

    /// The guest's side of things.
    pub fn guest(&self, domain: DomId) -> Result<SimGuest> {
        Ok(SimGuest::new(domain, self.store(domain)?, self.rings.clone()))
    }

    /// The side of an HVM guest.
    pub fn hvm_guest(&self, domain: DomId) -> SimHvmGuest {
        self.hvm.guest(domain)
    }

    /// The ACPI hotplug controller of an HVM guest.
    pub fn hotplug(&self, domain: DomId) -> SimHotplug {
        self.device_models.guest(domain)
    }

    /// A domain is made, as `xl create` does. `EEXIST`: there is one with this number.
    pub fn create(&self, domain: DomId, name: &str, passthrough: bool) -> std::result::Result<(), Errno> {
        self.introduce(domain, name, "pv", None, passthrough)
    }

    /// An HVM guest is made, paused, as `xl create -p` does.
    pub fn create_hvm(&self, domain: DomId, name: &str) -> std::result::Result<(), Errno> {
        self.introduce(domain, name, "hvm", None, true)?;
        self.start_device_model(domain);
        Ok(())
    }

    /// A guest that is known by its UUID is made, with passthrough. An HVM guest is paused and has no device model yet, as when
    /// libxl introduces it to xenstore.
    pub fn create_guest(
        &self,
        domain: DomId,
        name: &str,
        kind: &str,
        uuid: Uuid,
    ) -> std::result::Result<(), Errno> {
        self.introduce(domain, name, kind, Some(uuid), true)
    }

    /// A guest's device model runs, as it says itself in xenstore.
    pub fn start_device_model(&self, domain: DomId) {
        locked(&self.tree).put_text(&format!("/local/domain/0/device-model/{domain}/state"), "running");
    }

    fn introduce(
        &self,
        domain: DomId,
        name: &str,
        kind: &str,
        uuid: Option<Uuid>,
        passthrough: bool,
    ) -> std::result::Result<(), Errno> {
        let text = model::Domain {
            id: domain.0,
            name: name.to_owned(),
            uuid,
            kind: kind.to_owned(),
            passthrough,
            shadow_paging: false,
            without_acpi: false,
            paused: false,
        };
        let mut world = locked(&self.world);
        if domain == DomId::DOM0 || world.xen.domains.contains_key(&domain) {
            return Err(Errno::EEXIST);
        }
        let mut made = xen::Domain::from(&text);
        if kind == "hvm" {
            (made.pauses, made.has_run) = (1, false);
        }
        locked(&self.tree).introduce(&made);
        world.xen.domains.insert(domain, made);
        Ok(())
    }

    /// Ends a domain: Xen takes its functions, xl its nodes, and watchers get events.
    pub fn destroy(&self, domain: DomId) {
        locked(&self.world).xen.destroy(domain);
        self.rings.drop_domain(domain);
        self.hvm.drop_domain(domain);
        self.device_models.drop_domain(domain);
        locked(&self.tree).release(domain);
    }

    /// A domain stops to be saved, and watchers get the event of a domain that shuts down. `ESRCH`: there is none.
    pub fn suspend_domain(&self, domain: DomId) -> std::result::Result<(), Errno> {
        locked(&self.world).xen.domain(domain)?.suspended = true;
        locked(&self.tree).domain_stopped();
        Ok(())
    }

    /// The toolstack lets a suspended domain run on, of which xenstore sends no event. `ESRCH`: there is none.
    pub fn resume_domain(&self, domain: DomId) -> std::result::Result<(), Errno> {
        locked(&self.world).xen.domain(domain)?.suspended = false;
        Ok(())
    }

    /// Whether a domain exists, and whether it is paused.
    pub fn is_paused(&self, domain: DomId) -> Option<bool> {
        self.pauses(domain).map(|pauses| pauses > 0)
    }

    /// How often a domain is paused; `None`: there is none.
    pub fn pauses(&self, domain: DomId) -> Option<u32> {
        locked(&self.world).xen.domains.get(&domain).map(|domain| domain.pauses)
    }

    /// The toolstack takes its pause back. `EINVAL`: it is not paused.
    pub fn unpause(&self, domain: DomId) -> std::result::Result<(), Errno> {
        locked(&self.world).xen.unpause(domain)
    }

    /// A function reports an error: the kernel counts it and sends an event.
    pub fn report_error(&self, address: Sbdf, severity: Severity, status: u32) {
        self.miss_error(address, severity);
        self.trace_error(address, severity, status);
    }

    /// The kernel sends an event for an error that it counts at another time, or not at all.
    pub fn trace_error(&self, address: Sbdf, severity: Severity, status: u32) {
        let fault = Fault { address, severity, status, detection: Detection::Event, count: 1 };
        self.errors.tell(ErrorEvent::Error(fault));
    }

    /// A function reports an error that the kernel counts but that gets lost on its way to those who listen.
    pub fn miss_error(&self, address: Sbdf, severity: Severity) {
        self.errors.count(address, severity, 1);
    }

    /// The platform keeps AER from the kernel, or grants it.
    pub fn withhold_aer(&self, withheld: bool) {
        self.errors.withhold(withheld);
    }

    /// Puts a function into its slot; `yaml` describes it as an entry of `functions` does.
    pub fn plug(&self, yaml: &str) -> std::result::Result<(), String> {
        let function = serde_saphyr::from_str(yaml).map_err(|error| error.to_string())?;
        locked(&self.world).plug(&function)
    }

    /// Pulls a function out of its slot, a PF with its VFs.
    pub fn unplug(&self, address: Sbdf) {
        locked(&self.world).remove_function(address);
    }

    /// Makes a function answer all ones, or answer again: dead, but still listed.
    pub fn silence(&self, address: Sbdf, silent: bool) {
        if let Some(function) = locked(&self.world).functions.get_mut(&address) {
            function.silent = silent;
        }
    }

    /// Makes resets of a function have no effect, though the kernel reports success.
    pub fn ignore_resets(&self, address: Sbdf, ignored: bool) {
        if let Some(function) = locked(&self.world).functions.get_mut(&address) {
            function.unreset = ignored;
        }
    }

    /// Whether dom0's kernel reports added and removed functions to Xen.
    pub fn report_to_xen(&self, reporting: bool) {
        locked(&self.world).reporting = reporting;
    }

    /// Does something whose events get lost, as they do when they are not taken for long: subscribers only get [`HostEvent::Lost`].
    pub fn while_events_are_lost(&self, action: impl FnOnce()) {
        locked(&self.world).listeners.muted = true;
        action();
        let listeners = &mut locked(&self.world).listeners;
        listeners.muted = false;
        listeners.tell(HostEvent::Lost);
    }

    /// Makes an operation fail or take long.
    pub fn fail(&self, failure: Failure) {
        self.failures.add(failure);
    }

    /// How many calls shall still fail.
    pub fn pending_failures(&self) -> u32 {
        self.failures.pending()
    }

    /// One in so many calls of each service's fails with `EIO`, as the seed has it: see [`Self::platform_with`].
    pub fn fail_at_random(&self, seed: u64, one_in: u64) {
        self.failures.at_random(seed, one_in);
    }

    /// Ends that, and returns how many calls failed.
    pub fn end_random_failures(&self) -> u64 {
        self.failures.end_random()
    }

    /// Nothing fails from now on.
    pub fn forget_failures(&self) {
        self.failures.clear();
    }

    /// Who owns a function, as Xen's debug key Q shows it; `None` where Xen does not know it.
    pub fn owner(&self, address: Sbdf) -> Option<Owner> {
        locked(&self.world).xen.devices.get(&address).map(|device| device.owner)
    }

    /// All functions that Xen knows, with their owners.
    pub fn owners(&self) -> BTreeMap<Sbdf, Owner> {
        let world = locked(&self.world);
        world.xen.devices.iter().map(|(address, device)| (*address, device.owner)).collect()
    }

    /// Whether a function's MSI-X table is prepared for a guest.
    pub fn msix_prepared(&self, address: Sbdf) -> bool {
        locked(&self.world).xen.devices.get(&address).is_some_and(|device| device.used_entries > 0)
    }

    /// What Xen still lets a domain do.
    pub fn grants(&self, domain: DomId) -> Grants {
        let world = locked(&self.world);
        world.xen.domains.get(&domain).map_or_else(Grants::default, |domain| Grants {
            frames: domain.frames.iter().collect(),
            ports: domain.ports.iter().collect(),
            lines: domain.lines.iter().copied().collect(),
            vectors: domain.vectors.clone(),
        })
    }

    /// The resets that Xen was told of, in order.
    pub fn noted_resets(&self) -> Vec<(Sbdf, ResetReach)> {
        locked(&self.world).xen.resets.clone()
    }

    /// How many interrupts of the host were mapped to numbers that had one: they cannot be unmapped any more.
    pub fn lost_interrupts(&self) -> u32 {
        locked(&self.world).xen.lost
    }

    /// How many pages of a domain are mapped by its backend.
    pub fn connected_rings(&self, domain: DomId) -> usize {
        self.rings.connected(domain)
    }

    /// What the PF's driver keeps for a VF.
    pub fn vf_network(&self, vf: Sbdf) -> Option<VfSettings> {
        locked(&self.world).functions.get(&vf).map(|function| function.network)
    }

    /// The PF's driver takes something over that the guest's driver asked it for, for example another MAC address.
    pub fn guest_sets(&self, vf: Sbdf, setting: VfSetting) {
        if let Some(function) = locked(&self.world).functions.get_mut(&vf) {
            function.network.take(setting);
        }
    }

    /// What uses a function from now on, while it is bound to its own driver.
    pub fn set_uses(&self, address: Sbdf, uses: Vec<Use>) {
        if let Some(function) = locked(&self.world).functions.get_mut(&address) {
            function.uses = uses;
        }
    }

    /// What the kernel reads from a function's expansion ROM from now on.
    pub fn set_rom(&self, address: Sbdf, contents: Vec<u8>) {
        if let Some(function) = locked(&self.world).functions.get_mut(&address) {
            function.rom = contents;
        }
    }

    /// Flags of a function's expansion ROM that Linux shows from now on, beside those that it has.
    pub fn mark_rom(&self, address: Sbdf, flags: u64) {
        if let Some(function) = locked(&self.world).functions.get_mut(&address) {
            function.resources[6].flags |= flags;
        }
    }

    /// Bytes of a function's config space as hardware has them, without any access.
    pub fn peek(&self, address: Sbdf, offset: u16, length: u16) -> Vec<u8> {
        let world = locked(&self.world);
        let Some(function) = world.functions.get(&address) else { return vec![0xff; usize::from(length)] };
        (offset..offset + length).map(|at| function.registers.peek(at)).collect()
    }

    /// Sets bytes of a function's config space as hardware does, for example status bits.
    pub fn poke(&self, address: Sbdf, offset: u16, bytes: &[u8]) {
        if let Some(function) = locked(&self.world).functions.get_mut(&address) {
            function.registers.poke(offset, bytes);
        }
    }
}
