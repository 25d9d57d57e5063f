//! Attach, detach, hold and release as lists of steps with undo.
//!
//! The lists are in [`steps`](crate::steps). Detach and release undo the steps of attach and hold, with the same code. The journal names
//! a step before it runs or is undone. If a step fails on the way forward, it and the steps before it are undone. On the way back all
//! steps run in spite of failures, and a failure quarantines the function.

mod attach;
mod grants;
mod hold;
mod hotplug;
mod network;
mod path;
mod pristine;
mod quarantine;
mod reset;
mod rom;
mod sharing;
mod together;

use std::sync::Arc;
use std::time::Instant;

use log::{debug, warn};
use nix::errno::Errno;
use pciback::config::{Filter, FunctionSpec};
use pciback::platform::Platform;
use pciback::policy::PolicySet;
use pciback::{DomId, FunctionState, Sbdf};

pub use attach::{image_path, mailbox_path};
pub use grants::note_owner;
pub use hold::{
    PF_STUB, choose_holder, guest_owned, holder_of, is_held, is_owned_by_other_toolstack, refuse_in_use,
    vfs_are_by_guest,
};
pub use hotplug::not_released;
pub use network::{
    Reported as ReportedNetwork, change as change_network, described as describe_network,
    deviation as network_deviation, place as vf_place, prepare as prepare_networks,
    read_all as read_networks, read_one as read_network, reapply as reapply_network,
};
pub use path::{
    FunctionPath, Member, before as before_on_path, blast_radius, not_handled, renew as renew_path, value_in,
};
pub use reset::{plan_for, reset_and_verify};
pub use rom::{read_copy as read_rom_copy, refuse_unusable as refuse_unusable_rom};
pub use sharing::{Sharing, refuse_release};
pub use together::{Buses, Fresh};

use crate::former_owners::FormerOwners;
use crate::journal::{GuestPlace, Journal, Progress, Record};
use crate::ledger::Ledger;
use crate::outcome::{ErrorCode, Failure};
use crate::persistent_settings::PersistentSettings;
use crate::settings::Settings;
pub use crate::steps::{ATTACH, HOLD, Kind, Step};

/// How a function is withdrawn from its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Withdrawal {
    /// The guest is asked, and loses the function if it does not release it in time.
    Ask,
    /// The guest is not asked.
    Force,
    /// The guest has ended.
    GuestEnded,
}

/// The operations of transactions that the engine carries out, because it owns the serving threads and handshakes.
pub trait Serving: Sync {
    /// Opens a function with a new image, for [`Serving::serve`] in the same transaction. After it returns, the image is complete.
    fn open(&self, record: &Record) -> Result<(), Failure>;
    /// Publishes a function to its guest and serves it. The text is a warning about what the guest still has to do.
    fn serve(&self, record: &Record) -> Result<Option<String>, Failure>;
    /// Stops serving a function: switches off bus mastering and interrupts, removes its nodes. The text is a warning that the guest did
    /// not release it in time.
    fn withdraw(&self, record: &Record, withdrawal: Withdrawal) -> Result<Option<String>, Failure>;
    /// Whether a PF that has VFs enabled keeps them, because its guest, which created them, starts again or has started again.
    fn keeps_vfs(&self, record: &Record) -> bool;
    /// The filter for a function and a guest by the current policies: what the guest sees, and which of its writes reach hardware.
    fn filter(&self, spec: &FunctionSpec, domain: DomId) -> Result<Arc<Filter>, Failure>;
    /// Why the function must end quarantined, if that was decided during the transaction.
    fn distrusted(&self, address: Sbdf) -> Option<String>;
    /// The current count of events about the host's functions. Read it before examining the state.
    fn host_changes(&self) -> u64;
    /// Waits until the count is above `seen`; `false`: the deadline passed first.
    fn wait_for_host(&self, seen: u64, deadline: Instant) -> bool;
    /// Whether the engine has stopped. It then no longer serves or withdraws functions, and the unfinished transaction is left to the
    /// next run.
    fn ended(&self) -> bool;
}

/// What steps need.
pub struct Context<'a> {
    /// The host.
    pub platform: &'a Platform,
    /// The service's settings.
    pub settings: &'a Settings,
    /// The policies in force when the transaction began.
    pub policies: &'a PolicySet,
    /// The journal, with what the service intends.
    pub journal: &'a Journal,
    /// The ledger, with the earlier values of registers on the paths.
    pub ledger: &'a Ledger,
    /// The PV guests that may still reach a function.
    pub former_owners: &'a FormerOwners,
    /// The functions that were reset with their bus and have had no owner since.
    pub fresh: &'a Fresh,
    /// Functions that are held persistently, and persistent network settings.
    pub persistent_settings: &'a PersistentSettings,
    /// The engine.
    pub serving: &'a dyn Serving,
    /// How the function is withdrawn from its guest when steps are undone.
    pub withdrawal: Withdrawal,
    /// Whether a function is taken from its driver even while it is in use.
    pub force: bool,
    /// Reports progress to the client.
    pub progress: &'a dyn Fn(&str),
}

/// The result of a transaction.
#[derive(Debug)]
pub struct Finished {
    /// The record of the function, as written to the journal.
    pub record: Record,
    /// Warnings for the user, or why the transaction failed.
    pub outcome: Result<Vec<String>, Failure>,
}

impl Context<'_> {
    /// Runs a list forwards. If a step fails, the steps so far are undone; if that fails too, the function is quarantined.
    pub fn forward(&self, kind: Kind, mut record: Record) -> Finished {
        let mut warnings = Vec::new();
        let before = record.clone();
        record.state = kind.state_during();
        for (index, &step) in kind.steps().iter().enumerate() {
            let noted = self.note(&mut record, Progress { kind, step, undoing: false });
            if let (0, Err(failure)) = (index, &noted) {
                warn!("{}: {kind:?} was not begun: {failure}", before.address);
                return Finished { record: not_begun(kind, before), outcome: noted.map(|()| warnings) };
            }
            match noted.and_then(|()| self.run(step, &mut record)) {
                Ok(warning) => warnings.extend(warning),
                Err(failure) => {
                    warn!("{}: {kind:?} failed at {step:?}: {failure}", record.address);
                    if self.serving.ended() {
                        return Finished { record, outcome: Err(failure) };
                    }
                    return self.take_back(kind, step, record, failure);
                }
            }
        }
        let under_way = record.clone();
        record.state = kind.state_when_forward();
        record.transaction = None;
        match (self.write(&record), kind.steps().last()) {
            // The next run of the service would undo the steps that the journal does not have as done, so they are undone now.
            (Err(failure), Some(&last)) => self.take_back(kind, last, under_way, failure),
            (written, _) => Finished { record, outcome: written.map(|()| warnings) },
        }
    }

    /// Undoes `step` and all steps before it after a failure on the way forward; the outcome has that failure.
    fn take_back(&self, kind: Kind, step: Step, record: Record, failure: Failure) -> Finished {
        let undone = self.backward_from(kind, step, record);
        Finished { outcome: Err(both(failure, undone.outcome.err())), ..undone }
    }

    /// Runs a list backwards, from its last step.
    pub fn backward(&self, kind: Kind, mut record: Record) -> Finished {
        record.state = kind.state_during();
        match kind.steps().last() {
            Some(&last) => self.backward_from(kind, last, record),
            None => Finished { record, outcome: Ok(Vec::new()) },
        }
    }

    /// Undoes `step` and all steps before it, in spite of failures.
    pub fn backward_from(&self, kind: Kind, step: Step, mut record: Record) -> Finished {
        let mut warnings = Vec::new();
        let mut failures: Vec<Failure> = Vec::new();
        let steps = kind.steps();
        let step = step.of_this_version();
        let count = steps.iter().position(|candidate| *candidate == step).map_or(0, |index| index + 1);
        if record.quarantine.is_some() {
            // At once, because the following steps may wait for the guest.
            failures.extend(self.note(&mut record, Progress { kind, step, undoing: true }).err());
            failures.extend(quarantine::switch_off(self, &record).err());
        }
        for &step in steps[..count].iter().rev() {
            let noted = self.note(&mut record, Progress { kind, step, undoing: true });
            if let Err(failure) = noted {
                failures.push(failure);
            }
            match self.undo(step, &mut record) {
                Ok(warning) => {
                    record.unproved &= step != Step::Serve;
                    warnings.extend(warning);
                }
                Err(failure) => {
                    record.unproved |= step == Step::Serve;
                    warn!("{}: undoing {step:?} failed: {failure}", record.address);
                    if self.serving.ended() {
                        return Finished { record, outcome: Err(failure) };
                    }
                    // The note of the next step writes it to the journal, in case the service is killed before the end.
                    record.quarantine.get_or_insert_with(|| failure.message.clone());
                    failures.push(failure);
                }
            }
        }
        record.transaction = None;
        let failure = failures.into_iter().reduce(|first, next| both(first, Some(next)));
        match failure {
            None => {
                record.state = kind.state_when_undone();
                record.guest = None;
                let outcome = self.close(&mut record).map(|()| warnings);
                Finished { record, outcome }
            }
            Some(failure) => {
                record.state = FunctionState::Quarantined;
                record.quarantine.get_or_insert_with(|| failure.message.clone());
                let failure = both(failure, quarantine::switch_off(self, &record).err());
                if let Err(second) = self.write(&record) {
                    warn!("{}: {second}", record.address);
                }
                let hint = format!(
                    "the function is quarantined; see 'xpci status', then 'xpci quarantine clear {}'",
                    record.address
                );
                let failure = Failure { code: ErrorCode::Quarantined, ..failure }.hint(hint);
                Finished { record, outcome: Err(failure) }
            }
        }
    }

    /// Whether the device is no longer in the host: removed, disabled, or replaced by another one.
    pub(super) fn left_the_host(&self, record: &Record) -> bool {
        match self.platform.host.function(record.address) {
            Ok(function) => record.incarnation != 0 && function.incarnation != record.incarnation,
            Err(error) => error.errno() == Some(Errno::ENOENT),
        }
    }

    /// Ends a transaction whose steps are all undone.
    fn close(&self, record: &mut Record) -> Result<(), Failure> {
        if self.left_the_host(record) && record.state == FunctionState::Held {
            // The record is kept until an administrator has removed it, or another function appears at the address.
            record.state = FunctionState::Gone;
            record.quarantine = None;
        } else if record.quarantine.is_some() {
            // No guest has it, and none gets it. Switched off again, because Linux's reset restores the Command register from before the
            // reset.
            record.state = FunctionState::Quarantined;
            self.write(record)?;
            return quarantine::switch_off(self, record).map(drop);
        }
        if record.state == FunctionState::Host {
            self.journal.remove(record.address).map_err(|error| Failure::from(error).on(record.address))
        } else {
            self.write(record)
        }
    }

    fn note(&self, record: &mut Record, progress: Progress) -> Result<(), Failure> {
        let Progress { kind, step, undoing } = progress;
        record.transaction = Some(progress);
        if record.quarantine.is_none() {
            record.quarantine = self.serving.distrusted(record.address);
        }
        debug!("{}: {kind:?}, step {step:?}{}", record.address, if undoing { ", undo" } else { "" });
        self.write(record)
    }

    /// Writes the record to the journal.
    pub fn write(&self, record: &Record) -> Result<(), Failure> {
        self.journal.write(record).map_err(|error| Failure::from(error).on(record.address))
    }

    fn run(&self, step: Step, record: &mut Record) -> Result<Option<String>, Failure> {
        match step {
            Step::Driver => hold::take_driver(self, record),
            Step::RestoreNetwork => Ok(None),
            Step::Quarantine => hold::own(self, record).map(|()| {
                // The function had been dom0's until now.
                self.fresh.forget(record.address);
                pristine::take(self, record);
                None
            }),
            Step::ContainPath | Step::ContainErrors => {
                hold::refuse_owned(self, record)?;
                path::apply(self, record)
            }
            Step::Reset => {
                hold::refuse_owned(self, record)?;
                let unreset = reset::run(self, record)?;
                let warning = pristine::prepare(self, record)?;
                path::renew(self.platform, self.ledger, record.address)?;
                Ok(hold::joined(unreset.into_iter().chain(warning)))
            }
            Step::PrepareMsix => attach::prepare_msix(self, record).map(|()| None),
            Step::Assign => attach::assign(self, record),
            Step::Grant => grants::grant(self, record),
            Step::ApplyNetwork => network::apply(self, record),
            Step::Image => {
                let without_rom = rom::copy(self, record)?;
                attach::create_image(self, record)
                    .and_then(|()| self.serving.open(record))
                    .map(|()| without_rom)
            }
            Step::Serve => {
                let warning = self.serving.serve(record)?;
                Ok(hold::joined(warning.into_iter().chain(hotplug::announce(self, record)?)))
            }
        }
    }

    fn undo(&self, step: Step, record: &mut Record) -> Result<Option<String>, Failure> {
        match step {
            Step::Driver => hold::give_back_driver(self, record),
            Step::RestoreNetwork => network::restore(self, record),
            Step::Quarantine => {
                together::before_release(self, record)?;
                hold::disown(self, record).map(|()| None)
            }
            Step::ContainPath | Step::ContainErrors => path::restore(self, record).map(|()| None),
            Step::Reset => {
                hold::refuse_owned(self, record)?;
                let unreset = reset::run(self, record)?;
                let warning = pristine::restore(self, record)?;
                if !self.left_the_host(record) {
                    path::renew(self.platform, self.ledger, record.address)?;
                }
                Ok(hold::joined(unreset.into_iter().chain(warning)))
            }
            Step::PrepareMsix => attach::release_msix(self, record).map(|()| None),
            Step::Assign => attach::deassign(self, record).map(|()| None),
            Step::Grant => grants::revoke(self, record).map(|()| None),
            Step::ApplyNetwork => Ok(network::verify(self, record)),
            // The image shows what the guest may still reach.
            Step::Image if record.unproved => Ok(None),
            Step::Image => {
                attach::remove_image(self, record).and_then(|()| rom::remove(self, record)).map(|()| None)
            }
            Step::Serve => {
                let unreleased = hotplug::take_back(self, record)?;
                let warning = self.serving.withdraw(record, self.withdrawal)?;
                let place = place_of(record)?;
                self.platform.device_models.forget(place.domain, place.devfn.device());
                Ok(hold::joined(unreleased.into_iter().chain(warning)))
            }
        }
    }
}

/// The record after a transaction that could not be noted: no step has run, so that none is undone.
fn not_begun(kind: Kind, before: Record) -> Record {
    Record { state: kind.state_when_undone(), guest: None, transaction: None, ..before }
}

/// Combines two failures into one, in their order.
fn both(first: Failure, second: Option<Failure>) -> Failure {
    match second {
        None => first,
        Some(second) => Failure {
            code: second.code,
            message: format!("{}; and then: {}", first.message, second.message),
            hint: first.hint.or(second.hint),
            ..first
        },
    }
}

/// The guest and device number in a record that must have a guest.
pub fn place_of(record: &Record) -> Result<GuestPlace, Failure> {
    record.guest.ok_or_else(|| {
        Failure::new(ErrorCode::Failed, format!("the journal names no guest for {}", record.address))
            .on(record.address)
    })
}

/// The guest in a record that must have one.
pub fn guest_of(record: &Record) -> Result<DomId, Failure> {
    place_of(record).map(|place| place.domain)
}
