//! Which devices the host's functions are: what is persistent for guests goes with the device, not with the address.
//!
//! Reading that asks the device, so it is read when a function is seen, by the thread that looks, and the engine uses what is known.

use log::warn;
use pciback::Sbdf;
use pciback::platform::HostFunction;

use super::Engine;
use super::tasks::Workshop;
use crate::reservations::Followed;

impl Workshop {
    /// Whether the service must know which devices functions are.
    fn is_to_recognise(&self) -> bool {
        !self.reservations.is_empty() || !self.settings.guests.is_empty()
    }

    /// A function was looked at; what is persistent of it goes with it.
    pub(super) fn recognise(&self, address: Sbdf, function: Option<&HostFunction>) -> Option<Followed> {
        if !self.is_to_recognise() {
            return None;
        }
        let Some(function) = function else {
            self.reservations.left(address);
            return None;
        };
        let device = self.devices.of(self.platform.host.as_ref(), function);
        let found = device.and_then(|device| self.reservations.found(&device));
        found.unwrap_or_else(|failure| {
            warn!("{address}: find out whether it is persistent for a guest: {failure}");
            None
        })
    }
}

impl Engine {
    /// Finds out where the devices are that guests have persistently, before any guest gets one.
    pub(super) fn recognise_all(&self) {
        let workshop = self.workshop();
        if !workshop.is_to_recognise() {
            return;
        }
        let host = self.platform.host.as_ref();
        let functions = host.functions().unwrap_or_else(|error| {
            warn!("{error}");
            Vec::new()
        });
        let functions = functions.into_iter().filter_map(|address| host.function(address).ok());
        let devices = functions.filter_map(|function| self.devices.of(host, &function).ok()).collect();
        if let Err(failure) = self.reservations.found_all(devices) {
            warn!("{failure}");
        }
    }
}
