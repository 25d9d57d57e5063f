//! Answers to requests that list functions, VFs and the status.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use nix::errno::Errno;
use pciback::platform::{ErrorSource, Host, HostFunction};
use pciback::{FunctionState, Sbdf};

use super::attach::distrusted;
use crate::domains;
use crate::engine::Engine;
use crate::engine::functions::Records;
use crate::engine::problems::Problem;
use crate::engine::tasks::TaskContext;
use crate::journal::Record;
use crate::outcome::Failure;
use crate::protocol::{
    Cause, DomainName, FunctionView, GuestView, PersistentView, ProblemView, StatusView, Success, VfView,
};
use crate::reply::Reply;
use crate::reservations::{Reservation, Reservations};
use crate::spec::existing;
use crate::transaction::{holder_of, not_handled};

/// The view of a function, from its record and from sysfs.
fn view_of(host: &dyn Host, reservations: &Reservations, record: &Record) -> FunctionView {
    let seen = match host.function(record.address) {
        Ok(function) => view(Some(&function), record),
        Err(error) if error.errno() == Some(Errno::ENOENT) => {
            FunctionView { state: state_of_absent(record.state), ..view(None, record) }
        }
        Err(error) => FunctionView { note: Some(error.to_string()), ..view(None, record) },
    };
    let persistent = reservations.get(record.address).as_ref().map(persistent_view);
    FunctionView { persistent, ..seen }
}

/// The state of a function that is not in the host: a transaction or a quarantine takes precedence over `gone`.
const fn state_of_absent(recorded: FunctionState) -> FunctionState {
    match recorded {
        FunctionState::Host | FunctionState::Held | FunctionState::Attached => FunctionState::Gone,
        other => other,
    }
}

impl TaskContext {
    /// The view of a function, from its record and from sysfs.
    pub(in crate::engine) fn view_of(&self, record: &Record) -> FunctionView {
        view_of(self.platform.host.as_ref(), &self.files.reservations, record)
    }
}

/// The problem that a guest's persistent device has been replaced by another at its address.
fn displaced((reservation, since): (Reservation, SystemTime)) -> Problem {
    let (address, kind, who) = (reservation.address, reservation.kind(), reservation.who());
    let text = format!(
        "the {kind} that is persistent for {who} is missing: another device has its address {address} now"
    );
    Problem::new(Cause::Persistent, text).on(address).since(since)
}

/// The guest that has a function persistently.
pub(in crate::engine) fn persistent_view(reservation: &Reservation) -> PersistentView {
    let saved = reservation.saved.is_some();
    PersistentView { guest: reservation.guest, name: reservation.name.clone(), saved }
}

/// The note of a function that `pci-attach --managed` has held.
const MANAGED: &str = "goes back to dom0 as soon as no guest can reach it";
/// The same while the guest has it.
const MANAGED_ATTACHED: &str = "goes back to dom0 when the guest has released it";

fn view(function: Option<&HostFunction>, record: &Record) -> FunctionView {
    let note = record.quarantine.clone().or_else(|| {
        record.transaction.as_ref().map(|progress| {
            let direction = if progress.undoing { "undoing " } else { "" };
            format!("{direction}{:?}", progress.step).to_lowercase()
        })
    });
    let managed = || match (record.managed, record.state) {
        (true, FunctionState::Held) => Some(MANAGED.to_owned()),
        (true, FunctionState::Attached) => Some(MANAGED_ATTACHED.to_owned()),
        _ => None,
    };
    let note = note.or_else(managed);
    FunctionView {
        address: record.address,
        id: function.map_or_else(String::new, |found| format!("{:04x}:{:04x}", found.vendor, found.device)),
        state: record.state,
        driver: function.and_then(|found| found.driver.clone()),
        original_driver: record.original_driver.clone(),
        physical_function: function.and_then(|found| found.physical_function),
        domain: record.guest.map(|guest| guest.domain),
        // Added when the answer is sent.
        domain_name: None,
        guest_address: record.guest.map(|guest| Sbdf::in_guest(guest.devfn)),
        persistent: None,
        note,
    }
}

/// A copy of the records, for views that are made on a thread.
pub(in crate::engine) struct Shown {
    pub host: Arc<dyn Host>,
    records: Records,
    reservations: Reservations,
}

impl Engine {
    /// Answers on a background thread, because reading thousands of functions from sysfs takes some time.
    pub(in crate::engine) fn show(
        &self,
        reply: Reply,
        show: impl FnOnce(&Shown) -> Result<Success, Failure> + Send + 'static,
    ) {
        let host = Arc::clone(&self.platform.host);
        let (records, reservations) = (self.functions.records().clone(), self.files.reservations.clone());
        let shown = Shown { host, records, reservations };
        self.background("show", move || reply.done(show(&shown)));
    }

    /// Lists functions that can be attached: held by the service, or by another toolstack's `pci-assignable-add`.
    pub(super) fn assignable_list(&self, reply: Reply) {
        self.show(reply, |shown| {
            let found = shown.host.functions()?.into_iter().filter_map(|address| shown.assignable(address));
            Ok(Success::Functions { functions: found.collect() })
        });
    }

    pub(super) fn guest_list(&self, domain: &DomainName, reply: Reply) {
        let domain = match domains::find(self.platform.store.as_ref(), domain) {
            Ok(domain) => domain,
            Err(failure) => return reply.done(Err(failure)),
        };
        self.show(reply, move |shown| {
            let functions = shown.records.of(domain).map(|(record, _)| shown.view_of(record));
            Ok(Success::Functions { functions: functions.collect() })
        });
    }

    pub(super) fn vf_list(&self, physical_function: Option<Sbdf>, reply: Reply) {
        self.show(reply, move |shown| {
            let pfs = match physical_function {
                Some(address) => vec![known_pf(shown.host.as_ref(), address)?],
                None => all_pfs(shown.host.as_ref())?,
            };
            let vfs = pfs.iter().flat_map(|pf| {
                let untrusted = distrusted(&shown.records, pf);
                pf.virtual_functions.iter().enumerate().map(move |(index, address)| VfView {
                    index: index as u16,
                    function: shown.view(*address),
                    untrusted: untrusted.clone(),
                })
            });
            Ok(Success::Vfs { vfs: vfs.collect() })
        });
    }

    /// All current problems, except quarantines and root ports whose errors the kernel does not handle.
    pub(super) fn problems_now(&mut self) -> Vec<Problem> {
        self.problems.sweep(self.platform.store.as_ref(), self.platform.hypervisor.as_ref());
        self.problems
            .iter()
            .cloned()
            .chain(self.inventory.problems())
            .chain(self.holds.problems())
            .chain(self.vfs.problems())
            .chain(self.persistent.problems())
            .chain(self.files.reservations.displaced().into_iter().map(displaced))
            .chain(self.saving_problems())
            .chain(self.moving_problems())
            .chain(self.suspension_problems())
            .collect()
    }

    pub(in crate::engine) fn status(&mut self, reply: Reply) {
        let found = self.problems_now();
        let guests = self.guests.with_functions().map(|(domain, guest)| GuestView {
            domain,
            name: None,
            frontend: guest.describe(),
            requests: guest.requests(),
            errors: guest.errors(),
            times: guest.times(),
        });
        let mut guests: Vec<GuestView> = guests.collect();
        let platform = self.platform.description.clone();
        let (repaired, since) = (self.inventory.repaired(), self.quarantined_since());
        let device_errors = self.device_errors();
        let (store, errors) = (Arc::clone(&self.platform.store), Arc::clone(&self.platform.errors));
        self.show(reply, move |shown| {
            for guest in &mut guests {
                guest.name = domains::name(store.as_ref(), guest.domain).unwrap_or_default();
            }
            let functions: Vec<_> = shown.records.all().map(|record| shown.view_of(record)).collect();
            let quarantined =
                functions.iter().filter(|function| function.state == FunctionState::Quarantined);
            let quarantined = quarantined.map(|function| {
                let (address, why) = (function.address, function.note.as_deref().unwrap_or("unknown reason"));
                let text = format!("{address} is quarantined: {why}");
                let since = since.get(&address).copied().unwrap_or_else(SystemTime::now);
                let problem = Problem::new(Cause::Quarantine, text).on(address).since(since).view();
                ProblemView { domain: function.domain, ..problem }
            });
            let found = found.iter().map(Problem::view);
            Ok(Success::Status(StatusView {
                service: crate::VERSION.to_owned(),
                platform,
                guests,
                problems: quarantined.chain(shown.ports_without_aer(errors.as_ref())).chain(found).collect(),
                functions,
                device_errors,
                repaired,
            }))
        });
    }
}

impl Shown {
    /// Problems for root ports above assigned functions whose errors the kernel does not handle.
    fn ports_without_aer(&self, errors: &dyn ErrorSource) -> Vec<ProblemView> {
        let assigned = self.records.all().filter(|record| record.guest.is_some());
        let roots = assigned.filter_map(|record| {
            let ports = self.host.ports_above(record.address).ok()?;
            ports.last().copied().filter(|root| matches!(errors.handled(*root), Ok(false)))
        });
        let roots: BTreeSet<Sbdf> = roots.collect();
        let view = |root| ProblemView {
            message: not_handled(root),
            cause: Cause::ErrorReporting,
            since: None,
            address: Some(root),
            domain: None,
        };
        roots.into_iter().map(view).collect()
    }

    /// The record of a function, if it has one.
    pub(in crate::engine) fn record(&self, address: Sbdf) -> Option<&Record> {
        self.records.get(address)
    }

    fn view_of(&self, record: &Record) -> FunctionView {
        view_of(self.host.as_ref(), &self.reservations, record)
    }

    pub(in crate::engine) fn view(&self, address: Sbdf) -> FunctionView {
        let unrecorded = || Record::new(address, "");
        self.view_of(&self.records.get(address).cloned().unwrap_or_else(unrecorded))
    }

    pub(in crate::engine) fn assignable(&self, address: Sbdf) -> Option<FunctionView> {
        let record = self.records.get(address);
        match record.map_or(FunctionState::Host, |record| record.state) {
            FunctionState::Held => Some(self.view(address)),
            FunctionState::Host => self.held_by_others(address),
            _ => None,
        }
    }

    fn held_by_others(&self, address: Sbdf) -> Option<FunctionView> {
        let function = self.host.function(address).ok()?;
        holder_of(&function)?;
        let note = format!("held, but not by xpcid: 'xpci pci-assignable-add {address}' adopts it");
        Some(FunctionView { note: Some(note), ..view(Some(&function), &Record::new(address, "")) })
    }
}

/// All PFs of the host.
pub(in crate::engine) fn all_pfs(host: &dyn Host) -> Result<Vec<HostFunction>, Failure> {
    let found = host.functions()?.into_iter().filter_map(|address| host.function(address).ok());
    Ok(found.filter(|function| function.total_vfs > 0).collect())
}

/// Reads a PF; a failure if the function is none.
pub(in crate::engine) fn known_pf(host: &dyn Host, address: Sbdf) -> Result<HostFunction, Failure> {
    let function = existing(host, address)?;
    if function.total_vfs == 0 {
        let failure = Failure::refused(format!("{address} is not a PF: it has no SR-IOV capability"));
        return Err(failure.on(address));
    }
    Ok(function)
}
