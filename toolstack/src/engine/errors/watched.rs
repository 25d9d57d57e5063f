//! Which functions are watched for errors, the accounts of their errors, and whom an error concerns.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use pciback::fault::{Account, ErrorCounters, ErrorPolicy, Fault, History, Relation, Severity, Storms};
use pciback::{DomId, Sbdf};

/// The position of a guest's function in the PCI topology.
#[derive(Debug, Clone)]
pub(super) struct Position {
    /// Its PF, for a VF.
    pub physical_function: Option<Sbdf>,
    /// The ports above it, the nearest first.
    pub ports: Vec<Sbdf>,
}

/// Watched functions and their accounts.
#[derive(Default)]
pub(super) struct Watched {
    /// The functions that guests have.
    positions: BTreeMap<Sbdf, Position>,
    /// Those functions, their PFs and the ports above them.
    all: BTreeSet<Sbdf>,
    /// The accounts of the watched functions, and of others that reported an error.
    accounts: BTreeMap<Sbdf, Account>,
    histories: BTreeMap<Sbdf, History>,
    of_guests: BTreeMap<DomId, History>,
}

impl Watched {
    /// Whether nothing is watched.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub fn contains(&self, address: Sbdf) -> bool {
        self.all.contains(&address)
    }

    /// The position of a function that a guest has.
    pub fn position(&self, address: Sbdf) -> Option<&Position> {
        self.positions.get(&address)
    }

    /// The functions that guests have.
    pub fn functions(&self) -> impl Iterator<Item = Sbdf> {
        self.positions.keys().copied()
    }

    /// The ports above them.
    pub fn ports(&self) -> BTreeSet<Sbdf> {
        self.positions.values().flat_map(|position| position.ports.iter().copied()).collect()
    }

    /// A guest has a function. Call [`Self::update`] afterwards.
    pub fn add(&mut self, address: Sbdf, position: Position) {
        self.positions.insert(address, position);
    }

    /// No guest has a function any more; whether one had. Call [`Self::update`] afterwards.
    pub fn remove(&mut self, address: Sbdf) -> bool {
        self.histories.remove(&address);
        self.positions.remove(&address).is_some()
    }

    /// Updates what is watched. `begun`: the number of polls of the counters that were begun; `guests`: those that have functions.
    pub fn update(
        &mut self,
        begun: u64,
        counters: impl Fn(Sbdf) -> Option<ErrorCounters>,
        guests: &BTreeSet<DomId>,
    ) {
        let positions = self.positions.iter();
        self.all = positions
            .flat_map(|(address, Position { physical_function, ports })| {
                [*address].into_iter().chain(*physical_function).chain(ports.iter().copied())
            })
            .collect();
        for address in &self.all {
            // Counted from now on. An account that already exists is kept: an error in it that has been handled may still be reported by
            // another source.
            let begin = || Account::begin(*address, counters(*address).as_ref(), begun);
            self.accounts.entry(*address).or_insert_with(begin);
        }
        self.of_guests.retain(|domain, _| guests.contains(domain));
    }

    /// Forgets accounts of functions that are not watched and have no errors.
    pub fn drop_closed_accounts(&mut self) {
        let all = &self.all;
        self.accounts.retain(|address, account| all.contains(address) || account.is_open());
    }

    pub fn has_account(&self, address: Sbdf) -> bool {
        self.accounts.contains_key(&address)
    }

    /// Whether an account is open.
    pub fn has_open_accounts(&self) -> bool {
        self.accounts.values().any(Account::is_open)
    }

    /// The functions with an account.
    pub fn accounts(&self) -> Vec<Sbdf> {
        self.accounts.keys().copied().collect()
    }

    /// The functions with an open account.
    pub fn open_accounts(&self) -> Vec<Sbdf> {
        let accounts = self.accounts.iter().filter(|(_, account)| account.is_open());
        accounts.map(|(address, _)| *address).collect()
    }

    /// Enters a report into the account of its function; returns the errors that are to be handled because of it.
    pub fn heard(&mut self, fault: &Fault, begun: u64) -> Option<Fault> {
        let begin = || Account::begin(fault.address, None, begun);
        self.accounts.entry(fault.address).or_insert_with(begin).heard(fault, begun)
    }

    /// Enters counters, as a poll read them, into the account of their function; returns the errors that are to be handled.
    pub fn looked(&mut self, address: Sbdf, poll: u64, counters: Option<&ErrorCounters>) -> Vec<Fault> {
        let account = self.accounts.get_mut(&address);
        account.map(|account| account.looked(poll, counters).into_iter().collect()).unwrap_or_default()
    }

    /// The functions that an error concerns, and their relation to the function that reports it: those that guests have, and that function
    /// itself. `ports`: the ports above a function.
    pub fn concerned(&self, fault: &Fault, ports: impl Fn(Sbdf) -> Vec<Sbdf>) -> Vec<(Sbdf, Relation)> {
        let nearest = match fault.severity {
            Severity::Fatal => {
                let known = self.position(fault.address).map(|position| position.ports.clone());
                known.unwrap_or_else(|| ports(fault.address)).first().copied()
            }
            _ => None,
        };
        let relation = |(address, position): (&Sbdf, &Position)| {
            if *address == fault.address {
                Some((*address, Relation::Own))
            } else if position.physical_function == Some(fault.address)
                || position.ports.contains(&fault.address)
            {
                Some((*address, Relation::Above))
            } else {
                let beside = nearest.is_some_and(|port| position.ports.contains(&port));
                beside.then_some((*address, Relation::Beside))
            }
        };
        let mut concerned: Vec<_> = self.positions.iter().filter_map(relation).collect();
        if concerned.iter().all(|(address, _)| *address != fault.address) {
            // An error of a function without a guest (held, a PF, a port) is recorded as well.
            concerned.push((fault.address, Relation::Own));
        }
        concerned
    }

    /// Notes an error of a function in its history, and in that of the guest that has it.
    pub fn note(&mut self, fault: &Fault, guest: Option<DomId>, now: Instant) {
        self.histories.entry(fault.address).or_default().note(fault, now);
        if let Some(domain) = guest {
            self.of_guests.entry(domain).or_default().note(fault, now);
        }
    }

    /// The limits that the errors of a function exceed. Nothing is remembered of a function without a guest.
    pub fn storms(
        &mut self,
        address: Sbdf,
        guest: Option<DomId>,
        policy: &ErrorPolicy,
        now: Instant,
    ) -> Storms {
        let of_guest = guest.and_then(|domain| self.of_guests.get(&domain)).cloned().unwrap_or_default();
        let storms = self.histories.entry(address).or_default().storms(&of_guest, policy, now);
        if guest.is_none() {
            self.histories.remove(&address);
        }
        storms
    }

    /// Forgets the correctable errors in the history of a function, because they are masked now.
    pub fn forget_correctable(&mut self, address: Sbdf) {
        if let Some(history) = self.histories.get_mut(&address) {
            history.forget_correctable();
        }
    }
}
