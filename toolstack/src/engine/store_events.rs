//! Events of xenstore watches, collected in a set first.
//!
//! A guest can write to its own nodes as often as it likes, and each write is an event. An event is cheap, examining a guest is not: each
//! guest is examined once for all pending events.

use std::collections::BTreeSet;

use pciback::platform::{PlatformError, Store, WatchEvent};
use pciback::serve::pv::nodes;
use pciback::{DomId, Sbdf};

use super::{Engine, libxl};
use crate::domains;

/// The largest number of events that are handled before the engine polls its other sources.
const BURST: usize = 1024;

/// What has changed according to the events.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changed {
    /// A domain was introduced.
    introduced: bool,
    /// A domain was released, or has shut down.
    released: bool,
    /// Domains whose device model changed its state.
    device_models: BTreeSet<DomId>,
    /// xl assigned functions to guests, or took them back.
    pciback: bool,
    /// Functions of which libxl's nodes changed.
    libxl: BTreeSet<Sbdf>,
    /// Domains whose frontend changed its nodes.
    frontends: BTreeSet<DomId>,
}

impl Changed {
    /// Takes pending events; `true`: there may be more.
    fn take(&mut self, store: &dyn Store) -> Result<bool, PlatformError> {
        for _ in 0..BURST {
            match store.next_event()? {
                Some(event) => self.add(&event),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    fn add(&mut self, event: &WatchEvent) {
        match (event.path.as_str(), domains::of_device_model(&event.token)) {
            ("@introduceDomain", _) => self.introduced = true,
            ("@releaseDomain", _) => self.released = true,
            _ if event.token == nodes::PCIBACK => self.pciback = true,
            _ if event.token == libxl::DIRECTORY => self.libxl.extend(libxl::function_of(&event.path)),
            (_, Some(domain)) => drop(self.device_models.insert(domain)),
            (_, None) => {
                // The token is the frontend's directory, `/local/domain/DOMID/device/pci/0`.
                let domain = event.token.split('/').nth(3).and_then(|number| number.parse().ok());
                self.frontends.extend(domain.map(DomId));
            }
        }
    }
}

impl Engine {
    /// Handles pending events; `true`: there may be more.
    pub(super) fn take_store_events(&mut self) -> Result<bool, PlatformError> {
        let mut changed = Changed::default();
        let more = changed.take(self.platform.store.as_ref())?;
        if changed.introduced || changed.released {
            // Before guests that have ended lose their functions.
            self.find_suspended();
        }
        if changed.released {
            self.find_ended_guests();
        }
        if changed.introduced || changed.released {
            self.find_returning();
        }
        if changed.pciback {
            self.inventory.examine_others();
        }
        for address in changed.libxl {
            self.libxl_changed(address);
        }
        for domain in changed.device_models {
            self.device_model_changed(domain);
        }
        for domain in changed.frontends {
            if self.guests.contains(domain) {
                self.update_frontend(domain);
            }
        }
        Ok(more)
    }
}
