//! The registers that describe an error: read for the event log, and cleared.

use std::collections::BTreeSet;

use log::{error, warn};
use pciback::Sbdf;
use pciback::live::errors::{self as registers, Layout};

use super::{Engine, Event};
use crate::engine;
use crate::protocol::{EventView, Happening, RegisterValue};

/// Functions whose error registers are being read.
#[derive(Default)]
pub(super) struct Reading(BTreeSet<Sbdf>);

impl Engine {
    /// Reads the registers that describe an error, and clears those of a guest's function. This runs on a thread, because config accesses
    /// wait while the kernel resets the function. The registers are not cleared where the platform firmware handles errors.
    pub(super) fn read_registers(&mut self, address: Sbdf) {
        if !self.errors.reading.0.insert(address) {
            return;
        }
        let ports = self.errors.watched.position(address).map(|position| position.ports.as_slice());
        let (port, root) =
            ports.map_or((None, None), |ports| (ports.first().copied(), ports.last().copied()));
        let read: Vec<(Sbdf, Option<Layout>)> = [address]
            .into_iter()
            .chain(port)
            .map(|address| (address, self.errors.ports.layout(address)))
            .collect();
        let (context, inbox) = (self.task_context(), self.inbox.clone());
        let work = move || {
            let host = context.platform.host.as_ref();
            let handled = |root| context.platform.errors.handled(root).unwrap_or(false);
            let cleared = root.filter(|root| handled(*root)).map(|_| address);
            let of = |(address, layout): (Sbdf, Option<Layout>)| {
                let found = registers::of_errors(host, address, layout);
                if cleared == Some(address)
                    && let Err(problem) = registers::clear_errors(host, address, layout, &found)
                {
                    warn!("{address}: clear its error registers: {problem}");
                }
                let value =
                    move |(name, value): (&str, u32)| RegisterValue { address, name: name.to_owned(), value };
                found.into_iter().map(value)
            };
            read.into_iter().flat_map(of).collect()
        };
        self.inbox.background(&format!("registers {address}"), work, move |found| {
            let found = found.unwrap_or_else(|failure| {
                error!("{address}: read its error registers: {failure}");
                Vec::new()
            });
            inbox.send(engine::Event::Errors(Event::Registers(address, found)));
        });
    }

    pub(super) fn registers_read(&mut self, address: Sbdf, registers: Vec<RegisterValue>) {
        self.errors.reading.0.remove(&address);
        let place = self.functions.records().place(address);
        if let Some(place) = place
            && let Some(guest) = self.guests.get_mut(place.domain)
        {
            guest.events_cleared(place.devfn);
        }
        let domain = place.map(|place| place.domain);
        self.note_event(EventView::now(address, domain, Happening::Registers { registers }));
    }
}
