//! VFs' network settings: shown and set on threads, because the kernel's network lock may be taken for long.

use log::error;
use pciback::platform::VfSettings;
use pciback::{FunctionState, Sbdf};

use super::requests::{existing, not_in_state};
use super::tasks::Workshop;
use super::{Engine, Event};
use crate::control::Reply;
use crate::journal::Record;
use crate::outcome::Failure;
use crate::protocol::{Success, VfNetworkView};
use crate::transaction::{NetworkRecord, change_network, describe_network, look_at_network, vf_place};

impl Engine {
    /// What is wished for a VF, what is in force and what was before.
    pub(super) fn show_network(&mut self, address: Sbdf, reply: Reply) {
        if let Err(failure) = existing(self.platform.host.as_ref(), address) {
            return reply.done(Err(failure));
        }
        let (workshop, record) = (self.workshop(), self.record(address));
        self.background("look", move || reply.done(view(&workshop, &record)));
    }

    /// Takes over the administrator's wishes for a VF.
    pub(super) fn set_network(&mut self, address: Sbdf, wishes: VfSettings, reply: Reply) {
        let mut record = match self.settable(address, wishes) {
            Ok(record) => record,
            Err(failure) => return reply.done(Err(failure)),
        };
        self.busy.insert(address);
        self.syncing.touch(address);
        self.records.insert(address, record.clone());
        let workshop = self.workshop();
        self.spawn(address, move || {
            reply.progress(&format!("setting {} of {address}", describe_network(&wishes)));
            let changed = change_network(&workshop.platform, &workshop.journal, &mut record, wishes);
            // The engine first: who reads the answer may ask for the state at once.
            workshop.inbox.send(Event::NetworkSet(address, Box::new(record.network.clone())));
            let has = |already: &str| format!("{address} has {}{already}", describe_network(&wishes));
            reply.done(changed.map(|warnings| match warnings {
                None => Success::Already { message: has(" already") },
                Some(warnings) => Success::Changed {
                    message: has(""),
                    warnings,
                    functions: vec![super::lists::view_of(workshop.platform.host.as_ref(), &record)],
                },
            }));
        });
    }

    /// The record of a VF that can be set now. One that is dom0's has no record in which what was there before could be kept.
    fn settable(&self, address: Sbdf, wishes: VfSettings) -> Result<Record, Failure> {
        let function = existing(self.platform.host.as_ref(), address)?;
        self.idle(address)?;
        if wishes.is_empty() {
            return Err(Failure::refused(format!("nothing to set for {address}")).on(address));
        }
        let vf = vf_place(&self.platform, address)?;
        if self.busy_pfs.contains(&vf.physical_function) {
            return Err(Failure::refused(format!("the VFs of {} are being changed", vf.physical_function))
                .on(address)
                .hint("try again"));
        }
        let record = self.record(address);
        match record.state {
            FunctionState::Held | FunctionState::Attached => Ok(record),
            FunctionState::Host => {
                let driver = function.driver.as_deref().unwrap_or("no driver");
                Err(Failure::refused(format!("{address} is dom0's own, with {driver}")).on(address).hint(format!(
                    "run 'xpci pci-assignable-add {address}' first; for dom0's own VFs there is 'ip link set DEVICE vf'"
                )))
            }
            other => Err(not_in_state(&record, other, "to be set")),
        }
    }

    /// The thread that had set something has ended.
    pub(super) fn network_set(&mut self, address: Sbdf, network: Option<NetworkRecord>) {
        self.busy.remove(&address);
        let orphan = self.orphans.remove(&address);
        let Some(record) = self.records.get_mut(&address) else { return };
        record.network = network;
        // Whoever quarantined it meanwhile left the rest to whoever was busy with it.
        if record.quarantine.is_some() && record.state != FunctionState::Quarantined {
            record.state = FunctionState::Quarantined;
            if let Err(error) = self.journal.write(record) {
                error!("{error}");
                self.problems.push(error.to_string());
            }
        }
        let record = record.clone();
        // What happened to it meanwhile was left for now.
        self.stirred.one(address);
        if orphan && record.guest.is_some() {
            self.detach_from_dead(record);
        }
    }

    /// What could not be put back when a VF went back to dom0 is nobody's record any more.
    pub(super) fn note_network_problem(&mut self, record: &Record) {
        let problem = record.network.as_ref().and_then(|network| network.problem.clone());
        if record.state == FunctionState::Host {
            self.problems.extend(problem);
        }
    }
}

fn view(workshop: &Workshop, record: &Record) -> Result<Success, Failure> {
    let seen = look_at_network(&workshop.platform, record.address)?;
    let network = record.network.clone().unwrap_or_default();
    let unlike = seen.settings.map(|settings| network.wished.unlike(&settings)).unwrap_or_default();
    Ok(Success::VfNetwork(VfNetworkView {
        address: record.address,
        physical_function: seen.vf.physical_function,
        index: seen.vf.index,
        interface: seen.interface,
        state: record.state,
        domain: record.guest.map(|guest| guest.domain),
        in_force: seen.settings,
        wished: network.wished,
        before: network.before,
        differing: unlike.words().into_iter().map(|(name, _)| name.to_owned()).collect(),
    }))
}
