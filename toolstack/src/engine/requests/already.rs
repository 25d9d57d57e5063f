//! Attachments of functions that the guest has already.

use pciback::{DeviceNumber, FunctionState, Sbdf};

use crate::domains;
use crate::engine::Engine;
use crate::journal::Record;
use crate::protocol::{DomainName, Success};

impl Engine {
    /// The record of a function that the guest has already, at the requested device number.
    pub(super) fn attached_already(
        &self,
        domain: &DomainName,
        address: Sbdf,
        slot: Option<DeviceNumber>,
    ) -> Option<Record> {
        let domain = domains::find(self.platform.store.as_ref(), domain).ok()?;
        let record = self.functions.records().get(address)?;
        let place = record.guest.filter(|place| place.domain == domain)?;
        let here = slot.is_none_or(|slot| slot == place.devfn.device());
        (record.state == FunctionState::Attached && here && !self.functions.is_busy(address))
            .then(|| record.clone())
    }

    /// The answer to an attachment of a function that the guest has already.
    pub(super) fn has_it(&self, record: &Record) -> Success {
        let place = record.guest.map(|place| (place.domain, Sbdf::in_guest(place.devfn)));
        let text = place.map_or_else(
            || format!("{} is attached already", record.address),
            |(domain, seen)| {
                format!("{} has {} already, and sees it at {seen}", self.called(domain), record.address)
            },
        );
        Success::Already { message: text }
    }
}
