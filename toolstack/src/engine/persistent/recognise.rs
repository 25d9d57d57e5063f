//! Identifies devices: persistent assignments follow the device, not the address.
//!
//! Identifying a device reads its config space. The thread that examines a function, or resolves those of a request, does this, and the
//! engine uses the result.

use log::warn;
use pciback::Sbdf;
use pciback::platform::HostFunction;

use crate::device::Device;
use crate::engine::Engine;
use crate::engine::tasks::TaskContext;
use crate::reservations::Followed;
use crate::target::{Parent, Target};

impl TaskContext {
    /// Whether device identities are needed.
    fn is_to_recognise(&self) -> bool {
        !self.files.reservations.is_empty() || !self.settings.guests.is_empty()
    }

    /// Called when a function was examined; moves its reservation if the device has moved.
    pub(in crate::engine) fn recognise(
        &self,
        address: Sbdf,
        function: Option<&HostFunction>,
    ) -> Option<Followed> {
        if !self.is_to_recognise() {
            return None;
        }
        let Some(function) = function else {
            self.files.reservations.left(address);
            return None;
        };
        let device = self.devices.of(self.platform.host.as_ref(), function);
        let found = device.and_then(|device| self.files.reservations.found(&device));
        found.unwrap_or_else(|failure| {
            warn!("{address}: find out whether it is persistent for a guest: {failure}");
            None
        })
    }

    /// Finds out what the engine has to know of a function, or of all VFs of a PF, before it decides about a request: which device it is,
    /// and to which guest the settings assign it. The engine does not read this itself.
    pub(in crate::engine) fn look_up(&self, target: &Target) {
        let host = self.platform.host.as_ref();
        let meant = match target {
            Target::Any(Parent::At(pf)) => {
                host.function(*pf).map(|pf| pf.virtual_functions).unwrap_or_default()
            }
            other => other.address().into_iter().collect(),
        };
        for function in meant.into_iter().filter_map(|address| host.function(address).ok()) {
            self.look_at(&function);
        }
    }

    /// [`Self::look_up`] for a function that was read. Returns its device.
    fn look_at(&self, function: &HostFunction) -> Option<Device> {
        let host = self.platform.host.as_ref();
        let device = self.devices.of(host, function).ok();
        let guest = device.as_ref().and_then(|device| self.settings.assignee(host, function, device));
        self.handover.assignees.note(function, guest.cloned());
        device
    }
}

impl Engine {
    /// Finds the devices of all reservations, before any guest gets a function.
    pub(in crate::engine) fn recognise_all(&self) {
        let context = self.task_context();
        if !context.is_to_recognise() {
            return;
        }
        let host = self.platform.host.as_ref();
        let functions = host.functions().unwrap_or_else(|error| {
            warn!("{error}");
            Vec::new()
        });
        let functions = functions.into_iter().filter_map(|address| host.function(address).ok());
        let devices = functions.filter_map(|function| context.look_at(&function)).collect();
        if let Err(failure) = self.files.reservations.found_all(devices) {
            warn!("{failure}");
        }
    }
}
