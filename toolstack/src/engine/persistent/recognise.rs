//! Identifies devices: persistent assignments follow the device, not the address.
//!
//! Identifying a device reads its config space. The thread that examines a function does this, and the engine uses the result.

use log::warn;
use pciback::Sbdf;
use pciback::platform::HostFunction;

use crate::engine::Engine;
use crate::engine::tasks::TaskContext;
use crate::reservations::Followed;

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
        let devices = functions.filter_map(|function| self.devices.of(host, &function).ok()).collect();
        if let Err(failure) = self.files.reservations.found_all(devices) {
            warn!("{failure}");
        }
    }
}
