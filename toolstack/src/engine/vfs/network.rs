//! Network settings of VFs: which of them can be set or shown now. They are read and written on threads, because the kernel's RTNL lock may
//! be held for long.

use pciback::platform::{HostFunction, VfSettings};
use pciback::{FunctionState, Sbdf};

use super::by_request::Context;
use super::{Event, sriov};
use crate::engine::problems::Problem;
use crate::engine::requests::not_in_state;
use crate::engine::tasks::TaskContext;
use crate::engine::{self, Engine};
use crate::journal::{NetworkRecord, Record};
use crate::outcome::Failure;
use crate::protocol::{Cause, Success, VfNetworkView};
use crate::reply::Reply;
use crate::spec::existing;
use crate::transaction::{
    ReportedNetwork, change_network, describe_network, read_network, read_networks, vf_place,
};

/// What is shown to a client.
enum Shown {
    /// A VF.
    One(Box<Record>),
    /// All VFs of a PF.
    All(Box<HostFunction>, Vec<Record>),
}

impl Shown {
    /// The requested, current and previous settings.
    fn view(&self, context: &TaskContext) -> Result<Success, Failure> {
        let platform = &context.platform;
        match self {
            Self::One(record) => {
                let seen = read_network(platform, record.address)?;
                Ok(Success::VfNetwork(view(&seen, record)))
            }
            Self::All(pf, records) => {
                let sriov = sriov::read(platform.host.as_ref(), pf.address)?;
                let seen = read_networks(platform, pf)?;
                let vfs = seen.iter().zip(records).map(|(seen, record)| view(seen, record)).collect();
                Ok(Success::VfNetworks { physical_function: pf.address, sriov, vfs })
            }
        }
    }
}

/// Network settings that an administrator requests for a VF.
#[derive(Debug, Clone, Copy)]
struct Setting {
    address: Sbdf,
    wishes: VfSettings,
    persist: bool,
}

impl Setting {
    /// Applies the settings, and notes in the record what they were before. Returns the warnings; `None`: nothing had to be changed.
    fn make(&self, record: &mut Record, context: &TaskContext) -> Result<Option<Vec<String>>, Failure> {
        let Self { address, wishes, persist } = *self;
        let warnings = change_network(&context.platform, &context.files.journal, record, wishes)?;
        match persist && context.want(address, |one| one.network = wishes.or(one.network))? {
            true => Ok(Some(warnings.unwrap_or_default())),
            false => Ok(warnings),
        }
    }

    fn answer(&self, warnings: Option<Vec<String>>, record: &Record, context: &TaskContext) -> Success {
        let Self { address, wishes, persist } = self;
        let persistently = if *persist { " persistently" } else { "" };
        let has =
            |already: &str| format!("{address} has {}{already}{persistently}", describe_network(wishes));
        match warnings {
            None => Success::Already { message: has(" already") },
            Some(warnings) => {
                Success::Changed { message: has(""), warnings, functions: vec![context.view_of(record)] }
            }
        }
    }
}

impl Context<'_> {
    /// What is shown of a VF, or of all VFs of a PF.
    fn shown(&self, address: Sbdf) -> Result<Shown, Failure> {
        let function = existing(self.platform.host.as_ref(), address)?;
        let record = |address| self.functions.records().get_or_new(address);
        Ok(match function.total_vfs {
            0 => Shown::One(Box::new(record(address))),
            _ => {
                let records = function.virtual_functions.iter().map(|vf| record(*vf)).collect();
                Shown::All(Box::new(function), records)
            }
        })
    }

    /// The record of a VF that can be set now. A VF of dom0 has no record, so that its previous settings could not be kept.
    fn settable(&self, setting: &Setting) -> Result<Record, Failure> {
        let address = setting.address;
        let function = existing(self.platform.host.as_ref(), address)?;
        self.functions.idle(address)?;
        if setting.wishes.is_empty() {
            return Err(Failure::refused(format!("nothing to set for {address}")).on(address));
        }
        let pf = vf_place(self.platform, address)?.physical_function;
        if self.changing.contains(&pf) {
            let failure = Failure::refused(format!("the VFs of {pf} are being changed"));
            return Err(failure.on(address).hint("try again"));
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
}

impl Engine {
    /// Shows the requested, current and previous settings of a VF, or of all VFs of a PF with its SR-IOV capability.
    pub(in crate::engine) fn show_network(&self, address: Sbdf, reply: Reply) {
        let shown = match self.vf_changes().shown(address) {
            Ok(shown) => shown,
            Err(failure) => return reply.done(Err(failure)),
        };
        let context = self.task_context();
        self.background("look", move || reply.done(shown.view(&context)));
    }

    /// Applies the network settings that an administrator requests for a VF.
    pub(in crate::engine) fn set_network(
        &mut self,
        address: Sbdf,
        wishes: VfSettings,
        persist: bool,
        reply: Reply,
    ) {
        let setting = Setting { address, wishes, persist };
        let mut record = match self.vf_changes().settable(&setting) {
            Ok(record) => record,
            Err(failure) => return reply.done(Err(failure)),
        };
        self.functions.begin(record.clone());
        self.inventory.touch(address);
        let context = self.task_context();
        let (reporter, listener, before) = (context.clone(), reply.clone(), record.clone());
        let work = move || {
            listener.progress(&format!("setting {} of {address}", describe_network(&wishes)));
            let changed = setting.make(&mut record, &context);
            (record, changed)
        };
        self.inbox.background(&format!("task {address}"), work, move |done| {
            let (record, changed) = done.unwrap_or_else(|failure| (before, Err(failure)));
            // The engine first, because a client that has the answer may ask for the state at once.
            reporter.inbox.send(engine::Event::Vfs(Event::NetworkSet(address, record.network.clone())));
            reply.done(changed.map(|warnings| setting.answer(warnings, &record, &reporter)));
        });
    }

    /// Handles the end of a thread that applied settings.
    pub(super) fn network_set(&mut self, address: Sbdf, network: Option<NetworkRecord>) {
        self.vfs.network_checks.set_again(address);
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
