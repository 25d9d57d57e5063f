//! Network settings of VFs. They are read and written on threads, because the kernel's RTNL lock may be held for long.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use log::warn;
use pciback::platform::VfSettings;
use pciback::{FunctionState, Sbdf};

use super::Event;
use crate::engine::functions::Records;
use crate::engine::problems::{Deviations, Problem};
use crate::engine::requests::not_in_state;
use crate::engine::{self, Engine};
use crate::journal::{NetworkRecord, Record};
use crate::outcome::Failure;
use crate::protocol::{Cause, Success, VfNetworkView};
use crate::reply::Reply;
use crate::spec::existing;
use crate::transaction::{
    ReportedNetwork, change_network, describe_network, network_deviation, read_network, read_networks,
    vf_place,
};

impl Engine {
    /// Shows the requested, current and previous settings of a VF, or of all VFs of a PF.
    pub(in crate::engine) fn show_network(&mut self, address: Sbdf, reply: Reply) {
        let function = match existing(self.platform.host.as_ref(), address) {
            Ok(function) => function,
            Err(failure) => return reply.done(Err(failure)),
        };
        let context = self.task_context();
        if function.total_vfs == 0 {
            let record = self.functions.records().get_or_new(address);
            return self.background("look", move || {
                let seen = read_network(&context.platform, address);
                reply.done(seen.map(|seen| Success::VfNetwork(view(&seen, &record))));
            });
        }
        let records: Vec<Record> =
            function.virtual_functions.iter().map(|vf| self.functions.records().get_or_new(*vf)).collect();
        self.background("look", move || {
            let seen = read_networks(&context.platform, &function);
            let views =
                seen.map(|seen| seen.iter().zip(&records).map(|(seen, record)| view(seen, record)).collect());
            reply.done(views.map(|vfs| Success::VfNetworks { physical_function: address, vfs }));
        });
    }

    /// Applies the network settings that an administrator requests for a VF.
    pub(in crate::engine) fn set_network(
        &mut self,
        address: Sbdf,
        wishes: VfSettings,
        persist: bool,
        reply: Reply,
    ) {
        let mut record = match self.settable(address, wishes) {
            Ok(record) => record,
            Err(failure) => return reply.done(Err(failure)),
        };
        self.functions.begin(record.clone());
        self.inventory.touch(address);
        let context = self.task_context();
        let (reporter, listener, before) = (context.clone(), reply.clone(), record.clone());
        let work = move || {
            listener.progress(&format!("setting {} of {address}", describe_network(&wishes)));
            let changed = change_network(&context.platform, &context.files.journal, &mut record, wishes);
            let changed = changed.and_then(|warnings| {
                match persist && context.want(address, |one| one.network = wishes.or(one.network))? {
                    true => Ok(Some(warnings.unwrap_or_default())),
                    false => Ok(warnings),
                }
            });
            (record, changed)
        };
        self.inbox.background(&format!("task {address}"), work, move |done| {
            let (record, changed) = done.unwrap_or_else(|failure| (before, Err(failure)));
            // The engine first, because a client that has the answer may ask for the state at once.
            reporter.inbox.send(engine::Event::Vfs(Event::NetworkSet(address, record.network.clone())));
            let persistently = if persist { " persistently" } else { "" };
            let has =
                |already: &str| format!("{address} has {}{already}{persistently}", describe_network(&wishes));
            reply.done(changed.map(|warnings| match warnings {
                None => Success::Already { message: has(" already") },
                Some(warnings) => Success::Changed {
                    message: has(""),
                    warnings,
                    functions: vec![reporter.view_of(&record)],
                },
            }));
        });
    }

    /// The record of a VF that can be set now. A VF of dom0 has no record, so that its previous settings could not be kept.
    fn settable(&self, address: Sbdf, wishes: VfSettings) -> Result<Record, Failure> {
        let function = existing(self.platform.host.as_ref(), address)?;
        self.idle(address)?;
        if wishes.is_empty() {
            return Err(Failure::refused(format!("nothing to set for {address}")).on(address));
        }
        let vf = vf_place(&self.platform, address)?;
        if self.vfs.is_changing(vf.physical_function) {
            return Err(Failure::refused(format!("the VFs of {} are being changed", vf.physical_function))
                .on(address)
                .hint("try again"));
        }
        let record = self.functions.records().get_or_new(address);
        match record.state {
            FunctionState::Held | FunctionState::Attached => Ok(record),
            FunctionState::Host => {
                let driver = function.driver.as_deref().unwrap_or("no driver");
                Err(Failure::refused(format!("{address} belongs to dom0, with {driver}")).on(address).hint(format!(
                    "run 'xpci pci-assignable-add {address}' first; for VFs of dom0 use 'ip link set DEVICE vf'"
                )))
            }
            other => Err(not_in_state(&record, other, "set")),
        }
    }

    /// Handles the end of a thread that applied settings.
    pub(in crate::engine) fn network_set(&mut self, address: Sbdf, network: Option<NetworkRecord>) {
        // The deviation found before may no longer exist.
        self.vfs.network_checks.differing.remove(address);
        let Some((record, orphaned)) = self.functions.network_set(address, network) else { return };
        // Events about the function were not handled while it was busy.
        self.inventory.examine(address);
        if orphaned && record.guest.is_some() {
            self.detach_from_ended(record);
        }
        self.contain_awaiting(address);
    }

    /// Turns a failed restore of the settings of a VF that went back to dom0 into a problem in the status, because its record is deleted.
    pub(in crate::engine) fn note_network_problem(&mut self, record: &Record) {
        let problem = record.network.as_ref().and_then(|network| network.problem.clone());
        if record.state == FunctionState::Host {
            let problem = problem.map(|text| Problem::new(Cause::Network, text).on(record.address));
            self.problems.extend(problem);
        }
    }
}

fn view(seen: &ReportedNetwork, record: &Record) -> VfNetworkView {
    let network = record.network.clone().unwrap_or_default();
    let unlike = seen.settings.map(|settings| network.wanted().unlike(&settings)).unwrap_or_default();
    VfNetworkView {
        address: record.address,
        physical_function: seen.vf.physical_function,
        index: seen.vf.index,
        interface: seen.interface.clone(),
        state: record.state,
        domain: record.guest.map(|guest| guest.domain),
        domain_name: None,
        in_force: seen.settings,
        wished: network.wanted(),
        before: network.before,
        differing: unlike.words().into_iter().map(|(name, _)| name.to_owned()).collect(),
    }
}

/// When network settings of a VF are compared with the requested ones, after the guest's driver has started. Drivers first enable bus
/// mastering and then send their requests to the PF's driver. No event shows these requests, so the settings are read twice.
const LOOKS: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(30)];

/// Scheduled comparisons of network settings, and their results.
#[derive(Default)]
pub(super) struct NetworkChecks {
    /// When to compare, and the number of comparisons since the driver started.
    due: BTreeMap<Sbdf, (Instant, usize)>,
    /// Deviations from the requested settings.
    differing: Deviations,
}

impl NetworkChecks {
    /// When the next comparison is due.
    pub fn next(&self) -> Option<Instant> {
        self.due.values().map(|(when, _)| *when).min()
    }

    /// Forgets a function that its guest no longer has.
    pub fn forget(&mut self, address: Sbdf) {
        self.due.remove(&address);
        self.differing.remove(address);
    }

    /// Notes that a guest's driver has started. A guest that restarts its driver again and again causes no more comparisons.
    fn driver_started(&mut self, address: Sbdf, records: &Records) {
        let network = records.get(address).and_then(|record| record.network.as_ref());
        if network.is_some_and(|network| !network.wanted().is_empty()) {
            self.due.entry(address).or_insert_with(|| (Instant::now() + LOOKS[0], 0));
        }
    }

    /// The functions that are to be compared now, and the settings that are requested for them; the next comparison of each is scheduled.
    fn take_due(&mut self, now: Instant, records: &Records) -> Vec<(Sbdf, VfSettings)> {
        let (due, later): (BTreeMap<_, _>, _) =
            std::mem::take(&mut self.due).into_iter().partition(|(_, (when, _))| *when <= now);
        self.due = later;
        let again = due.iter().filter(|(_, (_, done))| done + 1 < LOOKS.len());
        self.due.extend(again.map(|(address, (_, done))| (*address, (now + LOOKS[done + 1], done + 1))));
        let requested = |address| {
            let record = records.get(address).filter(|record| record.state == FunctionState::Attached)?;
            Some((address, record.network.as_ref()?.wanted()))
        };
        due.into_keys().filter_map(requested).collect()
    }

    /// Handles the result of a comparison.
    fn compared(&mut self, address: Sbdf, differs: Option<String>, records: &Records) {
        let attached = records.state(address) == FunctionState::Attached;
        match differs.filter(|_| attached) {
            Some(how) => {
                warn!(
                    "{address}: its guest's driver has started, and its network settings are not as requested: {how}"
                );
                self.differing.insert(address, how);
            }
            None => self.differing.remove(address),
        }
    }

    /// Deviations from the requested settings, as problems for the status.
    pub fn problems(&self) -> impl Iterator<Item = Problem> {
        let text = |address, how: &str| format!("{address} has other network settings than requested: {how}");
        self.differing.problems(Cause::Network, text)
    }
}

impl Engine {
    /// Schedules comparisons after a guest's driver has started.
    pub(in crate::engine) fn driver_started(&mut self, address: Sbdf) {
        self.vfs.network_checks.driver_started(address, self.functions.records());
    }

    /// Starts comparisons that are due.
    pub(in crate::engine) fn check_networks(&mut self, now: Instant) {
        for (address, wanted) in self.vfs.network_checks.take_due(now, self.functions.records()) {
            let context = self.task_context();
            self.background("look", move || {
                // A failed read is ignored: the settings are read again by the next comparison or at detach.
                if let Ok(seen) = read_network(&context.platform, address) {
                    let differs = seen.settings.and_then(|settings| network_deviation(&wanted, &settings));
                    context.inbox.send(engine::Event::Vfs(Event::NetworkCompared(address, differs)));
                }
            });
        }
    }

    /// Handles the result of a comparison.
    pub(in crate::engine) fn network_compared(&mut self, address: Sbdf, differs: Option<String>) {
        self.vfs.network_checks.compared(address, differs, self.functions.records());
    }
}
