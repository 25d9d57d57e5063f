//! Device models of the simulated host's HVM guests: the devices on the guest's bus, and who is asked to release one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::failures::{Failures, Subject};
use super::locked;
use super::world::World;
use crate::config::{Access, CONVENTIONAL_SIZE};
use crate::platform::{Cause, DeviceModels, PlatformError, Result};
use crate::{Devfn, DeviceNumber, DomId};

/// The functions of every guest's device model, with the first registers of their config space: host bridge, ISA bridge with IDE and power
/// management, Xen's platform device.
const OWN: [(Devfn, u32); 5] = [
    (Devfn(0), 0x1237_8086),
    (Devfn(0x08), 0x7000_8086),
    (Devfn(0x09), 0x7010_8086),
    (Devfn(0x0b), 0x7113_8086),
    (Devfn(0x10), 0x0001_5853),
];
/// One that another toolstack plugs.
const PLUGGED: u32 = 0x100e_8086;

fn config_space(ids: u32) -> Vec<u8> {
    let mut bytes = vec![0; usize::from(CONVENTIONAL_SIZE)];
    bytes[..4].copy_from_slice(&ids.to_le_bytes());
    bytes
}

/// One device model.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Model {
    /// Config space of its functions, bytes that remember what is written.
    functions: BTreeMap<Devfn, Vec<u8>>,
    /// Placeholders by device number, and whether the guest was asked to release the device.
    placeholders: BTreeMap<u8, bool>,
    /// Device numbers that the guest was asked to release since they were announced.
    was_asked: BTreeSet<u8>,
    /// How many times the guest was notified of a device.
    notified: usize,
}

impl Default for Model {
    fn default() -> Self {
        let functions = OWN.into_iter().map(|(function, ids)| (function, config_space(ids))).collect();
        Self { functions, placeholders: BTreeMap::new(), was_asked: BTreeSet::new(), notified: 0 }
    }
}

impl Model {
    fn uses(&self, slot: DeviceNumber) -> bool {
        self.functions.keys().any(|function| function.device() == slot)
    }

    /// The bytes of a register.
    fn register(&mut self, function: Devfn, access: Access) -> std::result::Result<&mut [u8], Errno> {
        let start = usize::from(access.offset());
        let bytes = self.functions.get_mut(&function).ok_or(Errno::ENODEV)?;
        bytes.get_mut(start..start + usize::from(access.width().bytes())).ok_or(Errno::EINVAL)
    }
}

#[derive(Default)]
struct Models {
    by_domain: Mutex<BTreeMap<DomId, Model>>,
    changed: Condvar,
}

impl Models {
    fn with<T>(&self, domain: DomId, body: impl FnOnce(&mut Model) -> T) -> T {
        let answer = body(locked(&self.by_domain).entry(domain).or_default());
        self.changed.notify_all();
        answer
    }

    fn wait<'a>(
        &self,
        models: MutexGuard<'a, BTreeMap<DomId, Model>>,
        left: Duration,
    ) -> MutexGuard<'a, BTreeMap<DomId, Model>> {
        self.changed.wait_timeout(models, left).unwrap_or_else(PoisonError::into_inner).0
    }
}

#[derive(Clone)]
pub(super) struct SimDeviceModels {
    models: Arc<Models>,
    world: Arc<Mutex<World>>,
    failures: Failures,
}

impl SimDeviceModels {
    pub fn new(world: &Arc<Mutex<World>>, failures: &Failures) -> Self {
        Self { models: Arc::default(), world: Arc::clone(world), failures: failures.clone() }
    }

    /// The same device models, for one run of the service.
    pub fn of_a_run(&self, failures: &Failures) -> Self {
        let models = Arc::clone(&self.models);
        // Who waits for a guest dies with its process.
        failures.fuse.on_end(move || models.changed.notify_all());
        Self { failures: failures.clone(), ..self.clone() }
    }

    pub fn guest(&self, domain: DomId) -> SimHotplug {
        SimHotplug { domain, models: Arc::clone(&self.models) }
    }

    pub fn drop_domain(&self, domain: DomId) {
        locked(&self.models.by_domain).remove(&domain);
        self.models.changed.notify_all();
    }

    fn call<T>(
        &self,
        (operation, action): (&str, &'static str),
        domain: DomId,
        limit: Option<Duration>,
        body: impl FnOnce(&mut Model) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        let run = || {
            let known = locked(&self.world).xen.domains.get(&domain).map(|domain| domain.kind.clone());
            // Nobody listens at the socket of a device model that does not exist.
            if known.is_none_or(|kind| kind != "hvm") {
                return Err(Errno::ENOENT);
            }
            self.models.with(domain, body)
        };
        let answer = self
            .failures
            .check(operation, Subject { limit, ..domain.into() })
            .and_then(|()| self.failures.fuse.change(run).map_err(Cause::from));
        answer.map_err(|cause| PlatformError::new(action, domain, cause))
    }
}

impl DeviceModels for SimDeviceModels {
    fn slots(&self, domain: DomId) -> Result<Vec<DeviceNumber>> {
        let what = ("device_model_slots", "ask for its devices the device model of domain");
        self.call(what, domain, None, |model| {
            let slots: BTreeSet<_> = model.functions.keys().map(|function| function.device()).collect();
            Ok(slots.into_iter().collect())
        })
    }

    fn announce(&self, domain: DomId, slot: DeviceNumber) -> Result<()> {
        let what = ("announce", "plug a placeholder into the device model of domain");
        self.call(what, domain, None, |model| {
            if model.uses(slot) {
                return Err(Errno::EBUSY);
            }
            model.placeholders.insert(slot.get(), false);
            model.was_asked.remove(&slot.get());
            model.notified += 1;
            Ok(())
        })
    }

    fn request_eject(&self, domain: DomId, slot: DeviceNumber, limit: Duration) -> Result<bool> {
        let what = ("request_eject", "ask to release a device domain");
        self.call(what, domain, None, |model| {
            model.placeholders.entry(slot.get()).and_modify(|asked| *asked = true);
            model.was_asked.insert(slot.get());
            Ok(())
        })?;
        let deadline = Instant::now() + limit;
        let mut models = locked(&self.models.by_domain);
        loop {
            if self.failures.fuse.is_blown() {
                drop(models);
                self.failures.fuse.look();
                return Ok(false);
            }
            match models.get(&domain) {
                None => return Err(PlatformError::new(what.1, domain, Cause::Missing)),
                Some(model) if !model.placeholders.contains_key(&slot.get()) => return Ok(true),
                Some(_) => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            models = self.models.wait(models, left);
        }
    }

    fn has_ejected(&self, domain: DomId, slot: DeviceNumber, limit: Duration) -> Result<bool> {
        let what = ("has_ejected", "find out whether the guest has released a device of domain");
        let was_asked = |model: &Model| model.was_asked.contains(&slot.get());
        if !locked(&self.models.by_domain).get(&domain).is_some_and(was_asked) {
            return Ok(false);
        }
        self.call(what, domain, Some(limit), |model| {
            Ok(model.was_asked.contains(&slot.get()) && !model.placeholders.contains_key(&slot.get()))
        })
    }

    fn forget(&self, domain: DomId, slot: DeviceNumber) {
        if let Some(model) = locked(&self.models.by_domain).get_mut(&domain) {
            model.was_asked.remove(&slot.get());
        }
    }

    fn eject(&self, domain: DomId, slot: DeviceNumber) -> Result<()> {
        let what = ("eject", "remove a placeholder from the device model of domain");
        self.call(what, domain, None, |model| {
            model.placeholders.remove(&slot.get());
            Ok(())
        })
    }

    fn functions(&self, domain: DomId, limit: Duration) -> Result<Vec<Devfn>> {
        let what = ("functions_of_model", "ask for its functions the device model of domain");
        self.call(what, domain, Some(limit), |model| Ok(model.functions.keys().copied().collect()))
    }

    fn read_config(&self, domain: DomId, function: Devfn, access: Access, limit: Duration) -> Result<u32> {
        let what = ("read_config_of_model", "read config space of the device model of domain");
        self.call(what, domain, Some(limit), |model| {
            let bytes = model.register(function, access)?;
            Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
        })
    }

    fn write_config(
        &self,
        domain: DomId,
        function: Devfn,
        access: Access,
        value: u32,
        limit: Duration,
    ) -> Result<()> {
        let what = ("write_config_of_model", "write config space of the device model of domain");
        self.call(what, domain, Some(limit), |model| {
            let bytes = model.register(function, access)?;
            bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
            Ok(())
        })
    }
}

/// What the operating system of a simulated HVM guest sees of its ACPI hotplug controller. It does nothing by itself.
pub struct SimHotplug {
    domain: DomId,
    models: Arc<Models>,
}

impl SimHotplug {
    fn model(&self) -> Model {
        locked(&self.models.by_domain).get(&self.domain).cloned().unwrap_or_default()
    }

    /// Device numbers with a placeholder.
    pub fn placeholders(&self) -> Vec<u8> {
        self.model().placeholders.into_keys().collect()
    }

    /// How many times the guest was notified of a device.
    pub fn notified(&self) -> usize {
        self.model().notified
    }

    /// Whether the guest is asked to release the device.
    pub fn is_asked(&self, slot: u8) -> bool {
        self.model().placeholders.get(&slot) == Some(&true)
    }

    /// The guest ejects a device.
    pub fn eject(&self, slot: u8) {
        self.models.with(self.domain, |model| model.placeholders.remove(&slot));
    }

    /// Waits until the guest is asked to release the device; then it ejects it. `false`: it was not asked within the limit.
    pub fn eject_when_asked(&self, slot: u8, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut models = locked(&self.models.by_domain);
        while models.get(&self.domain).and_then(|model| model.placeholders.get(&slot)) != Some(&true) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            models = self.models.wait(models, left);
        }
        drop(models);
        self.eject(slot);
        true
    }

    /// Another toolstack has a device plugged at this device number.
    pub fn plug_other(&self, slot: u8) {
        let function = Devfn(slot << 3);
        self.models.with(self.domain, |model| model.functions.insert(function, config_space(PLUGGED)));
    }
}
