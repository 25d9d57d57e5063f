//! Changes of the host's functions: they appear, leave, are replaced, or change their driver.
//!
//! An event only shows which function to examine. A thread reads sysfs and asks Xen, which may block, and sends the result to the engine.
//! Events that arrive meanwhile are handled by the next examination.

use std::collections::BTreeSet;

use log::{error, info, warn};
use pciback::inventory::Owner;
use pciback::platform::{HostEvent, HostFunction};
use pciback::serve::pv::nodes;
use pciback::{FunctionState, Sbdf};

use super::Event;
use crate::engine::problems::Problem;
use crate::engine::tasks::Course;
use crate::engine::{self, Engine};
use crate::journal::Record;
use crate::reservations::Followed;
use crate::transaction::{Kind, Withdrawal, is_held};

/// Functions to be examined.
#[derive(Debug, Default)]
pub(super) struct Examinations {
    addresses: BTreeSet<Sbdf>,
    all: bool,
    /// Also the functions that another toolstack has attached to guests.
    others: bool,
    /// Whether a thread examines functions.
    running: bool,
    /// Functions that were in a transaction at some time since that thread started: what it read may be outdated.
    begun_meanwhile: BTreeSet<Sbdf>,
    /// Functions that stopped answering while the host still has them.
    silent: BTreeSet<Sbdf>,
}

impl Examinations {
    /// A function has stopped answering.
    pub fn add_silent(&mut self, address: Sbdf) {
        self.silent.insert(address);
        self.add([address]);
    }

    /// Whether a function had stopped answering; it is forgotten.
    fn take_silent(&mut self, address: Sbdf) -> bool {
        self.silent.remove(&address)
    }

    pub fn add(&mut self, addresses: impl IntoIterator<Item = Sbdf>) {
        self.addresses.extend(addresses);
    }

    pub fn add_everything(&mut self) {
        self.all = true;
    }

    /// Requests an examination after an action of another toolstack.
    pub fn add_others(&mut self) {
        self.others = true;
    }

    /// Notes that an operation begins with a function.
    pub fn begin(&mut self, address: Sbdf) {
        if self.running {
            self.begun_meanwhile.insert(address);
        }
    }

    /// Whether functions are being examined.
    pub fn is_running(&self) -> bool {
        self.running
    }
}

/// An examined function.
#[derive(Debug)]
pub struct ExaminedFunction {
    pub(super) address: Sbdf,
    /// `None`: it is not in the host.
    pub(super) function: Option<HostFunction>,
    /// Its owner in Xen; `None`: Xen does not know it.
    pub(super) owner: Option<Owner>,
    /// It is persistent for a guest and has moved from another address.
    pub(super) followed: Option<Followed>,
}

/// The result of an examination.
#[derive(Debug)]
pub struct Examination {
    seen: Vec<ExaminedFunction>,
    /// Whether the lists must be compared as well, because everything was examined or a read failed.
    compare: bool,
}

impl Engine {
    pub(in crate::engine) fn host_changed(&mut self, event: HostEvent) {
        self.inventory.changes.another();
        match event {
            HostEvent::Lost => {
                warn!("events about PCI functions were lost; all functions are examined");
                self.inventory.examine_everything();
            }
            HostEvent::Removed(address) => {
                // At once, because the guest must not access another device at this address.
                self.set_gone(address);
                self.inventory.examine(address);
            }
            HostEvent::Added(address) => {
                self.inventory.comparisons.begin_anew(address);
                self.holds.appeared(address);
                self.inventory.examine(address);
            }
            HostEvent::Changed(address) => {
                // The kernel also sends this event when it recovers from errors.
                self.errors.poll_counters_soon();
                self.inventory.examine(address);
            }
        }
    }

    pub(in crate::engine) fn set_gone(&mut self, address: Sbdf) {
        if let Some(place) = self.functions.records().place(address)
            && let Some(guest) = self.guests.get_mut(place.domain)
        {
            guest.set_gone(place.domain, place.devfn);
        }
    }

    /// Starts an examination if one is due and none runs. At the start of the service, the VFs that the settings ask for go first.
    pub(in crate::engine) fn examine_functions(&mut self) {
        if self.vfs.is_starting() {
            return;
        }
        let Examinations { addresses, all, others, running, begun_meanwhile, .. } =
            &mut self.inventory.examinations;
        if *running || (addresses.is_empty() && !*all && !*others) {
            return;
        }
        *running = true;
        begun_meanwhile.clone_from(self.functions.busy());
        let (mut addresses, all) = (std::mem::take(addresses), std::mem::take(all));
        let others = std::mem::take(others);
        let recorded: Vec<Sbdf> = if all {
            self.functions.records().all().map(|record| record.address).collect()
        } else {
            Vec::new()
        };
        let (context, busy) = (self.task_context(), self.functions.busy().clone());
        let inbox = self.inbox.clone();
        let work = move || {
            // All devices first: two of a kind may be told apart only by which of them is at its noted place.
            context.handover.recognition.wait();
            if others {
                match nodes::pciback_functions(context.platform.store.as_ref()) {
                    Ok(found) => addresses.extend(found.into_iter().map(|(address, _)| address)),
                    Err(error) => warn!("{error}"),
                }
            }
            let addresses: BTreeSet<Sbdf> = match all {
                true => {
                    let listed = context.platform.host.functions().unwrap_or_else(|error| {
                        warn!("{error}");
                        Vec::new()
                    });
                    listed.into_iter().chain(recorded).chain(addresses).collect()
                }
                false => addresses,
            };
            let count = addresses.len();
            let examine = |address| {
                let function = context.find(address).map_err(|error| warn!("{error}")).ok()?;
                // A failed query, or a function in a transaction, counts as unknown, which has no consequences.
                let asked = (!busy.contains(&address)).then(|| context.owner(address).ok()).flatten();
                let owner = asked.unwrap_or(Some(Owner::Unknown));
                let followed = context.recognise(address, function.as_ref());
                Some(ExaminedFunction { address, function, owner, followed })
            };
            let seen: Vec<ExaminedFunction> = addresses.into_iter().filter_map(examine).collect();
            let compare = all || seen.len() < count;
            Examination { seen, compare }
        };
        self.inbox.background("look", work, move |examination| {
            // After a failure, everything is compared instead.
            let examination = examination.unwrap_or_else(|failure| {
                error!("look at the host's functions: {failure}");
                Examination { seen: Vec::new(), compare: true }
            });
            inbox.send(engine::Event::Inventory(Event::Examined(examination)));
        });
    }

    pub(super) fn examined(&mut self, examination: Examination) {
        self.inventory.examinations.running = false;
        if examination.compare {
            self.inventory.comparisons.make_due();
        }
        for seen in examination.seen {
            self.compare(&seen);
            if let Some(followed) = &seen.followed {
                self.followed(followed);
            }
            let ExaminedFunction { address, function, .. } = seen;
            // A function in a transaction is examined after its end; so is one that was in a transaction during the examination.
            if self.functions.is_busy(address)
                || self.inventory.examinations.begun_meanwhile.contains(&address)
            {
                continue;
            }
            let Some(record) = self.functions.records().get(address).cloned() else {
                match function {
                    Some(function) => self.keep_for_guests(&function),
                    None => self.holds.left(address),
                }
                continue;
            };
            match function {
                Some(function) if is_same(&record, &function) => self.still_there(record, &function),
                other => self.left(record, other.is_some()),
            }
        }
    }

    /// Handles a function that is still present: its driver may have changed.
    fn still_there(&mut self, record: Record, function: &HostFunction) {
        if self.inventory.examinations.take_silent(record.address) {
            self.quarantine(record.address, "it no longer answers, and the guest reads all ones");
            return;
        }
        if record.state != FunctionState::Held || is_held(function) {
            return;
        }
        let address = record.address;
        let driver = function.driver.as_deref().unwrap_or("no driver");
        warn!(
            "{address}: it was taken from its holding driver and has {driver} now; it belongs to dom0 again"
        );
        // Xen's quarantine domain (dom_io) must not own a function that a driver of dom0 uses.
        self.start(Course::Backward(Kind::Release, Withdrawal::GuestEnded), record, None, |record| {
            format!("{}: dom0's again", record.address)
        });
    }

    /// Handles a function that was removed or replaced by another.
    fn left(&mut self, record: Record, replaced: bool) {
        let address = record.address;
        self.inventory.examinations.take_silent(address);
        self.inventory.touch(address);
        let how = if replaced { "was replaced by another function" } else { "left the host" };
        match record.state {
            FunctionState::Gone if !replaced => {}
            FunctionState::Host | FunctionState::Held | FunctionState::Gone => {
                info!("{address}: it {how}; xpci forgets the old one");
                if let Err(error) = self.files.journal.remove(address) {
                    warn!("{error}");
                    self.problems.push(Problem::unwritten(&error));
                }
                self.functions.forget(address);
                // Another function may have taken its address.
                self.inventory.examine(address);
            }
            FunctionState::Quarantined if record.guest.is_none() => {
                // The distrusted device is gone, and the quarantine does not apply to another device.
                info!("{address}: it {how} while it was quarantined");
                let gone = Record { state: FunctionState::Gone, quarantine: None, ..record };
                self.functions.keep(gone);
            }
            // The failed withdrawal that quarantined the function is retried a few times; the guest reads all ones in any case.
            FunctionState::Quarantined if !self.inventory.comparisons.may_try(address) => {}
            _ => {
                warn!("{address}: it {how} while a guest had it; it is withdrawn");
                self.set_gone(address);
                self.start(Course::Backward(Kind::Detach, Withdrawal::Ask), record, None, move |record| {
                    format!("{}: withdrawn from its guest, it {how}", record.address)
                });
            }
        }
    }
}

/// Whether a function is the one of the record. Records of versions without incarnations match any function.
fn is_same(record: &Record, function: &HostFunction) -> bool {
    record.incarnation == 0 || record.incarnation == function.incarnation
}
