//! What the engine knows of each function: its record, whether a transaction or a repair has it, and how its guest has it.
//!
//! Records here follow the journal, which transactions write. A function in a transaction or under repair is busy, and nothing else may
//! begin with it.

mod assignees;
mod attachments;
mod containment;
mod filter;
mod reachable;
mod recognition;
mod records;
mod resets;

use std::collections::{BTreeMap, BTreeSet};

use pciback::serve::Attachment;
use pciback::{FunctionState, Sbdf};

use self::assignees::Assignees;
use self::attachments::Attachments;
use self::containment::Awaiting;
pub use self::containment::Containment;
pub use self::filter::CompiledFilter;
use self::reachable::Reachable;
use self::recognition::Recognition;
pub(super) use self::records::Records;
use self::resets::Resets;
use crate::journal::{NetworkRecord, Record};
use crate::outcome::Failure;
use crate::transaction::Fresh;

/// The functions that the service has to do with.
pub(super) struct Functions {
    records: Records,
    /// Functions in a transaction or under repair.
    busy: BTreeSet<Sbdf>,
    /// Functions whose guest ended while they were busy: they are withdrawn afterwards.
    orphans: BTreeSet<Sbdf>,
    attachments: Attachments,
    /// What the filter of each attached function was compiled from.
    filters: BTreeMap<Sbdf, CompiledFilter>,
    handover: Handover,
}

/// What decides whether a function may get another owner. The threads of transactions share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Handover {
    /// Functions that are being reset while a guest has them.
    pub resets: Resets,
    /// Functions that guests may be able to reach.
    pub reachable: Reachable,
    /// Functions that were reset with their whole bus and have had no owner since.
    pub fresh: Fresh,
    /// Functions to be contained when their transaction ends.
    pub awaiting: Awaiting,
    /// To which guests the settings assign functions.
    pub assignees: Assignees,
    /// Whether the devices of the host were read.
    pub recognition: Recognition,
}

/// What the end of a transaction changes.
pub(super) struct Ended {
    /// The record during the transaction.
    pub earlier: Option<Record>,
    /// Whether the guest of the function ended meanwhile.
    pub orphaned: bool,
}

impl Functions {
    pub fn new(boot: String) -> Self {
        Self {
            records: Records::new(boot),
            busy: BTreeSet::new(),
            orphans: BTreeSet::new(),
            attachments: Attachments::default(),
            filters: BTreeMap::new(),
            handover: Handover::default(),
        }
    }

    pub fn records(&self) -> &Records {
        &self.records
    }

    /// The functions that got a record or lost it since the last call.
    pub fn take_changed(&mut self) -> BTreeSet<Sbdf> {
        self.records.take_changed()
    }

    /// Takes over a record that the journal has.
    pub fn keep(&mut self, record: Record) {
        if record.state == FunctionState::Host && record.transaction.is_none() {
            self.records.remove(record.address);
        } else {
            self.records.put(record);
        }
    }

    /// Creates a record for a function without one.
    pub fn keep_new(&mut self, record: &Record) {
        if self.records.get(record.address).is_none() {
            self.records.put(record.clone());
        }
    }

    /// Removes the record of a function.
    pub fn forget(&mut self, address: Sbdf) {
        self.records.remove(address);
    }

    /// A transaction begins with a function; `record`: what is shown of it meanwhile.
    pub fn begin(&mut self, record: Record) {
        self.busy.insert(record.address);
        self.records.put(record);
    }

    /// The transaction with a function has ended and left this record.
    pub fn end(&mut self, record: Record) -> Ended {
        let address = record.address;
        let earlier = self.records.get(address).cloned();
        self.busy.remove(&address);
        let orphaned = self.orphans.remove(&address);
        if record.state != FunctionState::Attached {
            self.filters.remove(&address);
            self.attachments.end(address);
        }
        self.keep(record);
        Ended { earlier, orphaned }
    }

    /// Reserves a function for a repair.
    pub fn reserve(&mut self, address: Sbdf) {
        self.busy.insert(address);
    }

    /// Ends what [`Self::reserve`] began.
    pub fn release(&mut self, address: Sbdf) {
        self.busy.remove(&address);
    }

    pub fn is_busy(&self, address: Sbdf) -> bool {
        self.busy.contains(&address)
    }

    /// Refuses a function that is in a transaction.
    pub fn idle(&self, address: Sbdf) -> Result<(), Failure> {
        if self.is_busy(address) {
            let text = format!("{address} is {} right now", self.records.state(address));
            return Err(Failure::refused(text).on(address).hint("try again"));
        }
        Ok(())
    }

    /// The functions in a transaction or under repair.
    pub fn busy(&self) -> &BTreeSet<Sbdf> {
        &self.busy
    }

    /// Notes that the guest of a busy function has ended.
    pub fn orphan(&mut self, address: Sbdf) {
        self.orphans.insert(address);
    }

    /// Network settings were applied to a function, which is no longer busy. Returns its record, and whether its guest ended meanwhile.
    pub fn network_set(&mut self, address: Sbdf, network: Option<NetworkRecord>) -> Option<(Record, bool)> {
        self.busy.remove(&address);
        let orphaned = self.orphans.remove(&address);
        self.records.change(address, |record| record.network = network).map(|record| (record, orphaned))
    }

    /// Notes why a function is quarantined, unless a reason is noted already. Returns its record; `None`: it belongs to dom0.
    pub fn note_quarantine(&mut self, address: Sbdf, why: &str) -> Option<Record> {
        self.records.change(address, |record| {
            record.quarantine.get_or_insert_with(|| why.to_owned());
        })
    }

    /// Notes that the guest of a PF has said how many VFs it wants. Returns the changed record.
    pub fn note_vfs_asked(&mut self, address: Sbdf) -> Option<Record> {
        self.records.get(address).filter(|record| record.keeps_vfs)?;
        self.records.change(address, |record| record.keeps_vfs = false)
    }

    /// Notes that Xen no longer guards the MSI-X table of a function. Returns the changed record.
    pub fn note_msix_released(&mut self, address: Sbdf) -> Option<Record> {
        self.records.get(address).filter(|record| record.msix_prepared)?;
        self.records.change(address, |record| record.msix_prepared = false)
    }

    /// A reset begins while a guest has the function. Returns its record; `None`: one runs already, which serves as well.
    pub fn begin_reset(&mut self, address: Sbdf) -> Option<Record> {
        if !self.handover.resets.begin(address) {
            return None;
        }
        let record = self.exchange_state(address, FunctionState::Attached, FunctionState::Resetting);
        if record.is_none() {
            self.handover.resets.end(address);
        }
        record
    }

    /// The reset has ended. Returns its record.
    pub fn end_reset(&mut self, address: Sbdf) -> Option<Record> {
        self.exchange_state(address, FunctionState::Resetting, FunctionState::Attached)
    }

    fn exchange_state(&mut self, address: Sbdf, from: FunctionState, to: FunctionState) -> Option<Record> {
        self.records.change(address, |record| {
            if record.state == from {
                record.state = to;
            }
        })
    }

    /// A guest is about to be served a function, with this filter.
    pub fn serve(&mut self, attachment: Attachment, filter: CompiledFilter) {
        self.filters.insert(attachment.address(), filter);
        self.attachments.begin(attachment);
    }

    /// The guest no longer has the function.
    pub fn withdraw(&mut self, address: Sbdf) {
        self.attachments.end(address);
    }

    pub fn attachment(&self, address: Sbdf) -> Option<Attachment> {
        self.attachments.of(address)
    }

    pub fn is_current(&self, attachment: Attachment) -> bool {
        self.attachments.is_current(attachment)
    }

    /// What decides whether a function may get another owner.
    pub fn handover(&self) -> &Handover {
        &self.handover
    }

    /// Whether no transaction, repair or reset runs.
    pub fn are_idle(&self) -> bool {
        self.busy.is_empty() && self.handover.resets.none()
    }

    /// The filter of an attached function.
    pub fn filter(&self, address: Sbdf) -> Option<&CompiledFilter> {
        self.filters.get(&address)
    }

    /// The filters of all attached functions.
    pub fn filters(&self) -> impl Iterator<Item = (Sbdf, &CompiledFilter)> {
        self.filters.iter().map(|(address, filter)| (*address, filter))
    }

    /// Another filter is in force for an attached function.
    pub fn replace_filter(&mut self, address: Sbdf, filter: CompiledFilter) {
        self.filters.insert(address, filter);
    }
}
