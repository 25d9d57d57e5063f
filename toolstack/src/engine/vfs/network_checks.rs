//! Whether a guest's driver has changed the network settings of its VF. They are read on threads, because the kernel's RTNL lock may be held
//! for long.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use log::warn;
use pciback::platform::VfSettings;
use pciback::{FunctionState, Sbdf};

use super::Event;
use crate::engine::functions::Records;
use crate::engine::problems::{Deviations, Problem};
use crate::engine::{self, Engine};
use crate::protocol::Cause;
use crate::transaction::{network_deviation, read_network};

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

    /// The settings were set again: the deviation found before may no longer exist.
    pub fn set_again(&mut self, address: Sbdf) {
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
