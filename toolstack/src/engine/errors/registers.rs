//! The registers that describe an error: read for the event log, and cleared.

use std::collections::BTreeSet;

use log::{error, warn};
use pciback::Sbdf;
use pciback::live::errors::{self as registers, Layout};

use super::{Context, Effect, Errors, Event};
use crate::engine;
use crate::protocol::{EventView, Happening, RegisterValue};

/// Functions whose error registers are being read.
#[derive(Default)]
pub(super) struct Reading(BTreeSet<Sbdf>);

impl Errors {
    /// Reads the registers that describe an error, and clears those of a guest's function. This runs on a thread, because config accesses
    /// wait while the kernel resets the function. The registers are not cleared where the platform firmware handles errors.
    pub(super) fn read_registers(&mut self, address: Sbdf, context: &Context<'_>) {
        if !self.reading.0.insert(address) {
            return;
        }
        let ports = self.watched.position(address).map(|position| position.ports.as_slice());
        let (port, root) =
            ports.map_or((None, None), |ports| (ports.first().copied(), ports.last().copied()));
        let read: Vec<(Sbdf, Option<Layout>)> =
            [address].into_iter().chain(port).map(|address| (address, self.ports.layout(address))).collect();
        let (platform, inbox) = (context.platform.clone(), context.inbox.clone());
        let work = move || {
            let host = platform.host.as_ref();
            let handled = |root| platform.errors.handled(root).unwrap_or(false);
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
        context.inbox.background(&format!("registers {address}"), work, move |found| {
            let found = found.unwrap_or_else(|failure| {
                error!("{address}: read its error registers: {failure}");
                Vec::new()
            });
            inbox.send(engine::Event::Errors(Event::Registers(address, found)));
        });
    }

    pub(super) fn registers_read(
        &mut self,
        address: Sbdf,
        registers: Vec<RegisterValue>,
        context: &Context<'_>,
    ) -> Vec<Effect> {
        self.reading.0.remove(&address);
        let domain = context.functions.records().guest(address);
        let event = EventView::now(address, domain, Happening::Registers { registers });
        vec![Effect::RegistersCleared(address), Effect::Note(event)]
    }
}
