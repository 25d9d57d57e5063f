//! Identifies devices: persistent assignments follow the device, not the address.
//!
//! Identifying a device reads its config space. The thread that examines a function, or resolves those of a request, does this, and the
//! engine uses the result. When the service starts, a thread reads all devices, before anything else decides which is whose: until then no
//! guest gets a function again, and requests for functions that a guest may have persistently wait, as do examinations.

use log::warn;
use pciback::Sbdf;
use pciback::platform::HostFunction;

use super::Event;
use crate::device::Device;
use crate::engine::inbox::Inbox;
use crate::engine::tasks::TaskContext;
use crate::engine::{self, Engine};
use crate::outcome::{ErrorCode, Failure};
use crate::reservations::{Followed, Reservation};
use crate::target::{Parent, Target};

impl TaskContext {
    /// Whether guests have functions persistently.
    fn is_to_recognise(&self) -> bool {
        !self.files.reservations.is_empty() || !self.settings.guests.is_empty()
    }

    /// Whether device identities are needed.
    pub(in crate::engine) fn needs_devices(&self) -> bool {
        self.is_to_recognise() || !self.files.persistent_settings.is_empty()
    }

    /// Called when a function was examined; moves its reservation if the device has moved.
    pub(in crate::engine) fn recognise(
        &self,
        address: Sbdf,
        function: Option<&HostFunction>,
    ) -> Option<Followed> {
        if !self.needs_devices() {
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
        for function in self.meant(target) {
            self.look_at(&function);
        }
    }

    /// The functions of a target: for a pool, all VFs of its PF.
    fn meant(&self, target: &Target) -> Vec<HostFunction> {
        let host = self.platform.host.as_ref();
        let meant = match target {
            Target::Any(Parent::At(pf)) => {
                host.function(*pf).map(|pf| pf.virtual_functions).unwrap_or_default()
            }
            other => other.address().into_iter().collect(),
        };
        meant.into_iter().filter_map(|address| host.function(address).ok()).collect()
    }

    /// [`Self::look_up`] for a function that was read. Returns its device.
    fn look_at(&self, function: &HostFunction) -> Option<Device> {
        let host = self.platform.host.as_ref();
        let device = self.devices.of(host, function);
        let device = device.inspect_err(|failure| warn!("{}: {failure}", function.address)).ok();
        let guest = device.as_ref().and_then(|device| self.settings.assignee(host, function, device));
        self.handover.assignees.note(function, guest.cloned());
        device
    }

    /// [`Self::look_up`] for a request. If a guest may have one of the functions persistently, it waits until all devices were read after a
    /// start of the service.
    pub(in crate::engine) fn look_up_for_request(&self, target: &Target) -> Result<(), Failure> {
        self.look_up(target);
        match self.may_be_reserved(target) {
            true => self.all_devices_read(&format!("whether a guest has {target} persistently")),
            false => Ok(()),
        }
    }

    /// Whether it is not known yet that no guest has a function of this target persistently.
    fn may_be_reserved(&self, target: &Target) -> bool {
        if self.handover.recognition.has_ended() || self.files.reservations.is_empty() {
            return false;
        }
        let (host, reservations) = (self.platform.host.as_ref(), &self.files.reservations);
        let may_concern = |function: &HostFunction| {
            self.devices.of(host, function).map_or(true, |device| reservations.may_concern(&device))
        };
        let is_noted = target.address().is_some_and(|address| reservations.get(address).is_some());
        is_noted || self.meant(target).iter().any(may_concern)
    }

    /// Waits until all devices were read after a start of the service; `what` is to be found out by that, in words that follow "find out".
    pub(in crate::engine) fn all_devices_read(&self, what: &str) -> Result<(), Failure> {
        let limit = self.settings.driver_limit();
        if self.handover.recognition.wait_for(limit) {
            return Ok(());
        }
        let text = format!(
            "find out {what}: xpcid was started a short time ago, and has waited {} s for the devices of this host to be read",
            limit.as_secs()
        );
        let hint = "try again; dom0's kernel log may name a function that does not answer";
        Err(Failure::new(ErrorCode::Failed, text).hint(hint))
    }

    /// The reservation of a function, after [`Self::all_devices_read`] where that matters.
    pub(in crate::engine) fn reservation_of(&self, address: Sbdf) -> Option<Reservation> {
        if self.may_be_reserved(&address.into())
            && let Err(failure) = self.all_devices_read("whether its guest has it persistently")
        {
            warn!("{address}: {failure}");
        }
        self.files.reservations.get(address)
    }

    /// Reads all devices, and finds those of the reservations.
    fn recognise_all(&self) {
        let host = self.platform.host.as_ref();
        let functions = host.functions().unwrap_or_else(|error| {
            warn!("{error}");
            Vec::new()
        });
        let functions = functions.into_iter().filter_map(|address| host.function(address).ok());
        let devices = functions.filter_map(|function| self.look_at(&function)).collect();
        if let Err(failure) = self.files.reservations.found_all(devices) {
            warn!("{failure}");
        }
    }
}

/// Says that the devices were read when it is dropped, so that nothing waits for ever after a bug in the reading.
struct Reading(Inbox);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.send(engine::Event::Persistent(Event::DevicesRead));
    }
}

impl Engine {
    /// Finds the devices of all reservations, on a thread, before any guest gets a function.
    pub(in crate::engine) fn recognise_all(&mut self) {
        let context = self.task_context();
        if !context.is_to_recognise() {
            return self.devices_read();
        }
        let reading = Reading(self.inbox.clone());
        self.background("recognise", move || {
            context.recognise_all();
            drop(reading);
        });
    }

    /// The devices were read: what waited for that goes on.
    pub(super) fn devices_read(&mut self) {
        self.functions.handover().recognition.end();
        self.return_all_managed();
        self.resume_returning();
    }
}
