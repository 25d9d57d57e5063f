//! The records of functions in memory.

use std::collections::{BTreeMap, BTreeSet};

use pciback::{DomId, FunctionState, Sbdf};

use crate::journal::{GuestPlace, Record};

/// The record of every function that is not in state `host`, and of those in a transaction from or to it. Threads get a copy.
#[derive(Debug, Clone)]
pub(in crate::engine) struct Records {
    by_address: BTreeMap<Sbdf, Record>,
    /// Functions that got a record or lost it.
    changed: BTreeSet<Sbdf>,
    boot: String,
}

impl Records {
    pub fn new(boot: String) -> Self {
        Self { by_address: BTreeMap::new(), changed: BTreeSet::new(), boot }
    }

    /// The record of a function, if it has one.
    pub fn get(&self, address: Sbdf) -> Option<&Record> {
        self.by_address.get(&address)
    }

    /// The record of a function, or a new one.
    pub fn get_or_new(&self, address: Sbdf) -> Record {
        self.get(address).cloned().unwrap_or_else(|| Record::new(address, &self.boot))
    }

    pub fn state(&self, address: Sbdf) -> FunctionState {
        self.get(address).map_or(FunctionState::Host, |record| record.state)
    }

    /// The guest of a function, and where it sees the function.
    pub fn place(&self, address: Sbdf) -> Option<GuestPlace> {
        self.get(address)?.guest
    }

    /// The guest of a function.
    pub fn guest(&self, address: Sbdf) -> Option<DomId> {
        self.place(address).map(|place| place.domain)
    }

    pub fn all(&self) -> impl Iterator<Item = &Record> {
        self.by_address.values()
    }

    /// The records of the functions of a guest, with the place of each.
    pub fn of(&self, domain: DomId) -> impl Iterator<Item = (&Record, GuestPlace)> {
        self.all()
            .filter_map(move |record| Some((record, record.guest.filter(|place| place.domain == domain)?)))
    }

    /// The function that a guest sees at this place.
    pub fn at(&self, place: GuestPlace) -> Option<Sbdf> {
        self.all().find(|record| record.guest == Some(place)).map(|record| record.address)
    }

    pub(super) fn put(&mut self, record: Record) {
        let address = record.address;
        if self.by_address.insert(address, record).is_none() {
            self.changed.insert(address);
        }
    }

    pub(super) fn remove(&mut self, address: Sbdf) {
        if self.by_address.remove(&address).is_some() {
            self.changed.insert(address);
        }
    }

    pub(super) fn take_changed(&mut self) -> BTreeSet<Sbdf> {
        std::mem::take(&mut self.changed)
    }

    pub(super) fn change(&mut self, address: Sbdf, change: impl FnOnce(&mut Record)) -> Option<Record> {
        let record = self.by_address.get_mut(&address)?;
        change(record);
        Some(record.clone())
    }
}
